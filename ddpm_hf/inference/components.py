"""What a text-to-image model consists of, loaded from a checkpoint or a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..common.errors import UsageError, why_not_loaded
from ..common.layout import AUTOENCODER
from ..models.autoencoder import load_autoencoder
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


def load_checkpoint_components(config: Any, **given: Any) -> Components:
    """All of a Stable Diffusion checkpoint.

    Args:
        config: a run's, with `TextModelFlags`.
        given: components to take in the place of the checkpoint's.

    Raises:
        UsageError: there is none.
    """
    name, options = config.pretrained_model_name_or_path, {"variant": config.variant, "use_safetensors": True}
    options["token"] = config.hub_token
    try:
        pipeline = TextToImageDDPMPipeline.from_pretrained(name, revision=config.revision, **(options | given))
        unet = pipeline.unet
        if config.non_ema_revision and "unet" not in given:
            unet = UNet2DConditionModel.from_pretrained(
                name, subfolder="unet", revision=config.non_ema_revision, **options
            )
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        reason = why_not_loaded(error)
        raise UsageError(
            f"--pretrained_model_name_or_path {name}: no Stable Diffusion checkpoint there ({reason})"
        ) from error
    changes = {
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr or None,
        "prediction_type": config.prediction_type,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **changes)
    extra = {key: pipeline.components.get(key) for key in ("safety_checker", "feature_extractor", "image_encoder")}
    others = {"sampler": type(pipeline.scheduler), "guidance_scale": pipeline.config.guidance_scale, **extra}
    return Components(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, unet, scheduler, others)


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
    # earlier versions did not record the scale
    config = SimpleNamespace(**{"guidance_scale": None, **settings, "hub_token": token})
    if config.pretrained_model_name_or_path:
        components = load_checkpoint_components(config, **given)
        if config.guidance_scale is not None:
            components.others["guidance_scale"] = config.guidance_scale
        return components
    tokenizer = text_encoder = None
    if config.text_encoder_name_or_path:
        tokenizer, text_encoder = load_text_encoder(config.text_encoder_name_or_path, token)
    elif (run / "tokenizer").is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    text_encoder = given.get("text_encoder", text_encoder)
    there = {
        "autoencoder": config.vae_name_or_path or (run / AUTOENCODER / "config.json").is_file(),
        "tokenizer": tokenizer,
        "text encoder": text_encoder,
        "scheduler": scheduler,
    }
    if missing := [name for name, value in there.items() if not value]:
        raise UsageError(f"there is no {' and no '.join(missing)} of it in {run}")
    vae = load_autoencoder(config.vae_name_or_path or str(run / AUTOENCODER), token=token)
    others = {"sampler": DDPMScheduler, "guidance_scale": config.guidance_scale}
    return Components(vae, text_encoder, tokenizer, given["unet"], DDPMScheduler.from_config(scheduler), others)
