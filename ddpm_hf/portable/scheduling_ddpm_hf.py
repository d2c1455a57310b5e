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
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as StockDDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .coefficients_ddpm_hf import (
    FITTED,
    FIXED_VARIANCE_TYPES,
    LEARNED_VARIANCE_TYPES,
    Coefficients,
    ExactTables,
    StepCoefficients,
    Timesteps,
    as_column,
    combine,
    working_dtype,
)
from .schedules_ddpm_hf import (
    BETA_SCHEDULE_ALIASES,
    BETA_SCHEDULES,
    STOCK_BETA_SCHEDULES,
    rescale_zero_terminal_snr,
    without_old_keys,
)

if TYPE_CHECKING:  # Diffusers' decorator has no types, and would hide the arguments from type checkers
    Init = TypeVar("Init")

    def register_to_config(init: Init) -> Init:
        """What a method `__init__` looks like once it is decorated."""
        return init
else:
    from diffusers.configuration_utils import register_to_config

logger = logging.get_logger(__name__)

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")
VARIANCE_TYPES = FIXED_VARIANCE_TYPES + LEARNED_VARIANCE_TYPES
# A table in the config, which stock ignores: with the underscore it does not even warn, and other samplers keep it
X_START_VARIANCES = "_x_start_variances"
DIFFUSION_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
# What the noise of the last noisy step is on average, at most: a grey level of 255 (Bao et al. 2022)
LAST_LOG_VARIANCE = 2 * math.log(2 / 255 / math.sqrt(2 / math.pi))


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
    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    timesteps: torch.Tensor
    variance_type: str
    num_inference_steps: int | None
    custom_timesteps: bool
    _coefficients: Coefficients

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
        self._coefficients = Coefficients(betas)
        # float32 as in stock: people index them by hand. Nothing here computes with them.
        self.betas, self.alphas, self.alphas_cumprod = (table.float() for table in self.exact_tables)
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0  # x_T ~ N(0, I)
        self.variance_type = variance_type

        self.custom_timesteps = False
        self.num_inference_steps = None
        self._set_chain(np.arange(num_train_timesteps - 1, -1, -1))

    def _resolve_betas(
        self,
        num_train_timesteps: int,
        beta_start: float,
        beta_end: float,
        beta_schedule: str,
        trained_betas: np.ndarray | list[float] | None,
    ) -> np.ndarray:
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

        A schedule that these name replaces one that the config carries as `trained_betas`; it has no fitted variances.
        """
        config = without_old_keys(config)
        renamed = set(DIFFUSION_SETTINGS) & set(kwargs)
        if renamed and isinstance(config, dict):
            config = {key: value for key, value in config.items() if key != X_START_VARIANCES}
            if "trained_betas" not in kwargs and ("beta_schedule" in kwargs or _is_record(config)):
                config["trained_betas"] = None
        result = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = result[0] if return_unused_kwargs else result
        if scheduler.config.get(X_START_VARIANCES) is not None:
            scheduler.use_x_start_variances(scheduler.config[X_START_VARIANCES])
        return result

    def use_x_start_variances(self, variances: Sequence[float] | None) -> None:
        """Take the reverse variance that Var[x_0 | x_t] implies, in chains of any spacing (Analytic-DPM).

        It replaces a fixed variance, in sampling and in the bound, and is saved with the config; a learned one stays.
        σ² = β̃ + (√ᾱ_s β_{t|s}/(1-ᾱ_t))² Var[x_0 | x_t] (Bao et al. 2022, https://arxiv.org/abs/2201.06503).

        Args:
            variances: Var[x_0 | x_t] for t = 0..T-1, the mean over the dimensions, in units of the data; None: none.

        Raises:
            ValueError: not T numbers of 0 or more.
        """
        table = None
        if variances is not None:
            try:
                table = np.array(variances, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{X_START_VARIANCES}={variances!r}: give a number for each timestep") from error
            if table.shape != (len(self.betas),) or not (np.isfinite(table) & (table >= 0)).all():
                raise ValueError(
                    f"{X_START_VARIANCES} of shape {table.shape}: give {len(self.betas)} numbers of 0 or more, one for"
                    " each timestep; `ddpm-hf fit-variance` measures them"
                )
        self._coefficients = Coefficients(self.exact_tables.betas.numpy(), table)
        if self.config.variance_type not in LEARNED_VARIANCE_TYPES:
            self.variance_type = self.config.variance_type if table is None else FITTED
        if table is not None or X_START_VARIANCES in self.config:
            self.register_to_config(**{X_START_VARIANCES: None if table is None else table.tolist()})
        self._set_chain(self.timesteps.cpu().numpy(), self.timesteps.device)

    @property
    def x_start_variances(self) -> torch.Tensor | None:
        """Var[x_0 | x_t] as `use_x_start_variances` took it, float64 [T]; None without one."""
        return self._coefficients.x_start_variances

    @property
    def exact_tables(self) -> ExactTables:
        """The float64 tables that `betas`, `alphas` and `alphas_cumprod` are rounded from; save and compare these."""
        return self._coefficients.exact

    # The chain

    def _set_chain(self, timesteps: np.ndarray, device: str | torch.device | None = None) -> None:
        self.timesteps = torch.from_numpy(np.ascontiguousarray(timesteps, dtype=np.int64)).to(device)
        visited = torch.from_numpy(np.ascontiguousarray(timesteps, dtype=np.int64))
        # trained_betas may be fewer than T (stock allows it); the chain then has steps that no table knows
        visited = visited[visited < len(self.betas)]
        following = torch.cat([visited[1:], torch.tensor([-1])])
        coefficients = self._coefficients.of_steps(visited, following, self.config.prediction_type)
        columns = [column.tolist() for column in coefficients]
        self._chain = {
            t: (s, StepCoefficients(*row)) for t, s, *row in zip(visited.tolist(), following.tolist(), *columns)
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
        if timesteps is not None and num_inference_steps is None:
            chain = np.asarray(timesteps)
            if chain.ndim != 1 or (chain.size and chain.dtype.kind not in "iu"):
                raise ValueError(f"`timesteps` {timesteps!r}: give whole numbers, descending.")
            if len(chain) == 0:
                raise ValueError("`timesteps` is empty; give at least one timestep.")
            if (np.diff(chain) >= 0).any():
                raise ValueError("`custom_timesteps` must be in descending order.")
            if chain[0] >= T:
                raise ValueError(f"`timesteps` must start before `self.config.train_timesteps`: {T}.")
            if chain[-1] < 0:
                raise ValueError(f"`timesteps` must not be negative; the last is {chain[-1]}.")
        elif num_inference_steps is not None and timesteps is None:
            if not 1 <= num_inference_steps <= T or num_inference_steps != int(num_inference_steps):
                raise ValueError(
                    f"`num_inference_steps`: {num_inference_steps} cannot be smaller than 1 or larger than"
                    f" `self.config.train_timesteps`: {T}, the timesteps that the model was trained with."
                )
            chain = self._spaced_timesteps(int(num_inference_steps))
        else:
            raise ValueError("Can only pass one of `num_inference_steps` or `custom_timesteps`.")
        # only now: a refused call leaves the chain as it was
        self.custom_timesteps = num_inference_steps is None
        self.num_inference_steps = num_inference_steps
        self._set_chain(chain, device)

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

    def _step_from(self, t: int) -> tuple[int, StepCoefficients]:
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

    # q: the forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, a sample of q(x_t | x_0) (Ho et al., Eq. 4).

        Args: x_0 and ε [N, C, ...]; timesteps an int or LongTensor [N]. Returns [N, C, ...] in x_0's dtype.
        """
        signal, deviation = self._coefficients.columns("marginal", timesteps, original_samples)
        return combine(signal, original_samples, deviation, noise)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (Salimans & Ho 2022, App. D), for x_0 = `sample` [N, C, ...]."""
        signal, deviation = self._coefficients.columns("marginal", timesteps, sample)
        return combine(-deviation, sample, signal, noise)

    def q_mean_variance(self, x_start: torch.Tensor, timesteps: Timesteps) -> GaussianMoments:
        """Moments of q(x_t | x_0) (Ho et al., Eq. 4); the mean [N, C, ...], the variances [N, 1, ...]."""
        return self._moments("marginal_moments", x_start, timesteps)

    def q_step_mean_variance(self, x_previous: torch.Tensor, timesteps: Timesteps) -> GaussianMoments:
        """Moments of q(x_t | x_{t-1}), one step forward (Ho et al., Eq. 2)."""
        return self._moments("forward_step_moments", x_previous, timesteps)

    def _moments(self, name: str, x: torch.Tensor, timesteps: Timesteps) -> GaussianMoments:
        scale, variance, log_variance = self._coefficients.columns(name, timesteps, x)
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
        c, _ = self._coefficients.step_columns(timesteps, previous_timesteps, x_t, self.config.prediction_type)
        mean = combine(c.mean_from_x0, x_start, c.mean_from_sample, x_t)
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
        return combine(from_sample, x_t, from_output, self._split(model_output, x_t)[0])

    def x0_coefficients(self, timesteps: Timesteps, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The factors of x_t and of the model's output in x̂_0, [N, 1, ...] to broadcast against a sample `like`."""
        return self._coefficients.columns("x0", timesteps, like, self.config.prediction_type)

    def predict_epsilon(self, x_start: torch.Tensor, timesteps: Timesteps, x_t: torch.Tensor) -> torch.Tensor:
        """The ε that takes x_0 to x_t: (x_t - √ᾱ_t x_0) / √(1-ᾱ_t), in x_t's dtype."""
        from_sample, from_x0 = self._coefficients.columns("epsilon", timesteps, x_t)
        return combine(from_sample, x_t, from_x0, x_start)

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
        flat = sample.flatten(1).to(working_dtype(sample))  # [N, C·H·W]
        s = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        s = s.clamp(min=1, max=self.config.sample_max_value)
        return (flat.clamp(-s, s) / s).reshape(sample.shape).to(sample.dtype)

    def _predict_mean(
        self, c: StepCoefficients, output: torch.Tensor, x_t: torch.Tensor, clip_sample: bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of p(x_s | x_t) and x̂_0, by Ho et al.'s Eq. 7 with x̂_0 for x_0."""
        pred_x0 = combine(c.x0_from_sample, x_t, c.x0_from_output, output)
        clipped = self.clip(pred_x0, clip_sample)
        # With posterior_mean the raw output is the mean, and clipping touches x̂_0 alone.
        for_mean = pred_x0 if self.config.prediction_type == "posterior_mean" else clipped
        return combine(c.mean_from_sample, x_t, c.mean_from_x0, for_mean), clipped

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
        c, last = self._coefficients.step_columns(timesteps, previous_timesteps, x_t, self.config.prediction_type)
        dtype = working_dtype(x_t)
        output, variance_output = self._split(model_output.to(dtype), x_t)
        mean, pred_x0 = self._predict_mean(c, output, x_t.to(dtype), clip_sample)
        if self.config.prediction_type == "posterior_mean":
            if previous_timesteps is None:
                mean = output
            else:
                following = self._coefficients.checked(timesteps, x_t.device) - 1
                full_chain = self._coefficients.checked(previous_timesteps, x_t.device, lowest=-1) == following
                mean = torch.where(as_column(full_chain, x_t), output, mean)
        log_variance = c.log_variance(self.variance_type, variance_output, last)
        variance = c.variance(self.variance_type, log_variance, last)
        return PredictedMoments(*(moment.to(x_t.dtype) for moment in (mean, variance, log_variance, pred_x0)))

    def _get_variance(
        self, t: int, predicted_variance: torch.Tensor | None = None, variance_type: str | None = None
    ) -> torch.Tensor:
        """The variance (never a log or a deviation) of the chain's step from t; float64 where it is fixed."""
        s, c = self._step_from(int(t))
        variance_type = variance_type or self.variance_type
        variance = c.variance(variance_type, c.log_variance(variance_type, predicted_variance, last=s < 0), last=s < 0)
        return variance if isinstance(variance, torch.Tensor) else torch.tensor(variance, dtype=torch.float64)

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
        dtype = working_dtype(sample)
        output, variance_output = self._split(model_output.to(dtype), sample)
        x_t = sample.to(dtype)
        mean, pred_x0 = self._predict_mean(c, output, x_t, None)
        if self.config.prediction_type == "posterior_mean" and s == t - 1:
            mean = output
        if s >= 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            log_variance = c.log_variance(self.variance_type, variance_output, last=False)
            if self.variance_type == FITTED and self.config.clip_sample and self._step_from(s)[0] < 0:
                log_variance = min(log_variance, LAST_LOG_VARIANCE)  # what is left in the image as noise
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
        empty = set((self.exact_tables.alphas_cumprod == 0).nonzero().flatten().tolist())
        if self.config.prediction_type != "epsilon" or not empty:
            return
        for t in sorted({int(t) for t in timesteps}):
            if t in empty:
                raise ValueError(
                    f"zero terminal SNR: at timestep {t} nothing of the image is left, and epsilon prediction"
                    " divides by zero there. Use prediction_type='v_prediction' (or 'sample'), or a schedule with"
                    " ᾱ_T > 0 (and rescale_betas_zero_snr=False)."
                )
