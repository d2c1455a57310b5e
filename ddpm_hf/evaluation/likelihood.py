"""Negative log-likelihood by the variational bound, in bits per dimension (Ho et al. 2020, Eq. 5)."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..objectives.bound import prior_bpd, vb_terms_bpd
from ..objectives.gaussians import mean_flat
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from .strata import checked_chain


class BitsPerDim(NamedTuple):
    """The bound of each of N images and its parts; column i of [N, S] belongs to `timesteps[i]`, ascending."""

    total: torch.Tensor  # [N], bits/dim: prior + vb summed over the chain
    prior: torch.Tensor  # [N], bits/dim
    vb: torch.Tensor  # [N, S], bits/dim; column 0 is the decoder's term
    x_start_mse: torch.Tensor  # [N, S], of x̂_0
    epsilon_mse: torch.Tensor  # [N, S], of the ε that x̂_0 implies


@torch.no_grad()
def bits_per_dim(
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    x_start: torch.Tensor,
    timesteps: Iterable[int] | None = None,
    *,
    generator: torch.Generator | None = None,
    clip_sample: bool = True,
    class_labels: torch.Tensor | None = None,
    progress: bool = False,
) -> BitsPerDim:
    """The variational bound on -log2 p(x_0), with one sample of x_t at each timestep.

    Args:
        unet: `unet(x_t, t, class_labels).sample` is the scheduler's kind of output. Called as it is: put it in eval
            mode first.
        x_start: images in [-1, 1] on the 256 levels of a byte, [N, C, H, W]; float64 stays float64 throughout.
        timesteps: those of a strided chain, in any order; None means all T. The prior's term is at T-1 in any case,
            so a chain for a likelihood should contain T-1.
        generator: of the noise, on the device of x_start.
        clip_sample: clip x̂_0 to the range of the data, as published figures do.
        class_labels: ids [N], for a UNet with class embeddings.
        progress: show a bar, of one step for each timestep.

    Returns: bits per dimension, for N images and the S timesteps of the chain.

    Raises:
        ValueError: timesteps that repeat or leave 0..T-1, or an ᾱ of 0 under epsilon prediction.
    """
    chain = checked_chain(scheduler, timesteps)
    conditioning = {} if class_labels is None else {"class_labels": class_labels}
    vb, x_start_mse, epsilon_mse = [], [], []
    previous = [-1, *chain[:-1]]
    for t, s in tqdm(list(zip(chain, previous))[::-1], desc="bits/dim", disable=not progress):
        noise = torch.randn(x_start.shape, generator=generator, dtype=x_start.dtype, device=x_start.device)
        x_t = scheduler.add_noise(x_start, noise, t)
        output = unet(x_t, t, **conditioning).sample
        terms = vb_terms_bpd(scheduler, output, x_start, x_t, t, s, clip_sample)
        epsilon = scheduler.predict_epsilon(terms.pred_original_sample, t, x_t)
        vb.append(terms.bits_per_dim)
        x_start_mse.append(mean_flat((terms.pred_original_sample - x_start) ** 2))
        epsilon_mse.append(mean_flat((epsilon - noise) ** 2))
    vb, x_start_mse, epsilon_mse = (torch.stack(column[::-1], dim=1) for column in (vb, x_start_mse, epsilon_mse))
    prior = prior_bpd(scheduler, x_start)
    return BitsPerDim(prior + vb.sum(dim=1), prior, vb, x_start_mse, epsilon_mse)
