"""The coefficients of q and p: functions of log ᾱ, computed in float64 and cast once, where a value meets a sample.

The notation is that of `scheduling_ddpm_hf`: t = 0..T-1, and s is the timestep that follows t on the way down, -1 for
the data. A column is a value for each sample, [N, 1, ...], which broadcasts against x_t [N, C, ...].

This file is copied into published repositories: it imports torch and numpy alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

Timesteps: TypeAlias = int | torch.Tensor  # one for all samples, or a LongTensor [N]
Coefficient: TypeAlias = Any  # a Python float, or a column: for each sample, [N, 1, ...]

FIXED_LARGE = ("fixed_large", "fixed_large_log")
FIXED_VARIANCE_TYPES = ("fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log")
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
FITTED = "fitted"  # the variance of a table of x_0's variances; no config says so: the table does
LEAST_VARIANCE = 1e-12  # of a fitted one, whose logarithm is taken


class ExactTables(NamedTuple):
    """β_t, α_t = 1 - β_t and ᾱ_t for t = 0..T-1, float64 [T] on the CPU."""

    betas: torch.Tensor
    alphas: torch.Tensor
    alphas_cumprod: torch.Tensor


class StepCoefficients(NamedTuple):
    """What one reverse step from t to s is made of: Python floats, or columns."""

    x0_from_sample: Coefficient  # x̂_0 = x0_from_sample · x_t + x0_from_output · output
    x0_from_output: Coefficient
    mean_from_x0: Coefficient  # μ̃ = mean_from_x0 · x̂_0 + mean_from_sample · x_t      (Ho et al., Eq. 7)
    mean_from_sample: Coefficient
    posterior_variance: Coefficient  # β̃, 0 where s = -1                                (Ho et al., Eq. 7)
    min_log_variance: Coefficient  # log β̃, clipped where s = -1
    max_log_variance: Coefficient  # log β_{t|s}
    min_variance: Coefficient  # the exponentials of these two, taken before the cast
    max_variance: Coefficient
    fitted_log_variance: Coefficient  # log(β̃ + mean_from_x0²·Var[x_0 | x_t]), or log β̃ without such a table
    fitted_variance: Coefficient

    def log_variance(self, variance_type: str, output: Any, last: bool | torch.Tensor) -> Coefficient:
        """log Σ of p(x_s | x_t).

        Args:
            output: a tensor, the learned variance's half of the model's output; None for a fixed variance.
            last: where s = -1; a bool, or a column.
        """
        if variance_type == "learned":
            return output
        if variance_type == "learned_range":  # Nichol & Dhariwal, Eq. 15
            fraction = (output + 1) / 2
            return fraction * self.max_log_variance + (1 - fraction) * self.min_log_variance
        if variance_type in FIXED_LARGE:
            return choose(last, self.min_log_variance, self.max_log_variance)
        if variance_type == FITTED:  # Bao et al. 2022, Theorem 1
            return self.fitted_log_variance
        return self.min_log_variance

    def variance(self, variance_type: str, log_variance: Coefficient, last: bool | torch.Tensor) -> Coefficient:
        """Σ of p(x_s | x_t), whose log is `log_variance`: 0 for `fixed_small` where s = -1, though that is clipped."""
        if variance_type in LEARNED_VARIANCE_TYPES:
            return torch.exp(log_variance)
        if variance_type in FIXED_LARGE:
            return choose(last, self.min_variance, self.max_variance)
        if variance_type == FITTED:
            return self.fitted_variance
        return self.posterior_variance


def choose(condition: bool | torch.Tensor, where_true: Coefficient, where_false: Coefficient) -> Coefficient:
    """One of two values, or of two columns where the condition is a column."""
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, where_true, where_false)
    return where_true if condition else where_false


# What meets a sample


def combine(a: Coefficient, x: torch.Tensor, b: Coefficient, y: torch.Tensor) -> torch.Tensor:
    """a·x + b·y in x's dtype, for floats or columns a and b, in as few passes over memory as torch has for it.

    Of an x of integers it is a float, as in stock.
    """
    if isinstance(a, torch.Tensor):
        if x.dtype == y.dtype == a.dtype:
            return torch.addcmul(a * x, b, y)
        result = torch.addcmul(a * x.to(a.dtype), b, y.to(a.dtype))
        return result.to(x.dtype) if x.is_floating_point() else result
    if a == 0.0:
        return y if b == 1.0 else b * y
    return torch.add(a * x, y, alpha=b)


def working_dtype(sample: torch.Tensor) -> torch.dtype:
    """Half precision is computed in float32 and rounded once, at the end."""
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def as_column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N] as [N, 1, ...], which broadcasts against a sample."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Coefficients:
    """The coefficients at any timesteps: rows of tables for one timestep, computed when requested for a pair (t, s).

    Args:
        betas: β for t = 0..T-1, float64 [T].
        x_start_variances: Var[x_0 | x_t] per dimension, as measured with a model, [T]; the fitted variances follow.
    """

    def __init__(self, betas: np.ndarray, x_start_variances: np.ndarray | None = None):
        self.x_start_variances = None if x_start_variances is None else torch.from_numpy(x_start_variances)
        with np.errstate(divide="ignore", invalid="ignore"):  # log(0) = -inf is right for ᾱ_T = 0
            log_alphas_cumprod = np.cumsum(np.log1p(-betas))
        exact = (betas, 1.0 - betas, np.exp(log_alphas_cumprod))
        self.exact = ExactTables(*(torch.from_numpy(table) for table in exact))
        # log ᾱ_t at index t + 1, so that log ᾱ_{-1} = 0 needs no special case
        self.log_alpha_bar = torch.from_numpy(np.concatenate([[0.0], log_alphas_cumprod]))
        self._kept: dict[tuple, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.exact.betas)

    def checked(self, timesteps: Timesteps, device: torch.device, lowest: int = 0) -> torch.Tensor:
        """Timesteps as a LongTensor [N] or [1] on the device. Numbers are checked here, tensors by their lookup.

        Reading a tensor's values would make a GPU's host wait, and break compiled graphs and vmap.

        Raises:
            ValueError: no whole numbers, or outside lowest..T-1.
        """
        if isinstance(timesteps, torch.Tensor):
            positions = timesteps
        else:
            try:
                positions = torch.as_tensor(timesteps)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"timesteps={timesteps!r}: give whole numbers from {lowest}") from error
            if not positions.is_floating_point() and positions.numel() and (out := self._outside(positions, lowest)):
                raise out
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise ValueError(f"timesteps of {positions.dtype}: must be whole numbers, the positions in the chain")
        if positions is not timesteps and positions.numel() == 1:  # a copy would make a GPU's host wait
            return torch.full((1,), int(positions), dtype=torch.int64, device=device)
        return positions.to(device=device, dtype=torch.int64).reshape(-1)

    def _outside(self, timesteps: torch.Tensor, lowest: int) -> ValueError | None:
        """The error for timesteps that leave the tables, or None if they do not."""
        low, high = int(timesteps.min()), int(timesteps.max())
        if low >= lowest and high < len(self):
            return None
        return ValueError(f"timesteps from {low} to {high} leave the range {lowest}..{len(self) - 1}")

    def _keep(self, key: tuple, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A table on a device, computed once."""
        if key in self._kept:
            return self._kept[key]
        with torch.inference_mode(False):  # what is kept must not be an inference tensor
            table = compute()
        if type(table) is torch.Tensor and not torch.compiler.is_compiling():  # else it lives only while it is traced
            self._kept[key] = table
        return table

    def columns(
        self, name: str, timesteps: Timesteps, like: torch.Tensor, prediction_type: str | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The rows of a table of `ROWS` at timesteps, as columns in the working precision of a sample.

        Raises:
            ValueError: a timestep outside 0..T-1, where the lookup itself detects it (on a CPU).
        """
        timesteps, dtype = self.checked(timesteps, like.device), working_dtype(like)

        def compute() -> torch.Tensor:
            return torch.stack(ROWS[name](self, prediction_type)).to(dtype).to(like.device)  # [K, T]

        table = self._keep((name, prediction_type, like.device, dtype), compute)
        try:
            columns = table.index_select(1, timesteps)  # [K, N]
        except (IndexError, RuntimeError) as error:
            raise self._outside(timesteps, 0) or error from error
        return columns.reshape(len(table), -1, *[1] * (like.ndim - 1)).unbind()

    def log_alpha_bar_at(self, timesteps: torch.Tensor, lowest: int = -1) -> torch.Tensor:
        """log ᾱ at the timesteps, float64, on their device (on the CPU for MPS, which has no float64)."""
        if timesteps.device.type == "mps":
            timesteps = timesteps.cpu()
        device = timesteps.device
        table = self._keep(("log_alpha_bar", device), lambda: self.log_alpha_bar.to(device))
        try:
            return table[lowest + 1 :].index_select(0, timesteps - lowest)
        except (IndexError, RuntimeError) as error:
            raise self._outside(timesteps, lowest) or error from error

    def of_steps(
        self, timesteps: torch.Tensor, previous_timesteps: torch.Tensor, prediction_type: str
    ) -> StepCoefficients:
        """Those of the reverse steps from t to s, LongTensors [N]; float64 [N] each."""
        log_t, log_s = self.log_alpha_bar_at(timesteps, lowest=0), self.log_alpha_bar_at(previous_timesteps)
        posterior_variance, log_beta = posterior_variance_and_log_beta(log_t, log_s)
        # At the end of a chain β̃ is 0: its log is that of the step into t, in the full chain t=1's (Ho et al.'s code).
        into = torch.clamp(2 * timesteps + 1, max=len(self) - 1)
        variance_into, _ = posterior_variance_and_log_beta(self.log_alpha_bar_at(into), log_t)
        last_log = torch.where((into > timesteps).to(log_t.device), torch.log(variance_into), log_beta)
        min_log = torch.where((previous_timesteps < 0).to(log_t.device), last_log, torch.log(posterior_variance))
        from_x0, from_sample = posterior_mean_coefficients(log_t, log_s)
        fitted_log = min_log
        if self.x_start_variances is not None:
            x_start_variance = self.x_start_variances.to(from_x0.device)[timesteps.to(from_x0.device)]
            fitted = reverse_variance(posterior_variance, from_x0, x_start_variance)
            fitted_log = torch.log(fitted.clamp(min=LEAST_VARIANCE))
        return StepCoefficients(
            *x0_coefficients(prediction_type, log_t, self.log_alpha_bar_at(timesteps - 1)),
            from_x0,
            from_sample,
            posterior_variance,
            min_log,
            log_beta,
            torch.exp(min_log),
            torch.exp(log_beta),
            fitted_log,
            torch.exp(fitted_log),
        )

    def step_columns(
        self, timesteps: Timesteps, previous_timesteps: Timesteps | None, like: torch.Tensor, prediction_type: str
    ) -> tuple[StepCoefficients, torch.Tensor]:
        """The coefficients of the step from t to s (None: t-1) as columns, and the column that says where s = -1."""
        timesteps = self.checked(timesteps, like.device)
        if previous_timesteps is None:  # the full chain: rows of a table
            columns = self.columns("step", timesteps, like, prediction_type)
            return StepCoefficients(*columns), as_column(timesteps == 0, like)
        previous_timesteps = self.checked(previous_timesteps, like.device, lowest=-1)
        timesteps, previous_timesteps = torch.broadcast_tensors(timesteps, previous_timesteps)
        exact = self.of_steps(timesteps, previous_timesteps, prediction_type)
        cast = (as_column(one.to(working_dtype(like)).to(like.device), like) for one in exact)
        return StepCoefficients(*cast), as_column(previous_timesteps < 0, like)


# The formulas, from log ᾱ_t and log ᾱ_s


def posterior_variance_and_log_beta(log_t: torch.Tensor, log_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """β̃ of the step from t to s (Ho et al., Eq. 7), and log β_{t|s}."""
    beta = -torch.expm1(log_t - log_s)
    return beta * (torch.expm1(log_s) / torch.expm1(log_t)), torch.log(beta)


def posterior_mean_coefficients(log_t: torch.Tensor, log_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of x_0 and x_t in the mean of q(x_s | x_t, x_0) (Ho et al., Eq. 7)."""
    one_minus_t = torch.expm1(log_t)  # the sign cancels in both ratios
    from_x0 = torch.exp(0.5 * log_s) * torch.expm1(log_t - log_s) / one_minus_t
    from_sample = torch.exp(0.5 * (log_t - log_s)) * torch.expm1(log_s) / one_minus_t
    return from_x0, from_sample


def reverse_variance(
    posterior_variance: torch.Tensor, from_x0: torch.Tensor, x_start_variance: torch.Tensor
) -> torch.Tensor:
    """The variance of p(x_s | x_t) that is nearest to the true reverse process (Bao et al. 2022, Theorem 1).

    Args:
        posterior_variance: β̃.
        from_x0: the factor of x_0 in the posterior's mean.
        x_start_variance: Var[x_0 | x_t], the mean over the dimensions.

    >>> one = torch.ones(1)
    >>> reverse_variance(0.5 * one, 0.1 * one, 4 * one)
    tensor([0.5400])
    """
    return posterior_variance + from_x0**2 * x_start_variance


def x0_coefficients(
    prediction_type: str, log_t: torch.Tensor, log_before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of x_t and of the model's output in x̂_0, from log ᾱ_t and log ᾱ_{t-1}."""
    if prediction_type == "epsilon":  # Ho et al., Eq. 15
        return torch.exp(-0.5 * log_t), -torch.sqrt(torch.expm1(-log_t))
    if prediction_type == "sample":
        return torch.zeros_like(log_t), torch.ones_like(log_t)
    if prediction_type == "v_prediction":  # Salimans & Ho 2022, App. D
        return torch.exp(0.5 * log_t), -torch.sqrt(-torch.expm1(log_t))
    from_x0, from_sample = posterior_mean_coefficients(log_t, log_before)
    return -from_sample / from_x0, 1 / from_x0  # Eq. 7 solved for x_0


# The rows of the tables, float64 [T] each


def _marginal(c: Coefficients, _: Any) -> list[torch.Tensor]:
    """√ᾱ_t and √(1-ᾱ_t)."""
    log_t = c.log_alpha_bar[1:]
    return [torch.exp(0.5 * log_t), torch.sqrt(-torch.expm1(log_t))]


def _moments(log_scale: torch.Tensor) -> list[torch.Tensor]:
    """Of q(x_t | x_s), from log ᾱ_t/ᾱ_s: the factor of x_s in the mean, the variance and its log."""
    return [torch.exp(0.5 * log_scale), -torch.expm1(log_scale), torch.log(-torch.expm1(log_scale))]


def _epsilon(c: Coefficients, _: Any) -> list[torch.Tensor]:
    """The factors of x_t and x_0 in ε."""
    signal, deviation = _marginal(c, None)
    return [1 / deviation, -signal / deviation]


def _x0(c: Coefficients, prediction_type: Any) -> list[torch.Tensor]:
    """The factors of x_t and the model's output in x̂_0."""
    return list(x0_coefficients(prediction_type, c.log_alpha_bar[1:], c.log_alpha_bar[:-1]))


def _step(c: Coefficients, prediction_type: Any) -> list[torch.Tensor]:
    """`StepCoefficients` of the full chain's steps, from t to t-1."""
    timesteps = torch.arange(len(c))
    return list(c.of_steps(timesteps, timesteps - 1, prediction_type))


# name -> (coefficients, prediction type or None) -> rows
ROWS: dict[str, Callable[[Coefficients, Any], list[torch.Tensor]]] = {
    "marginal": _marginal,
    "marginal_moments": lambda c, _: _moments(c.log_alpha_bar[1:]),
    "forward_step_moments": lambda c, _: _moments(c.log_alpha_bar.diff()),
    "epsilon": _epsilon,
    "x0": _x0,
    "step": _step,
}
