"""Weights of all steps fitted together, by Levenberg and Marquardt's method on where the chain ends."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from ..portable.multistep_ddpm_hf import MAX_ORDER, EpsilonMultistepScheduler, multistep_weights
from .trajectories import Predict, epsilon_of

Weights: TypeAlias = list[list[float]]  # of ε at each step, the current one first, then those before
MEASURED, STEPS, TRIALS = 4, 8, 4  # times that all derivatives are measured, steps after each, dampings of a step
LEAST_GAIN = 0.01  # of the loss, in a step, below which it ends
FIRST_DAMPING, LEAST_DAMPING = 1e-2, 1e-6  # of the diagonal
DIFFERENCE = 1e-3  # of a state's size, for derivatives


class Chain(NamedTuple):
    """A short chain from x_T, and what it needs at each of its K steps.

    Args:
        timesteps: descending [K].
        signals, rhos: √ᾱ and ρ at the timesteps and at x_0, [K + 1].
    """

    timesteps: list[int]
    signals: list[float]
    rhos: list[float]


def chain_of(scheduler: EpsilonMultistepScheduler, timesteps: Sequence[int]) -> Chain:
    """The chain of some timesteps."""
    pairs = [scheduler.signal_and_rho(t) for t in (*timesteps, -1)]
    return Chain(list(timesteps), [signal for signal, _ in pairs], [rho for _, rho in pairs])


class Ends:
    """Where a chain ends for some noise, as a function of its weights, and the derivatives.

    Args:
        noise: x_T [M, C, H, W].
        targets: x_0 to end near to, [M, C, H, W].
    """

    def __init__(
        self,
        predict: Predict,
        scheduler: EpsilonMultistepScheduler,
        chain: Chain,
        noise: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
    ):
        self.predict, self.scheduler, self.chain, self.batch_size = predict, scheduler, chain, batch_size
        self.start, self.targets = noise / chain.signals[0], scheduler.diffusion.clip(targets)

    def epsilon(self, step: int, state: torch.Tensor) -> torch.Tensor:
        """ε at the beginning of a step, from x̃ [M, C, H, W]."""
        t, parts = self.chain.timesteps[step], []
        for x_t in (state * self.chain.signals[step]).split(self.batch_size):
            output = self.predict(x_t, torch.full((len(x_t),), t, device=x_t.device))
            parts.append(epsilon_of(self.scheduler, output, t, x_t))
        return torch.cat(parts)

    def follow(
        self, weights: Weights, state: torch.Tensor, epsilons: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The states from a step to the end, and all ε: the states of `len(epsilons)` and on, the ε of 0 and on."""
        states, epsilons = [state], list(epsilons)
        for step in range(len(epsilons), len(weights)):
            epsilons.append(self.epsilon(step, state))
            size = self.chain.rhos[step + 1] - self.chain.rhos[step]
            for weight, epsilon in zip(weights[step], reversed(epsilons)):
                state = torch.add(state, epsilon, alpha=size * weight)
            states.append(state)
        return states, epsilons

    def differences(self, end: torch.Tensor) -> torch.Tensor:
        """From the targets, as the images are clipped, float64 [M, D]."""
        return (self.scheduler.diffusion.clip(end) - self.targets).flatten(1).double().cpu()

    def loss(self, differences: torch.Tensor) -> float:
        """The mean distance, not its square: a chain that ends at another image does not count for all the others."""
        return differences.norm(dim=1).mean().item() / differences.shape[1] ** 0.5

    def loss_of(self, weights: Weights | None) -> float:
        """Where some weights lead; None: `multistep_weights`."""
        if weights is None:
            rhos = self.chain.rhos
            steps = range(len(self.chain.timesteps))
            weights = [multistep_weights(rhos[step::-1][:MAX_ORDER], rhos[step + 1]) for step in steps]
        return self.loss(self.differences(self.follow(weights, self.start, [])[0][-1]))

    def jacobian(self, weights: Weights, states: list[torch.Tensor], epsilons: list[torch.Tensor]) -> torch.Tensor:
        """The derivatives of `differences` by each weight, [M, D, P], from differences of whole chains."""
        base = self.differences(states[-1])
        columns = []
        for step, row in enumerate(weights):
            change = DIFFERENCE * (1 + self.chain.rhos[step + 1] ** 2) ** 0.5
            size = self.chain.rhos[step + 1] - self.chain.rhos[step]
            for epsilon in list(reversed(epsilons[: step + 1]))[: len(row)]:
                moved = torch.add(states[step + 1], epsilon, alpha=change)
                end = self.follow(weights, moved, epsilons[: step + 1])[0][-1]
                columns.append((self.differences(end) - base) * (size / change))
        return torch.stack(columns, dim=2)


def normal_equations(jacobian: torch.Tensor, differences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss and Newton's matrix [P, P] and gradient [P] of the sum of the images' distances."""
    importance = 1 / differences.norm(dim=1).clamp(min=1e-6)  # [M], the derivative of a distance
    matrix = torch.einsum("mdp,mdq,m->pq", jacobian, jacobian, importance)
    return matrix, torch.einsum("mdp,md,m->p", jacobian, differences, importance)


@torch.no_grad()
def refine_weights(ends: Ends, weights: Weights) -> Weights:
    """The weights with which the chain ends nearest to the targets, from those given on.

    Each step tells how the end moved: Broyden's update (1965) keeps the derivatives good for several steps, which cost
    a chain each. Measuring all of them costs one for each weight.
    """
    sizes = [len(row) for row in weights]
    values = torch.tensor([weight for row in weights for weight in row], dtype=torch.float64)

    def rows(values: torch.Tensor) -> Weights:
        return [[float(f"{weight:.8g}") for weight in row.tolist()] for row in values.split(sizes)]

    reached = ends.follow(rows(values), ends.start, [])
    differences, damping = ends.differences(reached[0][-1]), FIRST_DAMPING
    for _ in range(MEASURED):
        jacobian = ends.jacobian(rows(values), *reached)
        measured = ends.loss(differences)
        for _ in range(STEPS):
            before = ends.loss(differences)
            matrix, gradient = normal_equations(jacobian, differences)
            for _ in range(TRIALS):
                damped = matrix + damping * torch.diag(matrix.diagonal())
                step = -torch.linalg.lstsq(damped, gradient[:, None], driver="gelsd").solution[:, 0]  # of any rank
                tried = ends.follow(rows(values + step), ends.start, [])
                moved = ends.differences(tried[0][-1])
                if ends.loss(moved) < before:
                    break
                damping *= 10
            else:
                break
            surprise = moved - differences - jacobian @ step
            jacobian += surprise[..., None] * (step / step.square().sum().clamp(min=1e-30))
            values, reached, differences = values + step, tried, moved
            damping = max(damping / 10, LEAST_DAMPING)
            if ends.loss(differences) > (1 - LEAST_GAIN) * before:
                break
        if ends.loss(differences) > (1 - LEAST_GAIN) * measured:
            break
    return rows(values)
