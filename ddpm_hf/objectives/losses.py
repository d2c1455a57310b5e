"""Training losses: the simple objective and its weights, the bound, and both together.

Sources: Ho et al. 2020 (the simple objective and the bound), Nichol & Dhariwal 2021 (the hybrid objective and
importance sampling of t). Weightings by signal-to-noise ratio are rows of `weightings`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..portable.scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES, DDPMScheduler
from .bound import vb_terms_bpd
from .gaussians import mean_flat
from .weightings import chosen_weighting, loss_weights

QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")  # losses by timestep, from little noise to much


def quartile_of(timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """The index in `QUARTILES` of each timestep: LongTensor [N] -> LongTensor [N]."""
    return timesteps * 4 // num_train_timesteps


# The simple objective: a loss between output and target, and its weight by signal-to-noise ratio

# name -> elementwise loss(output, target)
LOSS_TYPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda output, target: (output - target) ** 2,
    "l1": lambda output, target: (output - target).abs(),
    "huber": lambda output, target: F.huber_loss(output, target, reduction="none"),
}


def simple_losses(
    scheduler: DDPMScheduler,
    output: Tensor,
    x_start: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    loss_type: str = "l2",
    snr_gamma: float | None = None,
    loss_weighting: str | None = None,
) -> Tensor:
    """The mean loss between output and target (Ho et al., Eq. 14), [N], weighted as `training_losses` says."""
    losses = mean_flat(LOSS_TYPES[loss_type](output, scheduler.training_target(x_start, noise, timesteps)))
    weighting = chosen_weighting(loss_weighting, snr_gamma)
    if weighting is not None:
        losses = losses * loss_weights(scheduler, timesteps, *weighting, losses.dtype)
    return losses


# Objectives: name -> losses(scheduler, model_output, x_start, noise, timesteps, options) [N]


class LossOptions(NamedTuple):
    """What refines an objective; see `training_losses`."""

    loss_type: str = "l2"
    snr_gamma: float | None = None
    vlb_weight: float = 0.001
    loss_weighting: str | None = None


def _simple(
    scheduler: DDPMScheduler, output: Tensor, x_start: Tensor, noise: Tensor, timesteps: Tensor, options: LossOptions
) -> Tensor:
    mean = output[:, : x_start.shape[1]]  # a learned variance's half gets no gradient
    weighting = (options.loss_type, options.snr_gamma, options.loss_weighting)
    return simple_losses(scheduler, mean, x_start, noise, timesteps, *weighting)


def _vlb(
    scheduler: DDPMScheduler, output: Tensor, x_start: Tensor, noise: Tensor, timesteps: Tensor, options: LossOptions
) -> Tensor:
    x_t = scheduler.add_noise(x_start, noise, timesteps)
    return len(scheduler) * vb_terms_bpd(scheduler, output, x_start, x_t, timesteps, clip_sample=False).bits_per_dim


def _hybrid(
    scheduler: DDPMScheduler, output: Tensor, x_start: Tensor, noise: Tensor, timesteps: Tensor, options: LossOptions
) -> Tensor:
    mean, variance = output.chunk(2, dim=1)
    variance_alone = torch.cat([mean.detach(), variance], dim=1)  # Nichol & Dhariwal, sec. 3.1
    bound = _vlb(scheduler, variance_alone, x_start, noise, timesteps, options)
    return _simple(scheduler, output, x_start, noise, timesteps, options) + options.vlb_weight * bound


OBJECTIVES = {"simple": _simple, "vlb": _vlb, "hybrid": _hybrid}


def check_objective(
    scheduler: DDPMScheduler,
    objective: str,
    loss_type: str = "l2",
    snr_gamma: float | None = None,
    loss_weighting: str | None = None,
) -> None:
    """Raise ValueError, with the way out, for a name that does not exist or a combination that cannot train."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)} (got {objective!r})")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)} (got {loss_type!r})")
    learned = scheduler.variance_type in LEARNED_VARIANCE_TYPES
    if objective == "hybrid" and not learned:
        raise ValueError(
            f"objective='hybrid' trains a learned variance and variance_type is {scheduler.variance_type!r};"
            " use variance_type='learned_range', or objective='simple'"
        )
    weighting = chosen_weighting(loss_weighting, snr_gamma)
    if objective == "vlb" and (loss_type != "l2" or weighting is not None):
        raise ValueError(
            "objective='vlb' has no loss_type, loss_weighting or snr_gamma; leave them out, or use objective='simple'"
        )


def training_losses(
    scheduler: DDPMScheduler,
    model_output: Tensor,
    x_start: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    *,
    objective: str = "simple",
    loss_type: str = "l2",
    snr_gamma: float | None = None,
    vlb_weight: float = 0.001,
    loss_weighting: str | None = None,
) -> Tensor:
    """The loss of each sample, [N].

    Args:
        model_output: the network at x_t = scheduler.add_noise(x_start, noise, timesteps): [N, C, ...], or
            [N, 2C, ...] with a learned variance.
        x_start: images in [-1, 1], or latents, [N, C, ...].
        noise: the ε of x_t, [N, C, ...].
        timesteps: LongTensor [N].
        objective: `simple` (mean loss to the target), `vlb` (T times the bound's term at t, in bits/dim, an unbiased
            estimate of the bound less its prior term under uniform t), or `hybrid` (simple plus `vlb_weight` times
            vlb, with the mean's gradient stopped in the second).
        loss_type: of `simple`: `l2`, `l1` or `huber`.
        snr_gamma: γ of the weighting, for `simple`; without `loss_weighting`, of min-SNR.
        loss_weighting: of `simple`, by signal-to-noise ratio: a name in `LOSS_WEIGHTINGS`.

    Raises:
        ValueError: an unknown name, or a combination that cannot train.
    """
    check_objective(scheduler, objective, loss_type, snr_gamma, loss_weighting)
    options = LossOptions(loss_type, snr_gamma, vlb_weight, loss_weighting)
    return OBJECTIVES[objective](scheduler, model_output, x_start, noise, timesteps, options)
