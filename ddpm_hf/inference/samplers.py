"""The samplers of the command line, of the Space and of the model cards: one row each."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..common.errors import UsageError


class Sampler(NamedTuple):
    """A sampler of Diffusers, as it is set up for a model of ours.

    Args:
        title: for people.
        scheduler: its class in Diffusers, or in `portable/multistep_ddpm_hf.py`; None is our DDPMScheduler.
        steps: its usual number of steps; None is all of the model's timesteps.
        config: what its config says besides the model's.
        note: what to know before choosing it.
        fitted: whether it samples only as `ddpm-hf fit-timesteps` found, in the numbers of steps that were fitted.
    """

    title: str
    scheduler: str | None
    steps: int | None
    config: dict[str, Any] = {}
    note: str = ""
    fitted: bool = False


_LINSPACE = {"timestep_spacing": "linspace"}
SAMPLERS = {
    "ddpm": Sampler("DDPM (ancestral)", None, None, note="Ho et al. 2020, all timesteps by default"),
    "ddim": Sampler("DDIM", "DDIMScheduler", 50, note="deterministic, or with noise by eta"),
    "dpm++": Sampler(
        "DPM-Solver++", "DPMSolverMultistepScheduler", 25, {"algorithm_type": "dpmsolver++", **_LINSPACE},
        "second order, one evaluation a step",
    ),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler", 25, _LINSPACE, "second order, one evaluation a step"),
    "euler": Sampler("Euler", "EulerDiscreteScheduler", 50, _LINSPACE, "first order, of the probability flow"),
    "heun": Sampler("Heun", "HeunDiscreteScheduler", 20, _LINSPACE, "second order, two evaluations a step"),
    # its steps assume evenly spaced timesteps from 0; and its last one goes to x_0
    "pndm": Sampler(
        "PNDM", "PNDMScheduler", 50,
        {"skip_prk_steps": True, "timestep_spacing": "leading", "set_alpha_to_one": True},
        "linear multistep (PLMS), for epsilon or v_prediction",
    ),
    "ipndm": Sampler("iPNDM", "EpsilonMultistepScheduler", 10, {}, "fourth order, one evaluation a step"),
    "fitted": Sampler(
        "Fitted steps", "EpsilonMultistepScheduler", 10, {},
        "in as many steps as `ddpm-hf fit-timesteps` was run for, one evaluation a step", fitted=True,
    ),
}  # fmt: skip
UNFITTED = [name for name, row in SAMPLERS.items() if not row.fitted]
TEXT_STEPS = 50  # of ancestral sampling by text, as in Stable Diffusion's pipeline
QUICK_ANCESTRAL_STEPS = 100  # for interactive use: beyond them the images hardly change


def swap_sampler(pipeline: Any, name: str) -> int | None:
    """Put a sampler of `SAMPLERS` into the pipeline; its usual number of steps (None: all of T).

    Raises:
        UsageError: a fitted sampler for a model without a fit.
    """
    from ..portable.multistep_ddpm_hf import EpsilonMultistepScheduler
    from ..portable.scheduling_ddpm_hf import DDPMScheduler

    sampler, steps = SAMPLERS[name], SAMPLERS[name].steps
    if sampler.scheduler is None and hasattr(pipeline, "tokenizer"):
        steps = TEXT_STEPS
    for attribute, scheduler in schedulers_of(pipeline).items():
        if sampler.scheduler is not None:
            swapped_in = scheduler_class(sampler.scheduler).from_config(scheduler.config, **sampler.config)
            setattr(pipeline, attribute, swapped_in)
        elif not isinstance(scheduler, DDPMScheduler):
            setattr(pipeline, attribute, DDPMScheduler.from_config(scheduler.config))
        swapped = getattr(pipeline, attribute)
        if isinstance(swapped, EpsilonMultistepScheduler):
            swapped.fits = "required" if sampler.fitted else "ignored"
    if sampler.fitted:
        fitted = set.intersection(*(set(one.fitted_calls()) for one in schedulers_of(pipeline).values()))
        if not fitted:
            raise UsageError("the model has no fitted steps; run ddpm-hf fit-timesteps, or choose another sampler")
        return min(sorted(fitted), key=lambda number: abs(number - (steps or 0)))
    timesteps = min(one.config.num_train_timesteps for one in schedulers_of(pipeline).values())
    return steps and max(1, min(steps, timesteps - 1))  # all T would visit one twice


def schedulers_of(pipeline: Any) -> dict[str, Any]:
    """A pipeline's schedulers by their attributes: a cascade has one for each stage."""
    names = getattr(pipeline, "scheduler_names", ("scheduler",))  # stock pipelines have one
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name) is not None}


def scheduler_class(name: str) -> Any:
    """A scheduler's class: ours of that name, or Diffusers'."""
    import diffusers

    from ..portable import multistep_ddpm_hf

    return getattr(multistep_ddpm_hf, name, None) or getattr(diffusers, name)


@contextlib.contextmanager
def swapped(pipeline: Any, name: str) -> Iterator[int | None]:
    """A sampler, with its usual number of steps, in the pipeline; after it the pipeline's scheduler again."""
    before = schedulers_of(pipeline)
    try:
        yield swap_sampler(pipeline, name)
    finally:
        for attribute, scheduler in before.items():
            setattr(pipeline, attribute, scheduler)


def usable_samplers(pipeline: Any) -> dict[str, int]:
    """The samplers that can run the model, each with a number of steps for interactive use."""
    usable = {}
    for name in SAMPLERS:
        # `check_sampler` says which cannot
        with contextlib.suppress(ValueError), swapped(pipeline, name) as usual:
            steps = usual or min(QUICK_ANCESTRAL_STEPS, pipeline.scheduler.config.num_train_timesteps)
            pipeline.prepare_timesteps(steps)
            usable[name] = steps
    return usable
