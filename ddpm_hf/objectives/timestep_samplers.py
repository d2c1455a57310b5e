"""Timestep samplers: from uniform numbers in [0, 1) to timesteps and the weights that keep the loss unbiased."""

import torch


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
        """Restore what `state_dict` returned."""
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"the checkpoint's timestep sampler remembers {tuple(state['history'].shape)} losses and this run"
                f" {tuple(self.history.shape)}; resume with the same --ddpm_num_steps"
            )
        self.history, self.counts = state["history"].clone(), state["counts"].clone()


TIMESTEP_SAMPLERS = {"uniform": UniformTimestepSampler, "loss_second_moment": LossSecondMomentSampler}
