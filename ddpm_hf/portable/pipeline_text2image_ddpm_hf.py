"""Text to image in the latents of an autoencoder (Rombach et al. 2022), with DDPM or any sampler of Diffusers.

This file is copied into published repositories: it imports torch, diffusers, transformers and files next to it.
"""

import numbers
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import logging
from transformers import CLIPTextModel, CLIPTokenizer

from .acceleration_ddpm_hf import AccelerationMixin
from .coefficients_ddpm_hf import Coefficients  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .guidance_ddpm_hf import FreeGuidance
from .hub_ddpm_hf import PortablePipelineMixin
from .multistep_ddpm_hf import EpsilonMultistepScheduler  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .sampling_ddpm_hf import (
    DDPMPipelineOutput,
    SamplingMixin,
    StepCallback,
    adopt_scheduler,
    downscaling,
    output_channels,
    stock_samples_alike,
)
from .schedules_ddpm_hf import BETA_SCHEDULES  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .scheduling_ddpm_hf import DDPMScheduler  # noqa: F401  (only direct imports are copied with this file)
from .text_encoding_ddpm_hf import cut_off, encode_texts

logger = logging.get_logger(__name__)

# What Stable Diffusion's pipeline would set in place, with a warning, if a scheduler said anything else
STABLE_DIFFUSION_SETTINGS: dict[str, Any] = {"steps_offset": 1, "clip_sample": False}


class TextToImageDDPMPipeline(SamplingMixin, AccelerationMixin, PortablePipelineMixin, DiffusionPipeline):
    """Sample images of prompts; its folder is one of Stable Diffusion's, in both directions.

    Args:
        vae: between images and latents.
        text_encoder, tokenizer: CLIP's, from words to what the UNet attends to.
        unet: predicts from the noised latents, t and the embedded prompt what the `prediction_type` says.
        scheduler: ours; stock's `DDPMScheduler` is converted, other samplers are left alone.
        safety_checker, feature_extractor, image_encoder: of a checkpoint that has them; kept, and not used.
        guidance_scale: the default of calls; saved with the pipeline, where Stable Diffusion's passes over it.

    Raises:
        ValueError: a guidance scale that is negative or not finite.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: torch.nn.Module | None = None,
        feature_extractor: object | None = None,
        image_encoder: torch.nn.Module | None = None,
        requires_safety_checker: bool = False,
        guidance_scale: float = 7.5,
    ):
        super().__init__()
        scheduler = adopt_scheduler(scheduler)
        changed = {
            name: value
            for name, value in STABLE_DIFFUSION_SETTINGS.items()
            if scheduler.config.get(name, value) != value
        }
        if changed:
            scheduler = type(scheduler).from_config(scheduler.config, **changed)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        FreeGuidance(guidance_scale).check()
        self.register_to_config(requires_safety_checker=requires_safety_checker, guidance_scale=guidance_scale)

    def stock_class_name(self) -> str | None:
        """Stock's pipeline, but where its images would differ."""
        differs = (
            not stock_samples_alike(self.scheduler)
            or output_channels(self.unet) != self.unet.config.in_channels  # it extrapolates a learned variance too
            or bool(self.vae.config.shift_factor)
            or any(side % 8 for side in self.image_size)  # it refuses such sizes
        )
        return None if differs else "StableDiffusionPipeline"

    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Prompts as what the UNet attends to, [N, L, D]; cut off at the tokenizer's L tokens, with a warning."""
        if rest := [text for text in cut_off(self.tokenizer, prompts) if text]:
            logger.warning(
                f"prompts are cut to the {self.tokenizer.model_max_length} tokens that the text encoder reads; not"
                f" read: {rest}"
            )
        embedded = encode_texts(self.text_encoder, self.tokenizer, prompts, self._execution_device)
        return embedded.to(self.unet.dtype)

    def check_inputs(
        self, prompt: str | list[str] | None, negative_prompt: str | list[str] | None, height: int, width: int,
        prompt_embeds: torch.Tensor | None, negative_prompt_embeds: torch.Tensor | None, num_images_per_prompt: int,
    ) -> list[str] | None:  # fmt: skip
        """The prompts as a list.

        Raises:
            ValueError: no prompt, or two; a size that latents cannot have; negative prompts that are not as many.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give one of prompt and prompt_embeds")
        width_of_text = self.unet.config.cross_attention_dim
        for name, value in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if value is not None and not (
                isinstance(value, torch.Tensor)
                and value.ndim == 3
                and value.shape[-1] == width_of_text
                and value.isfinite().all()
            ):
                raise ValueError(f"{name}: give a tensor [N, L, {width_of_text}] of finite numbers")
        side = self.vae_scale_factor * downscaling(self.unet.config.block_out_channels)
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, numbers.Integral) or value < 1 or value % self.vae_scale_factor:
                raise ValueError(
                    f"{name}={value}: must be a multiple of {self.vae_scale_factor}, better of {side}, for this model"
                )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompts is not None and not (
            isinstance(prompts, (list, tuple)) and prompts and all(isinstance(one, str) for one in prompts)
        ):
            raise ValueError(f"prompt={prompt!r}: a text, or a list of texts")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give one of negative_prompt and negative_prompt_embeds")
        given: Any = prompt_embeds if prompts is None else prompts
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) != len(given):
            raise ValueError(
                f"negative_prompt_embeds of shape {tuple(negative_prompt_embeds.shape)} for {len(given)} prompts; give"
                " one for each"
            )
        if not (isinstance(num_images_per_prompt, numbers.Integral) and num_images_per_prompt >= 1):
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt!r}: must be a whole number of 1 or more")
        negatives = [negative_prompt or ""] if isinstance(negative_prompt, (str, type(None))) else negative_prompt
        if not (isinstance(negatives, (list, tuple)) and all(isinstance(one, str) for one in negatives)):
            raise ValueError(f"negative_prompt={negative_prompt!r}: a text, or a list of texts")
        if isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) != len(given):
            raise ValueError(
                f"{len(negative_prompt)} negative prompts for {len(given)} prompts; give one for each, or one"
            )
        return None if prompts is None else list(prompts)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 50,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        timesteps: list[int] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        num_frames: int = 0,
        eta: float = 0.0,
    ) -> DDPMPipelineOutput:
        """Sample `num_images_per_prompt` images for each prompt.

        Args:
            height, width: in pixels; by default what the model was trained on.
            num_inference_steps: of the T timesteps, how many to visit; None means all of them.
            guidance_scale: 1 is the conditional model, in a single pass; higher values follow the prompt more strongly
                (Ho & Salimans 2022). By default that of the pipeline's config.
            negative_prompt: what to move away from, instead of the empty prompt.
            latents: x_T [N, C, H/f, W/f] to start from, instead of noise.
            prompt_embeds, negative_prompt_embeds: embedded prompts [N, L, D], instead of texts.
            guidance_rescale: from 0 to 1, against over-exposure at high scales (Lin et al. 2023).
            guidance_interval: (low, high): guide only at these timesteps (Kynkäänniemi et al. 2024).
            num_frames: how many moments of the chain to return in `frames`, decoded: x_t and x̂_0.
            generator, output_type, return_dict, timesteps, callback_on_step_end, eta: as in `DDPMPipeline`.

        Raises:
            ValueError: what `check_inputs` or `DDPMPipeline` raises.
        """
        self.check_output_type(output_type)
        height, width = height or self.image_size[0], width or self.image_size[1]
        prompts = self.check_inputs(
            prompt, negative_prompt, height, width, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
        )
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        free = FreeGuidance(guidance_scale, guidance_rescale, guidance_interval).check()
        visited = self.prepare_timesteps(num_inference_steps if timesteps is None else None, timesteps)

        context: Any = prompt_embeds if prompts is None else self.encode_prompt(prompts)
        context = context.to(self._execution_device)
        null = negative_prompt_embeds
        if guidance_scale != 1.0 and null is None:
            negative = negative_prompt or ""
            negatives = [negative] * len(context) if isinstance(negative, str) else list(negative)
            null = self.encode_prompt(negatives)
        context = context.repeat_interleave(num_images_per_prompt, dim=0)  # [N, L, D]
        if null is not None:
            null = null.to(context.device).repeat_interleave(num_images_per_prompt, dim=0)  # [N, L, D]

        predict = free.guided(self.predict, "encoder_hidden_states", context, null)
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        x = self.prepare_latents(len(context), generator, latents, size)
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
