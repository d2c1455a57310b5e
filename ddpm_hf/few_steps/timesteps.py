"""Which timesteps a short chain visits: the shortest path through the costs of all possible steps."""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import torch

from ..common.errors import UsageError
from ..portable.coefficients_ddpm_hf import (
    LEAST_VARIANCE,
    posterior_mean_coefficients,
    posterior_variance_and_log_beta,
)
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from .trajectories import Trajectories


def shortest_path(costs: np.ndarray, jumps: int, growth: float = 1.0) -> list[int]:
    """The nodes of the cheapest path from the first node to the last with a number of jumps, each to a later node.

    Args:
        costs: of the jump from node i to node j, float64 [G, G]; only j > i is read.
        growth: the factor by which a jump weighs more than the one before it.

    Raises:
        ValueError: no number of jumps from 1 to G - 1.

    >>> shortest_path(np.array([[0, 1.0, 9.0], [0, 0, 1.0], [0, 0, 0]]), 2)
    [0, 1, 2]
    """
    nodes = len(costs)
    if not 1 <= jumps < nodes:
        raise ValueError(f"{jumps} jumps among {nodes} nodes")
    steps = np.where(np.triu(np.ones_like(costs, dtype=bool), 1), costs, np.inf)
    remaining, choices = steps[:, -1], []  # the cost from each node to the last
    for _ in range(jumps - 1):
        totals = steps + growth * remaining[None]  # [G, G]
        choices.append(totals.argmin(axis=1))
        remaining = totals.min(axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, nodes - 1]


def likelihood_costs(scheduler: DDPMScheduler) -> np.ndarray:
    """The expected term of the bound for a step from any t to any s < t, in bits/dim: float64 [T, T], at [t, s].

    ½ log2(1 + c² Var[x_0 | x_t]/β̃), c being the factor of x_0 in the posterior's mean: what remains of the KL with the
    fitted variance (Watson et al. 2021, https://arxiv.org/abs/2106.03802, whose table is measured for each pair).

    Raises:
        UsageError: the scheduler has no fitted variances.
    """
    variances = scheduler.x_start_variances
    if variances is None:
        raise UsageError(
            "the model has no fitted variance, which the terms follow from; run ddpm-hf fit-variance first"
        )
    log_alpha_bar = scheduler.exact_tables.alphas_cumprod.log()
    log_t, log_s = log_alpha_bar[:, None], log_alpha_bar[None]
    posterior_variance, _ = posterior_variance_and_log_beta(log_t, log_s)
    from_x0, _ = posterior_mean_coefficients(log_t, log_s)
    below = torch.tril(torch.ones_like(from_x0, dtype=torch.bool), -1)
    ratio = from_x0**2 * variances[:, None] / posterior_variance.clamp(min=LEAST_VARIANCE)
    return torch.where(below, torch.log1p(ratio) / (2 * math.log(2)), 0.0).numpy()


def likelihood_timesteps(scheduler: DDPMScheduler, calls: int) -> list[int]:
    """The chain of so many timesteps whose bound is lowest, descending; it has T-1 and 0, where the ends are measured.

    Raises:
        UsageError: no number of calls from 2 to T, or a scheduler without fitted variances.
    """
    T = len(scheduler)
    if not 2 <= calls <= T:
        raise UsageError(f"--calls {calls}: must be from 2 to {T}, the model's timesteps")
    costs = likelihood_costs(scheduler)[::-1, ::-1]  # from T-1 down to 0
    return [T - 1 - node for node in shortest_path(costs, calls - 1)]


def steps_cost(scheduler: DDPMScheduler, chain: Iterable[int]) -> float:
    """The expected bound of a chain (descending), in bits/dim, without its ends: the prior and the decoder."""
    costs, timesteps = likelihood_costs(scheduler), list(chain)
    return float(sum(costs[t, s] for t, s in itertools.pairwise(timesteps)))


def deviations(teacher: Trajectories, scaled: bool = False) -> np.ndarray:
    """How far one step of Euler's from node i ends from the teacher's state at node j, [G, G]: root mean squares.

    Args:
        scaled: in x instead of x̃ = x/√ᾱ, that is times 1/√(1 + ρ²): later steps shrink an error at high noise so.
    """
    nodes = len(teacher.rhos)
    costs = np.zeros((nodes, nodes))
    for i in range(nodes - 1):
        for j in range(i + 1, nodes):
            landed = torch.add(teacher.states[i], teacher.epsilons[i], alpha=teacher.rhos[j] - teacher.rhos[i])
            errors = (landed - teacher.states[j]).flatten(1).norm(dim=1) / landed[0].numel() ** 0.5  # [M]
            costs[i, j] = errors.mean().item() / ((1 + teacher.rhos[j] ** 2) ** 0.5 if scaled else 1)
    return costs


def picture_timesteps(teacher: Trajectories, calls: int, growth: float = 1.15, scaled: bool = False) -> list[int]:
    """The timesteps of the cheapest path through the deviations (GITS; Chen et al. 2024, Algorithm 1), descending.

    Args:
        growth: how much more a deviation weighs than the one before, which later steps partly undo.
    """
    return [teacher.timesteps[node] for node in shortest_path(deviations(teacher, scaled), calls, growth)[:-1]]
