"""Beta schedules: pure functions (num_train_timesteps, beta_start, beta_end) -> float64 array [T].

Where β = 1 - ᾱ_t/ᾱ_{t-1}, the ratio is rewritten so that nothing cancels.

This file is copied into published repositories: it imports numpy alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Where a schedule is given by ᾱ, the last β would be 1 and x_T carry nothing (Nichol & Dhariwal 2021, sec. 3.2)
MAX_BETA = 0.999
OLD_KEYS = {"timesteps", "predict_epsilon"}  # of a scheduler's config, of Diffusers before 0.10


def linear(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β linear in t (Ho et al. 2020, sec. 4)."""
    return np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)


def scaled_linear(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """√β linear in t, also called quadratic (latent diffusion; `quad` in Ho et al.'s code)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2


def squaredcos_cap_v2(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """ᾱ = cos²((t/T + 0.008)/1.008 · π/2), the cosine schedule (Nichol & Dhariwal 2021, Eq. 17)."""
    angle = (
        np.arange(num_train_timesteps, -1, -1) / num_train_timesteps / 1.008 * (math.pi / 2)
    )  # cos(x) = sin(π/2 - x)
    before, after = angle[:-1], angle[1:]
    return np.minimum(np.sin(before - after) * np.sin(before + after) / np.sin(before) ** 2, MAX_BETA)


def sigmoid(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β a sigmoid of t over [-6, 6] (GeoDiff, Xu et al. 2022)."""
    x = np.linspace(-6, 6, num_train_timesteps, dtype=np.float64)
    return (beta_end - beta_start) / (1 + np.exp(-x)) + beta_start


def sigmoid_alpha_bar(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """ᾱ falling along a sigmoid over [-3, 3] with temperature 1 (Jabri et al. 2023, arXiv:2212.11972, Alg. 1)."""
    x = -3 + 6 * np.arange(num_train_timesteps + 1) / num_train_timesteps
    after = x[1:]
    left = 6 * np.arange(num_train_timesteps, 0, -1) / num_train_timesteps  # 3 - before
    # sigmoid(b) - sigmoid(a) = sinh((b-a)/2) / (2 cosh(a/2) cosh(b/2))
    betas = np.sinh(3 / num_train_timesteps) * np.cosh(1.5) / (np.cosh(after / 2) * np.sinh(left / 2))
    return np.minimum(betas, MAX_BETA)


def laplace(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """log-SNR Laplace-distributed over uniform t (Hang et al. 2024, arXiv:2407.03297), as Diffusers defines it."""
    t = np.arange(num_train_timesteps + 1) / num_train_timesteps
    log_snr = -0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
    log_alpha_bar = -0.5 * np.log1p(np.exp(-log_snr))
    return np.minimum(-np.expm1(np.diff(log_alpha_bar)), MAX_BETA)


def const(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β = beta_end throughout (Ho et al.'s code)."""
    return np.full(num_train_timesteps, beta_end, dtype=np.float64)


def jsd(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β = 1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015, sec. 2.4.1); its ᾱ_T is 0."""
    return 1.0 / np.arange(num_train_timesteps, 0, -1, dtype=np.float64)


def _warmup(num_train_timesteps: int, beta_start: float, beta_end: float, fraction: float) -> np.ndarray:
    betas = const(num_train_timesteps, beta_start, beta_end)
    steps = int(num_train_timesteps * fraction)
    betas[:steps] = np.linspace(beta_start, beta_end, steps, dtype=np.float64)
    return betas


def warmup10(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β linear over the first tenth of the steps, then constant (Ho et al.'s code)."""
    return _warmup(num_train_timesteps, beta_start, beta_end, 0.1)


def warmup50(num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β linear over the first half of the steps, then constant (Ho et al.'s code)."""
    return _warmup(num_train_timesteps, beta_start, beta_end, 0.5)


BETA_SCHEDULES = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
    "sigmoid": sigmoid,
    "sigmoid_alpha_bar": sigmoid_alpha_bar,
    "laplace": laplace,
    "const": const,
    "jsd": jsd,
    "warmup10": warmup10,
    "warmup50": warmup50,
}
BETA_SCHEDULE_ALIASES = {"quadratic": "scaled_linear", "cosine": "squaredcos_cap_v2"}
BETA_SCHEDULES |= {alias: BETA_SCHEDULES[name] for alias, name in BETA_SCHEDULE_ALIASES.items()}
# The schedules that every stock sampler knows by name; all others are saved as `trained_betas`.
STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale √ᾱ so that ᾱ_{T-1} = 0 and ᾱ_0 stays (Lin et al. 2023, arXiv:2305.08891, Alg. 1).

    With r = √ᾱ_t/√ᾱ_{t-1} after the shift, β = 1 - r² = (1-r)(1+r), and 1-r is a ratio of two `expm1`: exact to
    rounding up to the last step, whose β is 1.
    """
    with np.errstate(divide="ignore"):
        half_log_alphas = 0.5 * np.log1p(-betas)
    to_the_end = np.cumsum(half_log_alphas[::-1])[::-1]  # log(√ᾱ_{T-1} / √ᾱ_{t-1})
    one_minus_r = np.expm1(half_log_alphas) / np.expm1(to_the_end)
    rescaled = one_minus_r * (2 - one_minus_r)
    rescaled[0] = betas[0]
    return rescaled


def without_old_keys(config: Any) -> Any:
    """A scheduler's config with the keys of Diffusers before 0.10 under their names of now; others as they are.

    >>> without_old_keys({"timesteps": 4000, "predict_epsilon": False})
    {'num_train_timesteps': 4000, 'prediction_type': 'sample'}
    """
    if not isinstance(config, Mapping) or not OLD_KEYS & set(config):
        return config
    new, defaults = dict(config), set(config.get("_use_default_values") or ())
    said = {"num_train_timesteps": new.pop("timesteps", None)}
    said["prediction_type"] = "sample" if new.pop("predict_epsilon", True) is False else None
    for name, value in said.items():
        if value is not None and (name not in new or name in defaults):
            new[name] = value
    if defaults:
        new["_use_default_values"] = sorted(defaults - {name for name, value in said.items() if value is not None})
    return new
