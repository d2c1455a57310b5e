#!/usr/bin/env python
"""Train an unconditional DDPM on your images: `accelerate launch train_unconditional.py --train_data_dir photos`.

Without a dataset it trains on the embedded MNIST digits, on a CPU in minutes. The output folder holds a pipeline that
`DiffusionPipeline.from_pretrained` loads anywhere, sample grids, metrics and checkpoints.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object
from diffusers import UNet2DModel
from diffusers.utils import logging as diffusers_logging

from ddpm_hf.data import (
    DataError,
    ImageDataset,
    ImageTransform,
    Rows,
    StreamingBatches,
    embedded_digits,
    identity,
    image_grid,
    read_dataset,
    should_cache,
    split_rows,
    to_model_range,
)
from ddpm_hf.models import MODEL_PRESETS, build_unet, preset_unet_config, smallest_sample_side, use_matmul_attention
from ddpm_hf.objectives import (
    LOSS_TYPES,
    OBJECTIVES,
    TIMESTEP_SAMPLERS,
    UniformTimestepSampler,
    check_objective,
    simple_losses,
    training_losses,
)
from ddpm_hf.portable.pipeline_ddpm_hf import DDPMPipeline
from ddpm_hf.portable.scheduling_ddpm_hf import BETA_SCHEDULES, PREDICTION_TYPES, VARIANCE_TYPES, DDPMScheduler
from ddpm_hf.publishing import push_folder, save_image, save_pipeline, write_model_card
from ddpm_hf.training.config import HfArg, TrainingConfig, UsageError, parse_layers
from ddpm_hf.training.loop import (
    KeyedBatchSampler,
    Losses,
    Meter,
    StepPlan,
    TrainingState,
    averaged_weights,
    load_checkpoint,
    register_model_hooks,
    training_loop,
    unwrap,
)
from ddpm_hf.training.randomness import StepKeys, keyed_seed
from ddpm_hf.training.setup import (
    agree_on_seed,
    claim_output_dir,
    cpu_has_bf16,
    log,
    make_ema,
    make_lr_scheduler,
    make_optimizer,
    public_settings,
    save_settings,
    start_accelerator,
    start_trackers,
    track_image,
)

QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")  # of the timesteps, from little noise to much


@dataclass
class UnconditionalConfig(TrainingConfig):
    """Flags of data, model and diffusion; those of the training itself are inherited."""

    dataset_name: str | None = HfArg(
        default=None, help="A dataset on the Hub, or a local path. Without any dataset: the embedded digits."
    )
    dataset_config_name: str | None = HfArg(default=None, help="The dataset's configuration.")
    dataset_split: str = HfArg(default="train", help="The split to train on.")
    train_data_dir: str | None = HfArg(
        default=None, help="A folder of images (also in class folders), or of parquet, arrow or save_to_disk data."
    )
    cache_dir: str | None = HfArg(default=None, help="Where datasets are cached.")
    streaming: bool = HfArg(default=False, help="Read the dataset as it comes; needs --max_train_steps.")
    image_column: str | None = HfArg(
        default=None, aliases=["--dataset_image_column_name"], help="By default the column that holds images."
    )
    resolution: str = HfArg(default="64", help="64, or HEIGHTxWIDTH such as 64x96.")
    channels: int | None = HfArg(
        default=None, help="1 for grayscale, 3 for colour; by default what the model has, else 3."
    )
    center_crop: bool = HfArg(default=False, help="Crop the centre; by default a random part.")
    random_flip: bool = HfArg(default=False, help="Flip half of the images left to right.")
    preserve_input_precision: bool = HfArg(
        default=False, help="Keep 16- and 32-bit images as they are instead of rounding them to 8 bits."
    )
    cache_dataset: Literal["auto", "never", "always"] = HfArg(
        default="auto", help="Keep all images decoded in memory; auto does if they take a quarter of it at most."
    )
    skip_broken_images: bool = HfArg(default=False, help="Leave out images that cannot be read, instead of stopping.")
    validation_split: float = HfArg(
        default=0.0, help="Share of the images to hold out for --validation_steps, such as 0.05."
    )

    model_preset: str | None = HfArg(
        default=None, help=f"A UNet by name, with its paper's recipe: {', '.join(MODEL_PRESETS)}."
    )
    model_config_name_or_path: str | None = HfArg(
        default=None, help="A UNet2DModel's config on the Hub or on disk; trained from scratch."
    )
    ddpm_num_steps: int = HfArg(default=1000, help="T, the diffusion's timesteps.")
    ddpm_num_inference_steps: int = HfArg(default=1000, help="Steps to sample the grids with.")
    ddpm_beta_schedule: str = HfArg(default="linear", help=f"{', '.join(BETA_SCHEDULES)}.")
    rescale_betas_zero_snr: bool = HfArg(
        default=False, help="Zero terminal SNR: x_T is pure noise. Wants --prediction_type v_prediction or sample."
    )
    prediction_type: str = HfArg(default="epsilon", help=f"What the model outputs: {', '.join(PREDICTION_TYPES)}.")
    variance_type: str = HfArg(default="fixed_small", help=f"Of the reverse step: {', '.join(VARIANCE_TYPES)}.")
    objective: str = HfArg(default="simple", help=f"{', '.join(OBJECTIVES)}; hybrid trains a learned variance too.")
    loss_type: str = HfArg(default="l2", help=f"Of the simple objective: {', '.join(LOSS_TYPES)}.")
    snr_gamma: float | None = HfArg(default=None, help="Min-SNR weighting of the simple objective; 5 is usual.")
    vlb_weight: float = HfArg(default=0.001, help="The bound's weight in the hybrid objective.")
    timestep_sampler: str = HfArg(
        default="uniform", help=f"{', '.join(TIMESTEP_SAMPLERS)}; the second is for --objective vlb."
    )

    def size(self) -> tuple[int, int]:
        """(height, width) of --resolution."""
        parts = self.resolution.lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(
                f"--resolution {self.resolution}: give a number such as 64, or HEIGHTxWIDTH such as 64x96"
            )
        return int(parts[0]), int(parts[-1])

    def check(self) -> None:
        """Raise UsageError for a value out of range or a combination that cannot work."""
        super().check()
        self.size()
        choices = {
            "ddpm_beta_schedule": BETA_SCHEDULES, "prediction_type": PREDICTION_TYPES, "variance_type": VARIANCE_TYPES,
            "timestep_sampler": TIMESTEP_SAMPLERS,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"--{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        for name in ("ddpm_num_steps", "ddpm_num_inference_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: must be 1 or more")
        if self.channels not in (None, 1, 3):
            raise UsageError(f"--channels {self.channels}: images have 1 or 3")
        if not 0 <= self.validation_split < 1:
            raise UsageError(f"--validation_split {self.validation_split}: must be at least 0 and less than 1")
        if self.dataset_name and self.train_data_dir:
            raise UsageError("--dataset_name and --train_data_dir name two datasets; give one of them")
        if self.model_preset and self.model_config_name_or_path:
            raise UsageError("--model_preset and --model_config_name_or_path name two models; give one of them")
        if self.streaming and self.max_train_steps is None:
            raise UsageError("--streaming has no epochs to count: give --max_train_steps")
        if self.streaming and (self.validation_split or self.cache_dataset == "always"):
            raise UsageError("--streaming knows no --validation_split and no --cache_dataset always")


def embedded_recipe() -> dict:
    """Settings for the embedded digits: a grid worth looking at after four minutes on two cores."""
    return {
        "model_preset": "small-16", "resolution": "16", "train_batch_size": 64, "num_epochs": 28,
        "learning_rate": 2e-3, "lr_warmup_steps": 100, "adam_beta1": 0.9, "adam_weight_decay": 0.0,
        "use_ema": True, "ema_max_decay": 0.995, "mixed_precision": "bf16" if cpu_has_bf16() else "no",
        "eval_batch_size": 64, "ddpm_num_inference_steps": 200, "save_images_epochs": 7,
        "validation_steps": 441, "checkpoints_total_limit": 2,
    }  # fmt: skip


def weaker_layers(config: UnconditionalConfig) -> list[tuple[str, dict]]:
    """What decides where command line and --config say nothing: the embedded recipe, then the preset."""
    embedded = embedded_recipe() if config.dataset_name is None and config.train_data_dir is None else {}
    if config.model_config_name_or_path:
        embedded.pop("model_preset", None)
    preset = config.model_preset or embedded.get("model_preset")
    if preset is not None and preset not in MODEL_PRESETS:
        raise UsageError(f"--model_preset {preset!r} is none of {', '.join(MODEL_PRESETS)}")
    recipe = MODEL_PRESETS[preset].recipe if preset else {}
    return [("the embedded recipe", embedded), (f"the preset {preset}", recipe)]


def load_rows(config: UnconditionalConfig) -> tuple[Rows, Rows | None]:
    """The images to train on, and those held out."""
    if config.dataset_name is None and config.train_data_dir is None:
        if config.streaming:
            raise UsageError("--streaming needs --dataset_name or --train_data_dir; the embedded digits are in memory")
        rows, held_out = embedded_digits("train"), embedded_digits("test")
        return (rows, held_out) if config.image_column in (None, rows.image_column) else _no_column(config, rows)
    rows = read_dataset(
        config.dataset_name,
        config.train_data_dir,
        config_name=config.dataset_config_name,
        split=config.dataset_split,
        image_column=config.image_column,
        streaming=config.streaming,
        cache_dir=config.cache_dir,
        token=config.hub_token,
    )
    return split_rows(rows, config.validation_split, config.seed) if config.validation_split else (rows, None)


def _no_column(config: UnconditionalConfig, rows: Rows):
    raise UsageError(
        f"no column {config.image_column!r} in {rows.name}; it has {', '.join(rows.dataset.column_names)}"
    )


def unet_config(config: UnconditionalConfig) -> dict:
    """The arguments of the UNet, fitted to resolution, channels and variance.

    Raises:
        UsageError: a resolution that the UNet cannot halve, or a channel mismatch.
    """
    height, width = config.size()
    if config.model_config_name_or_path:
        chosen = dict(_read_unet_config(config.model_config_name_or_path))
    elif config.model_preset:
        chosen = preset_unet_config(config.model_preset)
    else:
        chosen = dict(DEFAULT_UNET)
    channels = config.channels or (chosen.get("in_channels", 3) if config.model_config_name_or_path else 3)
    if config.channels is None and config.dataset_name is None and config.train_data_dir is None:
        channels = 1  # the embedded digits
    if config.model_config_name_or_path and chosen.get("in_channels", 3) != channels:
        raise UsageError(
            f"--model_config_name_or_path has {chosen['in_channels']} input channels and the images {channels};"
            f" pass --channels {chosen['in_channels']}"
        )
    learned = config.variance_type in ("learned", "learned_range")
    chosen |= {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": 2 * channels if learned else channels,
    }
    step = smallest_sample_side(chosen)
    if height % step or width % step:
        raise UsageError(
            f"--resolution {config.resolution}: this UNet halves the image {int(math.log2(step))} times, so both sides"
            f" must be multiples of {step}"
        )
    return chosen


# The peer's model where neither preset nor config is named, so that its command lines train the same here
DEFAULT_UNET = {
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}


def _read_unet_config(name_or_path: str) -> dict:
    try:
        loaded = UNet2DModel.load_config(name_or_path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--model_config_name_or_path {name_or_path}: no UNet2DModel config there ({reason})"
        ) from error
    if loaded.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UsageError(f"--model_config_name_or_path {name_or_path}: a {loaded['_class_name']}, not a UNet2DModel")
    return {name: value for name, value in loaded.items() if not name.startswith("_")}


def make_scheduler(config: UnconditionalConfig) -> DDPMScheduler:
    """The diffusion that the flags describe.

    Raises:
        UsageError: a combination that cannot train or sample.
    """
    scheduler = DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )
    try:
        check_objective(scheduler, config.objective, config.loss_type, config.snr_gamma)
        scheduler.check_invertible(range(config.ddpm_num_steps))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return scheduler


def warn_of_terminal_snr(config: UnconditionalConfig, scheduler: DDPMScheduler, accelerator) -> None:
    """Say so where x_T still shows the image: sampling starts from pure noise, which is then the wrong place."""
    left = float(scheduler.alphas_cumprod[-1])
    if left > 0.01:
        log(
            accelerator,
            f"warning: {config.ddpm_beta_schedule} with --ddpm_num_steps {config.ddpm_num_steps} leaves"
            f" ᾱ_T = {left:.2f} of the image in x_T; use more steps, --ddpm_beta_schedule cosine,"
            " or --rescale_betas_zero_snr",
        )


def make_model(config: UnconditionalConfig, arguments: dict) -> UNet2DModel:
    """The UNet, initialised from the seed, with the flags that concern its execution applied."""
    torch.manual_seed(config.seed)
    try:
        model = build_unet(arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        try:
            model.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise UsageError(
                "--enable_xformers_memory_efficient_attention: xFormers is not installed or has no GPU; leave the flag"
                " out, torch's own attention is memory-efficient"
            ) from error
    return model


def compute_loss(
    model, batch: dict, keys: StepKeys, *, config: UnconditionalConfig, scheduler: DDPMScheduler, sampler, accelerator
) -> Losses:
    """Draw t and noise, add it, predict, compare (Ho et al. 2020, Algorithm 1)."""
    x_start = to_model_range(batch["images"].to(accelerator.device, non_blocking=True))  # [N, C, H, W]
    timesteps, weights = sampler.sample(keys.uniform("timestep"))
    timesteps, weights = timesteps.to(x_start.device), weights.to(x_start.device)
    noise = keys.normal_like(x_start)
    output = model(scheduler.add_noise(x_start, noise, timesteps), timesteps).sample.float()
    losses = training_losses(
        scheduler,
        output,
        x_start,
        noise,
        timesteps,
        objective=config.objective,
        loss_type=config.loss_type,
        snr_gamma=config.snr_gamma,
        vlb_weight=config.vlb_weight,
    )
    if model.training and not isinstance(sampler, UniformTimestepSampler):
        share_losses(sampler, timesteps, losses.detach(), config.train_batch_size, accelerator)
    return Losses(losses * weights, logged=losses, groups=timesteps * 4 // len(scheduler))


def share_losses(sampler, timesteps: torch.Tensor, losses: torch.Tensor, batch_size: int, accelerator) -> None:
    """Give the losses of all ranks, in the same order on each, to a sampler that learns from them."""
    missing = batch_size - len(losses)  # in an epoch's last batch
    pairs = torch.stack([timesteps.double(), losses.double()], dim=1)  # [N, 2]
    pairs = torch.cat([pairs, pairs.new_full((missing, 2), -1.0)])
    pairs = accelerator.gather(pairs)  # [ranks · batch_size, 2]
    pairs = pairs[pairs[:, 0] >= 0]
    sampler.update_with_losses(pairs[:, 0].long(), pairs[:, 1])


def validation_loss(model, *, held_out: ImageDataset, config: UnconditionalConfig, scheduler, accelerator) -> dict:
    """The mean simple loss over the held-out images, at the same timesteps and noise each time."""
    uniform = UniformTimestepSampler(len(scheduler))
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    starts = range(0, len(held_out), config.eval_batch_size)
    for first in list(starts)[accelerator.process_index :: accelerator.num_processes]:
        keys_of = range(first, min(first + config.eval_batch_size, len(held_out)))
        batch = held_out.__getitems__([(0, index) for index in keys_of])
        x_start = to_model_range(batch["images"].to(accelerator.device))
        keys = StepKeys(config.seed, 0, first, len(x_start), validation=True)
        timesteps = uniform.sample(keys.uniform("timestep"))[0].to(x_start.device)
        noise = keys.normal_like(x_start)
        with torch.no_grad(), accelerator.autocast():
            output = model(scheduler.add_noise(x_start, noise, timesteps), timesteps).sample.float()
        output = output[:, : x_start.shape[1]]
        losses = simple_losses(scheduler, output, x_start, noise, timesteps, config.loss_type)
        total += torch.stack([losses.double().sum(), torch.tensor(len(losses), device=total.device).double()])
    total = accelerator.reduce(total, reduction="sum")
    return {"validation_loss": float(total[0] / total[1])}


def draw_grid(model, step: int, *, config: UnconditionalConfig, scheduler, accelerator) -> None:
    """Sample `eval_batch_size` images, shared out over the ranks, into one PNG and the tracker.

    An image depends on the seed and its place in the grid alone, so that grids show one model's progress.
    """
    pipeline = DDPMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(desc="sampling", leave=False, disable=not accelerator.is_main_process)
    own = range(accelerator.process_index, config.eval_batch_size, accelerator.num_processes)
    drawn = []
    if own:
        seeds = [keyed_seed(config.seed, "sample", 0, index) for index in own]
        generators = [torch.Generator(accelerator.device).manual_seed(seed) for seed in seeds]
        steps = min(config.ddpm_num_inference_steps, config.ddpm_num_steps)
        with accelerator.autocast():
            drawn = pipeline(len(own), generators, num_inference_steps=steps).images
    drawn = [image for _, image in sorted(gather_object(list(zip(own, drawn))), key=lambda pair: pair[0])]
    if accelerator.is_main_process:
        grid = image_grid(drawn, scale=max(1, 64 // drawn[0].width))
        save_image(grid, Path(config.output_dir) / "samples" / f"step-{step:06d}.png")
        track_image(accelerator, "samples", grid, step)


def make_batches(
    config: UnconditionalConfig,
    rows: Rows,
    dataset: ImageDataset | None,
    transform,
    plan: StepPlan,
    step: int,
    accelerator,
) -> Iterator[dict]:
    """This rank's batches, from a step on."""
    options = {
        "num_workers": 0 if dataset is not None and dataset.cache is not None else config.dataloader_num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        "collate_fn": identity,
    }
    if dataset is not None:
        sampler = KeyedBatchSampler(plan, config.seed, accelerator.process_index, step)
        return iter(torch.utils.data.DataLoader(dataset, batch_sampler=sampler, **options))
    options |= {"num_workers": min(1, config.dataloader_num_workers), "batch_size": None}  # a stream has one reader
    stream = StreamingBatches(
        rows,
        transform,
        config.seed,
        config.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        skip_batches=plan.batches_before(step),
        skip_broken=config.skip_broken_images,
    )
    return iter(torch.utils.data.DataLoader(stream, **options))


def describe(
    config: UnconditionalConfig, rows: Rows, dataset: ImageDataset | None, plan: StepPlan, total_steps: int, model
) -> str:
    """What would run, for --dry_run."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kept = 4 + config.use_ema  # weights, gradients, Adam's two moments, and the EMA
    cached = dataset is not None and dataset.cache is not None
    cache_bytes = sum(pixels.nbytes for pixels in dataset.cache) if cached else 0
    count = "a stream" if dataset is None else f"{len(dataset):,} images"
    name = config.model_preset or config.model_config_name_or_path or "the default UNet"
    lines = {
        "data": f"{rows.name}: {count}, column {rows.image_column!r}",
        "images": f"{model.config.in_channels} × {config.resolution}, {'kept' if cached else 'not kept'} decoded",
        "model": f"{name}, {parameters:,} parameters",
        "diffusion": f"{config.ddpm_beta_schedule}, T={config.ddpm_num_steps}, {config.prediction_type},"
        f" {config.variance_type}, objective {config.objective}",
        "batch": f"{plan.batch_size} × {plan.world} processes × {plan.accumulation} accumulated"
        f" = {plan.global_batch * plan.accumulation}",
        "steps": f"{total_steps:,} ({plan.steps_per_epoch:,} an epoch)",
        "memory": f"{kept * parameters * 4 / 2**20:,.0f} MiB for weights, gradients, Adam"
        f"{' and EMA' if config.use_ema else ''}, {cache_bytes / 2**20:,.0f} MiB for images; activations on top",
        "output": f"{Path(config.output_dir).resolve()}, tracker {config.logger}, seed {config.seed}",
    }
    return "\n".join(f"{name:>10}  {value}" for name, value in lines.items())


def check_resumable(found: tuple[Path, dict] | None, model: UNet2DModel, facts: dict, accelerator) -> None:
    """Raise UsageError for a checkpoint of another model; say what else differs."""
    if found is None:
        return
    checkpoint, manifest = found
    saved = json.loads((checkpoint / "unet" / "config.json").read_text())
    own = json.loads(model.to_json_string())
    differing = [key for key in own if not key.startswith("_") and key != "sample_size" and own[key] != saved.get(key)]
    if differing:
        key = differing[0]
        raise UsageError(f"{checkpoint} is of another model: its {key} is {saved.get(key)}, this run's {own[key]}")
    for name, value in facts.items():
        if manifest.get(name) != value:
            log(accelerator, f"warning: {name} was {manifest.get(name)} and is {value}: not an exact continuation")


def train(config: UnconditionalConfig) -> None:
    """From flags to a trained, saved and, if asked, published pipeline."""
    config.check()
    accelerator = start_accelerator(config)
    diffusers_logging.set_verbosity_error()
    scheduler = make_scheduler(config)
    arguments = unet_config(config)
    found = None if config.dry_run else claim_output_dir(config, accelerator)
    config.seed = agree_on_seed(config, found and found[1])

    with accelerator.local_main_process_first():
        rows, held_out_rows = load_rows(config)
    height, width = config.size()
    transform = ImageTransform(
        height,
        width,
        arguments["in_channels"],
        config.center_crop,
        config.random_flip,
        config.preserve_input_precision,
    )
    dataset = held_out = None
    if not config.streaming:
        cached = should_cache(rows, transform, config.cache_dataset)
        dataset = ImageDataset(rows, transform, config.seed, cached, config.skip_broken_images)
    if held_out_rows is not None and config.validation_steps:
        upright = transform._replace(center_crop=True, random_flip=False)
        held_out = ImageDataset(held_out_rows, upright, config.seed, True, config.skip_broken_images)

    model = make_model(config, arguments)
    if accelerator.device.type == "cpu":
        use_matmul_attention(model)
    samples = None if dataset is None else len(dataset)
    plan = StepPlan(
        samples,
        config.train_batch_size,
        accelerator.num_processes,
        config.gradient_accumulation_steps,
        config.max_train_steps or 0,
    )
    total_steps = config.max_train_steps or config.num_epochs * plan.steps_per_epoch
    if config.dry_run:
        print(describe(config, rows, dataset, plan, total_steps, model))
        return
    log(accelerator, f"seed {config.seed}, {total_steps} steps, {rows.name}")
    warn_of_terminal_snr(config, scheduler, accelerator)
    facts = {
        "seed": config.seed,
        "samples": samples,
        "global_batch": plan.global_batch * plan.accumulation,
        "total_steps": total_steps,
        "processes": accelerator.num_processes,
    }
    check_resumable(found, model, facts, accelerator)

    sampler = TIMESTEP_SAMPLERS[config.timestep_sampler](config.ddpm_num_steps)
    state = TrainingState(
        model=model,
        ema=make_ema(config, model),
        optimizer=make_optimizer(config, model, accelerator.num_processes),
        lr_scheduler=None,
        meter=Meter(QUARTILES, accelerator.device),
        extra={} if isinstance(sampler, UniformTimestepSampler) else {"timestep_sampler": sampler},
        facts=facts,
    )
    state.lr_scheduler = make_lr_scheduler(config, state.optimizer, total_steps)
    state.model, state.optimizer = accelerator.prepare(model, state.optimizer)
    if state.ema is not None:
        state.ema.to(accelerator.device)
    register_model_hooks(accelerator, state)
    if found is not None:
        load_checkpoint(accelerator, state, found[0], Path(config.output_dir))
        log(accelerator, f"resuming from {found[0]}")
    if config.compile:
        import torch._inductor.config

        torch._inductor.config.layout_optimization = False  # it gave wrong gradients for this model on CPUs
        state.model = torch.compile(state.model)
    if accelerator.is_main_process:
        save_settings(config)
    start_trackers(config, accelerator, Path(__file__).stem)

    shared = {"config": config, "scheduler": scheduler, "accelerator": accelerator}
    save = functools.partial(save_trained, config=config, scheduler=scheduler)
    finished = training_loop(
        config,
        accelerator,
        state,
        plan,
        make_batches(config, rows, dataset, transform, plan, state.step, accelerator),
        total_steps,
        compute_loss=functools.partial(compute_loss, sampler=sampler, **shared),
        validate=held_out and functools.partial(validation_loss, held_out=held_out, **shared),
        draw=functools.partial(draw_grid, **shared),
        save=save,
    )
    if not finished:
        log(accelerator, f"stopped at step {state.step}; go on with --resume_from_checkpoint latest")
    elif accelerator.is_main_process:
        with averaged_weights(state, unwrap(accelerator, state.model)) as trained:
            save(trained)
        publish(config, rows, state, scheduler, accelerator)
    accelerator.end_training()


def save_trained(model: UNet2DModel, *, config: UnconditionalConfig, scheduler: DDPMScheduler) -> None:
    """Write the pipeline into the output folder."""
    save_pipeline(DDPMPipeline(model, scheduler), config.output_dir)


def publish(config: UnconditionalConfig, rows: Rows, state: TrainingState, scheduler, accelerator) -> None:
    """The model card, and the upload if it was asked for; a failed upload loses nothing."""
    folder = Path(config.output_dir)
    repository = config.hub_model_id or folder.resolve().name
    shown = ("resolution", "model_preset", "ddpm_beta_schedule", "ddpm_num_steps", "prediction_type", "variance_type",
             "objective", "loss_type", "train_batch_size", "learning_rate", "use_ema", "seed")  # fmt: skip
    settings = {name: value for name, value in public_settings(config).items() if name in shown}
    trust = DDPMPipeline(unwrap(accelerator, state.model), scheduler)._stock_class_name() is None
    write_model_card(
        folder,
        title=repository.split("/")[-1],
        repository=repository,
        settings={"dataset": rows.name, "steps": state.step, **settings},
        dataset=config.dataset_name if config.dataset_name and not os.path.exists(config.dataset_name) else None,
        trust=trust,
    )
    log(accelerator, f"saved to {folder}: DiffusionPipeline.from_pretrained({str(folder)!r}) loads it")
    if config.push_to_hub:
        try:
            address = push_folder(folder, repository, config.hub_token, config.hub_private_repo)
        except Exception as error:  # whatever the network does, the trained model is on disk
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"the upload to {repository} failed ({error.__class__.__name__}: {reason}); {folder} is complete,"
                " upload it with the same command line and --resume_from_checkpoint latest"
            ) from error
        log(accelerator, f"published at {address}")


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and train; a mistake that the user can mend is one line and exit code 2."""
    config = parse_layers(UnconditionalConfig, sys.argv[1:] if argv is None else argv, weaker_layers)
    try:
        train(config)
    except (UsageError, DataError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
