"""Weights of the simple objective by signal-to-noise ratio, each as the weight of a squared error of x̂_0.

A prediction is affine in x̂_0: an error of the output is an error of x̂_0 times its factor k in x̂_0, so one row serves
every prediction type, and the weight of the output's error is the row's times k².
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..portable.scheduling_ddpm_hf import DDPMScheduler


class Weighting(NamedTuple):
    """A row of `LOSS_WEIGHTINGS`.

    Attributes:
        of_snr: (SNR [N], γ) -> the weight [N] of a squared error of x̂_0.
        gamma: its usual γ; None if it has none.
    """

    of_snr: Callable[[Tensor, float], Tensor]
    gamma: float | None


# Unweighted, `simple` weighs an error of x̂_0 by SNR for epsilon, by SNR + 1 for v_prediction and by 1 for sample
LOSS_WEIGHTINGS: dict[str, Weighting] = {
    # Hang et al. 2023, Eq. 6
    "min_snr": Weighting(lambda snr, gamma: snr.clamp(max=gamma), 5.0),
    # Crowson et al. 2024, Eq. 8: half the harmonic mean instead of the minimum
    "soft_min_snr": Weighting(lambda snr, gamma: snr * gamma / (snr + gamma), 5.0),
    # Choi et al. 2022, Eq. 8, with k = 1
    "p2": Weighting(lambda snr, gamma: snr / (1 + snr) ** gamma, 1.0),
    # Yu et al. 2024: 1/√SNR on epsilon
    "debiased": Weighting(lambda snr, gamma: snr.sqrt(), None),
}


def chosen_weighting(loss_weighting: str | None, snr_gamma: float | None) -> tuple[str, float] | None:
    """A row's name and its γ for these options; γ alone is min-SNR's. None where nothing is weighted.

    Raises:
        ValueError: no such row, or a γ that it cannot have.
    """
    if loss_weighting is None and snr_gamma is None:
        return None
    name = loss_weighting or "min_snr"
    if name not in LOSS_WEIGHTINGS:
        raise ValueError(f"loss_weighting must be one of {', '.join(LOSS_WEIGHTINGS)} (got {name!r})")
    usual = LOSS_WEIGHTINGS[name].gamma
    if snr_gamma is None:
        return name, usual or 0.0
    if usual is None:
        raise ValueError(f"loss_weighting={name!r} has no γ; leave snr_gamma={snr_gamma} out")
    if not snr_gamma > 0:
        raise ValueError(f"snr_gamma={snr_gamma} must be positive; {usual:g} is the paper's")
    return name, snr_gamma


def loss_weights(
    scheduler: DDPMScheduler, timesteps: Tensor, name: str, gamma: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights [N] of squared errors of the output at timesteps (LongTensor [N]), by a row of `LOSS_WEIGHTINGS`."""
    one = torch.ones(len(timesteps), 1, device=timesteps.device, dtype=dtype)
    signal = scheduler.q_mean_variance(one, timesteps)
    snr = (signal.mean**2 / signal.variance).flatten()
    if scheduler.config.prediction_type == "epsilon":
        snr = snr.clamp(min=torch.finfo(dtype).tiny)  # the limit of the quotient, where SNR is 0
        return LOSS_WEIGHTINGS[name].of_snr(snr, gamma) / snr  # k² is 1/SNR
    _, from_output = scheduler.x0_coefficients(timesteps, one)
    return LOSS_WEIGHTINGS[name].of_snr(snr, gamma) * from_output.flatten() ** 2


def min_snr_weights(
    scheduler: DDPMScheduler, timesteps: Tensor, snr_gamma: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [N] that make a squared error weigh min(SNR, γ) on x_0 (Hang et al. 2023, Eq. 6).

    They are the known min(SNR, γ)/SNR for epsilon and min(SNR, γ)/(SNR + 1) for v_prediction.
    """
    return loss_weights(scheduler, timesteps, "min_snr", snr_gamma, dtype)
