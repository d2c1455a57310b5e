"""Generation by class, in pixels or, with a `vae`, in latents, with classifier-free or classifier guidance.

This file is copied into published repositories: it imports torch, diffusers and files next to it, each directly.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import logging

from .acceleration_ddpm_hf import AccelerationMixin
from .coefficients_ddpm_hf import Coefficients  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .guidance_ddpm_hf import ClassesMixin, ClassifierGuidance, ClassLabels, FreeGuidance
from .hub_ddpm_hf import PortablePipelineMixin
from .multistep_ddpm_hf import EpsilonMultistepScheduler  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .sampling_ddpm_hf import DDPMPipelineOutput, SamplingMixin, StepCallback, adopt_scheduler
from .schedules_ddpm_hf import BETA_SCHEDULES  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .scheduling_ddpm_hf import DDPMScheduler

logger = logging.get_logger(__name__)


class ClassConditionalDDPMPipeline(
    SamplingMixin, ClassesMixin, AccelerationMixin, PortablePipelineMixin, DiffusionPipeline
):
    """Sample images of given classes from a `UNet2DModel` with class embeddings.

    Args:
        unet: with `num_class_embeds` K, or K + 1 where it also learned to do without a class: the last is that null
            class, which classifier-free guidance needs.
        scheduler: ours; stock's `DDPMScheduler` is converted, other samplers are left alone.
        id2label: the K classes' names by their ids (JSON makes the ids strings); by default the ids.
        vae: decodes x_0 into images, for a model of latents.
        trained_classes: the ids of the classes that training images had, where not all K had some. These are sampled
            by default; the embeddings of the others are untrained.
        classifier: of noised images, kept with the model; it guides in calls with `classifier=pipe.classifier`.

    Raises:
        ValueError: a UNet without class embeddings, or names and ids that do not fit them.
    """

    unet: UNet2DModel
    vae: AutoencoderKL | None
    classifier: ModelMixin | None
    model_cpu_offload_seq = "unet->vae"
    _exclude_from_cpu_offload = ["classifier"]  # it acts within the chain, on gradients
    _optional_components = ["vae", "classifier"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
        vae: AutoencoderKL | None = None,
        trained_classes: list[int] | None = None,
        classifier: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=adopt_scheduler(scheduler), vae=vae, classifier=classifier)
        embeddings = unet.config.num_class_embeds or 0
        if not embeddings:
            raise ValueError(
                "the UNet has no class embeddings, so the model is for DDPMPipeline, not ClassConditionalDDPMPipeline:"
                " load it with ddpm_hf.DDPMPipeline.from_pretrained, or train by class with --label_column"
            )
        self.register_classes(id2label, trained_classes)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        classifier: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        classifier_scale: float = 1.0,
        latents: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        num_frames: int = 0,
        eta: float = 0.0,
    ) -> DDPMPipelineOutput:
        """Sample one image for each label.

        Args:
            class_labels: ids or names (in upper or lower case), also mixed; None for an image of no class. By default
                each class once that training images had; another one is sampled with a warning, as its embedding is
                untrained.
            guidance_scale: 1 is the conditional model, in a single pass; higher values follow the class more
                strongly, 0 is the unconditional model (Ho & Salimans 2022; their w is this less 1).
            guidance_rescale: from 0 to 1, against over-exposure at high scales (Lin et al. 2023).
            guidance_interval: (low, high): guide only at these timesteps (Kynkäänniemi et al. 2024).
            classifier: (x_t, t) -> logits over the classes, trained on noised images, to guide by its gradient.
            classifier_scale: s of Dhariwal & Nichol 2021.
            generator, num_inference_steps, output_type, return_dict, latents, timesteps, callback_on_step_end,
                num_frames, eta: as in `DDPMPipeline`.

        Raises:
            ValueError: a class that the model does not know, guidance without a null class, or what `DDPMPipeline`
                raises.
        """
        self.check_output_type(output_type)
        ids = self.class_ids(self.default_classes if class_labels is None else class_labels)
        if untrained := self.untrained(ids.tolist()):
            logger.warning(f"no training image had these classes, whose embeddings are untrained: {untrained}")
        free = FreeGuidance(guidance_scale, guidance_rescale, guidance_interval).check()
        if guidance_scale != 1.0 and self.null_class is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a model that also learned no class (--class_dropout 0.1);"
                " use guidance_scale=1, or a classifier"
            )
        if classifier is not None and self.null_class is not None and self.null_class in ids:
            raise ValueError("a classifier guides towards a class: class_labels must not contain None")
        null = None if self.null_class is None else torch.full_like(ids, self.null_class)
        predict = free.guided(self.predict, "class_labels", ids, null)
        take_step = self.sampler_step(
            generator, eta, extrapolates=lambda t: classifier is not None or free.extrapolates(t)
        )
        if classifier is not None:
            guidance = ClassifierGuidance(classifier, ids, classifier_scale)
            ancestral = isinstance(self.scheduler, DDPMScheduler)
            predict, take_step = guidance.guided(predict, take_step, self.ddpm_scheduler(), ancestral)
        visited = self.prepare_timesteps(num_inference_steps, timesteps)
        x = self.prepare_latents(len(ids), generator, latents)
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
