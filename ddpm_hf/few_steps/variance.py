"""Var[x_0 | x_t] of a trained model, from which the optimal reverse variance of every step follows (Analytic-DPM)."""

from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..common.errors import DataError, UsageError
from ..common.randomness import StepKeys
from ..evaluation.bound import BoundBatch
from ..objectives.gaussians import mean_flat
from ..portable.scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES, DDPMScheduler

ESTIMATES = ("error", "norm")


class Moments(NamedTuple):
    """What the network's outputs on noised images are on average, per dimension; float64 [T]."""

    x_start_error: np.ndarray  # E|x̂_0 - x_0|², x̂_0 clipped as in sampling
    epsilon_norm: np.ndarray  # E|ε̂|²
    x_start_norm: float  # E|x_0|², which no variance of x_0 exceeds
    images: int


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


@torch.no_grad()
def measure_moments(
    network: Callable[..., Any],
    scheduler: DDPMScheduler,
    batches: Iterable[BoundBatch],
    *,
    seed: int = 0,
    progress: bool = False,
) -> Moments:
    """The moments at every timestep, one call for each image and timestep. Image i's noise depends on seed and i.

    Args:
        network: `network(x_t, t, **conditions).sample`, in eval mode.
        batches: images in [-1, 1], or latents, on the network's device.

    Raises:
        DataError: there are no images, or an output is not finite.
    """
    T, images, norm = len(scheduler), 0, 0.0
    errors, norms = np.zeros(T), np.zeros(T)
    total = len(batches) * T if isinstance(batches, Sized) else None
    with tqdm(total=total, desc="moments", unit="call", disable=not progress) as bar:
        for batch in batches:
            count, dtype = len(batch.images), getattr(network, "dtype", batch.images.dtype)
            for t in range(T):
                noise = StepKeys(seed, t, batch.first, count).normal_like(batch.images, "fit_noise")
                x_t = scheduler.add_noise(batch.images, noise, t)
                at = torch.full((count,), t, device=x_t.device)
                output = network(x_t.to(dtype), at, **batch.conditions).sample.to(batch.images.dtype)
                x_start = scheduler.predict_original_sample(output, t, x_t)
                epsilon = scheduler.predict_epsilon(x_start, t, x_t)
                errors[t] += mean_flat((scheduler.clip(x_start) - batch.images).double() ** 2).sum().item()
                norms[t] += mean_flat(epsilon.double() ** 2).sum().item()
                bar.update()
            norm += mean_flat(batch.images.double() ** 2).sum().item()
            images += count
    if not images:
        raise DataError("no images to fit the variance to")
    if not (np.isfinite(errors) & np.isfinite(norms)).all():
        raise DataError(f"the network's output is not finite at t={int(np.argmin(np.isfinite(errors + norms)))}")
    return Moments(errors / images, norms / images, norm / images, images)


def x_start_variances(scheduler: DDPMScheduler, moments: Moments, estimate: str = "error") -> np.ndarray:
    """Var[x_0 | x_t] for t = 0..T-1, the mean over the dimensions, float64 [T].

    Args:
        estimate: "norm" is Analytic-DPM's, (1-ᾱ)/ᾱ · (1 - E|ε̂|²), which the exact network's norm implies (Bao et al.
            2022, Theorem 1); "error" is E|x̂_0 - x_0|², the same for the exact network, and optimal for the mean that
            this one predicts, clipped as it is (Bao et al. 2022b, https://arxiv.org/abs/2206.07309).
    """
    if estimate == "error":
        return moments.x_start_error
    alphas_cumprod = scheduler.exact_tables.alphas_cumprod.numpy()
    variances = (1 - alphas_cumprod) / alphas_cumprod * (1 - moments.epsilon_norm)
    return np.clip(variances, 0, moments.x_start_norm)


def rounded(values: Iterable[float]) -> list[float]:
    """Numbers with six significant digits, as a config holds them."""
    return [float(f"{value:.6g}") for value in values]
