"""A new text-to-image model: its parts planned and checked before training, then built to fit the images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..common.checkpoints import part_of_run
from ..common.errors import UsageError, one_line
from ..data import DataFlags
from ..data.batches import Images
from ..inference.components import Components, load_text_encoder
from ..latents.flags import AutoencoderFlags
from ..models.autoencoder import load_autoencoder
from ..models.saving import save_model
from ..models.sizes import read_unet_config, settle_resolution
from ..models.unet import text_unet_config
from ..objectives.flags import ScheduleFlags
from ..portable.pipeline_text2image_ddpm_hf import STABLE_DIFFUSION_SETTINGS
from ..portable.sampling_ddpm_hf import downscaling
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from ..training.run import Run
from .captions import TOKENIZER_FILES, all_captions, fit_tokenizer, make_text_encoder, read_tokenizer
from .flags import TextModelFlags

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TEXT_WIDTH = 128  # of a new text encoder


def fit_to_checkpoint(run: Run, data: DataFlags, components: Components) -> None:
    """Settle a --resolution that was not given; the UNet's config says what it is trained at, and then sampled at.

    Raises:
        UsageError: a size that the autoencoder cannot halve.
    """
    factor = downscaling(components.vae.config.block_out_channels)
    run.log(settle_resolution(data, components.unet.config.sample_size, factor, usual="512", trained=True))
    check_multiples(data, factor)
    height, width = (side // factor for side in data.size())
    components.unet.register_to_config(sample_size=height if height == width else (height, width))


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


def draw_blueprint(
    run: Run,
    data: DataFlags,
    model: TextModelFlags,
    vae_name: str | None,
    autoencoder: AutoencoderFlags,
    schedule: ScheduleFlags,
    prediction_type: str | None,
    token: str | None,
) -> Blueprint:
    """The parts of a new model that are given, and the plan of the others.

    Args:
        vae_name: that of an autoencoder to use; without, a new one is trained.
        token: for parts on the Hub.

    Raises:
        UsageError: parts that are not there or do not fit together, or a size that cannot be halved.
    """
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
        prediction_type=prediction_type or "epsilon",
        rescale_betas_zero_snr=schedule.rescale_betas_zero_snr,
        timestep_spacing="trailing" if schedule.rescale_betas_zero_snr else "leading",
        **STABLE_DIFFUSION_SETTINGS,
    )
    return Blueprint(vae, text_encoder, tokenizer, unet, scheduler)


def build(
    blueprint: Blueprint, vae: AutoencoderKL, images: Images, seed: int, checkpoint: Path | None = None
) -> Components:
    """A new UNet in the latents of the autoencoder, with a new text encoder where none was given.

    Args:
        checkpoint: of the run that goes on: its text encoder was trained with the tokenizer in the run's folder.

    Raises:
        UsageError: there is no tokenizer there.
    """
    tokenizer, text_encoder = blueprint.tokenizer, blueprint.text_encoder
    if text_encoder is None:
        if checkpoint is None:
            tokenizer = fit_tokenizer(all_captions(images.dataset.captions, images.rows.name))
        else:
            tokenizer = read_tokenizer(part_of_run(checkpoint, "tokenizer", f"tokenizer/{TOKENIZER_FILES[0]}"))
        torch.manual_seed(seed)
        text_encoder = make_text_encoder(tokenizer, TEXT_WIDTH)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**blueprint.unet)
    return Components(vae, text_encoder, tokenizer, unet, blueprint.scheduler, {"sampler": DDPMScheduler})


def save_tokenizer(tokenizer: "CLIPTokenizer", output_dir: str | Path) -> None:
    """Save a new model's tokenizer, as its pipeline will, so that a checkpoint of the run can be sampled before."""
    save_model(tokenizer, Path(output_dir) / "tokenizer", within=output_dir)
