"""What type checkers know of the public names: checked by `python -m tests.support.snippets`, and never run.

mypy fails here where a type has become Any.
"""

from typing_extensions import assert_type

import ddpm_hf
from ddpm_hf import (
    OPERATORS,
    ClassConditionalDDPMPipeline,
    DDPMCascadePipeline,
    DDPMImageToImagePipeline,
    DDPMPipeline,
    DDPMRestorationPipeline,
    DDPMScheduler,
    TextToImageDDPMPipeline,
)
from ddpm_hf.evaluation.likelihood import BitsPerDim
from ddpm_hf.portable.pipeline_restoration_ddpm_hf import RestorationOutput
from ddpm_hf.portable.sampling_ddpm_hf import DDPMPipelineOutput, Frame
from ddpm_hf.portable.scheduling_ddpm_hf import GaussianMoments

LoadedPipeline = (
    DDPMPipeline
    | ClassConditionalDDPMPipeline
    | DDPMImageToImagePipeline
    | DDPMCascadePipeline
    | TextToImageDDPMPipeline
)


def types_of_public_names(unet, images) -> None:
    """Each line is a claim."""
    assert_type(ddpm_hf.load("name"), LoadedPipeline)
    assert_type(DDPMPipeline.from_pretrained("name"), DDPMPipeline)
    assert_type(ClassConditionalDDPMPipeline.from_pretrained("name"), ClassConditionalDDPMPipeline)
    assert_type(TextToImageDDPMPipeline.from_pretrained("name"), TextToImageDDPMPipeline)
    scheduler = DDPMScheduler(beta_schedule="linear")
    assert_type(scheduler, DDPMScheduler)
    assert_type(DDPMScheduler.from_config(scheduler.config), DDPMScheduler)
    assert_type(scheduler.q_mean_variance(images, 3), GaussianMoments)
    pipeline = DDPMPipeline(unet, scheduler)
    assert_type(pipeline(4), DDPMPipelineOutput)
    restorer = DDPMRestorationPipeline.from_pipe(pipeline)
    assert_type(restorer, DDPMRestorationPipeline)
    assert_type(restorer(images, OPERATORS["half"]((3, 8, 8))), RestorationOutput)
    assert_type(pipeline(4).frames, list[Frame])
    assert_type(ddpm_hf.bits_per_dim(unet, scheduler, images), BitsPerDim)
    assert_type(ddpm_hf.record_result("folder", "FID", 3.0, 100, "user/photos"), None)
