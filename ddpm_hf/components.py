"""What a text-to-image model consists of: of a Stable Diffusion checkpoint, or new, fitted to the images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .autoencoder import downscaling, load_autoencoder
from .captions import all_captions, fit_tokenizer, make_text_encoder
from .feeding import Images
from .flags import settle_resolution
from .loading import why_not_loaded
from .models import text_unet_config
from .portable.pipeline_text2image_ddpm_hf import STABLE_DIFFUSION_SETTINGS, TextToImageDDPMPipeline
from .portable.scheduling_ddpm_hf import DDPMScheduler
from .saving import save_model
from .training.config import UsageError
from .training.ownership import AUTOENCODER
from .training.setup import log

TEXT_WIDTH = 128  # of a new text encoder


class Components(NamedTuple):
    """What a text-to-image model consists of, before training."""

    vae: AutoencoderKL
    text_encoder: torch.nn.Module
    tokenizer: object
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    others: dict  # its sampler and default guidance scale; of a checkpoint also what else it holds


def load_checkpoint_components(config, **given) -> Components:
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


def fit_to_size(components: Components, size: tuple[int, int]) -> None:
    """Let the UNet's config say the size (height, width) that it is trained at, which it is then sampled at."""
    height, width = (side // downscaling(components.vae) for side in size)
    components.unet.register_to_config(sample_size=height if height == width else (height, width))


class Blueprint(NamedTuple):
    """What of a new model is known, and has been checked, before anything is trained."""

    vae: AutoencoderKL | None  # None: to be trained
    text_encoder: Any | None  # None: to be made, with its tokenizer
    tokenizer: Any | None
    unet: dict[str, Any]  # arguments of UNet2DConditionModel
    scheduler: DDPMScheduler


def draw_blueprint(config, accelerator) -> Blueprint:
    """The parts of a new model that are given, and the plan of the others.

    Raises:
        UsageError: parts that are not there or do not fit together, or a size that cannot be halved.
    """
    token = config.hub_token
    vae = load_autoencoder(config.vae_name_or_path, token=token) if config.vae_name_or_path else None
    tokenizer = text_encoder = None
    if config.text_encoder_name_or_path:
        tokenizer, text_encoder = load_text_encoder(config.text_encoder_name_or_path, token)
    factor = downscaling(vae) if vae is not None else 2 ** (len(config.widths()) - 1)
    given = read_unet_config(config.model_config_name_or_path, token) if config.model_config_name_or_path else None
    if given is not None:
        line = settle_resolution(config, given.get("sample_size"), factor, usual="32")
    else:
        line = settle_resolution(config, vae and vae.config.sample_size, 1, usual="32")
    log(accelerator, line)
    if any(side % factor for side in config.size()):
        raise UsageError(f"--resolution {config.resolution}: the autoencoder requires multiples of {factor}")
    height, width = (side // factor for side in config.size())
    channels = vae.config.latent_channels if vae is not None else config.vae_latent_channels
    context = text_encoder.config.hidden_size if text_encoder is not None else TEXT_WIDTH
    if given is not None:
        unet = given
        unet["sample_size"] = height if height == width else (height, width)
        for name, wanted in (("in_channels", channels), ("out_channels", channels), ("cross_attention_dim", context)):
            if unet.setdefault(name, wanted) != wanted:
                raise UsageError(f"--model_config_name_or_path: {name} is {unet[name]} and must be {wanted} here")
        try:
            with torch.device("meta"):
                UNet2DConditionModel(**unet)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--model_config_name_or_path: {' '.join(str(error).split())}") from error
    else:
        try:
            unet = text_unet_config(channels, (height, width), context)
        except ValueError as error:
            raise UsageError(f"--resolution {config.resolution}: {error}") from error
    scheduler = DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type or "epsilon",
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing" if config.rescale_betas_zero_snr else "leading",
        **STABLE_DIFFUSION_SETTINGS,
    )
    return Blueprint(vae, text_encoder, tokenizer, unet, scheduler)


def build(blueprint: Blueprint, vae: AutoencoderKL, images: Images, seed: int) -> Components:
    """A new UNet in the latents of the autoencoder, with a new text encoder where none was given."""
    tokenizer, text_encoder = blueprint.tokenizer, blueprint.text_encoder
    if text_encoder is None:
        tokenizer = fit_tokenizer(all_captions(images.dataset.captions, images.rows.name))
        torch.manual_seed(seed)
        text_encoder = make_text_encoder(tokenizer, TEXT_WIDTH)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**blueprint.unet)
    return Components(vae, text_encoder, tokenizer, unet, blueprint.scheduler, {"sampler": DDPMScheduler})


def save_tokenizer(tokenizer, output_dir: str | Path) -> None:
    """Save a new model's tokenizer, as its pipeline will, so that a checkpoint of the run can be sampled before."""
    save_model(tokenizer, Path(output_dir) / "tokenizer", within=output_dir)


def load_text_encoder(name_or_path: str, token: str | None = None):
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


def read_unet_config(name_or_path: str, token: str | None = None) -> dict:
    """The arguments in a UNet2DConditionModel's config.

    Raises:
        UsageError: there is none.
    """
    try:
        loaded = UNet2DConditionModel.load_config(name_or_path, token=token)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--model_config_name_or_path {name_or_path}: no config there ({reason})") from error
    if loaded.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        kind = loaded["_class_name"]
        raise UsageError(f"--model_config_name_or_path {name_or_path}: a {kind}, not a UNet2DConditionModel")
    return {name: value for name, value in loaded.items() if not name.startswith("_")}


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
