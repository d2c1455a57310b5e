"""A new autoencoder for a dataset (Rombach et al. 2022, sec. 3.1)."""

import torch
from diffusers import AutoencoderKL

from .flags import AutoencoderFlags


def make_autoencoder(flags: AutoencoderFlags, channels: int, size: tuple[int, int], seed: int) -> AutoencoderKL:
    """An untrained autoencoder, of the seed."""
    widths = flags.widths()
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=flags.vae_latent_channels,
        norm_num_groups=8,
        sample_size=max(size),
        scaling_factor=1.0,
        force_upcast=False,
    )
