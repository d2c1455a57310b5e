"""Super-resolution by a network that reads the small image: OpenAI's upsamplers (Nichol & Dhariwal 2021, sec. 3).

This file is copied into published repositories: it imports torch, diffusers and files next to it, each directly.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .acceleration_ddpm_hf import AccelerationMixin
from .coefficients_ddpm_hf import Coefficients  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .guidance_ddpm_hf import FreeGuidance  # noqa: F401
from .hub_ddpm_hf import PortablePipelineMixin
from .multistep_ddpm_hf import EpsilonMultistepScheduler  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .sampling_ddpm_hf import DDPMPipelineOutput, SamplingMixin, StepCallback, adopt_scheduler
from .schedules_ddpm_hf import BETA_SCHEDULES  # noqa: F401
from .scheduling_ddpm_hf import DDPMScheduler  # noqa: F401


class UpsamplingDDPMPipeline(SamplingMixin, AccelerationMixin, PortablePipelineMixin, DiffusionPipeline):
    """Enlarge images with an `OpenAIUNet2DModel` that has `condition_channels`.

    Args:
        unet: reads x_t and the small image, enlarged bilinearly; where it embeds classes, also the image's.
        scheduler: ours; stock's `DDPMScheduler` is converted, other samplers are left alone.

    Raises:
        ValueError: a UNet that reads no image.
    """

    unet: ModelMixin
    vae = None  # pixels alone
    model_cpu_offload_seq = "unet"

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        if unet.config.get("condition_channels") != unet.config.in_channels:
            raise ValueError("the UNet does not read an image besides x_t (condition_channels), so it enlarges none")
        self.register_modules(unet=unet, scheduler=adopt_scheduler(scheduler))

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        class_labels: Sequence[int] | torch.Tensor | int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        latents: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        num_frames: int = 0,
        eta: float = 0.0,
    ) -> DDPMPipelineOutput:
        """Enlarge one image or several of one size to the model's size.

        Args:
            image: PIL images, arrays [N, H, W, C] or tensors [N, C, H, W] in [0, 1], of any size.
            class_labels: the images' classes, ids from 0, where the model embeds classes.
            generator, num_inference_steps, output_type, return_dict, latents, timesteps, callback_on_step_end,
                num_frames, eta: as in `DDPMPipeline`.

        Raises:
            ValueError: classes that are missing or unknown, or what `DDPMPipeline` raises.
        """
        self.check_output_type(output_type)
        small = self.image_processor.preprocess(image).to(self._execution_device, self.unet.dtype)  # [N, C, h, w]
        condition = F.interpolate(small, self.image_size, mode="bilinear")  # [N, C, H, W]
        conditioning = {"condition": condition, **self.check_labels(class_labels, len(small))}
        visited = self.prepare_timesteps(num_inference_steps, timesteps)
        x = self.prepare_latents(len(small), generator, latents)

        def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.predict(x_t, t, **conditioning)

        return self.denoise(
            x,
            visited,
            predict,
            self.sampler_step(generator, eta),
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            num_frames,
        )

    def check_labels(self, class_labels: Any, count: int) -> dict[str, torch.Tensor]:
        """The classes as the UNet's argument; empty for a model without classes.

        Raises:
            ValueError: as many labels as images are required, ids of the model's classes.
        """
        classes = self.unet.config.num_class_embeds or 0
        if not classes:
            if class_labels is not None:
                raise ValueError("class_labels: this model has no classes")
            return {}
        labels = torch.as_tensor([] if class_labels is None else class_labels).reshape(-1)
        if (
            len(labels) != count
            or labels.is_floating_point()
            or not 0 <= int(labels.min()) <= int(labels.max()) < classes
        ):
            raise ValueError(
                f"class_labels={class_labels!r}: give one for each of the {count} images, ids from 0 to {classes - 1}"
            )
        return {"class_labels": labels.long().to(self._execution_device)}
