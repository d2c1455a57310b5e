"""A cascade: a model of small images, and one or two models that enlarge them (Ho et al. 2021).

This file is copied into published repositories: it imports torch, diffusers and files next to it, each directly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .acceleration_ddpm_hf import AccelerationMixin
from .coefficients_ddpm_hf import Coefficients  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .conditioning_ddpm_hf import Conditioning
from .guidance_ddpm_hf import ClassesMixin, ClassLabels, FreeGuidance
from .hub_ddpm_hf import PortablePipelineMixin
from .image_to_image_ddpm_hf import ImageToImageMixin, conditioning_of_unet
from .linear_ddpm_hf import Operator  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .multistep_ddpm_hf import EpsilonMultistepScheduler  # noqa: F401
from .operators_ddpm_hf import OPERATORS  # noqa: F401
from .sampling_ddpm_hf import DDPMPipelineOutput, Generators, SamplingMixin, StepCallback, adopt_scheduler
from .schedules_ddpm_hf import BETA_SCHEDULES  # noqa: F401
from .scheduling_ddpm_hf import DDPMScheduler  # noqa: F401

UPPER = ("2", "3")  # the stages that enlarge, by the ends of their components' names
LEVEL = 0.1  # of noise in what an upper stage reads, where it was trained with as much


class Stage(SamplingMixin, ClassesMixin):
    """A stage of a cascade as a pipeline of its own; its device, progress and classes are the cascade's."""

    vae = None

    def __init__(self, cascade: "DDPMCascadePipeline", unet: Any, scheduler: Any):
        self.cascade, self.unet, self.scheduler = cascade, unet, scheduler

    @property
    def _execution_device(self) -> torch.device:
        return self.cascade._execution_device

    @property
    def config(self) -> Any:
        """The cascade's."""
        return self.cascade.config

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        """The cascade's."""
        return self.cascade.progress_bar(*args, **kwargs)

    def maybe_free_model_hooks(self) -> None:
        """The cascade does it after its last stage."""


class UpperStage(ImageToImageMixin, Stage):
    """A stage that enlarges."""

    def __init__(self, cascade: "DDPMCascadePipeline", unet: Any, scheduler: Any, conditioning: Conditioning):
        self.conditioning = conditioning
        super().__init__(cascade, unet, scheduler)


class DDPMCascadePipeline(SamplingMixin, ClassesMixin, AccelerationMixin, PortablePipelineMixin, DiffusionPipeline):
    """Sample small images, then enlarge them stage by stage; `from_pipes` makes one of trained models.

    Args:
        unet, scheduler: of the small images, as of `DDPMPipeline` or `ClassConditionalDDPMPipeline`.
        unet_2, scheduler_2, unet_3, scheduler_3: of the stages that enlarge, as of `DDPMImageToImagePipeline`.
        conditionings: what these read, by the names of their UNets.
        conditioning_noise: the level of the noise that is mixed into what they read, by the same names, where a call
            says none.
        id2label, trained_classes: as of `ClassConditionalDDPMPipeline`.

    Raises:
        ValueError: stages that do not fit together.
    """

    unet: ModelMixin
    vae = None  # pixels alone
    model_cpu_offload_seq = "unet->unet_2->unet_3"
    _optional_components = ["unet_3", "scheduler_3"]
    scheduler_names = ("scheduler", "scheduler_2", "scheduler_3")

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        unet_2: ModelMixin,
        scheduler_2: SchedulerMixin,
        unet_3: ModelMixin | None = None,
        scheduler_3: SchedulerMixin | None = None,
        conditionings: dict[str, dict] | None = None,
        conditioning_noise: dict[str, float] | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        trained_classes: list[int] | None = None,
    ):
        super().__init__()
        uppers = {"unet_2": unet_2} | ({} if unet_3 is None else {"unet_3": unet_3})
        given = conditionings or {}
        self.conditionings = {name: conditioning_of_unet(one, given.get(name)) for name, one in uppers.items()}
        self._last_size = list(uppers.values())[-1].config.sample_size
        schedulers = (
            adopt_scheduler(one) if one is not None else None for one in (scheduler, scheduler_2, scheduler_3)
        )
        first, second, third = schedulers
        self.register_modules(
            unet=unet, scheduler=first, unet_2=unet_2, scheduler_2=second, unet_3=unet_3, scheduler_3=third
        )
        self.register_to_config(conditionings={name: one.config() for name, one in self.conditionings.items()})
        if self.has_classes:
            self.register_classes(id2label, trained_classes)
        levels = {name: min(LEVEL, one.noise) for name, one in self.conditionings.items()}
        self.register_to_config(conditioning_noise={**levels, **(conditioning_noise or {})})
        self.check_stages()

    @classmethod
    def from_pipes(
        cls, base: Any, *uppers: Any, conditioning_noise: Sequence[float] | float | None = None
    ) -> "DDPMCascadePipeline":
        """The cascade of a pipeline of small images and one or two of super-resolution; they share the networks.

        Args:
            base: a `DDPMPipeline` or `ClassConditionalDDPMPipeline` of pixels.
            uppers: `DDPMImageToImagePipeline`s of super-resolution.
            conditioning_noise: the level for all of them, or for each.

        Raises:
            ValueError: pipelines that do not fit together.
        """
        if not 1 <= len(uppers) <= len(UPPER):
            raise ValueError(
                f"a cascade of {1 + len(uppers)} models: give one of small images, and one or two that enlarge"
            )
        if hasattr(base, "conditioning") or hasattr(base, "tokenizer") or not hasattr(base, "unet"):
            raise ValueError("the first model of a cascade must sample small images, unconditionally or by class")
        if getattr(base, "vae", None) is not None:
            raise ValueError("the first model of a cascade samples latents; a cascade is of pixels")
        for number, one in enumerate(uppers, 2):
            if not hasattr(one, "conditioning") or one.conditioning.task != "super-resolution":
                task = one.conditioning.task if hasattr(one, "conditioning") else "it reads no image"
                raise ValueError(f"model {number} of the cascade must be of super-resolution ({task})")
        parts: dict[str, Any] = {"unet": base.unet, "scheduler": base.scheduler}
        for end, one in zip(UPPER, uppers):
            parts |= {f"unet_{end}": one.unet, f"scheduler_{end}": one.scheduler}
        names = base.config.get("id2label") if getattr(base, "has_classes", False) else None
        for number, one in enumerate(uppers, 2):
            if one.has_classes and names is not None and dict(one.config.id2label) != dict(names):
                raise ValueError(f"model {number} of the cascade knows other classes than the first")
        levels = None
        if conditioning_noise is not None:
            several = one_for_each(conditioning_noise, len(uppers))
            levels = {f"unet_{end}": float(level) for end, level in zip(UPPER, several)}
        conditionings = {f"unet_{end}": one.conditioning.config() for end, one in zip(UPPER, uppers)}
        trained = base.config.get("trained_classes") if names is not None else None
        return cls(
            **parts, conditionings=conditionings, conditioning_noise=levels, id2label=names, trained_classes=trained
        )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the last stage makes."""
        height, width = (self._last_size,) * 2 if isinstance(self._last_size, int) else self._last_size
        return self.unet.config.in_channels, height, width

    def networks(self) -> list[torch.nn.Module]:
        """The stages' UNets, the first one first."""
        return [self.unet, *(getattr(self, name) for name in self.conditionings)]

    def prepare_timesteps(self, num_inference_steps: int | None, timesteps: list[int] | None = None) -> list:
        """Set the chain of every stage, which raises ValueError where one cannot run it; that of the last stage."""
        return [stage.prepare_timesteps(num_inference_steps, timesteps) for stage in self.stages][-1]

    @property
    def stages(self) -> list[Any]:
        """The stages, with the networks and samplers that the pipeline has now."""
        upper = [
            UpperStage(self, getattr(self, name), getattr(self, name.replace("unet", "scheduler")), conditioning)
            for name, conditioning in self.conditionings.items()
        ]
        return [Stage(self, self.unet, self.scheduler), *upper]

    def check_stages(self) -> None:
        """Raise ValueError for stages of other channels or sizes than the stage before makes."""
        first, *uppers = self.stages
        channels, height, width = first.sample_shape
        for number, stage in enumerate(uppers, 2):
            if stage.sample_shape[0] != channels:
                raise ValueError(
                    f"model {number} of the cascade makes images of {stage.sample_shape[0]} channels, the one before"
                    f" {channels}"
                )
            _, reads_height, reads_width = stage.conditioning.observed_shape(stage.sample_shape)
            if reads_height is not None and (reads_height, reads_width) != (height, width):
                raise ValueError(
                    f"model {number} of the cascade reads images of {reads_height}x{reads_width}, and the one before"
                    f" makes {height}x{width}"
                )
            if stage.has_classes and not self.has_classes:
                raise ValueError(f"model {number} of the cascade is by class, and the first one is not")
            _, height, width = stage.sample_shape
        for name, level in self.config.conditioning_noise.items():
            most = self.conditionings[name].noise
            if not 0 <= level <= most:
                raise ValueError(f"conditioning_noise={level:g} for {name}: it was trained with up to {most:g}")

    def levels(self, conditioning_noise: Sequence[float] | float | None) -> list[float]:
        """The level of noise for each stage that enlarges.

        Raises:
            ValueError: another number of levels, or one that a stage was not trained with.
        """
        names = list(self.conditionings)
        if conditioning_noise is None:
            return [float(self.config.conditioning_noise[name]) for name in names]
        several = one_for_each(conditioning_noise, len(names))
        return [stage.check_level(level, 0.0) for stage, level in zip(self.stages[1:], several)]

    @torch.no_grad()
    def __call__(
        self,
        samples: ClassLabels = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        conditioning_noise: Sequence[float] | float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        num_frames: int = 0,
        eta: float = 0.0,
    ) -> DDPMPipelineOutput:
        """Sample images at the size of the last stage.

        Args:
            samples: how many, 1 by default; for a cascade by class their classes, as in
                `ClassConditionalDDPMPipeline`.
            guidance_scale, guidance_rescale, guidance_interval: by class, in each stage with a null class.
            generator: one, or one for each image: an image then depends on its own alone, whatever the batch.
            num_inference_steps: of each stage; None means all timesteps.
            conditioning_noise: the level of the noise that is mixed into what each stage reads, for all or for each;
                None is what the cascade was saved with. It hides what a stage makes otherwise than real images are.
            callback_on_step_end, callback_on_step_end_tensor_inputs, num_frames: of the last stage.
            output_type, return_dict, eta: as in `DDPMPipeline`.

        Raises:
            ValueError: classes, levels or steps that the models do not support.
        """
        self.check_output_type(output_type)
        self.prepare_timesteps(num_inference_steps)  # of all stages, before the first one samples
        guidance = FreeGuidance(guidance_scale, guidance_rescale, guidance_interval).check()
        levels = self.levels(conditioning_noise)
        first, *uppers = self.stages
        labels, count = None, 1 if samples is None else samples
        if self.has_classes:
            labels = self.class_ids(self.default_classes if samples is None else samples)
            count = len(labels)
            without = self.null_class is not None and bool((labels == self.null_class).any())
            if without and any(stage.has_classes and stage.null_class is None for stage in uppers):
                raise ValueError("a model of the cascade always has a class; give classes, not None")
        if guidance_scale != 1.0 and (labels is None or self.null_class is None):
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a cascade by class that also learned no class"
                " (--class_dropout 0.1); use guidance_scale=1"
            )
        null = None if labels is None or self.null_class is None else torch.full_like(labels, self.null_class)
        predict = first.predict if labels is None else guidance.guided(first.predict, "class_labels", labels, null)
        x = self.run(first, count, predict, guidance, generator, num_inference_steps, eta, "latent").images
        for stage, level in zip(uppers, levels):
            last = stage is uppers[-1]
            output = stage.solve(
                x.clamp(-1, 1), labels=labels if stage.has_classes else None, conditioning_noise=level,
                guidance=guidance if stage.has_classes and stage.null_class is not None else FreeGuidance(1.0),
                generator=generator, num_inference_steps=num_inference_steps, eta=eta,
                output_type=output_type if last else "latent",
                callback_on_step_end=callback_on_step_end if last else None,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                num_frames=num_frames if last else 0,
            )  # fmt: skip
            x = output.images
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images,)  # type: ignore[return-value]

    def run(
        self, stage: Stage, count: Any, predict: Any, guidance: FreeGuidance, generator: Generators,
        num_inference_steps: int | None, eta: float, output_type: str,
    ) -> DDPMPipelineOutput:  # fmt: skip
        """The first stage."""
        visited = stage.prepare_timesteps(num_inference_steps)
        take_step = stage.sampler_step(generator, eta, extrapolates=guidance.extrapolates)
        return stage.denoise(stage.prepare_latents(count, generator), visited, predict, take_step, output_type)


def one_for_each(conditioning_noise: Sequence[float] | float, count: int) -> list[float]:
    """A level of noise for each of `count` stages: the given ones, or one for all.

    Raises:
        ValueError: another number of levels.
    """
    given = isinstance(conditioning_noise, Sequence)
    several = list(conditioning_noise) if given else [conditioning_noise] * count  # type: ignore[arg-type]
    if len(several) != count:
        raise ValueError(f"{len(several)} levels of conditioning_noise for {count} models that enlarge")
    return several  # type: ignore[return-value]
