"""A new text-to-image model: its parts planned and checked before training, then built to fit the images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..common.errors import UsageError, one_line
from ..data.batches import Images
from ..data.flags import DataFlags
from ..inference.components import Components, load_checkpoint_components, load_text_encoder, of_a_checkpoint
from ..latents.autoencoder import make_autoencoder
from ..latents.flags import AutoencoderFlags
from ..latents.training import AUTOENCODER, autoencoder_of
from ..models.autoencoder import frozen, load_autoencoder
from ..models.saving import save_model
from ..models.sizes import read_unet_config, settle_resolution
from ..models.unet import text_unet_config, time_blindness
from ..objectives.flags import ScheduleFlags
from ..objectives.losses import check_objective
from ..portable.pipeline_text2image_ddpm_hf import STABLE_DIFFUSION_SETTINGS
from ..portable.sampling_ddpm_hf import downscaling
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from ..training.complete_checkpoints import part_of_run
from ..training.run import Run
from .captions import TOKENIZER_FILES, captions_of, fit_tokenizer, make_text_encoder, read_tokenizer
from .flags import TextModelFlags, TextObjectiveFlags

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TEXT_WIDTH = 128  # of a new text encoder


def load_parts(run: Run) -> Components:
    """All of the checkpoint to train further.

    Settles a --resolution that was not given; the UNet's config says what it is trained at, and then sampled at.

    Raises:
        UsageError: no checkpoint there, or a size that its autoencoder cannot halve.
    """
    flags, data = run.settings, run.settings[DataFlags]
    name, changes = flags.pretrained_model_name_or_path, of_a_checkpoint(flags.values())
    components = load_checkpoint_components(name, **changes, token=flags.hub_token)
    factor = downscaling(components.vae.config.block_out_channels)
    run.log(settle_resolution(data, components.unet.config.sample_size, factor, usual="512", trained=True))
    check_multiples(data, factor)
    height, width = (side // factor for side in data.size())
    components.unet.register_to_config(sample_size=height if height == width else (height, width))
    check_schedule(components.scheduler, flags[TextObjectiveFlags])
    return frozen_but_unet(components, run.device)


def check_schedule(scheduler: DDPMScheduler, objective: TextObjectiveFlags) -> None:
    """Raise UsageError for a diffusion and a loss that cannot go together."""
    try:
        check_objective(scheduler, "simple", **objective.loss_options())
        scheduler.check_invertible(range(len(scheduler)))
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_multiples(data: DataFlags, factor: int) -> None:
    """Raise UsageError for a --resolution that the autoencoder cannot halve."""
    if any(side % factor for side in data.size()):
        raise UsageError(f"--resolution {data.resolution}: the autoencoder requires multiples of {factor}")


class Blueprint(NamedTuple):
    """What of a new model is known, and has been checked, before anything is trained."""

    vae: AutoencoderKL | None  # None: to be trained
    text_encoder: Any | None  # None: to be made, with its tokenizer
    tokenizer: Any | None
    unet: dict[str, Any]  # arguments of UNet2DConditionModel
    scheduler: DDPMScheduler


def check_channels(run: Run, data: DataFlags) -> None:
    """Raise UsageError where the autoencoder that a resumed run goes on with is not there, or reads other channels."""
    folder = run.folder / AUTOENCODER
    if run.resumed is not None:
        folder = autoencoder_of(run.resumed.checkpoint, run.folder)
    elif not (run.flags.resume_from_checkpoint and (folder / "config.json").is_file()):
        return
    channels = load_autoencoder(str(folder)).config.in_channels
    if data.channels not in (None, channels):
        raise UsageError(f"--channels {data.channels}: the autoencoder in {folder} reads images of {channels}")


def design_parts(run: Run) -> Blueprint:
    """The parts of a new model that are given, and the plan of the others; settles a --resolution that was not given.

    Raises:
        UsageError: parts that are not there or do not fit together, or a size that cannot be halved.
    """
    flags = run.settings
    data, model, autoencoder = flags[DataFlags], flags[TextModelFlags], flags[AutoencoderFlags]
    vae_name, token, schedule = flags.vae_name_or_path, flags.hub_token, flags[ScheduleFlags]
    if not vae_name:
        check_channels(run, data)
    vae = load_autoencoder(vae_name, token=token) if vae_name else None
    tokenizer = text_encoder = None
    if model.text_encoder_name_or_path:
        tokenizer, text_encoder = load_text_encoder(model.text_encoder_name_or_path, token)
    factor = downscaling(autoencoder.widths() if vae is None else vae.config.block_out_channels)
    given = None
    if model.model_config_name_or_path:
        given = read_unet_config(model.model_config_name_or_path, token, "UNet2DConditionModel")
    if given is not None:
        line = settle_resolution(data, given.get("sample_size"), factor, usual="32")
    else:
        line = settle_resolution(data, vae and vae.config.sample_size, 1, usual="32")
    run.log(line)
    check_multiples(data, factor)
    height, width = (side // factor for side in data.size())
    channels = vae.config.latent_channels if vae is not None else autoencoder.vae_latent_channels
    context = text_encoder.config.hidden_size if text_encoder is not None else TEXT_WIDTH
    if given is not None:
        unet = given
        unet["sample_size"] = height if height == width else (height, width)
        expected = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": context}
        for name, number in expected.items():
            if unet.setdefault(name, number) != number:
                raise UsageError(f"--model_config_name_or_path: {name} is {unet[name]} and must be {number} here")
        try:
            with torch.device("meta"):
                UNet2DConditionModel(**unet)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--model_config_name_or_path: {one_line(error)}") from error
    else:
        try:
            unet = text_unet_config(channels, (height, width), context)
        except ValueError as error:
            raise UsageError(f"--resolution {data.resolution}: {error}") from error
    scheduler = DDPMScheduler(
        num_train_timesteps=schedule.ddpm_num_steps,
        beta_schedule=schedule.ddpm_beta_schedule,
        prediction_type=flags.prediction_type or "epsilon",
        rescale_betas_zero_snr=schedule.rescale_betas_zero_snr,
        timestep_spacing="trailing" if schedule.rescale_betas_zero_snr else "leading",
        **STABLE_DIFFUSION_SETTINGS,
    )
    check_schedule(scheduler, flags[TextObjectiveFlags])
    return Blueprint(vae, text_encoder, tokenizer, unet, scheduler)


def build(run: Run, blueprint: Blueprint, images: Images) -> Components:
    """A new UNet in the latents of the autoencoder, with a new text encoder where none was given.

    An autoencoder that is to be trained is untrained here, so that the model's first batch can be computed before.

    Raises:
        UsageError: the run that goes on has no tokenizer, with which its text encoder was trained.
    """
    flags, tokenizer, text_encoder = run.settings, blueprint.tokenizer, blueprint.text_encoder
    size, channels = flags[DataFlags].size(), images.transform.channels
    vae = blueprint.vae or make_autoencoder(flags[AutoencoderFlags], channels, size, run.seed)
    if text_encoder is None:
        if run.resumed is None:
            tokenizer = fit_tokenizer(captions_of(images))
        else:
            there = part_of_run(run.resumed.checkpoint, "tokenizer", f"tokenizer/{TOKENIZER_FILES[0]}")
            tokenizer = read_tokenizer(there)
        torch.manual_seed(run.seed)
        text_encoder = make_text_encoder(tokenizer, TEXT_WIDTH)
    torch.manual_seed(run.seed)
    unet = UNet2DConditionModel(**blueprint.unet)
    run.log(time_blindness(unet.config))
    others = {"sampler": DDPMScheduler}
    if flags.guidance_scale is not None:
        others["guidance_scale"] = flags.guidance_scale
    return frozen_but_unet(Components(vae, text_encoder, tokenizer, unet, blueprint.scheduler, others), run.device)


def frozen_but_unet(components: Components, device: torch.device) -> Components:
    """The components, with autoencoder and text encoder on the device and frozen."""
    vae, text_encoder = frozen(components.vae, device), frozen(components.text_encoder, device)
    return components._replace(vae=vae, text_encoder=text_encoder)


def save_tokenizer(tokenizer: "CLIPTokenizer", output_dir: str | Path) -> None:
    """Save a new model's tokenizer, as its pipeline will, so that a checkpoint of the run can be sampled before."""
    save_model(tokenizer, Path(output_dir) / "tokenizer", within=output_dir)
