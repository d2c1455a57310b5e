"""Timesteps and weights for pictures in a few network calls, and how near they come to the model's own solution."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from ..common.errors import UsageError
from ..portable.multistep_ddpm_hf import EpsilonMultistepScheduler, karras_timesteps
from .refining import Ends, Weights, chain_of, refine_weights
from .timesteps import picture_timesteps
from .trajectories import Predict, Trajectories, fit_weights, follow

LEAST_TRAJECTORIES = 8
# How the deviations along a path are summed: how much more each weighs than the one before, and whether scaled by √ᾱ
PATHS = ((1.15, False), (1.0, True), (0.9, True))
REFINED = 2  # of the chains for a number of calls, the nearest after the first fit


class Candidate(NamedTuple):
    """A way to sample in K calls, and its distance from the teacher's images, from noise that it was not fitted to.

    Args:
        timesteps: descending [K].
        weights: of ε at each step; None: Adams and Bashforth's.
        error: of x_0 as it is clipped: the root mean square over an image, the mean over the images.
    """

    name: str
    timesteps: list[int]
    weights: Weights | None
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

    def ends_of(timesteps: Sequence[int], judged: bool = False) -> Ends:
        known, x = (other, judging) if judged else (teacher, fitting)
        return Ends(predict, plain, chain_of(plain, timesteps), x, known.states[-1], batch_size)

    def judge(name: str, timesteps: list[int], weights: Weights | None) -> Candidate:
        return Candidate(name, timesteps, weights, ends_of(timesteps, judged=True).loss_of(weights))

    fitted: dict[int, list[Candidate]] = {}
    for number in tqdm(calls, desc="fits", unit="fit", disable=not progress):
        plain.set_timesteps(number)
        even = {
            "even timesteps": plain.timesteps.tolist(),
            "even in ρ^(1/7)": karras_timesteps(plain.diffusion, number),
        }
        candidates = [judge(f"{name}, iPNDM", timesteps, None) for name, timesteps in even.items()]
        starts = [(ends_of(path), first_weights(predict, plain, fitting, teacher, path, batch_size))
                  for path in paths(teacher, number)]  # fmt: skip
        starts = sorted(starts, key=lambda one: one[0].loss_of(one[1]))[:REFINED]
        for ends, weights in starts:
            refined = refine_weights(ends, weights)
            candidates.append(judge("fitted timesteps and weights", ends.chain.timesteps, refined))
        fitted[number] = sorted(candidates, key=lambda one: one.error)
    return fitted


def paths(teacher: Trajectories, number: int) -> list[list[int]]:
    """Different timesteps for so many calls, all of them the teacher's: the cheapest paths by several costs."""
    found = [picture_timesteps(teacher, number, growth, scaled) for growth, scaled in PATHS]
    return [path for index, path in enumerate(found) if path not in found[:index]]


def first_weights(
    predict: Predict,
    scheduler: EpsilonMultistepScheduler,
    noise: torch.Tensor,
    teacher: Trajectories,
    path: Sequence[int],
    batch_size: int,
) -> Weights:
    """The weights with which each step comes nearest to the teacher's state."""
    return fit_weights(predict, scheduler, noise, path, teacher.at([*path[1:], -1]), batch_size)


def without_fits(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what was fitted before."""
    return {key: value for key, value in config.items() if not key.startswith("_fitted")}
