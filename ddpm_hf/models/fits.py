"""What `ddpm-hf fit-variance` and `fit-timesteps` add to a scheduler's config; it is right for these weights alone."""

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ..portable.multistep_ddpm_hf import FITTED_TIMESTEPS, FITTED_WEIGHTS, LIKELIHOOD_TIMESTEPS
from ..portable.scheduling_ddpm_hf import X_START_VARIANCES

FITS = (X_START_VARIANCES, FITTED_TIMESTEPS, FITTED_WEIGHTS, LIKELIHOOD_TIMESTEPS)


def fits_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was fitted, of a scheduler's config."""
    return {key: config[key] for key in FITS if config.get(key) is not None}


def without_fits(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config without what was fitted."""
    return {key: value for key, value in config.items() if key not in FITS}


def use_fits(pipeline: DiffusionPipeline, fits: Mapping[str, Any]) -> None:
    """Give a pipeline a scheduler with these fits and no others; the scheduler that it has is not changed."""
    old = pipeline.scheduler
    pipeline.register_modules(scheduler=type(old).from_config({**without_fits(old.config), **fits}))
