"""The network that is trained on captions, and the captions as its input."""

from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel

from ..common.randomness import StepKeys, to_device
from ..inference.components import Components
from ..models.acceleration import choose_execution
from ..portable.text_encoding_ddpm_hf import encode_texts, tokenize
from ..training.flags import TrainingFlags

if TYPE_CHECKING:
    from ..portable.scheduling_ddpm_hf import DDPMScheduler


class TextConditioned(torch.nn.Module):
    """What is trained: the UNet, and the text encoder where it learns too."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: torch.nn.Module | None):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def parts(self) -> dict[str, torch.nn.Module]:
        """What is saved, by the names of its folders."""
        return {"unet": self.unet} | ({} if self.text_encoder is None else {"text_encoder": self.text_encoder})

    def forward(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_t [N, C, h, w], t [N], and ids [N, L] or embeddings [N, L, D] -> the prediction [N, C, h, w]."""
        if self.text_encoder is not None and not text.is_floating_point():
            text = self.text_encoder(text, attention_mask=mask)[0]
        return self.unet(x_t, timesteps, encoder_hidden_states=text).sample


def caption_input(
    batch: dict,
    keys: StepKeys,
    components: Components,
    null_embedding: torch.Tensor | None,
    device: torch.device,
    dropout: float,
    learns: bool,
) -> torch.Tensor:
    """The captions as ids [N, L] for a text encoder that learns, else as embeddings [N, L, D]; some left out.

    Args:
        null_embedding: that of no caption [L, D], where embeddings are cached.
        dropout: the share of the captions to leave out.
        learns: whether the text encoder does.
    """
    count = len(batch["captions"])
    dropped = torch.zeros(count, dtype=torch.bool)
    if not keys.validation:
        dropped = keys.uniform("caption_dropout") < dropout
    if "embeddings" in batch:
        embedded = torch.where(dropped[:, None, None], null_embedding, batch["embeddings"])
        return embedded.to(device, non_blocking=True)
    captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), batch["captions"])]
    if learns:
        return to_device(tokenize(components.tokenizer, captions)[0], device)
    with torch.no_grad():
        return encode_texts(components.text_encoder, components.tokenizer, captions, device)


@torch.no_grad()
def dream_noise(
    model: torch.nn.Module,
    scheduler: "DDPMScheduler",
    x_start: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
    power: float,
) -> torch.Tensor:
    """The noise moved by λ times the model's own error, λ = √(1-ᾱ)^p (Zhou et al. 2023, Algorithm 1)."""
    x_t = scheduler.add_noise(x_start, noise, timesteps)
    predicted = scheduler.predict_original_sample(model(x_t, timesteps, text).float(), timesteps, x_t)
    epsilon = scheduler.predict_epsilon(predicted, timesteps, x_t)
    variance = scheduler.q_mean_variance(x_start, timesteps).variance  # 1 - ᾱ, [N, 1, 1, 1]
    return noise + variance ** (0.5 * power) * (noise - epsilon)


def trained_model(
    components: Components, with_text_encoder: bool, device: torch.device, flags: TrainingFlags, xformers: bool
) -> TextConditioned:
    """What is trained of the components.

    Args:
        with_text_encoder: whether the text encoder learns too.
        flags: how it is executed.
        xformers: whether to use xFormers' attention.
    """
    text_encoder = components.text_encoder if with_text_encoder else None
    model = TextConditioned(components.unet, text_encoder).requires_grad_(True)
    choose_execution(model.unet, device, flags.gradient_checkpointing, xformers, flags.acceleration)
    if flags.gradient_checkpointing and text_encoder is not None:
        text_encoder.gradient_checkpointing_enable()
    return model
