"""Checks of the parts of text to image; images and captions made ready for training; what is said of it."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL

from ..common.errors import UsageError
from ..data.batches import Images, open_images
from ..data.buckets import BucketedDataset, bucket_sizes, bucketed
from ..data.dataset import should_cache
from ..data.digits import DIGIT_NAMES
from ..data.flags import DataFlags
from ..inference.components import Components
from ..latents.cache import cache_embeddings, cached_latents, prepare_caching
from ..portable.sampling_ddpm_hf import downscaling
from ..portable.text_encoding_ddpm_hf import cut_off, encode_texts
from ..training.plan import StepPlan
from ..training.reporting import run_lines
from ..training.run import Run
from .captions import captions_of, warn_of_cut_captions
from .components import Blueprint
from .flags import CaptionFlags

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTokenizer


def log_cut_texts(run: Run, prompts: list[str], images: Images, tokenizer: "CLIPTokenizer") -> None:
    """Say once which captions and prompts the text encoder does not read to their ends."""
    captions = [] if images.dataset is None else captions_of(images)
    lines = warn_of_cut_captions(tokenizer, captions)
    for rest in filter(None, cut_off(tokenizer, prompts)):
        lines.append(f"a prompt of --validation_prompts is too long; this is not read: {rest!r}")
    run.log(*(f"warning: {line}" for line in lines))


def default_prompts(given: list[str], embedded: bool, images: Images) -> list[str]:
    """The prompts of the grids: those asked for, or the digits', or some captions."""
    if given:
        return given
    if embedded:
        return [f"a handwritten {name}" for name in DIGIT_NAMES]
    if images.dataset is None:
        return [""]
    captions = captions_of(images, 2000)
    return captions[:: max(1, len(captions) // 8)][:8]


def open_captioned(
    run: Run, data: DataFlags, captions: CaptionFlags, start: Components | Blueprint, cached: bool, token: str | None
) -> Images:
    """The images with their captions, by aspect ratio where that is asked for.

    Where latents are cached, images that cannot be read are left out, if they may be, before batches are planned.

    Args:
        start: whose autoencoder they are for.
        cached: whether their latents are.
        token: for a private dataset on the Hub.

    Raises:
        DataError: images or captions that cannot be read.
        UsageError: channels that the autoencoder does not read, or latents that cannot be cached.
    """
    read = dataclasses.replace(data, cache_dataset="never") if captions.aspect_ratio_buckets else data
    images = open_images(run, read, image_channels(data, start.vae), token, captions.caption_column)
    if captions.aspect_ratio_buckets:
        images = in_buckets(run, images, data, start.vae, start.unet)
    if images.dataset is None:
        return images
    captions_of(images)  # raises DataError
    if cached and not isinstance(images.dataset, BucketedDataset):
        prepare_caching(images.dataset, every=start.vae is None)
    return images


def in_buckets(run: Run, images: Images, data: DataFlags, vae: AutoencoderKL, unet: "UNet2DConditionModel") -> Images:
    """The images by aspect ratio, in sizes that autoencoder and UNet can halve."""
    widths = unet["block_out_channels"] if isinstance(unet, dict) else unet.config.block_out_channels
    sizes = bucket_sizes(*data.size(), downscaling(vae.config.block_out_channels) * downscaling(widths))
    dataset = bucketed(images.indexed, sizes, cached=should_cache(images.rows, images.transform, data.cache_dataset))
    counts = (f"{p.transform.height}x{p.transform.width}: {len(p)}" for p in dataset.parts)
    run.log(f"images by size: {', '.join(counts)}")
    return images._replace(dataset=dataset)


def cached(
    run: Run, images: Images, folder: Path, components: Components, with_captions: bool
) -> tuple[Images, torch.Tensor | None]:
    """The images with their latents, and captions with their embeddings, computed once; and that of no caption.

    Args:
        folder: for what is computed.
        with_captions: whether the text encoder does not learn, so that captions are embedded once.
    """
    accelerator = run.accelerator
    embeddings = null = None
    if with_captions:
        encode = functools.partial(
            encode_texts, components.text_encoder, components.tokenizer, device=accelerator.device
        )
        captions = sorted({*captions_of(images), ""})
        embeddings = cache_embeddings(
            captions, components.text_encoder, components.tokenizer, encode, folder, accelerator
        )
        null = encode([""]).detach().cpu().float()
    parts = images.dataset.parts if isinstance(images.dataset, BucketedDataset) else [images.indexed]
    parts = [cached_latents(part, components.vae, folder, accelerator, embeddings) for part in parts]
    dataset = BucketedDataset(parts) if isinstance(images.dataset, BucketedDataset) else parts[0]
    return images._replace(dataset=dataset), null


def check_parts(run: Run, parts: dict) -> None:
    """Raise UsageError for a checkpoint whose text encoder was trained where this run's is not, or the other way."""
    if run.resumed is None:
        return
    checkpoint = run.resumed.checkpoint
    before = (checkpoint / "text_encoder").is_dir()
    if before != ("text_encoder" in parts):
        trained = "was" if before else "was not"
        raise UsageError(
            f"{checkpoint}: its text encoder {trained} trained; resume with the --train_text_encoder it had"
        )


def image_channels(data: DataFlags, vae: AutoencoderKL | None) -> int:
    """What the autoencoder reads; where it is to be trained, as asked for: 1 for the digits, else 3.

    Raises:
        UsageError: --channels that the autoencoder does not read.
    """
    if vae is None:
        return data.channels or (1 if data.embedded else 3)
    if data.channels not in (None, vae.config.in_channels):
        raise UsageError(f"--channels {data.channels}: the autoencoder reads images of {vae.config.in_channels}")
    return vae.config.in_channels


def describe(run: Run, images: Images, plan: StepPlan, parameters: int, learns: bool) -> dict[str, str]:
    """What runs: said at the start, and by --dry_run."""
    flags = run.settings
    base = flags.pretrained_model_name_or_path
    new = f"a new one, {flags.vae_widths}, {flags.vae_train_steps} steps"
    return {
        **images.lines(),
        "model": f"{base or 'from scratch'}, {parameters:,} parameters to train",
        "latents": "of the checkpoint" if base else flags.vae_name_or_path or new,
        "text": "trained along" if learns else "frozen",
        **run_lines(run, plan, parameters, images.cached_bytes),
    }
