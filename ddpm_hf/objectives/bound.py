"""The variational bound, term by term, in bits/dim."""

from typing import NamedTuple

import torch

from ..portable.scheduling_ddpm_hf import DDPMScheduler, Timesteps
from .gaussians import LOG2, discretized_gaussian_log_likelihood, gaussian_log_likelihood, mean_flat, normal_kl


class VariationalTerms(NamedTuple):
    """One term of the variational bound, in bits per dimension [N], and the x̂_0 [N, C, ...] it was computed with."""

    bits_per_dim: torch.Tensor
    pred_original_sample: torch.Tensor


def vb_terms_bpd(
    scheduler: DDPMScheduler,
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    timesteps: Timesteps,
    previous_timesteps: Timesteps | None = None,
    clip_sample: bool = True,
    discretized: bool = True,
) -> VariationalTerms:
    """The bound's term of the step from t to s: L_{t-1}, or the decoder's L_0 where s = -1 (Ho et al., Eq. 5).

    Args:
        model_output: [N, C, ...], or [N, 2C, ...] with a learned variance, at x_t [N, C, ...].
        x_start: images in [-1, 1], on the 256 levels of a byte; or latents.
        timesteps, previous_timesteps: ints or LongTensors [N]; None means t-1, and -1 the data.
        clip_sample: whether x̂_0 is clipped to [-1, 1]; False for training.
        discretized: whether the decoder's term is the probability of a byte (Eq. 13); False for latents, whose term
            is a density, so that their bound can be negative.

    Raises:
        ValueError: timesteps outside 0..T-1, or an output of other channels than `variance_type` requires.
    """
    true = scheduler.q_posterior_mean_variance(x_start, x_t, timesteps, previous_timesteps)
    predicted = scheduler.p_mean_variance(model_output, timesteps, x_t, previous_timesteps, clip_sample=clip_sample)
    kl = mean_flat(normal_kl(true.mean, true.log_variance, predicted.mean, predicted.log_variance))
    if discretized:
        likelihood = discretized_gaussian_log_likelihood(x_start, predicted.mean, 0.5 * predicted.log_variance)
    else:
        likelihood = gaussian_log_likelihood(x_start, predicted.mean, predicted.log_variance)
    previous = timesteps - 1 if previous_timesteps is None else previous_timesteps
    last = torch.as_tensor(previous, device=x_start.device) < 0
    return VariationalTerms(torch.where(last, -mean_flat(likelihood), kl) / LOG2, predicted.pred_original_sample)


def prior_bpd(scheduler: DDPMScheduler, x_start: torch.Tensor) -> torch.Tensor:
    """KL(q(x_T | x_0) ‖ N(0, I)) in bits per dimension [N], for images x_0 [N, C, ...] in [-1, 1].

    It is the bound's term that no training changes.
    """
    q = scheduler.q_mean_variance(x_start, len(scheduler) - 1)
    zero = torch.zeros_like(x_start)
    return mean_flat(normal_kl(q.mean, q.log_variance, zero, zero)) / LOG2
