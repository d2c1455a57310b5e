"""Denoising diffusion (DDPM, Ho et al. 2020) as a first-class citizen of the Hugging Face ecosystem.

The public names are imported when they are first used, so that `import ddpm_hf` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:  # what type checkers and editors see; at run time `__getattr__` imports it
    from . import data as data
    from . import evaluation as evaluation
    from . import functional as functional
    from . import models as models
    from . import objectives as objectives
    from . import portable as portable
    from . import training as training
    from .evaluation.likelihood import bits_per_dim as bits_per_dim
    from .evaluation.results import record_result as record_result
    from .inference.loading import load as load
    from .objectives.losses import training_losses as training_losses
    from .portable.operators_ddpm_hf import OPERATORS as OPERATORS
    from .portable.pipeline_cascade_ddpm_hf import DDPMCascadePipeline as DDPMCascadePipeline
    from .portable.pipeline_class_conditional_ddpm_hf import (
        ClassConditionalDDPMPipeline as ClassConditionalDDPMPipeline,
    )
    from .portable.pipeline_ddpm_hf import DDPMPipeline as DDPMPipeline
    from .portable.pipeline_image_to_image_ddpm_hf import DDPMImageToImagePipeline as DDPMImageToImagePipeline
    from .portable.pipeline_restoration_ddpm_hf import DDPMRestorationPipeline as DDPMRestorationPipeline
    from .portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline as TextToImageDDPMPipeline
    from .portable.schedules_ddpm_hf import BETA_SCHEDULES as BETA_SCHEDULES
    from .portable.scheduling_ddpm_hf import DDPMScheduler as DDPMScheduler

_HOMES = {
    "BETA_SCHEDULES": ".portable.schedules_ddpm_hf",
    "DDPMScheduler": ".portable.scheduling_ddpm_hf",
    "ClassConditionalDDPMPipeline": ".portable.pipeline_class_conditional_ddpm_hf",
    "DDPMCascadePipeline": ".portable.pipeline_cascade_ddpm_hf",
    "DDPMImageToImagePipeline": ".portable.pipeline_image_to_image_ddpm_hf",
    "DDPMPipeline": ".portable.pipeline_ddpm_hf",
    "DDPMRestorationPipeline": ".portable.pipeline_restoration_ddpm_hf",
    "OPERATORS": ".portable.operators_ddpm_hf",
    "TextToImageDDPMPipeline": ".portable.pipeline_text2image_ddpm_hf",
    "bits_per_dim": ".evaluation.likelihood",
    "load": ".inference.loading",
    "record_result": ".evaluation.results",
    "training_losses": ".objectives.losses",
}
_SUBMODULES = ("data", "evaluation", "functional", "models", "objectives", "portable", "training")

__all__ = ["__version__", *_HOMES]


if not TYPE_CHECKING:  # else type checkers take any name for one of ours

    def __getattr__(name: str) -> None:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name], __name__), name)
        if name in _SUBMODULES:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_SUBMODULES])
