"""The model of an unconditional or class-conditional training: designed before the images are read, then built."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import AutoencoderKL

from ..objectives.flags import ObjectiveFlags, ScheduleFlags
from ..portable.pipeline_class_conditional_ddpm_hf import ClassConditionalDDPMPipeline
from ..portable.pipeline_ddpm_hf import DDPMPipeline
from ..portable.pipeline_image_to_image_ddpm_hf import DDPMImageToImagePipeline
from .autoencoder import frozen, load_autoencoder
from .conditioning import check_conditioning, conditioning_of, describe_conditioning
from .diffusion import make_scheduler, terminal_snr_warning
from .flags import StartFlags, UNetFlags
from .pretrained import differences, revision_of_vae, source_of, start_from
from .sizes import model_size, settle_resolution, unet_arguments
from .sources import Source
from .unet import make_unet, time_blindness

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from ..portable.conditioning_ddpm_hf import Conditioning
    from ..portable.scheduling_ddpm_hf import DDPMScheduler


class Design(NamedTuple):
    """What of a model is known before its images are."""

    arguments: dict[str, Any]  # of the UNet
    scheduler: "DDPMScheduler"
    vae: AutoencoderKL | None  # frozen, on the device; None for a model of pixels
    source: Source | None  # the trained model to start from
    fresh: bool  # whether its weights are still to be loaded: no checkpoint has them
    conditioning: "Conditioning | None" = None  # what it reads besides x_t

    @property
    def image_channels(self) -> int:
        """What the UNet, or the autoencoder, reads."""
        return self.arguments["in_channels"] if self.vae is None else self.vae.config.in_channels


def design_model(
    flags: Any, data: Any, checkpoint: Path | None, device: torch.device, token: str | None
) -> tuple[Design, str | None]:
    """The design that the flags describe, and a line to log; settles a --resolution that was not given.

    Args:
        flags: all of the program's.
        data: those of the images.
        checkpoint: of a run that is resumed.
        token: for private models on the Hub.

    Raises:
        UsageError: models that are not there or do not fit together, or a diffusion that cannot train.
    """
    unet, start, name = flags[UNetFlags], flags[StartFlags], flags.vae_name_or_path
    source, vae = source_of(start, token, checkpoint), None
    if name:
        vae = frozen(load_autoencoder(name, revision_of_vae(start, name), token=token), device)
    scheduler = make_scheduler(flags[ScheduleFlags], flags[ObjectiveFlags], vae is not None, source)
    fresh = source is not None and checkpoint is None
    line = settle_resolution(data, *model_size(unet, vae, source, token), usual="64", trained=fresh)
    arguments, conditioning = unet_arguments(unet, data, vae, source, token), conditioning_of(flags.values())
    if conditioning is not None:
        check_conditioning(conditioning, (arguments["in_channels"], *data.size()))
    return Design(arguments, scheduler, vae, source, fresh, conditioning), line


def build_model(
    design: Design, flags: Any, class_names: Sequence[str], seed: int
) -> tuple["UNet2DModel", list[str | None]]:
    """The UNet, of the seed or of the trained weights, and lines to log.

    Args:
        flags: all of the program's.
        class_names: of its images, by id; empty for an unconditional model.

    Raises:
        UsageError: weights that cannot be loaded, or classes that cannot be mapped.
    """
    embedded = len(class_names) + (flags.class_dropout > 0) if class_names else None
    read = design.conditioning and design.conditioning.extra_channels(design.arguments["in_channels"])
    model = make_unet(design.arguments, flags.variance_type, embedded, seed, read or 0)
    lines: list[str | None] = [terminal_snr_warning(design.scheduler, flags[ScheduleFlags])]
    if design.source is None:
        lines.append(time_blindness(model.config))
    elif design.fresh:
        lines += start_from(model, design.source, class_names, design.scheduler, flags.variant, design.conditioning)
        lines += differences(flags.values(), design.source)
    return model, lines


def make_pipeline(
    model: "UNet2DModel", design: Design, class_names: Sequence[str], trained_classes: list[int] | None
) -> DDPMPipeline | ClassConditionalDDPMPipeline | DDPMImageToImagePipeline:
    """The pipeline that samples from the model: from another image, by class, or unconditionally.

    Args:
        class_names: of the images, by id; empty for an unconditional model.
        trained_classes: the ids of those that have images; None for all.
    """
    scheduler, vae, names = design.scheduler, design.vae, dict(enumerate(class_names))
    if design.conditioning is not None:
        return DDPMImageToImagePipeline(model, scheduler, design.conditioning.config(), names, trained_classes)
    if class_names:
        return ClassConditionalDDPMPipeline(model, scheduler, names, vae, trained_classes)
    return DDPMPipeline(model, scheduler, vae)


def describe_model(flags: Any, parameters: int) -> dict[str, str]:
    """What a run says of its model at its start.

    Args:
        flags: all of the program's.
        parameters: how many the UNet has.
    """
    name = flags.pretrained_model_name_or_path or flags.model_preset or flags.model_config_name_or_path
    conditioning = conditioning_of(flags.values())
    reads = {} if conditioning is None else {"conditioning": describe_conditioning(conditioning)}
    in_latents = f", in the latents of {flags.vae_name_or_path}" if flags.vae_name_or_path else ""
    return {
        "model": f"{name or 'the default UNet'}, {parameters:,} parameters{in_latents}",
        "diffusion": f"{flags.ddpm_beta_schedule}, T={flags.ddpm_num_steps}, {flags.prediction_type},"
        f" {flags.variance_type}, objective {flags.objective}",
        **reads,
    }
