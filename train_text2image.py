#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6",
#     "numpy>=1.26",
#     "diffusers>=0.38",
#     "accelerate>=1.10",
#     "transformers>=5.0",
#     "tokenizers>=0.20",
#     "datasets>=4.0",
#     "pandas>=2.0",
#     "pyarrow>=15.0",
#     "huggingface_hub>=1.0",
#     "safetensors>=0.5",
#     "pillow>=10.0",
#     "psutil>=5.9",
#     "pyyaml>=6.0",
#     "tqdm>=4.66",
#     "matplotlib>=3.8",
#     "typer>=0.15",
#     "tensorboard>=2.16",
#     "mlxtend>=0.23",
# ]
# ///
"""Train text to image in latents.

    accelerate launch train_text2image.py --train_data_dir pictures        # pictures/metadata.jsonl has the captions
    accelerate launch train_text2image.py                                  # the embedded digits, minutes on a CPU
    accelerate launch train_text2image.py --pretrained_model_name_or_path MODEL --dataset_name DATASET --use_ema

With `--pretrained_model_name_or_path` a Stable Diffusion checkpoint (1.x, 2.x) is trained further; without it, all
networks are trained from scratch: first an autoencoder, then a text encoder and a UNet together. The output folder is
one that `DiffusionPipeline.from_pretrained` loads anywhere, as Stable Diffusion's; `ddpm-hf sample` samples from it.
"""

import dataclasses
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ddpm_hf.common.arguments import FIXED, FREE, START, HfArg, Need, has_grids, names_elsewhere
from ddpm_hf.common.errors import UsageError
from ddpm_hf.data.flags import CAPTION_COLUMN, DataFlags
from ddpm_hf.latents.flags import AUTOENCODER_FOLDER, AutoencoderFlags
from ddpm_hf.models.acceleration import use_xformers
from ddpm_hf.models.flags import ON_THE_HUB
from ddpm_hf.models.sizes import settle_resolution
from ddpm_hf.objectives.flags import ScheduleFlags
from ddpm_hf.objectives.names import LOSS_TYPES, PREDICTION_TYPES
from ddpm_hf.training.flags import PipelineConfig
from ddpm_hf.training.parsing import parse_layers

QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")  # of the timesteps, from little noise to much
# The settings that the model card shows
SHOWN = (
    "resolution", "caption_dropout", "prediction_type", "loss_type", "snr_gamma",
    "train_text_encoder", "train_batch_size", "learning_rate", "use_ema",
)  # fmt: skip

# Where no checkpoint is named: a small model from scratch
SCRATCH_RECIPE = {
    "output_dir": "text2image",
    "center_crop": True,
    "cache_latents": True,
    "caption_dropout": 0.1,
    "guidance_scale": 3.0,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 200,
    "adam_weight_decay": 0.0,
    "train_batch_size": 64,
    "eval_batch_size": 64,
    "use_ema": True,
    "ema_max_decay": 0.998,
}
# Where no dataset is named either: the digits
DIGITS_RECIPE = {
    "num_epochs": 32,
    "vae_train_steps": 750,
    "save_images_epochs": 16,
    "checkpoints_total_limit": 2,
}
# What other programs call these flags
MODEL = names_elsewhere("""
--pretrained_model_name_or_path: model model_id model_name pretrained pretrained_model base_model checkpoint_path sd
--pretrained_model_name_or_path: pretrained_model_name model_name_or_path model_path pretrained_path
--text_encoder_name_or_path: text_encoder clip clip_model
--train_text_encoder: finetune_text_encoder train_clip
""")
CAPTIONS = names_elsewhere("""
--caption_column: caption text_column prompt_column caption_key txt_column captions
--caption_dropout: p_uncond uncond_prob cond_drop_prob proportion_empty_prompts text_dropout cfg_dropout
--aspect_ratio_buckets: buckets bucketing enable_bucket aspect_ratio_bucketing
""")
OBJECTIVE = names_elsewhere("""
--prediction_type: parameterization pred_type
--prediction_type v_prediction: v_prediction v_pred v_parameterization
--loss_type: loss loss_fn
--snr_gamma 5: min_snr
--snr_gamma: min_snr_gamma
--noise_offset: offset_noise
--dream_training: dream
""")
PROMPTS = names_elsewhere("""
--validation_prompts: prompt prompts validation_prompt sample_prompts
--guidance_scale: cfg_scale guidance cfg
--num_inference_steps: inference_steps sampling_steps num_sampling_steps sampling_timesteps ddpm_num_inference_steps
""")


@dataclass
class TextModelFlags:
    """Flags of the networks."""

    title: ClassVar[str] = "Model"
    meanings: ClassVar[dict[str, str]] = MODEL
    needs: ClassVar[dict[str, Need]] = {
        "revision": ON_THE_HUB,
        "non_ema_revision": ON_THE_HUB,
        "train_text_encoder": Need(
            lambda run: run.pretrained_model_name_or_path or run.text_encoder_name_or_path,
            "changes nothing: a new text encoder is trained in any case",
        ),
    }

    pretrained_model_name_or_path: str | None = HfArg(
        resume=FIXED,
        default=None,
        help="A Stable Diffusion checkpoint (1.x, 2.x) on the Hub or on disk; without, from scratch.",
    )
    revision: str | None = HfArg(resume=FIXED, default=None, help="Branch, tag or commit of the checkpoint.")
    variant: str | None = HfArg(resume=FIXED, default=None, help="Variant of the checkpoint's files, such as fp16.")
    non_ema_revision: str | None = HfArg(
        resume=FIXED, default=None, help="Revision that holds the UNet's raw weights to train on."
    )
    model_config_name_or_path: str | None = HfArg(
        resume=FREE, default=None, help="From scratch: a UNet2DConditionModel's config, on the Hub or on disk."
    )
    text_encoder_name_or_path: str | None = HfArg(
        resume=FIXED,
        default=None,
        help="From scratch: a CLIPTextModel with its tokenizer to use, frozen, instead of a new one.",
    )
    train_text_encoder: bool = HfArg(resume=FIXED, default=False, help="Train the text encoder along with the UNet.")


@dataclass
class CaptionFlags:
    """Flags of the captions."""

    title: ClassVar[str] = "Captions"
    meanings: ClassVar[dict[str, str]] = CAPTIONS

    caption_column: str = HfArg(default=CAPTION_COLUMN, help="The column of the captions: texts, or lists of them.")
    caption_dropout: float = HfArg(
        default=0.0,
        help="Share of the captions to train without, for classifier-free guidance; 0.1 is usual.",
    )
    aspect_ratio_buckets: bool = HfArg(
        default=False,
        help="Crop each image to the nearest of several sizes of up to the resolution's area, at most twice as wide as"
        " high or the reverse; a batch holds one size. Needs an autoencoder that is trained already.",
    )


@dataclass
class TextObjectiveFlags:
    """Flags of what the model predicts, and of its loss."""

    title: ClassVar[str] = "Prediction and loss"
    meanings: ClassVar[dict[str, str]] = OBJECTIVE
    needs: ClassVar[dict[str, Need]] = {
        "dream_detail_preservation": Need(lambda run: run.dream_training, "has no effect without --dream_training")
    }

    prediction_type: str | None = HfArg(
        resume=FIXED, default=None, help=f"{', '.join(PREDICTION_TYPES)}; by default the checkpoint's, or epsilon."
    )
    loss_type: str = HfArg(default="l2", help=f"{', '.join(LOSS_TYPES)}.")
    snr_gamma: float | None = HfArg(default=None, help="Min-SNR weighting; 5 is usual.")
    noise_offset: float = HfArg(default=0.0, help="Noise shared by all of a channel, for dark and light images.")
    input_perturbation: float = HfArg(default=0.0, help="Perturb the noise that is added, not the one predicted; 0.1.")
    dream_training: bool = HfArg(default=False, help="DREAM: train on the model's own errors, with a second pass.")
    dream_detail_preservation: float = HfArg(default=1.0, help="DREAM's p: the higher, the more detail is kept.")


@dataclass
class PromptFlags:
    """Flags of the grids."""

    title: ClassVar[str] = "Samples and logging"
    meanings: ClassVar[dict[str, str]] = PROMPTS
    needs: ClassVar[dict[str, Need]] = {
        "validation_prompts": Need(has_grids, "is not sampled: sample grids are turned off"),
        "num_inference_steps": Need(has_grids, "has no effect without sample grids"),
    }

    validation_prompts: list[str] = HfArg(  # noqa: RUF009
        resume=FREE,
        default_factory=list,
        help="Prompts of the grids that are sampled while training; by default some captions.",
    )
    guidance_scale: float | None = HfArg(
        resume=FREE,
        default=None,
        help="Classifier-free guidance scale of the grids, saved with the pipeline as its default; if omitted, the"
        " checkpoint's (7.5 for Stable Diffusion), or 3 from scratch.",
    )
    num_inference_steps: int = HfArg(resume=FREE, default=50, help="Steps to sample the grids with.")


@dataclass
class Text2ImageConfig(
    DataFlags, TextModelFlags, CaptionFlags, AutoencoderFlags, ScheduleFlags, TextObjectiveFlags, PromptFlags,
    PipelineConfig
):  # fmt: skip
    """All flags; `--help` groups them in the order of the bases."""

    needs: ClassVar[dict[str, Need]] = dict.fromkeys(
        ("ddpm_num_steps", "ddpm_beta_schedule"),
        Need(lambda run: not run.pretrained_model_name_or_path, "has no effect: the diffusion is the checkpoint's"),
    )

    # where Diffusers' script has other defaults than its unconditional one
    output_dir: str = HfArg(
        resume=START,
        default="sd-model-finetuned",
        help="Where the pipeline, its pictures, metrics.jsonl and the checkpoints go.",
    )
    resolution: str | None = HfArg(
        default=None,
        help="512, or HEIGHTxWIDTH such as 512x768; by default the size of the checkpoint, else 512; from scratch 32.",
    )
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = HfArg(
        default="lanczos", help="How images are resized."
    )
    lr_scheduler: str = HfArg(default="constant", help="linear, cosine, constant, constant_with_warmup, ...")
    adam_beta1: float = HfArg(default=0.9, help="AdamW's first decay rate.")
    adam_weight_decay: float = HfArg(default=1e-2, help="AdamW's weight decay.")
    save_images_epochs: int = HfArg(
        resume=FREE,
        default=5,
        aliases=["--validation_epochs"],
        help="Epochs between grids of the validation prompts; 0 turns them off.",
    )
    tracker_project_name: str | None = HfArg(
        resume=FREE, default="text2image-fine-tune", help="The tracker's project."
    )

    def check(self) -> None:
        """Raise UsageError or DataError for a value out of range or a combination that cannot work."""
        super().check()
        self.check_data()
        self.check_schedule()
        self.check_autoencoder()
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise UsageError(
                f"--prediction_type must be one of {', '.join(PREDICTION_TYPES)} (got {self.prediction_type!r})"
            )
        if not 0 <= self.caption_dropout < 1:
            raise UsageError(f"--caption_dropout {self.caption_dropout}: must be at least 0 and less than 1")
        for name in ("noise_offset", "input_perturbation", "dream_detail_preservation", "guidance_scale"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UsageError(f"--{name} {getattr(self, name)}: must be a number of 0 or more")
        if self.num_inference_steps < 1:
            raise UsageError(f"--num_inference_steps {self.num_inference_steps}: must be 1 or more")
        if self.streaming and self.max_train_steps is None:
            raise UsageError("--streaming has no epochs to count: give --max_train_steps")
        if self.streaming and not (self.pretrained_model_name_or_path or self.vae_name_or_path):
            raise UsageError("--streaming: a new autoencoder requires all images at once; give --vae_name_or_path")
        if self.streaming and self.cache_latents:
            raise UsageError("--cache_latents requires all images at once; leave it or --streaming out")
        if self.streaming and not self.pretrained_model_name_or_path and not self.text_encoder_name_or_path:
            raise UsageError("--streaming: a tokenizer is fitted to all captions; give --text_encoder_name_or_path")
        if self.aspect_ratio_buckets and self.streaming:
            raise UsageError("--aspect_ratio_buckets requires all images at once; leave it or --streaming out")
        if self.aspect_ratio_buckets and not (self.pretrained_model_name_or_path or self.vae_name_or_path):
            raise UsageError("--aspect_ratio_buckets: give --vae_name_or_path; a new autoencoder trains on one size")
        if not self.pretrained_model_name_or_path:
            for name in ("revision", "variant", "non_ema_revision"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name} is of the checkpoint: give --pretrained_model_name_or_path")
        if self.label_column is not None:
            raise UsageError("--label_column is for train_unconditional.py; here captions say what is to be seen")
        if self.pretrained_model_name_or_path:
            for name in ("model_config_name_or_path", "text_encoder_name_or_path", "vae_name_or_path"):
                if getattr(self, name):
                    raise UsageError(f"--{name} is for training from scratch; the checkpoint brings its own")

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder learns too: on request, and where it is a new one."""
        own = not self.pretrained_model_name_or_path and not self.text_encoder_name_or_path
        return self.train_text_encoder or own


def weaker_layers(config: Text2ImageConfig) -> list:
    """What decides where command line and --config say nothing."""
    if config.pretrained_model_name_or_path:
        return []
    recipe = SCRATCH_RECIPE | ({"cache_latents": False} if config.streaming else {})
    layers = [("the recipe from scratch", recipe)]
    if config.embedded:
        from ddpm_hf.common.machine import cpu_has_bf16

        half = {"mixed_precision": "bf16" if cpu_has_bf16() else "no"}
        layers.append(("the embedded recipe", {**DIGITS_RECIPE, **half}))
    return layers


def parse(argv: list[str]) -> Text2ImageConfig:
    """The settings for a command line; a mistake is one line and exit code 2."""
    stages = ("", AUTOENCODER_FOLDER)
    return parse_layers(Text2ImageConfig, argv, weaker_layers, description=__doc__, stages=stages)


if __name__ == "__main__":  # before torch is imported, so that --help and an unknown flag are answered at once
    CONFIG = parse(sys.argv[1:])

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.layout import COMPONENTS, layout
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.data import DIGIT_NAMES, should_cache
from ddpm_hf.data.batches import Images, make_batches, make_plan, open_images
from ddpm_hf.data.buckets import BucketedDataset, bucket_sizes, bucketed
from ddpm_hf.inference.components import Components, assemble, load_checkpoint_components
from ddpm_hf.latents.autoencoder import make_autoencoder
from ddpm_hf.latents.cache import cache_embeddings, cached_latents, check_cacheable
from ddpm_hf.latents.encoding import x_start_of
from ddpm_hf.latents.training import find_autoencoder_run, train_autoencoder
from ddpm_hf.models.acceleration import compiled
from ddpm_hf.models.attention import choose_attention
from ddpm_hf.models.autoencoder import downscaling
from ddpm_hf.models.unet import time_blindness
from ddpm_hf.objectives.losses import check_objective, training_losses
from ddpm_hf.objectives.timestep_samplers import UniformTimestepSampler
from ddpm_hf.portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline, cut_off, tokenize
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler
from ddpm_hf.publishing.publisher import Publisher, describe_run, reserve_repository
from ddpm_hf.text.captions import all_captions, encode_captions, warn_of_cut_captions
from ddpm_hf.text.components import build, draw_blueprint, fit_to_size, save_tokenizer
from ddpm_hf.training.ending import ends_in_one_line
from ddpm_hf.training.logs import end_training, log, start_trackers
from ddpm_hf.training.loop import training_loop
from ddpm_hf.training.meter import Losses, sum_over_ranks
from ddpm_hf.training.plan import StepPlan
from ddpm_hf.training.previews import draw_grid
from ddpm_hf.training.rehearsal import measure_pace, rehearse
from ddpm_hf.training.reporting import ending, run_lines, show, shows_bars, table
from ddpm_hf.training.setup.accelerator import start_accelerator
from ddpm_hf.training.setup.begin import begin_training, run_facts
from ddpm_hf.training.setup.claiming import (
    check_resumable,
    check_unchanged,
    claim_output_dir,
    describe_start,
    find_run,
)
from ddpm_hf.training.setup.settings import agree_on_seed, save_settings
from ddpm_hf.training.state import averaged_weights, unwrap
from ddpm_hf.training.stopping import deadline_of


class TextConditioned(torch.nn.Module):
    """What is trained: the UNet, and the text encoder where it learns too."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: torch.nn.Module | None):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, mask=None) -> torch.Tensor:
        """x_t [N, C, h, w], t [N], and ids [N, L] or embeddings [N, L, D] -> the prediction [N, C, h, w]."""
        if not text.is_floating_point():
            text = self.text_encoder(text, attention_mask=mask)[0]
        return self.unet(x_t, timesteps, encoder_hidden_states=text).sample


def compute_loss(
    model,
    batch: dict,
    keys: StepKeys,
    *,
    config: Text2ImageConfig,
    components: Components,
    null_embedding: torch.Tensor | None,
    accelerator,
) -> Losses:
    """Draw t and noise, add it to the latents, predict from the caption, compare (Rombach et al. 2022, Eq. 3)."""
    scheduler = components.scheduler
    x_start = x_start_of(batch, keys, components.vae, accelerator)  # [N, C, h, w]
    timesteps = UniformTimestepSampler(len(scheduler)).sample(keys.uniform("timestep"))[0].to(x_start.device)
    noise = keys.normal_like(x_start)
    text = caption_input(batch, keys, config, components, null_embedding, accelerator)
    if config.noise_offset and not keys.validation:
        noise = noise + config.noise_offset * keys.normal_like(x_start[:, :, :1, :1].clone(), "noise_offset")
    if config.dream_training and not keys.validation:
        noise = dream_noise(model, scheduler, x_start, noise, timesteps, text, config.dream_detail_preservation)
    added = noise
    if config.input_perturbation and not keys.validation:  # Ning et al. 2023
        added = noise + config.input_perturbation * keys.normal_like(x_start, "input_perturbation")
    output = model(scheduler.add_noise(x_start, added, timesteps), timesteps, text).float()
    losses = training_losses(
        scheduler, output, x_start, noise, timesteps, loss_type=config.loss_type, snr_gamma=config.snr_gamma
    )
    return Losses(losses, groups=timesteps * 4 // len(scheduler))


def caption_input(
    batch: dict, keys: StepKeys, config: Text2ImageConfig, components: Components, null_embedding, accelerator
) -> torch.Tensor:
    """The captions as ids [N, L] for a text encoder that learns, else as embeddings [N, L, D]; some left out."""
    count = len(batch["captions"])
    dropped = torch.zeros(count, dtype=torch.bool)
    if not keys.validation:
        dropped = keys.uniform("caption_dropout") < config.caption_dropout
    if "embeddings" in batch:
        embedded = torch.where(dropped[:, None, None], null_embedding, batch["embeddings"])
        return embedded.to(accelerator.device, non_blocking=True)
    captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), batch["captions"])]
    if config.trains_text_encoder:
        return tokenize(components.tokenizer, captions)[0].to(accelerator.device)
    with torch.no_grad():
        return encode_captions(components.text_encoder, components.tokenizer, captions, accelerator.device)


@torch.no_grad()
def dream_noise(model, scheduler, x_start, noise, timesteps, text, power: float) -> torch.Tensor:
    """The noise moved by λ times the model's own error, λ = √(1-ᾱ)^p (Zhou et al. 2023, Algorithm 1)."""
    x_t = scheduler.add_noise(x_start, noise, timesteps)
    predicted = scheduler.predict_original_sample(model(x_t, timesteps, text).float(), timesteps, x_t)
    epsilon = scheduler.predict_epsilon(predicted, timesteps, x_t)
    variance = scheduler.q_mean_variance(x_start, timesteps).variance  # 1 - ᾱ, [N, 1, 1, 1]
    return noise + variance ** (0.5 * power) * (noise - epsilon)


@torch.no_grad()
def validation_loss(model, *, held_out, config: Text2ImageConfig, accelerator, **options) -> dict:
    """The mean loss over the held-out images, at the same timesteps and noise each time, no caption left out."""
    total = torch.zeros(2, dtype=torch.float64)
    starts = range(0, len(held_out), config.eval_batch_size)
    for first in list(starts)[accelerator.process_index :: accelerator.num_processes]:
        places = range(first, min(first + config.eval_batch_size, len(held_out)))
        batch = held_out.__getitems__([(0, index) for index in places])
        keys = StepKeys(config.seed, 0, first, len(places), validation=True)
        with accelerator.autocast():
            losses = compute_loss(model, batch, keys, config=config, accelerator=accelerator, **options).losses
        total += torch.stack([losses.cpu().double().sum(), torch.tensor(float(len(places)))])
    total = sum_over_ranks(total)
    return {"validation_loss": float(total[0] / total[1])}


def make_pipeline(model: TextConditioned, components: Components) -> TextToImageDDPMPipeline:
    """The pipeline that samples from the model."""
    text_encoder = model.text_encoder or components.text_encoder
    return assemble(components._replace(unet=model.unet, text_encoder=text_encoder))


def draw_prompts(
    model, step: int, *, pipeline_of, prompts: list[str], config: Text2ImageConfig, accelerator
) -> Path | None:
    """A grid with a row for each prompt."""
    pipeline = pipeline_of(model)
    shown = accelerator.is_main_process and shows_bars()
    pipeline.set_progress_bar_config(desc="sampling", leave=False, disable=not shown)
    prompts = prompts[: config.eval_batch_size]
    columns = config.eval_batch_size // len(prompts)

    steps = min(config.num_inference_steps, len(pipeline.scheduler))

    def sample(places: list[int], generators: list[torch.Generator], num_frames: int):
        asked = [prompts[place // columns] for place in places]
        options = {"num_inference_steps": steps, "num_frames": num_frames, "output_type": "preview"}
        return pipeline(asked, generator=generators, **options)

    return draw_grid(sample, columns * len(prompts), columns, step, config, accelerator, prompts)


def log_cut_texts(config: Text2ImageConfig, images: Images, tokenizer, accelerator) -> None:
    """Say once which captions and prompts the text encoder does not read to their ends."""
    captions = [] if images.dataset is None else all_captions(images.dataset.captions, images.rows.name)
    lines = warn_of_cut_captions(tokenizer, captions)
    for rest in filter(None, cut_off(tokenizer, config.validation_prompts)):
        lines.append(f"a prompt of --validation_prompts is too long; this is not read: {rest!r}")
    for line in lines:
        log(accelerator, f"warning: {line}")


def default_prompts(config: Text2ImageConfig, images: Images) -> list[str]:
    """The prompts of the grids: those asked for, or the digits', or some captions."""
    if config.validation_prompts:
        return config.validation_prompts
    if config.embedded:
        return [f"a handwritten {name}" for name in DIGIT_NAMES]
    if images.dataset is None:
        return [""]
    captions = all_captions(images.dataset.captions[:2000], images.rows.name)
    return captions[:: max(1, len(captions) // 8)][:8]


def in_buckets(images: Images, config: Text2ImageConfig, vae: AutoencoderKL, unet, accelerator) -> Images:
    """The images by aspect ratio, in sizes that autoencoder and UNet can halve."""
    widths = unet["block_out_channels"] if isinstance(unet, dict) else unet.config.block_out_channels
    sizes = bucket_sizes(*config.size(), downscaling(vae) * 2 ** (len(widths) - 1))
    dataset = bucketed(images.dataset, sizes, cached=should_cache(images.rows, images.transform, config.cache_dataset))
    counts = (f"{p.transform.height}x{p.transform.width}: {len(p)}" for p in dataset.parts)
    log(accelerator, f"images by size: {', '.join(counts)}")
    return images._replace(dataset=dataset)


def cached(
    images: Images, config: Text2ImageConfig, components: Components, accelerator
) -> tuple[Images, torch.Tensor]:
    """The images with their latents, and captions with their embeddings, computed once; and that of no caption."""
    folder = config.cache_folder()
    embeddings = null = None
    if not config.trains_text_encoder:
        encode = functools.partial(
            encode_captions, components.text_encoder, components.tokenizer, device=accelerator.device
        )
        captions = all_captions([*images.dataset.captions, ""], images.rows.name)
        embeddings = cache_embeddings(
            captions, components.text_encoder, components.tokenizer, encode, folder, accelerator
        )
        null = encode([""]).detach().cpu().float()
    parts = images.dataset.parts if config.aspect_ratio_buckets else [images.dataset]
    parts = [cached_latents(part, components.vae, folder, accelerator, embeddings) for part in parts]
    return images._replace(dataset=BucketedDataset(parts) if config.aspect_ratio_buckets else parts[0]), null


def describe(
    config: Text2ImageConfig, images: Images, plan: StepPlan, total_steps: int, model: TextConditioned, accelerator
) -> dict[str, str]:
    """What runs: said at the start, and by --dry_run."""
    count = "a stream" if images.dataset is None else f"{len(images.dataset):,} images"
    start = config.pretrained_model_name_or_path or "from scratch"
    vae = config.vae_name_or_path or f"a new one, {config.vae_widths}, {config.vae_train_steps} steps"
    return {
        "data": f"{images.rows.name}: {count}, captions in {config.caption_column!r}",
        "images": f"{images.transform.channels} × {' × '.join(map(str, config.size()))}",
        "model": f"{start}, {sum(each.numel() for each in model.parameters()):,} parameters to train",
        "latents": "of the checkpoint" if config.pretrained_model_name_or_path else vae,
        "text": "trained along" if config.trains_text_encoder else "frozen",
        **run_lines(config, accelerator, plan, total_steps),
    }


def train(config: Text2ImageConfig) -> None:
    """From flags to a trained, saved and, if asked, published pipeline."""
    config.check()
    deadline = deadline_of(config.max_train_hours)
    accelerator = start_accelerator(config)
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # an error is one line, and main says it
    diffusers_logging.disable_progress_bar()  # one for the parts of a checkpoint
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # one for each file that is saved
    new_autoencoder = not config.pretrained_model_name_or_path and not config.vae_name_or_path
    written = layout(*COMPONENTS, autoencoder=new_autoencoder)
    found = find_run(config, accelerator, written, (config.train_data_dir, config.dataset_name))
    begun = found or (config.resume_from_checkpoint and find_autoencoder_run(config))
    config.seed = agree_on_seed(config, begun and begun[1])
    check_unchanged(config, begun and begun[1])
    checkpoint = load_checkpoint_components(config) if config.pretrained_model_name_or_path else None
    if checkpoint is not None:
        size = checkpoint.unet.config.sample_size, downscaling(checkpoint.vae)
        log(accelerator, settle_resolution(config, *size, usual="512", trained=True))
    start = checkpoint or draw_blueprint(config, accelerator)
    check_schedule(config, start.scheduler)
    channels = image_channels(config, start.vae)
    if checkpoint is not None:
        fit_to_size(checkpoint, config.size())
    data = dataclasses.replace(config, cache_dataset="never") if config.aspect_ratio_buckets else config
    images = open_images(data, config, channels, accelerator, config.caption_column)
    if config.aspect_ratio_buckets:
        images = in_buckets(images, config, start.vae, start.unet, accelerator)
    check_images(config, images, new_autoencoder)
    plan, total_steps = make_plan(images, config, accelerator.num_processes)

    # all of the model, so that its first batch is computed before an autoencoder is trained: with a stand-in for that
    vae = start.vae or make_autoencoder(config, channels, config.size(), config.seed)
    components = checkpoint or build(start, vae, images, config.seed)
    if config.guidance_scale is not None:
        components.others["guidance_scale"] = config.guidance_scale
    for frozen in (components.vae, components.text_encoder):
        frozen.eval().requires_grad_(False).to(accelerator.device)
    log_cut_texts(config, images, components.tokenizer, accelerator)
    if checkpoint is None:
        log(accelerator, time_blindness(components.unet.config))
    model = trained_model(config, components, accelerator)
    parts = {"unet": model.unet} | ({"text_encoder": model.text_encoder} if model.text_encoder is not None else {})
    facts = run_facts(config, images.count, plan, total_steps)
    check_resumable(found, config, model.unet, facts, accelerator)
    check_parts(found, parts)
    facts["scheduler"] = json.loads(components.scheduler.to_json_string())  # so that a checkpoint can be sampled
    repository = reserve_repository(config, bool(images.held_out), accelerator)
    state = begin_training(config, accelerator, model, total_steps, QUARTILES, facts, found, parts=parts)
    if config.compile and not config.dry_run:  # compiling takes minutes
        state.model = compiled(state.model)
    loss_of = functools.partial(
        compute_loss, config=config, accelerator=accelerator, components=components, null_embedding=None
    )
    batches = make_batches(images, config, config, plan, state.step, accelerator)
    batches = rehearse(config, accelerator, state, plan, batches, loss_of)
    lines = describe(config, images, plan, total_steps, model, accelerator)
    if config.dry_run:
        if new_autoencoder:
            own = start_accelerator(config)
            train_autoencoder(config, config, images, channels, config.size(), own, rehearse_only=True)
        lines |= measure_pace(config, accelerator, state, plan, batches, loss_of, total_steps)
        show(accelerator, table(lines), describe_start(config, found))
        return

    claim_output_dir(config, accelerator, written, state.step)
    start_trackers(config, accelerator, Path(__file__).stem)
    if accelerator.is_main_process:
        save_settings(config)
    log(accelerator, table(lines))
    if new_autoencoder:
        own = start_accelerator(config)
        vae = train_autoencoder(config, config, images, channels, config.size(), own, deadline)
        if vae is None:  # stopped, and said so
            return
        components = components._replace(vae=vae.eval().requires_grad_(False).to(accelerator.device))
    null_embedding = None
    if config.cache_latents:
        images, null_embedding = cached(images, config, components, accelerator)
        batches = make_batches(images, config, config, plan, state.step, accelerator)
    tokenize(components.tokenizer, [""])  # it is saved as it was last used, which a run that only saves it did not
    if checkpoint is None and accelerator.is_main_process:
        save_tokenizer(components.tokenizer, config.output_dir)

    shared = {"config": config, "accelerator": accelerator, "components": components, "null_embedding": null_embedding}
    pipeline_of = functools.partial(make_pipeline, components=components)
    prompts = default_prompts(config, images)
    base = config.pretrained_model_name_or_path
    about = describe_run(config, images, plan, model, SHOWN, prompts[: config.eval_batch_size], base)
    publisher = Publisher(config, state, pipeline_of, about, total_steps, repository, accelerator)
    finished = training_loop(
        config,
        accelerator,
        state,
        plan,
        batches,
        total_steps,
        compute_loss=functools.partial(compute_loss, **shared),
        validate=images.held_out and functools.partial(validation_loss, held_out=images.held_out, **shared),
        draw=functools.partial(
            draw_prompts, pipeline_of=pipeline_of, prompts=prompts, config=config, accelerator=accelerator
        ),
        save=publisher.save,
        saves_checkpoints=config.hub_strategy != "end",
        name_of=images.name_of,
        deadline=deadline,
    )
    if finished:
        with averaged_weights(state, unwrap(accelerator, state.model)) as trained:
            if accelerator.is_main_process:
                publisher.finish(trained, state.step)
    else:
        publisher.stopped()
    sample = ["ddpm-hf", "sample", "--prompt", prompts[0]]
    log(accelerator, ending(config, state, f"accelerate launch {Path(__file__).name}", finished, sample))
    end_training(accelerator)


def check_images(config: Text2ImageConfig, images: Images, new_autoencoder: bool) -> None:
    """Raise DataError or UsageError for captions that are no texts, and latents that cannot be cached.

    Where they are cached, images that cannot be read are left out, if they may be, before the batches are planned.
    """
    if images.dataset is None:
        return
    all_captions(images.dataset.captions, images.rows.name)
    if config.cache_latents and not config.aspect_ratio_buckets:
        images.dataset.leave_out_broken()
        check_cacheable(images.dataset, every=new_autoencoder)


def check_parts(found: tuple[Path, dict] | None, parts: dict) -> None:
    """Raise UsageError for a checkpoint whose text encoder was trained where this run's is not, or the other way."""
    if found is not None and (found[0] / "text_encoder").is_dir() != ("text_encoder" in parts):
        trained = "was" if (found[0] / "text_encoder").is_dir() else "was not"
        raise UsageError(
            f"{found[0]}: its text encoder {trained} trained; resume with the --train_text_encoder it had"
        )


def image_channels(config: Text2ImageConfig, vae: AutoencoderKL | None) -> int:
    """What the autoencoder reads; where it is to be trained, as asked for: 1 for the digits, else 3.

    Raises:
        UsageError: --channels or a --resolution that the autoencoder does not read.
    """
    if vae is None:
        return config.channels or (1 if config.embedded else 3)
    if any(side % downscaling(vae) for side in config.size()):
        wanted = downscaling(vae)
        raise UsageError(f"--resolution {config.resolution}: the autoencoder requires multiples of {wanted}")
    if config.channels not in (None, vae.config.in_channels):
        raise UsageError(f"--channels {config.channels}: the autoencoder reads images of {vae.config.in_channels}")
    return vae.config.in_channels


def check_schedule(config: Text2ImageConfig, scheduler: DDPMScheduler) -> None:
    """Raise UsageError for a diffusion and a loss that cannot go together."""
    try:
        check_objective(scheduler, "simple", config.loss_type, config.snr_gamma)
        scheduler.check_invertible(range(len(scheduler)))
    except ValueError as error:
        raise UsageError(str(error)) from error


def trained_model(config: Text2ImageConfig, components: Components, accelerator) -> TextConditioned:
    """What is trained of the components, with the flags that concern its execution applied."""
    text_encoder = components.text_encoder if config.trains_text_encoder else None
    model = TextConditioned(components.unet, text_encoder).requires_grad_(True)
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        if text_encoder is not None:
            text_encoder.gradient_checkpointing_enable()
    if config.enable_xformers_memory_efficient_attention:
        use_xformers(model.unet)
    if accelerator.device.type == "cpu":
        choose_attention(model.unet)
    return model


def run(config: Text2ImageConfig) -> None:
    """Train; a mistake that the user can mend is one line and exit code 2."""
    with ends_in_one_line(Path(__file__).name, config.output_dir, DataError):
        train(config)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and train."""
    run(parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    run(CONFIG)
