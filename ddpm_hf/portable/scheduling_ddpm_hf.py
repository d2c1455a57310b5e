"""The forward process q and the reverse process p of DDPM, behind Diffusers' `SchedulerMixin`.

Notation, after Ho et al. 2020 (https://arxiv.org/abs/2006.11239) and Nichol & Dhariwal 2021
(https://arxiv.org/abs/2102.09672): t runs over 0..T-1 and t=0 is one step of noise, so x_{-1} is the data, x_0 in
the papers. ᾱ_t = Π(1-β). A chain visits some of the timesteps; s is the one that follows t in it (t-1 in the full
chain, -1 for the data). Everything is derived from log ᾱ in float64 and cast once, where a value meets a sample.

This file is copied into published repositories: it imports torch, numpy and diffusers alone.
"""

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as StockDDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .schedules_ddpm_hf import BETA_SCHEDULE_ALIASES, BETA_SCHEDULES, STOCK_BETA_SCHEDULES, rescale_zero_terminal_snr

if TYPE_CHECKING:  # Diffusers' decorator has no types, and would hide the arguments from type checkers
    Init = TypeVar("Init")

    def register_to_config(init: Init) -> Init:
        """What a method `__init__` looks like once it is decorated."""
        return init
else:
    from diffusers.configuration_utils import register_to_config

logger = logging.get_logger(__name__)

Timesteps = int | torch.Tensor  # one for all samples, or a LongTensor [N]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")
FIXED_VARIANCE_TYPES = ("fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log")
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")
VARIANCE_TYPES = FIXED_VARIANCE_TYPES + LEARNED_VARIANCE_TYPES


class GaussianMoments(NamedTuple):
    """Mean, variance and log-variance (natural log) of a diagonal Gaussian; each broadcasts against the sample."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor


class PredictedMoments(NamedTuple):
    """`GaussianMoments` of p(x_s | x_t), and the prediction of x_0 they rest on (after clipping)."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    pred_original_sample: torch.Tensor


class ExactTables(NamedTuple):
    """β_t, α_t = 1 - β_t and ᾱ_t for t = 0..T-1, float64 [T] on the CPU."""

    betas: torch.Tensor
    alphas: torch.Tensor
    alphas_cumprod: torch.Tensor


class _Coefficients(NamedTuple):
    """What one reverse step from t to s is made of: Python floats, or tensors that broadcast against x_t."""

    x0_from_sample: float | torch.Tensor  # x̂_0 = x0_from_sample · x_t + x0_from_output · output
    x0_from_output: float | torch.Tensor
    mean_from_x0: float | torch.Tensor  # μ̃ = mean_from_x0 · x̂_0 + mean_from_sample · x_t      (Ho et al., Eq. 7)
    mean_from_sample: float | torch.Tensor
    posterior_variance: float | torch.Tensor  # β̃, 0 where s = -1                                (Ho et al., Eq. 7)
    min_log_variance: float | torch.Tensor  # log β̃, clipped where s = -1
    max_log_variance: float | torch.Tensor  # log β_{t|s}
    min_variance: float | torch.Tensor  # the exponentials of these two, taken before the cast
    max_variance: float | torch.Tensor


def _affine(a, x: torch.Tensor, b, y: torch.Tensor) -> torch.Tensor:
    """a·x + b·y in as few passes over memory as torch has for it."""
    if isinstance(a, torch.Tensor):
        return torch.addcmul(a * x, b, y)
    if a == 0.0:
        return y if b == 1.0 else b * y
    return torch.add(a * x, y, alpha=b)


def _is_record(config: dict) -> bool:
    """Whether a config's `trained_betas` are but our record of its named schedule."""
    name, betas = config.get("beta_schedule"), config.get("trained_betas")
    if betas is None or name not in BETA_SCHEDULES or name in STOCK_BETA_SCHEDULES:
        return False
    named = BETA_SCHEDULES[name](len(betas), config.get("beta_start", 0.0001), config.get("beta_end", 0.02))
    return np.array_equal(np.asarray(betas, dtype=np.float64), named)


Scheduler = TypeVar("Scheduler", bound="DDPMScheduler")


class DDPMScheduler(StockDDPMScheduler):
    """Denoising diffusion (Ho et al. 2020), a drop-in for `diffusers.DDPMScheduler` with the whole of its math.

    It is a subclass so that `isinstance` checks hold, and overrides every method of stock's.

    Configs are exchanged with stock freely: the keys and defaults are the same, and a `beta_schedule` that a stock
    sampler does not know is carried as `trained_betas`.

    Args:
        num_train_timesteps: T, the length of the chain the model is trained on.
        beta_start, beta_end: the range of β for the schedules that have one.
        beta_schedule: a name in `BETA_SCHEDULES`.
        trained_betas: β for t = 0..T-1, each in (0, 1], instead of a named schedule.
        variance_type: of p(x_s | x_t): `fixed_small` (β̃), `fixed_large` (β), `learned` (the second half of the
            model's output channels is a log-variance), `learned_range` (it is in [-1, 1] and interpolates between
            log β̃ and log β; Nichol & Dhariwal, Eq. 15). `fixed_small_log` and `fixed_large_log` name the same two.
        clip_sample: clip x̂_0 to ±`clip_sample_range` while sampling.
        prediction_type: what the model outputs: `epsilon`, `sample` (x_0), `v_prediction` (Salimans & Ho 2022) or
            `posterior_mean` (μ̃ of the step from t to t-1; Ho et al., Table 2).
        thresholding: clip x̂_0 dynamically instead (Imagen, sec. 2.3), by `dynamic_thresholding_ratio` and
            `sample_max_value`.
        timestep_spacing: `leading` (floor(i·T/n), plus `steps_offset`), `linspace` or `trailing`.
        rescale_betas_zero_snr: make ᾱ_{T-1} exactly 0 (Lin et al. 2023).

    Raises:
        NotImplementedError: unknown `beta_schedule`.
        ValueError: unknown `prediction_type`, or a β outside (0, 1].
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if not (isinstance(num_train_timesteps, numbers.Integral) and num_train_timesteps >= 1):
            raise ValueError(f"num_train_timesteps={num_train_timesteps!r}: must be a whole number of 1 or more")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)} (got {prediction_type!r})")
        if variance_type is None:  # as a sampler keeps it that was told to leave a learned variance alone
            variance_type = "fixed_small"
            self.register_to_config(variance_type=variance_type)
        if variance_type not in VARIANCE_TYPES:  # as in stock, such a name samples with fixed_small
            logger.warning(
                f"variance_type must be one of {', '.join(VARIANCE_TYPES)} (got {variance_type!r}): using fixed_small"
            )
        betas = self._resolve_betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        with np.errstate(divide="ignore", invalid="ignore"):  # log(0) = -inf is right for ᾱ_T = 0
            log_alphas = np.log1p(-betas)
        log_alphas_cumprod = np.cumsum(log_alphas)

        exact = (betas, 1.0 - betas, np.exp(log_alphas_cumprod))
        self._exact_tables = ExactTables(*(torch.from_numpy(table) for table in exact))
        # float32 as in stock: people index them by hand. Nothing here computes with them.
        self.betas, self.alphas, self.alphas_cumprod = (table.float() for table in self._exact_tables)
        # log ᾱ_t at index t + 1, so that log ᾱ_{-1} = 0 needs no special case
        self._log_alpha_bar = {torch.device("cpu"): torch.from_numpy(np.concatenate([[0.0], log_alphas_cumprod]))}
        self._tables = {}  # (name, device, dtype) -> [K, T]
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0  # x_T ~ N(0, I)
        self.variance_type = variance_type

        self.custom_timesteps = False
        self.num_inference_steps = None
        self._set_chain(np.arange(num_train_timesteps - 1, -1, -1))

    def _resolve_betas(self, num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas) -> np.ndarray:
        """The float64 betas [T]; records in the config what a stock sampler needs in order to find the same."""
        named = isinstance(beta_schedule, str) and beta_schedule in BETA_SCHEDULES
        name = BETA_SCHEDULE_ALIASES.get(beta_schedule, beta_schedule) if named else beta_schedule
        if trained_betas is not None and len(trained_betas) != num_train_timesteps:
            if named and name not in STOCK_BETA_SCHEDULES:
                trained_betas = None  # our own record of this schedule, from a config whose T was changed since
            else:
                logger.warning(f"{len(trained_betas)} trained_betas for num_train_timesteps={num_train_timesteps}")
        if trained_betas is None:
            if not named:
                known = ", ".join(BETA_SCHEDULES)
                raise NotImplementedError(
                    f"beta_schedule must be one of {known} (got {beta_schedule!r}); or give trained_betas"
                )
            try:
                betas = np.asarray(BETA_SCHEDULES[name](num_train_timesteps, beta_start, beta_end), dtype=np.float64)
            except (TypeError, ValueError, ArithmeticError) as error:
                raise ValueError(f"beta_start={beta_start!r}, beta_end={beta_end!r}: {error}") from error
        else:
            betas = np.asarray(trained_betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"trained_betas of shape {betas.shape}: give one for each timestep")
        if not (betas > 0).all() or (trained_betas is not None and (betas > 1).any()):
            raise ValueError(f"every beta must lie in (0, 1]; they run from {betas.min():g} to {betas.max():g}")
        if (betas > 1).any():  # stock constructs it all the same
            logger.warning(f"beta_end={beta_end} makes betas above 1: there is no such noise, and tables hold NaN")

        # said also where it is a default: other samplers have defaults of their own
        recorded = {"beta_schedule": name, "beta_start": beta_start, "beta_end": beta_end}
        if trained_betas is None and name not in STOCK_BETA_SCHEDULES:
            recorded["trained_betas"] = betas.tolist()
        # `from_config` forgets what it believes to be a default, also what was given by position
        parameters = inspect.signature(DDPMScheduler.__init__).parameters
        changed = {key for key in parameters if key in self.config and self.config[key] is not parameters[key].default}
        if "_use_default_values" in self.config:
            defaults = [key for key in self.config["_use_default_values"] if key not in changed | set(recorded)]
            recorded["_use_default_values"] = defaults
        self.register_to_config(**recorded)
        return betas

    @classmethod
    def from_config(
        cls: type[Scheduler],
        config: Mapping[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Scheduler:
        """As stock's, from the config of any sampler over β; `kwargs` replace settings of it.

        A schedule that these name replaces one that the config carries as `trained_betas`.
        """
        renamed = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"} & set(kwargs)
        if renamed and "trained_betas" not in kwargs and isinstance(config, dict) and _is_record(config):
            config = {**config, "trained_betas": None}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def exact_tables(self) -> ExactTables:
        """The float64 tables that `betas`, `alphas` and `alphas_cumprod` are rounded from; save and compare these."""
        return self._exact_tables

    # The chain

    def _set_chain(self, timesteps: np.ndarray, device=None) -> None:
        self.timesteps = torch.from_numpy(np.ascontiguousarray(timesteps, dtype=np.int64)).to(device)
        visited = torch.from_numpy(np.ascontiguousarray(timesteps, dtype=np.int64))
        # trained_betas may be fewer than T (stock allows it); the chain then has steps that no table knows
        visited = visited[visited < len(self.betas)]
        following = torch.cat([visited[1:], torch.tensor([-1])])
        columns = [column.tolist() for column in self._coefficients(visited, following)]
        self._chain = {
            t: (s, _Coefficients(*row)) for t, s, *row in zip(visited.tolist(), following.tolist(), *columns)
        }

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps that the sampling chain visits, and make the tables for its steps.

        Args:
            num_inference_steps: their number n, from 1 to T, spaced by the config's `timestep_spacing`.
            device: where `self.timesteps` is to lie. On the CPU (the default) `step` never waits for a GPU.
            timesteps: the timesteps themselves, descending, instead of a number.

        Raises:
            ValueError: both or neither given, a number outside 1..T, or timesteps not descending within 0..T-1.
        """
        T = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Can only pass one of `num_inference_steps` or `custom_timesteps`.")
        if timesteps is not None:
            given, timesteps = timesteps, np.asarray(timesteps)
            if timesteps.ndim != 1 or (timesteps.size and timesteps.dtype.kind not in "iu"):
                raise ValueError(f"`timesteps` {given!r}: give whole numbers, descending.")
            if len(timesteps) == 0:
                raise ValueError("`timesteps` is empty; give at least one timestep.")
            if (np.diff(timesteps) >= 0).any():
                raise ValueError("`custom_timesteps` must be in descending order.")
            if timesteps[0] >= T:
                raise ValueError(f"`timesteps` must start before `self.config.train_timesteps`: {T}.")
            if timesteps[-1] < 0:
                raise ValueError(f"`timesteps` must not be negative; the last is {timesteps[-1]}.")
        else:
            if not 1 <= num_inference_steps <= T or num_inference_steps != int(num_inference_steps):
                raise ValueError(
                    f"`num_inference_steps`: {num_inference_steps} cannot be smaller than 1 or larger than"
                    f" `self.config.train_timesteps`: {T}, the timesteps that the model was trained with."
                )
            timesteps = self._spaced_timesteps(int(num_inference_steps))
        # only now: a refused call leaves the chain as it was
        self.custom_timesteps = num_inference_steps is None
        self.num_inference_steps = num_inference_steps
        self._set_chain(timesteps, device)

    def _spaced_timesteps(self, n: int) -> np.ndarray:
        """n of the T timesteps, descending (Lin et al. 2023, Table 2)."""
        T, spacing = self.config.num_train_timesteps, self.config.timestep_spacing
        i = np.arange(n - 1, -1, -1)
        if spacing == "leading":
            timesteps = i * T // n
            return timesteps + min(self.config.steps_offset, T - 1 - timesteps[0])  # as far as there is room
        if spacing == "linspace":
            return np.linspace(0, T - 1, n).round()[::-1].astype(np.int64)
        if spacing == "trailing":
            # from the top down, as stock counts, so that ties round alike; and never more than n of them
            return np.round(np.arange(T, 0, -T / n)[:n]).astype(np.int64) - 1
        raise ValueError(f"timestep_spacing must be one of leading, linspace, trailing (got {spacing!r})")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def previous_timestep(self, timestep: Timesteps) -> Timesteps:
        """The timestep that follows `timestep` on the way down; -1 after the last."""
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        return torch.tensor(self._step_from(int(timestep))[0])

    def _step_from(self, t: int) -> tuple[int, _Coefficients]:
        if t not in self._chain:
            visited = self.timesteps.tolist()
            raise ValueError(
                f"timestep {t} is not in the chain of {len(visited)} steps from {visited[0]} to {visited[-1]}"
                " that set_timesteps made; pass one of scheduler.timesteps."
            )
        return self._chain[t]

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample unchanged: DDPM's model input needs no scaling."""
        return sample

    # Coefficients: those of one timestep are rows of tables, those of a pair (t, s) are computed when requested

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A table of `_ROWS` as [K, T] on a device: computed in float64 on the CPU, cast once, kept."""
        key = name, device, dtype
        if key in self._tables:
            return self._tables[key]
        with torch.inference_mode(False):  # what is kept must not be an inference tensor
            table = torch.stack(_ROWS[name](self)).to(dtype).to(device)
        if type(table) is torch.Tensor and not torch.compiler.is_compiling():  # else it lives only while it is traced
            self._tables[key] = table
        return table

    def _columns(self, name: str, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of a table at timesteps [N], each [N, 1, ...] in the working precision of a sample.

        Raises:
            ValueError: a timestep outside 0..T-1, where the lookup itself detects it (on a CPU).
        """
        table = self._table(name, like.device, self._working_dtype(like))
        try:
            columns = table.index_select(1, timesteps)  # [K, N]
        except (IndexError, RuntimeError) as error:
            raise self._outside(timesteps, 0) or error from error
        return columns.reshape(len(table), -1, *[1] * (like.ndim - 1)).unbind()

    def _outside(self, timesteps: torch.Tensor, lowest: int) -> ValueError | None:
        """The error for timesteps that leave the tables, or None if they do not."""
        low, high = int(timesteps.min()), int(timesteps.max())
        if low >= lowest and high < len(self.betas):
            return None
        return ValueError(f"timesteps from {low} to {high} leave the range {lowest}..{len(self.betas) - 1}")

    def _log_alpha_bar_at(self, timesteps: torch.Tensor, lowest: int = -1) -> torch.Tensor:
        """log ᾱ at the timesteps, float64, on their device (on the CPU for MPS, which has no float64)."""
        if timesteps.device.type == "mps":
            timesteps = timesteps.cpu()
        table = self._log_alpha_bar.get(timesteps.device)
        if table is None:
            with torch.inference_mode(False):
                table = self._log_alpha_bar[torch.device("cpu")].to(timesteps.device)
            if type(table) is torch.Tensor and not torch.compiler.is_compiling():
                self._log_alpha_bar[timesteps.device] = table
        try:
            return table[lowest + 1 :].index_select(0, timesteps - lowest)
        except (IndexError, RuntimeError) as error:
            raise self._outside(timesteps, lowest) or error from error

    def _posterior_mean_coefficients(self, log_t: torch.Tensor, log_s: torch.Tensor):
        """The factors of x_0 and x_t in the mean of q(x_s | x_t, x_0) (Ho et al., Eq. 7), from log ᾱ_t and log ᾱ_s."""
        one_minus_t = torch.expm1(log_t)  # the sign cancels in both ratios
        from_x0 = torch.exp(0.5 * log_s) * torch.expm1(log_t - log_s) / one_minus_t
        from_sample = torch.exp(0.5 * (log_t - log_s)) * torch.expm1(log_s) / one_minus_t
        return from_x0, from_sample

    def _x0_coefficients(self, log_t: torch.Tensor, log_before: torch.Tensor):
        """The factors of x_t and of the model's output in x̂_0, for the config's prediction type.

        From log ᾱ_t and log ᾱ_{t-1}.
        """
        prediction_type = self.config.prediction_type
        if prediction_type == "epsilon":  # Ho et al., Eq. 15
            return torch.exp(-0.5 * log_t), -torch.sqrt(torch.expm1(-log_t))
        if prediction_type == "sample":
            return torch.zeros_like(log_t), torch.ones_like(log_t)
        if prediction_type == "v_prediction":  # Salimans & Ho 2022, App. D
            return torch.exp(0.5 * log_t), -torch.sqrt(-torch.expm1(log_t))
        from_x0, from_sample = self._posterior_mean_coefficients(log_t, log_before)
        return -from_sample / from_x0, 1 / from_x0  # Eq. 7 solved for x_0

    def _coefficients(self, timesteps: torch.Tensor, previous_timesteps: torch.Tensor) -> _Coefficients:
        """All of a reverse step from t to s, float64 [N] each."""
        log_t, log_s = self._log_alpha_bar_at(timesteps, lowest=0), self._log_alpha_bar_at(previous_timesteps)
        posterior_variance, log_beta = self._posterior_variance(log_t, log_s)
        # At the end of a chain β̃ is 0: its log is that of the step into t, in the full chain t=1's (Ho et al.'s code).
        into = torch.clamp(2 * timesteps + 1, max=len(self.betas) - 1)
        variance_into, _ = self._posterior_variance(self._log_alpha_bar_at(into), log_t)
        last_log = torch.where((into > timesteps).to(log_t.device), torch.log(variance_into), log_beta)
        min_log = torch.where((previous_timesteps < 0).to(log_t.device), last_log, torch.log(posterior_variance))
        return _Coefficients(
            *self._x0_coefficients(log_t, self._log_alpha_bar_at(timesteps - 1)),
            *self._posterior_mean_coefficients(log_t, log_s),
            posterior_variance,
            min_log,
            log_beta,
            torch.exp(min_log),
            torch.exp(log_beta),
        )

    @staticmethod
    def _posterior_variance(log_t: torch.Tensor, log_s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """β̃ of the step from t to s (Ho et al., Eq. 7), and log β_{t|s}."""
        beta = -torch.expm1(log_t - log_s)
        return beta * (torch.expm1(log_s) / torch.expm1(log_t)), torch.log(beta)

    def _checked(self, timesteps: Timesteps, device: torch.device, lowest: int = 0) -> torch.Tensor:
        """Timesteps as a LongTensor [N] or [1] on the device. Numbers are checked here, tensors by their lookup.

        Reading a tensor's values would make a GPU's host wait, and break compiled graphs and vmap.
        """
        if not isinstance(timesteps, torch.Tensor):
            try:
                timesteps = torch.as_tensor(timesteps)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"timesteps={timesteps!r}: give whole numbers from {lowest}") from error
            if not timesteps.is_floating_point() and timesteps.numel() and (out := self._outside(timesteps, lowest)):
                raise out
        if timesteps.is_floating_point() or timesteps.dtype == torch.bool:
            raise ValueError(f"timesteps of {timesteps.dtype}: must be whole numbers, the positions in the chain")
        return timesteps.to(device=device, dtype=torch.int64).reshape(-1)

    def _step_columns(
        self, timesteps: Timesteps, previous_timesteps: Timesteps | None, like: torch.Tensor
    ) -> tuple[_Coefficients, torch.Tensor]:
        """The coefficients of the step from t to s that broadcast against a sample, and where s = -1 [N, 1, ...]."""
        timesteps = self._checked(timesteps, like.device)
        if previous_timesteps is None:  # the full chain: rows of a table
            return _Coefficients(*self._columns("step", timesteps, like)), self._spread(timesteps == 0, like)
        previous_timesteps = self._checked(previous_timesteps, like.device, lowest=-1)
        timesteps, previous_timesteps = torch.broadcast_tensors(timesteps, previous_timesteps)
        columns = self._coefficients(timesteps, previous_timesteps)
        return _Coefficients(*(self._cast(one, like) for one in columns)), self._spread(previous_timesteps < 0, like)

    @staticmethod
    def _spread(column: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[N] as [N, 1, ...], which broadcasts against a sample."""
        return column.reshape(-1, *[1] * (like.ndim - 1))

    @staticmethod
    def _working_dtype(sample: torch.Tensor) -> torch.dtype:
        """Half precision is computed in float32 and rounded once, at the end."""
        return torch.float64 if sample.dtype == torch.float64 else torch.float32

    def _cast(self, column: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A float64 column [N] as [N, 1, ...] in the working precision of a sample: the one cast there is."""
        return self._spread(column.to(self._working_dtype(like)).to(like.device), like)  # [N, 1, ...]

    def _mix(self, a: torch.Tensor, x: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """a·x + b·y for columns a, b [N, 1, ...] and samples x, y, in x's dtype."""
        if x.dtype == y.dtype == a.dtype:
            return torch.addcmul(a * x, b, y)
        return torch.addcmul(a * x.to(a.dtype), b, y.to(a.dtype)).to(x.dtype)

    # q: the forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, a sample of q(x_t | x_0) (Ho et al., Eq. 4).

        Args: x_0 and ε [N, C, ...]; timesteps an int or LongTensor [N]. Returns [N, C, ...] in x_0's dtype.
        """
        signal, deviation = self._marginal(timesteps, original_samples)
        return self._mix(signal, original_samples, deviation, noise)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (Salimans & Ho 2022, App. D), for x_0 = `sample` [N, C, ...]."""
        signal, deviation = self._marginal(timesteps, sample)
        return self._mix(-deviation, sample, signal, noise)

    def _marginal(self, timesteps: Timesteps, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """√ᾱ_t and √(1-ᾱ_t), [N, 1, ...]."""
        return self._columns("marginal", self._checked(timesteps, like.device), like)

    def q_mean_variance(self, x_start: torch.Tensor, timesteps: Timesteps) -> GaussianMoments:
        """Moments of q(x_t | x_0) (Ho et al., Eq. 4); the mean [N, C, ...], the variances [N, 1, ...]."""
        return self._moments("marginal_moments", x_start, timesteps)

    def q_step_mean_variance(self, x_previous: torch.Tensor, timesteps: Timesteps) -> GaussianMoments:
        """Moments of q(x_t | x_{t-1}), one step forward (Ho et al., Eq. 2)."""
        return self._moments("forward_step_moments", x_previous, timesteps)

    def _moments(self, name: str, x: torch.Tensor, timesteps: Timesteps) -> GaussianMoments:
        scale, variance, log_variance = self._columns(name, self._checked(timesteps, x.device), x)
        return GaussianMoments((scale * x).to(x.dtype), variance.to(x.dtype), log_variance.to(x.dtype))

    def q_posterior_mean_variance(
        self,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: Timesteps,
        previous_timesteps: Timesteps | None = None,
    ) -> GaussianMoments:
        """Moments of q(x_s | x_t, x_0) (Ho et al., Eqs. 6 and 7), s being `previous_timesteps` or t-1.

        At s = -1 the variance is 0 and `log_variance` is clipped to that of the step from min(2t+1, T-1) to t.
        """
        c, _ = self._step_columns(timesteps, previous_timesteps, x_t)
        mean = self._mix(c.mean_from_x0, x_start, c.mean_from_sample, x_t)
        return GaussianMoments(mean, c.posterior_variance.to(x_t.dtype), c.min_log_variance.to(x_t.dtype))

    # p: what a model's output says

    def training_target(self, x_start: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """What the network should output at x_t = add_noise(x_start, noise, timesteps), for the prediction type."""
        prediction_type = self.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x_start
        if prediction_type == "v_prediction":
            return self.get_velocity(x_start, noise, timesteps)
        return self.q_posterior_mean_variance(x_start, self.add_noise(x_start, noise, timesteps), timesteps).mean

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: Timesteps, x_t: torch.Tensor
    ) -> torch.Tensor:
        """x̂_0 [N, C, ...] from the model's output, not clipped. A learned variance's half of it is ignored."""
        from_sample, from_output = self.x0_coefficients(timesteps, x_t)
        return self._mix(from_sample, x_t, from_output, self._split(model_output, x_t)[0])

    def x0_coefficients(self, timesteps: Timesteps, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The factors of x_t and of the model's output in x̂_0, [N, 1, ...] to broadcast against a sample `like`."""
        return self._columns("x0", self._checked(timesteps, like.device), like)

    def predict_epsilon(self, x_start: torch.Tensor, timesteps: Timesteps, x_t: torch.Tensor) -> torch.Tensor:
        """The ε that takes x_0 to x_t: (x_t - √ᾱ_t x_0) / √(1-ᾱ_t), in x_t's dtype."""
        from_sample, from_x0 = self._columns("epsilon", self._checked(timesteps, x_t.device), x_t)
        return self._mix(from_sample, x_t, from_x0, x_start)

    def _split(self, model_output: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output proper, and the learned variance's half where there is one."""
        if min(model_output.ndim, x_t.ndim) < 2:
            raise ValueError(
                f"a model output of shape {tuple(model_output.shape)} and a sample of {tuple(x_t.shape)}: [N, C, ...]"
            )
        if self.variance_type not in LEARNED_VARIANCE_TYPES:
            if model_output.shape[1] != x_t.shape[1]:
                raise ValueError(
                    f"the model outputs {model_output.shape[1]} channels for a sample of {x_t.shape[1]}; if it learned"
                    " its variance, the scheduler requires variance_type='learned_range' (or 'learned')"
                )
            return model_output, None
        if model_output.shape[1] != 2 * x_t.shape[1]:
            raise ValueError(
                f"variance_type={self.variance_type!r} requires {2 * x_t.shape[1]} output channels and the model has"
                f" {model_output.shape[1]}; build it with out_channels={2 * x_t.shape[1]}, or use a fixed variance"
            )
        return model_output.chunk(2, dim=1)

    def clip(self, x_start: torch.Tensor, clip_sample: bool | None = None) -> torch.Tensor:
        """x̂_0 clipped or thresholded; None means as the config says."""
        if clip_sample is False:
            return x_start
        if self.config.thresholding:
            return self._threshold_sample(x_start)
        if clip_sample or self.config.clip_sample:
            return x_start.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_start

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding (Saharia et al. 2022, sec. 2.3): clip to a percentile of |x̂_0| and divide by it."""
        flat = sample.flatten(1).to(self._working_dtype(sample))  # [N, C·H·W]
        s = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        s = s.clamp(min=1, max=self.config.sample_max_value)
        return (flat.clamp(-s, s) / s).reshape(sample.shape).to(sample.dtype)

    def _predict_mean(self, c: _Coefficients, output: torch.Tensor, x_t: torch.Tensor, clip_sample: bool | None):
        """The mean of p(x_s | x_t) and x̂_0, by Ho et al.'s Eq. 7 with x̂_0 in the place of x_0."""
        pred_x0 = _affine(c.x0_from_sample, x_t, c.x0_from_output, output)
        clipped = self.clip(pred_x0, clip_sample)
        # With posterior_mean the raw output is the mean, and clipping touches x̂_0 alone.
        for_mean = pred_x0 if self.config.prediction_type == "posterior_mean" else clipped
        return _affine(c.mean_from_sample, x_t, c.mean_from_x0, for_mean), clipped

    def _log_variance(self, c: _Coefficients, variance_output: torch.Tensor | None, last):
        """log Σ of p(x_s | x_t); `last` says where s = -1 (a bool, or a tensor that broadcasts)."""
        if self.variance_type == "learned":
            return variance_output
        if self.variance_type == "learned_range":  # Nichol & Dhariwal, Eq. 15
            fraction = (variance_output + 1) / 2
            return fraction * c.max_log_variance + (1 - fraction) * c.min_log_variance
        if self.variance_type in ("fixed_large", "fixed_large_log"):
            if isinstance(last, torch.Tensor):
                return torch.where(last, c.min_log_variance, c.max_log_variance)
            return c.min_log_variance if last else c.max_log_variance
        return c.min_log_variance

    def p_mean_variance(
        self,
        model_output: torch.Tensor,
        timesteps: Timesteps,
        x_t: torch.Tensor,
        previous_timesteps: Timesteps | None = None,
        clip_sample: bool | None = None,
    ) -> PredictedMoments:
        """Moments of p(x_s | x_t) as the model's output gives them (Ho et al., Eqs. 7, 11 and 15).

        Args:
            model_output: [N, C, ...], or [N, 2C, ...] with a learned variance.
            timesteps, previous_timesteps: ints or LongTensors [N]; None means t-1, and -1 the data.
            x_t: [N, C, ...].
            clip_sample: whether to clip (or threshold) x̂_0; None means as the config says.

        Returns: `PredictedMoments` in x_t's dtype.
        """
        c, last = self._step_columns(timesteps, previous_timesteps, x_t)
        dtype = self._working_dtype(x_t)
        output, variance_output = self._split(model_output.to(dtype), x_t)
        mean, pred_x0 = self._predict_mean(c, output, x_t.to(dtype), clip_sample)
        if self.config.prediction_type == "posterior_mean":
            if previous_timesteps is None:
                mean = output
            else:
                following = self._checked(timesteps, x_t.device) - 1
                full_chain = self._checked(previous_timesteps, x_t.device, lowest=-1) == following
                mean = torch.where(self._spread(full_chain, x_t), output, mean)
        log_variance = self._log_variance(c, variance_output, last)
        if variance_output is not None:
            variance = torch.exp(log_variance)
        elif self.variance_type in ("fixed_large", "fixed_large_log"):
            variance = torch.where(last, c.min_variance, c.max_variance)
        else:
            variance = c.posterior_variance  # 0 where s = -1, though its clipped log is not -inf
        return PredictedMoments(*(moment.to(x_t.dtype) for moment in (mean, variance, log_variance, pred_x0)))

    def _get_variance(
        self, t: int, predicted_variance: torch.Tensor | None = None, variance_type: str | None = None
    ) -> torch.Tensor:
        """The variance (never a log or a deviation) of the chain's step from t; float64 where it is fixed."""
        s, c = self._step_from(int(t))
        variance_type = variance_type or self.config.variance_type
        if variance_type == "learned":
            return torch.exp(predicted_variance)
        if variance_type == "learned_range":
            fraction = (predicted_variance + 1) / 2
            return torch.exp(fraction * c.max_log_variance + (1 - fraction) * c.min_log_variance)
        if variance_type in ("fixed_large", "fixed_large_log"):
            return torch.tensor(c.min_variance if s < 0 else c.max_variance, dtype=torch.float64)
        return torch.tensor(c.posterior_variance, dtype=torch.float64)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step down the chain: x_s = mean + σ z, with no noise at the chain's last step (Ho et al., Alg. 2).

        Args:
            model_output: [N, C, ...], or [N, 2C, ...] with a learned variance.
            timestep: one of `self.timesteps`. An int or a CPU tensor costs no host synchronisation.
            sample: x_t [N, C, ...].
            generator: of the noise z; a list has one for each sample.

        Returns: `prev_sample` and `pred_original_sample`, [N, C, ...] in the sample's dtype.
        """
        t = int(timestep)
        if isinstance(timestep, float) and t != timestep:
            raise ValueError(f"timestep {timestep} is no whole number; pass one of scheduler.timesteps")
        s, c = self._step_from(t)
        dtype = self._working_dtype(sample)
        output, variance_output = self._split(model_output.to(dtype), sample)
        x_t = sample.to(dtype)
        mean, pred_x0 = self._predict_mean(c, output, x_t, None)
        if self.config.prediction_type == "posterior_mean" and s == t - 1:
            mean = output
        if s >= 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            log_variance = self._log_variance(c, variance_output, last=False)
            if isinstance(log_variance, torch.Tensor):
                mean = torch.addcmul(mean, torch.exp(0.5 * log_variance), noise.to(dtype))
            else:
                mean = torch.add(mean, noise, alpha=math.exp(0.5 * log_variance))
        prev_sample, pred_x0 = mean.to(sample.dtype), pred_x0.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_x0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_x0)

    # What is refused, and the way out

    def check_invertible(self, timesteps: Iterable[int]) -> None:
        """Raise ValueError if x̂_0 would divide by √ᾱ = 0 at one of the timesteps (ᾱ_T = 0 with `epsilon`)."""
        if self.config.prediction_type != "epsilon":
            return
        for t in sorted({int(t) for t in timesteps}):
            if t < len(self.betas) and self.exact_tables.alphas_cumprod[t] == 0:
                raise ValueError(
                    f"zero terminal SNR: at timestep {t} nothing of the image is left, and epsilon prediction"
                    " divides by zero there. Use prediction_type='v_prediction' (or 'sample'), or a schedule with"
                    " ᾱ_T > 0 (and rescale_betas_zero_snr=False)."
                )


def _marginal_rows(scheduler: DDPMScheduler) -> list[torch.Tensor]:
    """√ᾱ_t and √(1-ᾱ_t)."""
    log_t = scheduler._log_alpha_bar[torch.device("cpu")][1:]
    return [torch.exp(0.5 * log_t), torch.sqrt(-torch.expm1(log_t))]


def _marginal_moments_rows(scheduler: DDPMScheduler) -> list[torch.Tensor]:
    """Of q(x_t | x_0): √ᾱ_t, 1-ᾱ_t and its log."""
    log_t = scheduler._log_alpha_bar[torch.device("cpu")][1:]
    return [torch.exp(0.5 * log_t), -torch.expm1(log_t), torch.log(-torch.expm1(log_t))]


def _forward_step_moments_rows(scheduler: DDPMScheduler) -> list[torch.Tensor]:
    """Of q(x_t | x_{t-1}): √α_t, β_t and its log."""
    log_alpha = scheduler._log_alpha_bar[torch.device("cpu")].diff()
    return [torch.exp(0.5 * log_alpha), -torch.expm1(log_alpha), torch.log(-torch.expm1(log_alpha))]


def _epsilon_rows(scheduler: DDPMScheduler) -> list[torch.Tensor]:
    """The factors of x_t and x_0 in ε."""
    signal, deviation = _marginal_rows(scheduler)
    return [1 / deviation, -signal / deviation]


def _x0_rows(scheduler: DDPMScheduler) -> list[torch.Tensor]:
    """The factors of x_t and the model's output in x̂_0."""
    log_alpha_bar = scheduler._log_alpha_bar[torch.device("cpu")]
    return list(scheduler._x0_coefficients(log_alpha_bar[1:], log_alpha_bar[:-1]))


def _step_rows(scheduler: DDPMScheduler) -> list[torch.Tensor]:
    """`_Coefficients` of the full chain's steps, from t to t-1."""
    timesteps = torch.arange(len(scheduler.betas))
    return list(scheduler._coefficients(timesteps, timesteps - 1))


# name -> rows of float64 [T]
_ROWS = {
    "marginal": _marginal_rows,
    "marginal_moments": _marginal_moments_rows,
    "forward_step_moments": _forward_step_moments_rows,
    "epsilon": _epsilon_rows,
    "x0": _x0_rows,
    "step": _step_rows,
}
