"""Latents drawn from an autoencoder's posterior."""

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..common.randomness import StepKeys
from ..data.images import to_model_range
from ..portable.sampling_ddpm_hf import scale_latents


def draw_latents(moments: torch.Tensor, vae: AutoencoderKL, keys: StepKeys) -> torch.Tensor:
    """x_0 [N, C, h, w] of the diffusion: a sample of the autoencoder's posterior, scaled to unit variance."""
    posterior = DiagonalGaussianDistribution(moments)
    latents = posterior.mean + posterior.std * keys.normal_like(posterior.mean, "posterior")
    return scale_latents(vae, latents)


def x_start_of(batch: dict, keys: StepKeys, vae: AutoencoderKL | None, device: torch.device) -> torch.Tensor:
    """x_0 of a batch [N, C, H, W]: images in [-1, 1], or with a `vae` their latents, cached ones where there are."""
    if "moments" in batch:
        return draw_latents(batch["moments"].to(device, non_blocking=True), vae, keys)
    images = to_model_range(batch["images"].to(device, non_blocking=True))
    if vae is None:
        return images
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):  # as exact as what is cached
        moments = vae.encode(images.to(vae.dtype)).latent_dist.parameters.float()
    return draw_latents(moments, vae, keys)
