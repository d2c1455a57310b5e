"""Unconditional generation in pixels or, with a `vae`, in latents.

This file is copied into published repositories: it imports torch, diffusers and files next to it, each directly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from .acceleration_ddpm_hf import AccelerationMixin
from .coefficients_ddpm_hf import Coefficients  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .guidance_ddpm_hf import ClassifierGuidance
from .hub_ddpm_hf import PortablePipelineMixin
from .multistep_ddpm_hf import EpsilonMultistepScheduler  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .sampling_ddpm_hf import (
    DDPMPipelineOutput,
    SamplingMixin,
    StepCallback,
    adopt_scheduler,
    output_channels,
    stock_samples_alike,
)
from .schedules_ddpm_hf import BETA_SCHEDULES  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .scheduling_ddpm_hf import DDPMScheduler


class DDPMPipeline(SamplingMixin, AccelerationMixin, PortablePipelineMixin, DiffusionPipeline):
    """Sample images from a `UNet2DModel` with DDPM (Ho et al. 2020) or any other sampler of Diffusers.

    Args:
        unet: predicts from x_t what the scheduler's `prediction_type` says.
        scheduler: ours; stock's `DDPMScheduler` is converted, other samplers are left alone.
        vae: decodes x_0 into images, for a model of latents.

    Raises:
        ValueError: a UNet with class embeddings.
    """

    unet: UNet2DModel
    vae: AutoencoderKL | None
    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None):
        super().__init__()
        if unet.config.get("num_class_embeds"):
            raise ValueError(
                "the UNet embeds classes, so the model is for ClassConditionalDDPMPipeline, not DDPMPipeline: load it"
                " with ddpm_hf.ClassConditionalDDPMPipeline.from_pretrained"
            )
        self.register_modules(unet=unet, scheduler=adopt_scheduler(scheduler), vae=vae)

    def stock_class_name(self) -> str | None:
        """Stock's pipeline, but where its images would differ: latents, and what its scheduler gets wrong."""
        ours = isinstance(self.scheduler, DDPMScheduler)
        differs = (
            self.vae is not None
            or not stock_samples_alike(self.scheduler)
            or (not ours and output_channels(self.unet) != self.unet.config.in_channels)
            # stock's pipeline neither scales x_t nor leaves out a generator that a sampler does not take
            or not (ours or isinstance(self.scheduler, DDIMScheduler))
        )
        return None if differs else "DDPMPipeline"

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
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
        classifier: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        classifier_scale: float = 1.0,
        class_labels: Sequence[int] | torch.Tensor | None = None,
    ) -> DDPMPipelineOutput:
        """Sample `batch_size` images (Ho et al. 2020, Algorithm 2).

        Args:
            generator: one, or one for each image: an image then depends on its own alone, whatever the batch.
            num_inference_steps: of the T timesteps, how many to visit; None means all of them.
            output_type: "pil", "np" (or "numpy") [N, H, W, C] or "pt" [N, C, H, W] in [0, 1], or "latent" (x_0). PIL
                images have up to four channels (L, LA, RGB, RGBA); "preview" is "pil", or the first three of more.
            return_dict: False returns the tuple (images,), as in stock.
            latents: x_T [N, C, H, W] to start from, instead of noise.
            timesteps: the timesteps to visit, descending, instead of their number.
            callback_on_step_end: called with (pipeline, index, timestep, {"latents": x_s}) after each step.
            num_frames: how many moments of the chain to return in `frames`, with x_t and x̂_0 (figs. 6 and 14).
            eta: of DDIM (Song et al. 2021, Eq. 16): 0 is deterministic, 1 as noisy as ancestral sampling.
            classifier: (x_t, t) -> logits, trained on noised images: guides towards `class_labels`, the ids of
                `batch_size` classes, at `classifier_scale` (Dhariwal & Nichol 2021, Algorithms 1 and 2).

        Raises:
            ValueError: a number of steps outside 1..T, latents or generators that do not fit, or an ᾱ of 0 where the
                sampler would divide by it.
        """
        self.check_output_type(output_type)
        labels = check_labels(class_labels, batch_size, classifier)
        visited = self.prepare_timesteps(num_inference_steps, timesteps)
        x = self.prepare_latents(batch_size, generator, latents)  # Algorithm 2, line 1
        predict = self.predict
        take_step = self.sampler_step(generator, eta, extrapolates=lambda t: classifier is not None)
        if classifier is not None and labels is not None:
            guidance = ClassifierGuidance(classifier, labels.to(x.device), classifier_scale)
            ancestral = isinstance(self.scheduler, DDPMScheduler)
            predict, take_step = guidance.guided(predict, take_step, self.ddpm_scheduler(), ancestral)
        return self.denoise(
            x,
            visited,
            predict,
            take_step,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            num_frames,
        )

    @torch.no_grad()
    def interpolate(
        self,
        image_a: Any,
        image_b: Any,
        timestep: int,
        weights: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> DDPMPipelineOutput:
        """Interpolate between two images at a noise level, then denoise (Ho et al. 2020, fig. 8).

        Both are noised to `timestep` (or the chain's next lower), mixed linearly there and taken back down; the noise
        is shared, so that the images differ by their weight alone.

        Args:
            image_a, image_b: PIL images, arrays or tensors in [0, 1].
            timestep: 0..T-1; the higher, the coarser the features that vary.
            weights: of image_b, from 0 to 1, one output image for each.
            generator: of the noise, all of it.
            num_inference_steps, output_type, return_dict: as in a call.

        Raises:
            ValueError: a timestep outside the chain, or another sampler than `DDPMScheduler`.
        """
        self.check_output_type(output_type)
        tail = self._chain_from(timestep, num_inference_steps)
        pair = torch.cat([self.encode(image, generator) for image in (image_a, image_b)])  # [2, C, H, W]
        noise = randn_tensor(pair.shape, generator=generator, device=pair.device, dtype=pair.dtype)
        noised = self.scheduler.add_noise(pair, noise, torch.tensor([tail[0]] * 2))
        mix = torch.tensor(weights, dtype=pair.dtype, device=pair.device).reshape(-1, 1, 1, 1)
        x = (1 - mix) * noised[:1] + mix * noised[1:]  # [len(weights), C, H, W]
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
        generators = [torch.Generator(device).manual_seed(seed) for _ in weights]
        return self.denoise(x, tail, self.predict, self.sampler_step(generators), output_type, return_dict)

    @torch.no_grad()
    def sample_from_shared(
        self,
        batch_size: int,
        timestep: int,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> DDPMPipelineOutput:
        """Many images from one shared x_t (Ho et al. 2020, fig. 7): they differ in what is decided after `timestep`.

        Args:
            batch_size: how many images.
            timestep: 0..T-1, down to which the chain is one.
            generator: of the noise, all of it.
            num_inference_steps, output_type, return_dict: as in a call.

        Raises:
            ValueError: a timestep outside the chain, or another sampler than `DDPMScheduler`.
        """
        self.check_output_type(output_type)
        tail = self._chain_from(timestep, num_inference_steps)
        head = self.scheduler.timesteps.tolist()[: -len(tail)]
        x = self.prepare_latents(1, generator)
        take_step = self.sampler_step(generator)
        x = self.denoise(x, head, self.predict, take_step, "latent").images  # [1, C, H, W]
        x = x.repeat(batch_size, 1, 1, 1)
        return self.denoise(x, tail, self.predict, take_step, output_type, return_dict)

    def _chain_from(self, timestep: int, num_inference_steps: int | None) -> list[int]:
        """The part of the chain at and below a timestep. These methods need a memoryless sampler."""
        if not isinstance(self.scheduler, DDPMScheduler):
            raise ValueError(
                f"starting within a chain is for DDPMScheduler, and this pipeline has {type(self.scheduler).__name__};"
                " set pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)"
            )
        tail = [t for t in self.prepare_timesteps(num_inference_steps) if t <= timestep]
        if not tail or timestep >= len(self.scheduler):
            raise ValueError(
                f"timestep {timestep} is not within the chain's {self.scheduler.timesteps.tolist()[-1]}..T-1"
            )
        return tail


def check_labels(
    class_labels: Sequence[int] | torch.Tensor | None, batch_size: int, classifier: Callable | None
) -> torch.Tensor | None:
    """The classes to guide towards, LongTensor [N]; None without a classifier.

    Raises:
        ValueError: no ids, or not as many as images; labels that nothing would read.
    """
    if classifier is None:
        if class_labels is not None:
            raise ValueError("class_labels without a classifier: this model has no classes")
        return None
    try:
        labels = torch.as_tensor([] if class_labels is None else class_labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"class_labels={class_labels!r}: give the classifier's ids, integers from 0") from error
    if len(labels) != batch_size:
        raise ValueError(f"classifier guidance requires {batch_size} class_labels (got {len(labels)})")
    if labels.is_floating_point() or labels.dtype == torch.bool or int(labels.min()) < 0:
        raise ValueError(f"class_labels={labels.tolist()}: give the classifier's ids, integers from 0")
    return labels.long()
