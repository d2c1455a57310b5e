"""A model's own trajectories in many steps, which a sampler in few steps is fitted to: they need no data."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..portable.multistep_ddpm_hf import MAX_ORDER, EpsilonMultistepScheduler, multistep_weights

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t [N, C, H, W], t [N]) -> the model's output
RIDGE = 1e-4  # of the squared norms: what ties the weights to `multistep_weights` where ε hardly changes


class Trajectories(NamedTuple):
    """M solutions x̃(ρ) of the probability flow at G nodes, from T-1 to x_0."""

    timesteps: list[int]  # [G], the last is -1
    rhos: list[float]  # [G]
    states: torch.Tensor  # x̃ [G, M, C, H, W]
    epsilons: torch.Tensor  # ε(x̃, ρ) [G - 1, M, C, H, W]

    def at(self, chain: Sequence[int]) -> torch.Tensor:
        """x̃ at some of the timesteps, [S, M, C, H, W]."""
        return self.states[[self.timesteps.index(t) for t in chain]]


@torch.no_grad()
def follow(
    predict: Predict,
    scheduler: EpsilonMultistepScheduler,
    noise: torch.Tensor,
    chain: Sequence[int],
    batch_size: int,
    weights: Sequence[Sequence[float]] | None = None,
    progress: bool = False,
) -> Trajectories:
    """The trajectories that a chain takes from x_T = noise [M, C, H, W]."""
    nodes = [*chain, -1]
    scales = [scheduler.signal_and_rho(t)[0] for t in nodes]
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    total = len(chain) * math.ceil(len(noise) / batch_size)
    with tqdm(total=total, desc="teacher", unit="call", disable=not progress) as bar:
        for x in noise.split(batch_size):
            scheduler.set_timesteps(timesteps=list(chain), weights=weights)
            states, epsilons = [x / scales[0]], []
            for t, scale in zip(chain, scales[1:]):
                output = predict(x, torch.full((len(x),), t, device=x.device))
                epsilons.append(epsilon_of(scheduler, output, t, x))
                x, _ = scheduler.step(output, t, x, return_dict=False)
                states.append(x / scale)
                bar.update()
            parts.append((torch.stack(states), torch.stack(epsilons)))
    states, epsilons = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
    return Trajectories(nodes, [scheduler.signal_and_rho(t)[1] for t in nodes], states, epsilons)


def epsilon_of(scheduler: EpsilonMultistepScheduler, output: torch.Tensor, t: int, x_t: torch.Tensor) -> torch.Tensor:
    """The ε that the model's output implies."""
    x_start = scheduler.diffusion.predict_original_sample(output, t, x_t)
    return scheduler.diffusion.predict_epsilon(x_start, t, x_t)


@torch.no_grad()
def fit_weights(
    predict: Predict,
    scheduler: EpsilonMultistepScheduler,
    noise: torch.Tensor,
    chain: Sequence[int],
    targets: torch.Tensor,
    batch_size: int,
) -> list[list[float]]:
    """The weights of ε at each step with which the chain comes nearest to the teacher, step by step.

    A step is linear in its weights, so that least squares gives them, on the trajectory that the steps before lead to.
    S4S (Frankel et al. 2025) learns such weights by gradients through the whole chain.

    Args:
        noise: x_T [M, C, H, W].
        targets: x̃ after each step, [S, M, C, H, W].
    """
    rhos = [scheduler.signal_and_rho(t)[1] for t in (*chain, -1)]
    signals = [scheduler.signal_and_rho(t)[0] for t in (*chain, -1)]
    state, history = noise / signals[0], list[torch.Tensor]()
    rows: list[list[float]] = []
    for index, t in enumerate(chain):
        at, parts = torch.full((batch_size,), t, device=noise.device), []
        for x_t in (state * signals[index]).split(batch_size):
            parts.append(epsilon_of(scheduler, predict(x_t, at[: len(x_t)]), t, x_t))
        history = [torch.cat(parts), *history][:MAX_ORDER]
        step = rhos[index + 1] - rhos[index]
        before = rhos[index::-1][: len(history)]
        usual = torch.tensor(multistep_weights(before, rhos[index + 1]), dtype=torch.float64)
        columns = torch.stack([epsilon.flatten() for epsilon in history], dim=1).double().cpu() * step  # [M·D, k]
        wanted = (targets[index] - state).flatten().double().cpu()
        gram = columns.T @ columns
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(usual), dtype=torch.float64)
        row = torch.linalg.solve(gram + ridge, columns.T @ wanted + ridge @ usual)
        rows.append([float(f"{weight:.8g}") for weight in row.tolist()])
        for weight, epsilon in zip(rows[-1], history):
            state = torch.add(state, epsilon, alpha=step * weight)
    return rows
