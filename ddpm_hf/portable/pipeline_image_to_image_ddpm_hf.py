"""Image to image with a network that was trained for it: super-resolution, colorizing, inpainting, deblurring.

This file is copied into published repositories: it imports torch, diffusers and files next to it, each directly.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .acceleration_ddpm_hf import AccelerationMixin
from .coefficients_ddpm_hf import Coefficients  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .conditioning_ddpm_hf import Conditioning
from .guidance_ddpm_hf import ClassLabels, FreeGuidance
from .hub_ddpm_hf import PortablePipelineMixin
from .image_to_image_ddpm_hf import ImageToImageMixin, conditioning_of_unet
from .linear_ddpm_hf import Operator  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .multistep_ddpm_hf import EpsilonMultistepScheduler  # noqa: F401
from .operators_ddpm_hf import OPERATORS  # noqa: F401
from .sampling_ddpm_hf import DDPMPipelineOutput, StepCallback, adopt_scheduler
from .schedules_ddpm_hf import BETA_SCHEDULES  # noqa: F401
from .scheduling_ddpm_hf import DDPMScheduler  # noqa: F401


class DDPMImageToImagePipeline(ImageToImageMixin, AccelerationMixin, PortablePipelineMixin, DiffusionPipeline):
    """Sample the images that a degraded image may come from, with a network that reads it besides x_t.

    Trained by `train_unconditional.py --conditioning`; OpenAI's upsamplers are sampled too.

    Args:
        unet: reads x_t, the degraded image at its size and, where it was trained so, the mask and the level of the
            noise in that image, concatenated; with `num_class_embeds` also a class.
        scheduler: ours; stock's `DDPMScheduler` is converted, other samplers are left alone.
        conditioning: the fields of `Conditioning`; None for an OpenAI upsampler, whose network says it.
        id2label, trained_classes: as of `ClassConditionalDDPMPipeline`, for a network with classes.

    Raises:
        ValueError: a conditioning or classes that do not fit the network.
    """

    unet: ModelMixin
    vae = None  # pixels alone
    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        conditioning: dict[str, Any] | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        trained_classes: list[int] | None = None,
    ):
        super().__init__()
        self.conditioning: Conditioning = conditioning_of_unet(unet, conditioning)
        self.register_modules(unet=unet, scheduler=adopt_scheduler(scheduler))
        self.register_to_config(conditioning=self.conditioning.config())
        if self.has_classes:
            self.register_classes(id2label, trained_classes)
        elif id2label:
            raise ValueError(f"id2label names {len(id2label)} classes and the UNet embeds none")

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        mask: Any = None,
        class_labels: ClassLabels = None,
        conditioning_noise: float = 0.0,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        num_solutions: int = 1,
        sigma_y: float = 0.0,
        correction: str | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        latents: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        num_frames: int = 0,
        eta: float = 0.0,
    ) -> DDPMPipelineOutput:
        """Sample `num_solutions` images for each image, those of the first one first.

        Args:
            image: the degraded images: PIL, arrays [N, h, w, c] or tensors [N, c, h, w] in [0, 1].
            mask: for inpainting, one or one for each image: PIL, white where to paint; or a bool tensor [H, W], true
                where a pixel is known.
            class_labels: for a model by class, ids or names, one or one for each image; None is the null class.
            conditioning_noise: the level s from 0 to what the model was trained with: noise is mixed into the images,
                √(1-s²) y + s ε, and the model is told. It then relies less on their details, which helps where these
                are another model's.
            sigma_y: the deviation, for pixels in [-1, 1], of noise that the images have already; the model is told.
            correction: makes each x̂_0 agree with the image: `colour` with its mean in each channel, `observation`
                with all that it says, `none`. By default `colour` for super-resolution and deblurring, `observation`
                for inpainting and colorizing without noise.
            guidance_scale, guidance_rescale, guidance_interval: by class, as in `ClassConditionalDDPMPipeline`.
            generator: one, or one for each solution.
            num_inference_steps, output_type, return_dict, latents, timesteps, callback_on_step_end, num_frames, eta:
                as in `DDPMPipeline`.

        Raises:
            ValueError: images, masks, classes or levels that the model does not support, or what `DDPMPipeline`
                raises.
        """
        self.check_output_type(output_type)
        if image is None:
            raise ValueError(f"this model ({self.conditioning.task}) reads an image: give one")
        y = self.read_image(image)
        guidance = FreeGuidance(guidance_scale, guidance_rescale, guidance_interval)
        return self.solve(
            y, known=self.read_mask(mask, len(y)), labels=self.class_condition(class_labels, len(y)),
            num_solutions=num_solutions, conditioning_noise=conditioning_noise, sigma_y=sigma_y,
            correction=correction, guidance=guidance, generator=generator, num_inference_steps=num_inference_steps,
            output_type=output_type, return_dict=return_dict, latents=latents, timesteps=timesteps,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, num_frames=num_frames, eta=eta,
        )  # fmt: skip
