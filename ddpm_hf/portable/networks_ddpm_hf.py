"""Networks that Diffusers does not have: OpenAI's variants of `UNet2DModel`, and a classifier of noised images.

This file is copied into the folders of published networks: it imports torch and diffusers alone, and no file next to
it, since Diffusers fetches one file for each network.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps


def takes_stock_arguments(init: Callable) -> Callable:
    """Give `init(self, *, own, **stock)` the signature, by which configs are read, with all of `UNet2DModel`'s."""
    stock = inspect.signature(UNet2DModel.__init__).parameters.values()
    own = [one for one in inspect.signature(init).parameters.values() if one.kind is inspect.Parameter.KEYWORD_ONLY]
    init.__signature__ = inspect.Signature([*stock, *own])  # type: ignore[attr-defined]
    return init


class OpenAIUNet2DModel(UNet2DModel):
    """A `UNet2DModel` with what OpenAI's networks have and its config cannot express (Nichol & Dhariwal 2021).

    Args:
        num_attention_heads: of every attention layer, whatever its width; None leaves it to `attention_head_dim`.
        timestep_scale: factor of t before its embedding: 1000/T, where a model was trained with rescaled timesteps.
        timestep_channels: width of the sinusoidal embedding, where it is not that of the first level.
        condition_channels: of an image that the network reads besides x_t, concatenated to it; 0 for none.
        stock: the arguments of `UNet2DModel`.

    Raises:
        ValueError: heads that do not divide the width of an attention layer.
    """

    time_embedding: torch.nn.Module
    conv_in: torch.nn.Conv2d

    @register_to_config
    @takes_stock_arguments
    def __init__(
        self,
        *,
        num_attention_heads: int | None = None,
        timestep_scale: float = 1.0,
        timestep_channels: int | None = None,
        condition_channels: int = 0,
        **stock: Any,
    ):
        super().__init__(**stock)
        if num_attention_heads is not None:
            for module in self.modules():
                if isinstance(module, Attention):
                    set_heads(module, num_attention_heads)
        if timestep_channels is not None:
            embedding = self.time_embedding
            self.time_proj = Timesteps(timestep_channels, self.config.flip_sin_to_cos, self.config.freq_shift)
            self.time_embedding = TimestepEmbedding(timestep_channels, embedding.linear_1.out_features)
        if condition_channels:
            first = self.conv_in
            channels = first.in_channels + condition_channels
            self.conv_in = torch.nn.Conv2d(channels, first.out_channels, first.kernel_size, padding=first.padding)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        condition: torch.Tensor | None = None,
    ) -> Any:
        """As `UNet2DModel`'s: sample [N, C, H, W], timestep a number or [N] -> `sample` [N, out_channels, H, W].

        Args:
            condition: [N, condition_channels, H, W].
        """
        if condition is not None:
            sample = torch.cat([sample, condition], dim=1)  # [N, C + condition_channels, H, W]
        if self.config.timestep_scale != 1.0:
            timestep = torch.as_tensor(timestep, device=sample.device).float() * self.config.timestep_scale
        return super().forward(sample, timestep, class_labels, return_dict)


def set_heads(attention: Attention, heads: int) -> None:
    """Divide an attention layer into other heads; its weights stay."""
    width = attention.inner_dim
    if heads < 1 or width % heads:
        raise ValueError(f"num_attention_heads={heads}: must divide the {width} channels of each attention layer")
    attention.heads, attention.sliceable_head_dim = heads, heads
    attention.scale = (width // heads) ** -0.5


OWN_ARGUMENTS = {
    "num_attention_heads": None,
    "timestep_scale": 1.0,
    "timestep_channels": None,
    "condition_channels": 0,
}


def unet_class(config: dict[str, Any]) -> type[UNet2DModel]:
    """The class of a UNet by its arguments: stock's, where that can express them."""
    plain = all(config.get(name, default) in (None, default) for name, default in OWN_ARGUMENTS.items())
    return UNet2DModel if plain else OpenAIUNet2DModel


def build_unet(config: dict[str, Any]) -> UNet2DModel:
    """A `UNet2DModel` from its arguments; those left out are Diffusers' defaults.

    It maps x_t [N, in_channels, H, W] and t to [N, out_channels, H, W].

    Args:
        config: such as `MODEL_PRESETS["small-32"].unet`; the resolution is its `sample_size`. With arguments of
            `OpenAIUNet2DModel` alone, it is one.

    Raises:
        ValueError: norm groups that do not divide the channels at some width.
    """
    cls = unet_class(config)
    stock = inspect.signature(UNet2DModel.__init__).parameters
    widths, groups = (config.get(key, stock[key].default) for key in ("block_out_channels", "norm_num_groups"))
    for width in widths:
        if not isinstance(groups, int) or groups < 1 or width % groups:
            raise ValueError(
                f"norm_num_groups={groups} with {width} channels: the groups must divide the channels of each level;"
                f" for {width} channels, {max(1, width // 4)} is usual"
            )
    return cls(**{key: value for key, value in config.items() if key not in OWN_ARGUMENTS or cls is not UNet2DModel})


class AttentionPool(torch.nn.Module):
    """A feature map [N, C, H, W] as one vector [N, C]: its mean attends to all positions (as in CLIP)."""

    def __init__(self, channels: int, positions: int, heads: int):
        super().__init__()
        self.position = torch.nn.Parameter(torch.randn(positions + 1, channels) / channels**0.5)
        self.attention = torch.nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C]."""
        positions = features.flatten(2).transpose(1, 2)  # [N, H·W, C]
        tokens = torch.cat([positions.mean(dim=1, keepdim=True), positions], dim=1) + self.position  # [N, 1 + H·W, C]
        return self.attention(tokens[:, :1], tokens, tokens, need_weights=False)[0].squeeze(1)


class NoisyClassifier(ModelMixin, ConfigMixin):
    """The encoder half of a `UNet2DModel` with attention pooling: (x_t, t) -> logits (Dhariwal & Nichol 2021).

    Args:
        unet: the arguments of the `UNet2DModel` whose encoder this is.
        num_classes: K.
        num_train_timesteps, trained_betas: the diffusion it was trained on, T and β.
        trained_classes: the ids of the classes that training images had, where not all K had some.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        unet: dict,
        num_classes: int,
        num_train_timesteps: int = 1000,
        trained_betas: list[float] | None = None,
        id2label: dict[str, str] | None = None,
        trained_classes: list[int] | None = None,
    ):
        super().__init__()
        if any("Skip" in kind for kind in unet.get("down_block_types", ())):
            raise ValueError("a classifier cannot be made of SkipDownBlock2D, whose blocks pass the image along")
        network = build_unet(unet)
        self.conv_in, self.time_proj, self.time_embedding = network.conv_in, network.time_proj, network.time_embedding
        self.down_blocks, self.mid_block = network.down_blocks, network.mid_block
        self.timestep_scale = network.config.get("timestep_scale", 1.0)
        width = network.config.block_out_channels[-1]
        size = network.config.sample_size
        height, breadth = (size, size) if isinstance(size, int) else size
        shrunk = 2 ** (len(network.config.block_out_channels) - 1)
        self.norm = torch.nn.GroupNorm(network.config.norm_num_groups, width)
        heads = max(count for count in range(1, max(1, width // 64) + 1) if width % count == 0)
        self.pool = AttentionPool(width, (height // shrunk) * (breadth // shrunk), heads)
        self.head = torch.nn.Linear(width, num_classes)

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t [N, C, H, W] in [-1, 1] and noised, timesteps [N] or a number -> logits [N, K]."""
        return self.head(self.features(x_t, timesteps))

    def features(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the last layer reads: x_t and timesteps as in `forward` -> [N, D]."""
        timesteps = torch.as_tensor(timesteps, device=x_t.device).reshape(-1).expand(len(x_t))
        if self.timestep_scale != 1.0:
            timesteps = timesteps.float() * self.timestep_scale
        embedding = self.time_embedding(self.time_proj(timesteps).to(x_t.dtype))  # [N, D]
        features = self.conv_in(x_t)
        for block in self.down_blocks:
            features, _ = block(hidden_states=features, temb=embedding)
        if self.mid_block is not None:
            features = self.mid_block(features, embedding)
        return self.pool(F.silu(self.norm(features)))
