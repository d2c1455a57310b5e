"""Var[x_0 | x_t] of a trained model, from which the optimal reverse variance of every step follows (Analytic-DPM)."""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..common.errors import DataError, UsageError
from ..common.randomness import StepKeys
from ..evaluation.bound import BoundBatch
from ..objectives.gaussians import mean_flat
from ..portable.coefficients_ddpm_hf import LEAST_VARIANCE
from ..portable.multistep_ddpm_hf import evenly_spaced
from ..portable.scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES, DDPMScheduler

ESTIMATES = ("error", "norm")
LEAST_NODES = 3
LEAST_LOG_SNR = -30.0  # there is no image left


class Moments(NamedTuple):
    """What the network's outputs on noised images are on average, per dimension, at G timesteps; float64 [G]."""

    timesteps: np.ndarray  # ascending, from 0 to T-1
    x_start_error: np.ndarray  # E|x̂_0 - x_0|², x̂_0 clipped as in sampling
    epsilon_norm: np.ndarray  # E|ε̂|²
    x_start_error_deviation: np.ndarray  # standard errors of the two, over images
    epsilon_norm_deviation: np.ndarray
    x_start_norm: float  # E|x_0|², which no variance of x_0 exceeds
    images: int


class FittedVariances(NamedTuple):
    """Var[x_0 | x_t] at every timestep, and how sure it is.

    Args:
        variances: the mean over the dimensions, float64 [T].
        standard_error: of a measured one over images, relative to it; the median over the timesteps.
        interpolation_error: how far a measured one is from the curve through the others, likewise: above the error of
            those between, which are half as far from measured ones. None where all timesteps were measured.
    """

    variances: np.ndarray
    standard_error: float
    interpolation_error: float | None


def check_fittable(scheduler: DDPMScheduler) -> None:
    """Raise UsageError for a model that learned its variance, or one whose ε cannot be told at some timestep."""
    if scheduler.config.variance_type in LEARNED_VARIANCE_TYPES:
        raise UsageError(
            f"the model learned its variance (variance_type={scheduler.config.variance_type!r}): a fitted one would"
            " replace it; fit a model that was trained with a fixed variance"
        )
    if scheduler.config.prediction_type == "posterior_mean":
        raise UsageError("the model predicts the mean of the step to t-1 alone: there is no variance for longer steps")
    scheduler.check_invertible(range(len(scheduler)))


def measured_timesteps(scheduler: DDPMScheduler, number: int) -> list[int]:
    """Timesteps from 0 to T-1 (ascending), as even in log SNR, along which the variance is smooth, as there are.

    Raises:
        UsageError: a number below 3, unless it is T.
    """
    T = len(scheduler)
    if number < min(LEAST_NODES, T):
        raise UsageError(f"--timesteps {number}: must be {LEAST_NODES} or more")
    return evenly_spaced(log_snr(scheduler), min(number, T))[::-1]


def log_snr(scheduler: DDPMScheduler) -> np.ndarray:
    """log ᾱ/(1-ᾱ), float64 [T]; finite also where ᾱ is 0."""
    log_alpha_bar = scheduler.exact_tables.alphas_cumprod.log().numpy()
    return np.maximum(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)), LEAST_LOG_SNR)


@torch.no_grad()
def measure_moments(
    network: Callable[..., Any],
    scheduler: DDPMScheduler,
    batches: Iterable[BoundBatch],
    *,
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Moments:
    """The moments at some timesteps, one call for each image and timestep. Image i's noise depends on seed and i.

    Args:
        network: `network(x_t, t, **conditions).sample`, in eval mode.
        batches: images in [-1, 1], or latents, on the network's device.
        timesteps: ascending; None: all of them.

    Raises:
        DataError: there are not two images, or an output is not finite.
    """
    nodes = list(range(len(scheduler)) if timesteps is None else timesteps)
    parts: list[torch.Tensor] = []  # of [2, G, N]
    images, norm = 0, 0.0
    total = len(batches) * len(nodes) if isinstance(batches, Sized) else None
    with tqdm(total=total, desc="moments", unit="call", disable=not progress) as bar:
        for batch in batches:
            count, dtype = len(batch.images), getattr(network, "dtype", batch.images.dtype)
            measured = torch.zeros(2, len(nodes), count, dtype=torch.float64)
            for index, t in enumerate(nodes):
                noise = StepKeys(seed, t, batch.first, count).normal_like(batch.images, "fit_noise")
                x_t = scheduler.add_noise(batch.images, noise, t)
                at = torch.full((count,), t, device=x_t.device)
                output = network(x_t.to(dtype), at, **batch.conditions).sample.to(batch.images.dtype)
                x_start = scheduler.predict_original_sample(output, t, x_t)
                epsilon = scheduler.predict_epsilon(x_start, t, x_t)
                measured[0, index] = mean_flat((scheduler.clip(x_start) - batch.images) ** 2).cpu()
                measured[1, index] = mean_flat(epsilon**2).cpu()
                bar.update()
            parts.append(measured)
            norm += mean_flat(batch.images.double() ** 2).sum().item()
            images += count
    if images < 2:
        raise DataError(f"{images} images to fit the variance to: two or more are required")
    each = torch.cat(parts, dim=2).numpy()  # [2, G, N]
    if not np.isfinite(each).all():
        node = nodes[int(np.argmin(np.isfinite(each).all(axis=(0, 2))))]
        raise DataError(f"the network's output is not finite at t={node}")
    (error, epsilon_norm), deviations = each.mean(axis=2), each.std(axis=2, ddof=1) / images**0.5
    return Moments(np.array(nodes), error, epsilon_norm, deviations[0], deviations[1], norm / images, images)


def fit_variances(scheduler: DDPMScheduler, moments: Moments, estimate: str = "error") -> FittedVariances:
    """Var[x_0 | x_t] for t = 0..T-1, between the timesteps that were measured linear in log SNR.

    Args:
        estimate: "norm" is Analytic-DPM's, (1-ᾱ)/ᾱ · (1 - E|ε̂|²), which the exact network's norm implies (Bao et al.
            2022, Theorem 1); "error" is E|x̂_0 - x_0|², the same for the exact network, and optimal for the mean that
            this one predicts, clipped as it is (Bao et al. 2022b, https://arxiv.org/abs/2206.07309).
    """
    nodes = moments.timesteps
    positions = -log_snr(scheduler)  # ascending
    values, deviations = moments.x_start_error, moments.x_start_error_deviation
    if estimate == "norm":
        alphas_cumprod = scheduler.exact_tables.alphas_cumprod.numpy()[nodes]
        with np.errstate(divide="ignore", invalid="ignore"):  # where ᾱ is 0, nothing but the bound is known
            scales = (1 - alphas_cumprod) / alphas_cumprod
            values = np.nan_to_num(scales * (1 - moments.epsilon_norm), nan=moments.x_start_norm)
            deviations = np.nan_to_num(scales * moments.epsilon_norm_deviation, nan=0.0, posinf=0.0)
        values = values.clip(0, moments.x_start_norm)
    variances = np.interp(positions, positions[nodes], values)
    between = None
    if len(nodes) < len(scheduler):
        left_out = [
            np.interp(positions[node], np.delete(positions[nodes], index), np.delete(values, index))
            for index, node in enumerate(nodes[1:-1], start=1)
        ]
        between = relative(np.array(left_out) - values[1:-1], values[1:-1])
    return FittedVariances(variances, relative(deviations, values), between)


def relative(errors: np.ndarray, values: np.ndarray) -> float:
    """The median of errors in units of the values."""
    return float(np.median(np.abs(errors) / np.maximum(values, LEAST_VARIANCE)))


def rounded(values: Iterable[float]) -> list[float]:
    """Numbers with six significant digits, as a config holds them."""
    return [float(f"{value:.6g}") for value in values]
