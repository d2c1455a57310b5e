"""A classifier of noised images, whose gradient guides sampling (Dhariwal & Nichol 2021)."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from ..portable.sampling_ddpm_hf import downscaling
from .unet import build_unet


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
    """The encoder half of a `UNet2DModel` with attention pooling: (x_t, t) -> logits.

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
        width = network.config.block_out_channels[-1]
        size = network.config.sample_size
        height, breadth = (size, size) if isinstance(size, int) else size
        shrunk = downscaling(network.config.block_out_channels)
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
        embedding = self.time_embedding(self.time_proj(timesteps).to(x_t.dtype))  # [N, D]
        features = self.conv_in(x_t)
        for block in self.down_blocks:
            features, _ = block(hidden_states=features, temb=embedding)
        if self.mid_block is not None:
            features = self.mid_block(features, embedding)
        return self.pool(F.silu(self.norm(features)))
