"""Timesteps and weights for pictures in a few network calls, and how near they come to the model's own solution."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..common.errors import UsageError
from ..models.fits import without_fits
from ..portable.multistep_ddpm_hf import EpsilonMultistepScheduler, karras_timesteps
from .refining import LEAST_GAIN, Ends, Weights, chain_of, refine_weights
from .timesteps import picture_timesteps
from .trajectories import Predict, fit_weights, follow

LEAST_TRAJECTORIES = 8
# How the deviations along a path are summed: how much more each weighs than the one before, and whether scaled by √ᾱ
PATHS = ((1.15, False), (1.0, True), (0.9, True))
MOST_TRIALS = 40  # of other timesteps
REFINED = 2  # of the chains for a number of calls, the nearest after the first fit


class Candidate(NamedTuple):
    """A way to sample in K calls, and its distance from the teacher's images, from noise that it was not fitted to.

    Args:
        timesteps: descending [K].
        weights: of ε at each step; None: `multistep_weights`.
        error: of x_0 as it is clipped: the root mean square over an image, the mean over the images.
    """

    name: str
    timesteps: list[int]
    weights: Weights | None
    error: float


@torch.no_grad()
def fit_pictures(
    predict: Predict,
    scheduler: EpsilonMultistepScheduler,
    noise: torch.Tensor,
    calls: Sequence[int],
    *,
    teacher_steps: int = 60,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[int, list[Candidate]]:
    """For each number of calls the candidates, the nearest to the teacher first.

    Half of the noise is for fitting, the other half says which candidate is nearest. No data are needed.

    Args:
        noise: x_T [M, C, H, W], M being 8 or more.
        calls: numbers from 2 to below `teacher_steps`.

    Raises:
        UsageError: too little noise, or a number of calls outside that range.
    """
    if len(noise) < LEAST_TRAJECTORIES:
        raise UsageError(f"--trajectories {len(noise)}: must be {LEAST_TRAJECTORIES} or more")
    if not 3 <= teacher_steps <= len(scheduler):
        raise UsageError(f"--teacher-steps {teacher_steps}: must be from 3 to {len(scheduler)}, the model's timesteps")
    for number in calls:
        if not 2 <= number < teacher_steps:
            raise UsageError(f"--calls {number}: must be from 2 to {teacher_steps - 1}, below --teacher-steps")
    plain = EpsilonMultistepScheduler.from_config(without_fits(scheduler.config))
    chain = karras_timesteps(plain.diffusion, teacher_steps)
    fitting, judging = (Student(predict, plain, half, chain, batch_size, progress) for half in halves(noise))
    fitted: dict[int, list[Candidate]] = {}
    for number in tqdm(calls, desc="fits", unit="fit", disable=not progress):
        plain.set_timesteps(number)
        even = {
            "even timesteps": plain.timesteps.tolist(),
            "even in ρ^(1/7)": karras_timesteps(plain.diffusion, number),
        }
        candidates = [Candidate(f"{name}, iPNDM", path, None, judging.loss(path)) for name, path in even.items()]
        paths = unique(picture_timesteps(fitting.teacher, number, growth, scaled) for growth, scaled in PATHS)
        nearest = min(paths, key=fitting.first_loss)
        paths = unique([search(nearest, chain, fitting.first_loss), *paths])
        for path in sorted(paths, key=fitting.first_loss)[:REFINED]:
            weights = refine_weights(fitting.ends(path), fitting.first_weights(path))
            candidates.append(Candidate("fitted timesteps and weights", path, weights, judging.loss(path, weights)))
        fitted[number] = sorted(candidates, key=lambda one: one.error)
    return fitted


class Student:
    """Short chains from some noise, against the teacher's trajectories from it.

    Args:
        noise: x_T [M, C, H, W].
        chain: the teacher's timesteps, descending.
    """

    def __init__(
        self,
        predict: Predict,
        scheduler: EpsilonMultistepScheduler,
        noise: torch.Tensor,
        chain: Sequence[int],
        batch_size: int,
        progress: bool,
    ):
        self.predict, self.scheduler, self.noise, self.batch_size = predict, scheduler, noise, batch_size
        self.teacher = follow(predict, scheduler, noise, chain, batch_size, progress=progress)
        self._first: dict[tuple[int, ...], tuple[Weights, float]] = {}

    def ends(self, path: Sequence[int]) -> Ends:
        """Where a chain ends, as a function of its weights."""
        chain = chain_of(self.scheduler, path)
        return Ends(self.predict, self.scheduler, chain, self.noise, self.teacher.states[-1], self.batch_size)

    def loss(self, path: Sequence[int], weights: Weights | None = None) -> float:
        """How far a chain ends from the teacher's images; None: with `multistep_weights`."""
        return self.ends(path).loss_of(weights)

    def first_weights(self, path: Sequence[int]) -> Weights:
        """The weights with which each step, one after another, comes nearest to the teacher's state."""
        return self._fit(path)[0]

    def first_loss(self, path: Sequence[int]) -> float:
        """How far a chain with these weights ends from the teacher's images."""
        return self._fit(path)[1]

    def _fit(self, path: Sequence[int]) -> tuple[Weights, float]:
        key = tuple(path)
        if key not in self._first:
            targets = self.teacher.at([*path[1:], -1])
            weights = fit_weights(self.predict, self.scheduler, self.noise, path, targets, self.batch_size)
            self._first[key] = weights, self.loss(path, weights)
        return self._first[key]


def search(path: list[int], nodes: Sequence[int], loss: Callable[[list[int]], float]) -> list[int]:
    """A chain with less loss: one timestep at a time moves to the next of the nodes, as long as that helps.

    Args:
        path: the chain to begin with, of nodes, descending; its first timestep stays.
        nodes: all timesteps to choose from, descending.
    """
    trials = 0
    while True:
        before = loss(path)
        for position in range(len(path) - 1, 0, -1):
            for shift in (1, -1):
                while trials < MOST_TRIALS:
                    moved = list(path)
                    index = nodes.index(path[position]) + shift
                    if index == len(nodes) or nodes[index] in path:
                        break
                    moved[position] = nodes[index]
                    trials += 1
                    if not loss(moved) < loss(path):
                        break
                    path = moved
        if not loss(path) < (1 - LEAST_GAIN) * before or trials >= MOST_TRIALS:
            return path


def halves(noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part to fit to, and the part to judge by."""
    return noise[: len(noise) // 2], noise[len(noise) // 2 :]


def unique(paths: Iterable[list[int]]) -> list[list[int]]:
    """Without repetitions, in the order given."""
    return [list(path) for path in dict.fromkeys(map(tuple, paths))]
