"""Training losses, the terms of the variational bound, and the samplers of training timesteps.

Sources: Ho et al. 2020 (the simple objective and the bound), Nichol & Dhariwal 2021 (the hybrid objective and
importance sampling of t), Hang et al. 2023 (min-SNR weighting).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .functional import LOG2, discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .portable.scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES, DDPMScheduler, Timesteps


class VariationalTerms(NamedTuple):
    """One term of the variational bound, in bits per dimension [N], and the x̂_0 [N, C, ...] it was computed with."""

    bits_per_dim: torch.Tensor
    pred_original_sample: torch.Tensor


# The variational bound


def vb_terms_bpd(
    scheduler: DDPMScheduler,
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    timesteps: Timesteps,
    previous_timesteps: Timesteps | None = None,
    clip_sample: bool = True,
) -> VariationalTerms:
    """The bound's term of the step from t to s: L_{t-1}, or the decoder's L_0 where s = -1 (Ho et al., Eq. 5).

    Args:
        model_output: [N, C, ...], or [N, 2C, ...] with a learned variance, at x_t [N, C, ...].
        x_start: images in [-1, 1], on the 256 levels of a byte.
        timesteps, previous_timesteps: ints or LongTensors [N]; None means t-1, and -1 the data.
        clip_sample: whether x̂_0 is clipped to [-1, 1]; False for training.

    Raises:
        ValueError: timesteps outside 0..T-1, or an output of other channels than `variance_type` requires.
    """
    true = scheduler.q_posterior_mean_variance(x_start, x_t, timesteps, previous_timesteps)
    predicted = scheduler.p_mean_variance(model_output, timesteps, x_t, previous_timesteps, clip_sample=clip_sample)
    kl = mean_flat(normal_kl(true.mean, true.log_variance, predicted.mean, predicted.log_variance))
    decoder = mean_flat(discretized_gaussian_log_likelihood(x_start, predicted.mean, 0.5 * predicted.log_variance))
    previous = timesteps - 1 if previous_timesteps is None else previous_timesteps
    last = torch.as_tensor(previous, device=x_start.device) < 0
    return VariationalTerms(torch.where(last, -decoder, kl) / LOG2, predicted.pred_original_sample)


def prior_bpd(scheduler: DDPMScheduler, x_start: torch.Tensor) -> torch.Tensor:
    """KL(q(x_T | x_0) ‖ N(0, I)) in bits per dimension [N], for images x_0 [N, C, ...] in [-1, 1].

    It is the bound's term that no training changes.
    """
    q = scheduler.q_mean_variance(x_start, len(scheduler) - 1)
    zero = torch.zeros_like(x_start)
    return mean_flat(normal_kl(q.mean, q.log_variance, zero, zero)) / LOG2


# The simple objective: a loss between output and target, and its weight by signal-to-noise ratio

# name -> elementwise loss(output, target)
LOSS_TYPES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l2": lambda output, target: (output - target) ** 2,
    "l1": lambda output, target: (output - target).abs(),
    "huber": lambda output, target: F.huber_loss(output, target, reduction="none"),
}


def min_snr_weights(
    scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Weights [N] that make a squared error weigh min(SNR, γ) on x_0 (Hang et al. 2023, Eq. 6).

    An error of the output is an error of x̂_0 times its factor k in x̂_0, so the weight is min(SNR, γ)·k²: the known
    min(SNR, γ)/SNR for epsilon and min(SNR, γ)/(SNR + 1) for v_prediction.
    """
    one = torch.ones(len(timesteps), 1, device=timesteps.device, dtype=dtype)
    signal = scheduler.q_mean_variance(one, timesteps)
    snr = (signal.mean**2 / signal.variance).flatten()
    if scheduler.config.prediction_type == "epsilon":
        return torch.where(snr > 0, snr.clamp(max=snr_gamma) / snr, 1.0)  # the limit, where SNR is 0
    _, from_output = scheduler.x0_coefficients(timesteps, one)
    return snr.clamp(max=snr_gamma) * from_output.flatten() ** 2


def simple_losses(
    scheduler: DDPMScheduler,
    output: torch.Tensor,
    x_start: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    loss_type: str = "l2",
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """The mean loss between output and target (Ho et al., Eq. 14), [N]; with `snr_gamma`, weighted by min-SNR."""
    losses = mean_flat(LOSS_TYPES[loss_type](output, scheduler.training_target(x_start, noise, timesteps)))
    if snr_gamma is not None:
        losses = losses * min_snr_weights(scheduler, timesteps, snr_gamma, losses.dtype)
    return losses


# Objectives: name -> losses(scheduler, model_output, x_start, noise, timesteps, options) [N]


class LossOptions(NamedTuple):
    """What refines an objective; see `training_losses`."""

    loss_type: str = "l2"
    snr_gamma: float | None = None
    vlb_weight: float = 0.001


def _simple(scheduler, model_output, x_start, noise, timesteps, options: LossOptions):
    output = model_output[:, : x_start.shape[1]]  # a learned variance's half gets no gradient
    return simple_losses(scheduler, output, x_start, noise, timesteps, options.loss_type, options.snr_gamma)


def _vlb(scheduler, model_output, x_start, noise, timesteps, options: LossOptions):
    x_t = scheduler.add_noise(x_start, noise, timesteps)
    return (
        len(scheduler) * vb_terms_bpd(scheduler, model_output, x_start, x_t, timesteps, clip_sample=False).bits_per_dim
    )


def _hybrid(scheduler, model_output, x_start, noise, timesteps, options: LossOptions):
    mean, variance = model_output.chunk(2, dim=1)
    variance_alone = torch.cat([mean.detach(), variance], dim=1)  # Nichol & Dhariwal, sec. 3.1
    bound = _vlb(scheduler, variance_alone, x_start, noise, timesteps, options)
    return _simple(scheduler, model_output, x_start, noise, timesteps, options) + options.vlb_weight * bound


OBJECTIVES = {"simple": _simple, "vlb": _vlb, "hybrid": _hybrid}


def check_objective(
    scheduler: DDPMScheduler, objective: str, loss_type: str = "l2", snr_gamma: float | None = None
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
    if objective == "vlb" and (loss_type != "l2" or snr_gamma is not None):
        raise ValueError("objective='vlb' has no loss_type or snr_gamma; leave them out, or use objective='simple'")
    if snr_gamma is not None and not snr_gamma > 0:
        raise ValueError(f"snr_gamma={snr_gamma} must be positive; 5 is the paper's")


def training_losses(
    scheduler: DDPMScheduler,
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    objective: str = "simple",
    loss_type: str = "l2",
    snr_gamma: float | None = None,
    vlb_weight: float = 0.001,
) -> torch.Tensor:
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
        snr_gamma: γ of min-SNR weighting, for `simple`.

    Raises:
        ValueError: an unknown name, or a combination that cannot train.
    """
    check_objective(scheduler, objective, loss_type, snr_gamma)
    options = LossOptions(loss_type, snr_gamma, vlb_weight)
    return OBJECTIVES[objective](scheduler, model_output, x_start, noise, timesteps, options)


# Timestep samplers: from uniform numbers in [0, 1) to timesteps and the weights that keep the loss unbiased


class UniformTimestepSampler:
    """t uniform over 0..T-1, every weight 1."""

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def sample(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (LongTensor [N]) and weights (float32 [N]) for numbers u in [0, 1), float64 [N]."""
        timesteps = (uniforms * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        return timesteps, torch.ones(uniforms.shape, dtype=torch.float32, device=uniforms.device)

    def update_with_losses(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Nothing to learn from the losses."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing to restore."""


class LossSecondMomentSampler:
    """p(t) ∝ √E[L_t²] over the last losses seen at t (Nichol & Dhariwal 2021, Eq. 18), for `objective='vlb'`.

    Uniform until every timestep has `history_per_term` losses; then mixed with a uniform share, so that none is ever
    forgotten. Give `update_with_losses` the losses of all ranks, in the same order on each: they then agree on p.
    """

    def __init__(
        self, num_train_timesteps: int, history_per_term: int = 10, uniform_probability: float = 0.001
    ) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.uniform_probability = uniform_probability
        self.history = torch.zeros(num_train_timesteps, history_per_term, dtype=torch.float64)  # oldest first
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.int64)

    def probabilities(self) -> torch.Tensor:
        """p(t) [T], float64, summing to 1."""
        if (self.counts < self.history.shape[1]).any():
            return torch.full_like(self.counts, 1, dtype=torch.float64) / self.num_train_timesteps
        weights = self.history.square().mean(dim=1).sqrt()
        if not weights.sum() > 0:
            weights = torch.ones_like(weights)
        return (1 - self.uniform_probability) * weights / weights.sum() + (
            self.uniform_probability / self.num_train_timesteps
        )

    def sample(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (LongTensor [N]) by the inverse of p's CDF at u in [0, 1); weights 1/(T·p(t)) (float32 [N])."""
        p = self.probabilities()
        cdf = p.cumsum(0)
        timesteps = torch.searchsorted(cdf, uniforms.cpu().double() * cdf[-1], right=True)
        timesteps = timesteps.clamp(max=self.num_train_timesteps - 1)
        weights = 1.0 / (self.num_train_timesteps * p[timesteps])
        return timesteps.to(uniforms.device), weights.float().to(uniforms.device)

    def update_with_losses(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember the (unweighted) losses seen at the timesteps, both [N]; those that are not finite are left out."""
        for t, loss in zip(timesteps.tolist(), losses.tolist()):
            if loss - loss != 0:  # inf or nan
                continue
            self.history[t] = self.history[t].roll(-1)
            self.history[t, -1] = loss
            self.counts[t] = min(int(self.counts[t]) + 1, self.history.shape[1])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The losses remembered, as tensors."""
        return {"history": self.history, "counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave."""
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"the checkpoint's timestep sampler remembers {tuple(state['history'].shape)} losses and this run"
                f" {tuple(self.history.shape)}; resume with the same --ddpm_num_steps"
            )
        self.history, self.counts = state["history"].clone(), state["counts"].clone()


TIMESTEP_SAMPLERS = {"uniform": UniformTimestepSampler, "loss_second_moment": LossSecondMomentSampler}
