"""Timesteps and weights for pictures in a few network calls, and how near they come to the model's own solution."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..common.errors import UsageError
from ..portable.multistep_ddpm_hf import EpsilonMultistepScheduler, karras_timesteps
from .timesteps import picture_timesteps
from .trajectories import Predict, Trajectories, fit_weights, follow

LEAST_TRAJECTORIES = 8


class Candidate(NamedTuple):
    """A way to sample in K calls, and its distance from the teacher's images, from noise that it was not fitted to.

    Args:
        timesteps: descending [K].
        weights: of ε at each step; None: Adams and Bashforth's.
        error: root mean square of the difference of x_0.
    """

    name: str
    timesteps: list[int]
    weights: list[list[float]] | None
    error: float


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
    fitting, judging = noise[: len(noise) // 2], noise[len(noise) // 2 :]
    teacher, other = (follow(predict, plain, x, chain, batch_size, progress=progress) for x in (fitting, judging))
    fitted: dict[int, list[Candidate]] = {}
    for number in calls:
        plain.set_timesteps(number)
        lists = {
            "even timesteps": plain.timesteps.tolist(),
            "timesteps even in ρ^(1/7)": karras_timesteps(plain.diffusion, number),
            "timesteps by deviation": picture_timesteps(teacher, number),
            "timesteps by scaled deviation": picture_timesteps(teacher, number, growth=1.0, scaled=True),
        }
        candidates = []
        for name, timesteps in lists.items():
            if set(timesteps) <= set(chain):  # the teacher has been there
                targets = teacher.at([*timesteps[1:], -1])
                weights = fit_weights(predict, plain, fitting, timesteps, targets, batch_size)
                error = distance(predict, plain, judging, timesteps, weights, other, batch_size)
                candidates.append(Candidate(f"{name}, fitted weights", timesteps, weights, error))
            error = distance(predict, plain, judging, timesteps, None, other, batch_size)
            candidates.append(Candidate(name, timesteps, None, error))
        fitted[number] = sorted(candidates, key=lambda one: one.error)
    return fitted


def distance(
    predict: Predict,
    scheduler: EpsilonMultistepScheduler,
    noise: torch.Tensor,
    timesteps: Sequence[int],
    weights: Sequence[Sequence[float]] | None,
    teacher: Trajectories,
    batch_size: int,
) -> float:
    """The root mean square of the difference between a chain's x_0 and the teacher's, from the same noise."""
    reached = follow(predict, scheduler, noise, timesteps, batch_size, weights)
    return (reached.states[-1] - teacher.states[-1]).double().square().mean().sqrt().item()


def without_fits(config: dict) -> dict:
    """A config without what was fitted before."""
    return {key: value for key, value in config.items() if not key.startswith("_fitted")}
