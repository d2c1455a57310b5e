"""What a text-to-image model consists of, loaded from a checkpoint or a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..common.errors import UsageError, why_not_loaded
from ..common.layout import AUTOENCODER
from ..common.locations import name_from_run
from ..models.autoencoder import load_autoencoder
from ..models.fits import without_fits
from ..portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline
from ..portable.scheduling_ddpm_hf import DDPMScheduler


class Components(NamedTuple):
    """What a text-to-image model consists of, before training."""

    vae: AutoencoderKL
    text_encoder: torch.nn.Module
    tokenizer: object
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    others: dict  # its sampler and default guidance scale; of a checkpoint also what else it holds


def load_checkpoint_components(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    non_ema_revision: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool = False,
    guidance_scale: float | None = None,
    token: str | None = None,
    **given: Any,
) -> Components:
    """All of a Stable Diffusion checkpoint.

    Args:
        name: of the checkpoint, on the Hub or on disk; also its `revision` and the `variant` of its weights.
        non_ema_revision: the revision with the UNet's weights that are not averaged, to be taken.
        prediction_type, rescale_betas_zero_snr: of the diffusion, if it is to be another one.
        guidance_scale: the default of its pipeline, if it is to be another one.
        token: for a private checkpoint.
        given: components to take instead of the checkpoint's.

    Raises:
        UsageError: there is none.
    """
    options: dict[str, Any] = {"variant": variant, "use_safetensors": True, "token": token}
    try:
        pipeline = TextToImageDDPMPipeline.from_pretrained(name, revision=revision, **(options | given))
        unet = pipeline.unet
        if non_ema_revision and "unet" not in given:
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", revision=non_ema_revision, **options)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        reason = why_not_loaded(error)
        raise UsageError(
            f"--pretrained_model_name_or_path {name}: no Stable Diffusion checkpoint there ({reason})"
        ) from error
    changes: dict[str, Any] = {"rescale_betas_zero_snr": True} if rescale_betas_zero_snr else {}
    changes |= {"prediction_type": prediction_type} if prediction_type is not None else {}
    scheduler = DDPMScheduler.from_config(without_fits(pipeline.scheduler.config), **changes)
    extra = {key: pipeline.components.get(key) for key in ("safety_checker", "feature_extractor", "image_encoder")}
    scale = pipeline.config.guidance_scale if guidance_scale is None else guidance_scale
    others = {"sampler": type(pipeline.scheduler), "guidance_scale": scale, **extra}
    return Components(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, unet, scheduler, others)


def of_a_checkpoint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's settings say of its checkpoint, and change of it; earlier versions did not record all of it."""
    names = "revision", "variant", "non_ema_revision", "prediction_type", "rescale_betas_zero_snr", "guidance_scale"
    return {name: settings[name] for name in names if name in settings}


def assemble(components: Components) -> TextToImageDDPMPipeline:
    """The pipeline that samples from the components; of a checkpoint, with its own sampler where that can."""
    config = components.scheduler.config
    sampler = components.others["sampler"]
    if config.rescale_betas_zero_snr:  # which few samplers know, and only from the very end of the chain
        sampler, config = DDPMScheduler, {**config, "timestep_spacing": "trailing"}
    others = {name: value for name, value in components.others.items() if name != "sampler"}
    return TextToImageDDPMPipeline(
        components.vae,
        components.text_encoder,
        components.tokenizer,
        components.unet,
        sampler.from_config(config),
        requires_safety_checker=others.get("safety_checker") is not None,
        **others,
    )


def load_text_encoder(name_or_path: str, token: str | None = None) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """A tokenizer and its CLIPTextModel: by themselves, or of a pipeline.

    Raises:
        UsageError: there are none.
    """
    of_pipeline = (Path(name_or_path) / "text_encoder").is_dir()
    folders = ("tokenizer", "text_encoder") if of_pipeline else ("", "")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name_or_path, subfolder=folders[0], token=token)
        encoder = CLIPTextModel.from_pretrained(name_or_path, subfolder=folders[1], use_safetensors=True, token=token)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        reason = why_not_loaded(error)
        raise UsageError(
            f"--text_encoder_name_or_path {name_or_path}: no CLIP text encoder there ({reason})"
        ) from error
    return tokenizer, encoder


def components_of_run(
    settings: dict[str, Any], run: Path, scheduler: dict[str, Any] | None, given: dict, token: str | None = None
) -> Components:
    """The components of a run that has not saved its pipeline yet, by its settings.

    Args:
        run: its folder, which holds what it made itself: an autoencoder, a tokenizer.
        scheduler: its diffusion's config, where its checkpoint says it.
        given: those that it trains, of the checkpoint.
        token: for what it started from on the Hub.

    Raises:
        UsageError: a component that cannot be loaded, or that is not there.
    """
    if settings["pretrained_model_name_or_path"]:
        name, changes = name_from_run(settings["pretrained_model_name_or_path"], run), of_a_checkpoint(settings)
        return load_checkpoint_components(name, **changes, token=token, **given)
    tokenizer = text_encoder = None
    if settings["text_encoder_name_or_path"]:
        name = name_from_run(settings["text_encoder_name_or_path"], run)
        tokenizer, text_encoder = load_text_encoder(name, token)
    elif (run / "tokenizer").is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    text_encoder = given.get("text_encoder", text_encoder)
    there = {
        "autoencoder": settings["vae_name_or_path"] or (run / AUTOENCODER / "config.json").is_file(),
        "tokenizer": tokenizer,
        "text encoder": text_encoder,
        "scheduler": scheduler,
    }
    if missing := [name for name, value in there.items() if not value]:
        raise UsageError(f"there is no {' and no '.join(missing)} of it in {run}")
    vae = load_autoencoder(name_from_run(settings["vae_name_or_path"] or AUTOENCODER, run / AUTOENCODER), token=token)
    others = {"sampler": DDPMScheduler, "guidance_scale": settings.get("guidance_scale")}
    return Components(vae, text_encoder, tokenizer, given["unet"], DDPMScheduler.from_config(scheduler), others)
