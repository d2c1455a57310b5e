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
"""Train a DDPM on your images.

    accelerate launch train_unconditional.py --train_data_dir photos --resolution 64 --model_preset small-64
    accelerate launch train_unconditional.py                           # the embedded digits, minutes on a CPU
    accelerate launch train_unconditional.py --train_data_dir photos --label_column label          # by class

The output folder holds a pipeline that `DiffusionPipeline.from_pretrained` loads anywhere, sample grids, metrics and
checkpoints; `ddpm-hf sample ddpm-model-64` samples from it. `--dry_run` shows what would run, and how long it takes.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ddpm_hf.common.arguments import HfArg, Need, names_elsewhere
from ddpm_hf.common.errors import UsageError
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.latents.flags import LatentFlags
from ddpm_hf.models.diffusion import make_scheduler
from ddpm_hf.models.flags import StartFlags, UNetFlags
from ddpm_hf.models.recipes import advice_on_a_cpu, weaker_layers
from ddpm_hf.models.sizes import model_size, settle_resolution, unet_arguments
from ddpm_hf.models.unet import make_unet
from ddpm_hf.objectives.flags import ObjectiveFlags, ScheduleFlags
from ddpm_hf.training.flags import PipelineConfig
from ddpm_hf.training.parsing import parse_layers

QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")  # of the timesteps, from little noise to much
# The settings that the model card shows
SHOWN = (
    "resolution", "label_column", "model_preset", "ddpm_beta_schedule", "ddpm_num_steps", "prediction_type",
    "variance_type", "objective", "loss_type", "train_batch_size", "learning_rate", "use_ema",
)  # fmt: skip
# What other programs call the flags of classes
CLASSES = names_elsewhere("""
--class_dropout: p_uncond uncond_prob cond_drop_prob class_drop_prob label_dropout cfg_dropout unconditional_prob
--class_balanced: balanced class_balance balance_classes
""")


@dataclass
class ClassFlags:
    """Flags of training by class."""

    title: ClassVar[str] = "Classes"
    meanings: ClassVar[dict[str, str]] = CLASSES
    needs: ClassVar[dict[str, Need]] = {
        "class_dropout": Need(lambda run: run.label_column, "has no effect without --label_column")
    }

    class_dropout: float = HfArg(
        default=0.1,
        help="Share of the images to train without their label, for classifier-free guidance; 0 to disable.",
    )
    class_balanced: bool = HfArg(default=False, help="Sample every class equally often, however many images it has.")


@dataclass
class UnconditionalConfig(
    DataFlags, UNetFlags, StartFlags, ScheduleFlags, ObjectiveFlags, ClassFlags, LatentFlags, PipelineConfig
):
    """All flags; `--help` groups them in the order of the bases."""

    def check(self) -> None:
        """Raise UsageError or DataError for a value out of range or a combination that cannot work."""
        super().check()
        self.check_data()
        self.check_unet()
        self.check_start()
        self.check_schedule()
        self.check_objective_flags()
        if self.streaming and self.max_train_steps is None:
            raise UsageError("--streaming has no epochs to count: give --max_train_steps")
        if not 0 <= self.class_dropout < 1:
            raise UsageError(f"--class_dropout {self.class_dropout}: must be at least 0 and less than 1")
        if self.cache_latents and (self.streaming or not self.vae_name_or_path):
            raise UsageError("--cache_latents needs --vae_name_or_path, and a dataset that is not a stream")
        if self.class_balanced and (self.label_column is None or self.streaming):
            raise UsageError("--class_balanced needs --label_column, and a dataset that is not a stream")


def parse(argv: list[str]) -> UnconditionalConfig:
    """The settings for a command line; a mistake is one line and exit code 2."""
    return parse_layers(UnconditionalConfig, argv, weaker_layers, description=__doc__)


if __name__ == "__main__":  # before torch is imported, so that --help and an unknown flag are answered at once
    CONFIG = parse(sys.argv[1:])

import torch
from diffusers import AutoencoderKL, UNet2DModel

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.layout import layout
from ddpm_hf.common.randomness import StepKeys, sent
from ddpm_hf.data import ImageDataset
from ddpm_hf.data.batches import Images, held_out_means, make_batches, open_images, plan_steps
from ddpm_hf.latents.cache import cached_latents, check_cacheable
from ddpm_hf.latents.encoding import x_start_of
from ddpm_hf.models.acceleration import accelerate_for_training, prepare_layout
from ddpm_hf.models.autoencoder import load_autoencoder
from ddpm_hf.models.gradient_gate import recorded_call
from ddpm_hf.models.pretrained import differences, revision_of_vae, source_of, start_from
from ddpm_hf.models.unet import time_blindness
from ddpm_hf.objectives.losses import simple_losses, training_losses
from ddpm_hf.objectives.timestep_samplers import TIMESTEP_SAMPLERS, UniformTimestepSampler
from ddpm_hf.portable.pipeline_class_conditional_ddpm_hf import ClassConditionalDDPMPipeline
from ddpm_hf.portable.pipeline_ddpm_hf import DDPMPipeline
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler
from ddpm_hf.publishing.publisher import Publisher, describe_run, reserve_repository
from ddpm_hf.training.ending import ends_in_one_line
from ddpm_hf.training.logs import end_training
from ddpm_hf.training.loop import training_loop
from ddpm_hf.training.meter import Losses
from ddpm_hf.training.plan import StepPlan
from ddpm_hf.training.previews import draw_grid
from ddpm_hf.training.rehearsal import rehearse, show_dry_run
from ddpm_hf.training.reporting import ending, run_lines, weights_memory
from ddpm_hf.training.run import Run
from ddpm_hf.training.setup.begin import begin_training, run_facts, start_run
from ddpm_hf.training.setup.claiming import check_resumable, start_writing


def terminal_snr_warning(config: UnconditionalConfig, scheduler: DDPMScheduler) -> str | None:
    """A warning where x_T still shows the image: sampling starts from pure noise, which is then the wrong place."""
    left = float(scheduler.exact_tables.alphas_cumprod[-1])
    if left <= 0.01:
        return None
    return (
        f"warning: {config.ddpm_beta_schedule} with --ddpm_num_steps {config.ddpm_num_steps} leaves"
        f" ᾱ_T = {left:.2f} of the image in x_T; use more steps, --ddpm_beta_schedule cosine,"
        " or --rescale_betas_zero_snr with --prediction_type v_prediction"
    )


def compute_loss(
    model,
    batch: dict,
    keys: StepKeys,
    *,
    run: Run,
    config: UnconditionalConfig,
    scheduler: DDPMScheduler,
    sampler,
    null_class: int,
    vae: AutoencoderKL | None = None,
) -> Losses:
    """Draw t and noise, add it, predict, compare (Ho et al. 2020, Algorithm 1)."""
    x_start = x_start_of(batch, keys, vae, run.device)  # [N, C, H, W]
    timesteps, weights = sampler.sample(keys.uniform("timestep"))
    timesteps, weights = sent(timesteps, x_start.device), sent(weights, x_start.device)
    noise = keys.normal_like(x_start)
    conditioning = {}
    if "labels" in batch:  # a share of them become the null class (Ho & Salimans 2022, Algorithm 1)
        dropped = keys.uniform("class_dropout") < config.class_dropout
        conditioning["class_labels"] = sent(torch.where(dropped, null_class, batch["labels"]), x_start.device)
    output = model(scheduler.add_noise(x_start, noise, timesteps), timesteps, **conditioning).sample.float()
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
        seen = slice(keys.valid)
        share_losses(run, sampler, timesteps[seen], losses.detach()[seen])
    return Losses(losses * weights, logged=losses, groups=timesteps * 4 // len(scheduler))


def share_losses(run: Run, sampler, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
    """Give the losses of all ranks, in the same order on each, to a sampler that learns from them."""
    missing = run.flags.train_batch_size - len(losses)  # in an epoch's last batch
    pairs = torch.stack([timesteps.float(), losses.float()], dim=1)  # [N, 2]
    pairs = torch.cat([pairs, pairs.new_full((missing, 2), -1.0)])
    pairs = run.accelerator.gather(pairs)  # [ranks · batch_size, 2]
    pairs = pairs[pairs[:, 0] >= 0]
    sampler.update_with_losses(pairs[:, 0].long(), pairs[:, 1])


def validation_loss(
    model, *, run: Run, held_out: ImageDataset, scheduler: DDPMScheduler, vae: AutoencoderKL | None, loss_type: str
) -> dict[str, float]:
    """The mean simple loss over the held-out images, at the same timesteps and noise each time."""
    uniform = UniformTimestepSampler(len(scheduler))

    def measure(batch: dict, keys: StepKeys) -> list[torch.Tensor]:
        x_start = x_start_of(batch, keys, vae, run.device)
        timesteps = uniform.sample(keys.uniform("timestep"))[0].to(x_start.device)
        noise = keys.normal_like(x_start)
        conditioning = {"class_labels": batch["labels"].to(x_start.device)} if "labels" in batch else {}
        with run.accelerator.autocast():
            output = model(scheduler.add_noise(x_start, noise, timesteps), timesteps, **conditioning).sample.float()
        return [simple_losses(scheduler, output[:, : x_start.shape[1]], x_start, noise, timesteps, loss_type)]

    return held_out_means(run, held_out, ["validation_loss"], measure)


def draw_samples(model, step: int, *, run: Run, pipeline_of: Callable, num_inference_steps: int) -> Path | None:
    """A grid of `eval_batch_size` images; by class, a row for each."""
    pipeline, requests = pipeline_of(model), run.flags.eval_batch_size
    columns = legend = None
    if isinstance(pipeline, ClassConditionalDDPMPipeline):
        classes = pipeline.default_classes[:requests]
        columns = requests // len(classes)
        requests = [label for label in classes for _ in range(columns)]
        legend = [pipeline.config.id2label[str(label)] for label in classes]
    return draw_grid(run, pipeline, requests, columns, step, legend, num_inference_steps=num_inference_steps)


def describe(
    run: Run, config: UnconditionalConfig, images: Images, plan: StepPlan, model: UNet2DModel
) -> dict[str, str]:
    """What runs: said at the start, and by --dry_run."""
    rows, dataset = images.rows, images.dataset
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cached = dataset is not None and dataset.cache is not None
    cache_bytes = sum(pixels.nbytes for pixels in dataset.cache) if cached else 0
    count = "a stream" if dataset is None else f"{len(dataset):,} images"
    named = (config.pretrained_model_name_or_path, config.model_preset, config.model_config_name_or_path)
    name = next(filter(None, named), "the default UNet")
    return {
        "data": f"{rows.name}: {count}, column {rows.image_column!r}"
        + (f", {len(rows.label_names)} classes in {rows.label_column!r}" if rows.label_column else ""),
        "images": f"{images.transform.channels} × {' × '.join(map(str, config.size()))},"
        f" {'kept' if cached else 'not kept'} decoded",
        "model": f"{name}, {parameters:,} parameters"
        + (f", in the latents of {config.vae_name_or_path}" if config.vae_name_or_path else ""),
        "diffusion": f"{config.ddpm_beta_schedule}, T={config.ddpm_num_steps}, {config.prediction_type},"
        f" {config.variance_type}, objective {config.objective}",
        **run_lines(run, plan),
        "memory": f"{weights_memory(parameters, config.use_ema)}, {cache_bytes / 2**20:,.0f} MiB for images;"
        " activations on top",
    }


def make_pipeline(
    model: UNet2DModel,
    scheduler: DDPMScheduler,
    class_names: list[str],
    vae: AutoencoderKL | None,
    trained_classes: list[int] | None = None,
):
    """The pipeline that samples from the model, by class where it knows classes."""
    if class_names:
        return ClassConditionalDDPMPipeline(model, scheduler, dict(enumerate(class_names)), vae, trained_classes)
    return DDPMPipeline(model, scheduler, vae)


def train(config: UnconditionalConfig) -> None:
    """From flags to a trained, saved and, if asked, published pipeline."""
    config.check()
    written = layout("unet", "scheduler", *(["vae"] if config.vae_name_or_path else []))
    run = start_run(config, written, (config.train_data_dir, config.dataset_name))
    source = source_of(config, run.resumed)
    vae, token = None, config.hub_token
    if config.vae_name_or_path:
        vae = load_autoencoder(config.vae_name_or_path, revision_of_vae(config), token=token)
        vae.eval().requires_grad_(False).to(run.device)
    scheduler = make_scheduler(config, config, vae is not None, source)
    size, fresh = model_size(config, vae, source, token), source is not None and run.resumed is None
    run.log(settle_resolution(config, *size, usual="64", trained=fresh))
    arguments = unet_arguments(config, config, vae, source, token)

    channels = arguments["in_channels"] if vae is None else vae.config.in_channels
    images = open_images(run, config, channels, token)
    class_names = images.rows.label_names if config.label_column else []
    classes = len(class_names) + (config.class_dropout > 0) if class_names else None
    model = make_unet(arguments, config.variance_type, classes, config)
    prepare_layout(model, run.device, config.acceleration)
    if source is None:
        run.log(time_blindness(model.config))
    elif fresh:
        run.log(*start_from(model, source, class_names, scheduler, config), *differences(config, source))
    if config.cache_latents:
        images.dataset.leave_out_broken()  # before the batches are planned
        check_cacheable(images.dataset)
    plan = plan_steps(run, images)
    facts = run_facts(run, images.count, plan, classes=class_names)
    check_resumable(run, model, facts, "unet")
    facts["scheduler"] = json.loads(scheduler.to_json_string())  # so that a checkpoint can be sampled by itself
    repository = reserve_repository(run, bool(images.held_out))
    run.log(terminal_snr_warning(config, scheduler))

    sampler = TIMESTEP_SAMPLERS[config.timestep_sampler](config.ddpm_num_steps)
    extra = {} if isinstance(sampler, UniformTimestepSampler) else {"timestep_sampler": sampler}
    state = begin_training(run, model, plan, facts, QUARTILES, extra)
    shared = {"run": run, "scheduler": scheduler, "vae": vae}
    loss_of = functools.partial(compute_loss, sampler=sampler, null_class=len(class_names), config=config, **shared)
    batches = make_batches(run, images, plan, state.step, config.class_balanced)
    with recorded_call(model) as call:
        batches = rehearse(run, state, plan, batches, loss_of)
    lines = describe(run, config, images, plan, model)
    lines["acceleration"] = accelerate_for_training(
        model, call, config.acceleration, run.autocast_dtype, run.captures_steps(plan), plan.total
    )
    advice = advice_on_a_cpu(config, arguments["sample_size"])
    if config.dry_run:
        show_dry_run(run, lines, state, plan, batches, loss_of, advice)
        return
    start_writing(run, state.step, lines, Path(__file__).stem)
    if config.cache_latents:
        images = images._replace(dataset=cached_latents(images.dataset, vae, config.cache_folder(), run.accelerator))
        batches = make_batches(run, images, plan, state.step, config.class_balanced)

    trained = images.trained_classes
    pipeline_of = functools.partial(
        make_pipeline, scheduler=scheduler, class_names=class_names, vae=vae, trained_classes=trained
    )
    names = class_names if trained is None else [class_names[label] for label in trained]
    base = config.pretrained_model_name_or_path
    about = describe_run(run, images, plan, model, SHOWN, names[: config.eval_batch_size], base)
    publisher = Publisher(run, state, pipeline_of, about, plan.total, repository)
    steps = min(config.ddpm_num_inference_steps, config.ddpm_num_steps)
    finished = training_loop(
        run,
        state,
        plan,
        batches,
        compute_loss=loss_of,
        validate=images.held_out
        and functools.partial(validation_loss, held_out=images.held_out, loss_type=config.loss_type, **shared),
        draw=functools.partial(draw_samples, run=run, pipeline_of=pipeline_of, num_inference_steps=steps),
        save=publisher.save,
        saves_checkpoints=config.hub_strategy != "end",
        name_of=images.name_of,
        advice=advice,
    )
    publisher.close(finished)
    sample = ["ddpm-hf", "sample", *(["--class", names[0]] if names else [])]
    end_training(run, ending(run, state, f"accelerate launch {Path(__file__).name}", finished, sample))


def run(config: UnconditionalConfig) -> None:
    """Train; a mistake that the user can mend is one line and exit code 2."""
    with ends_in_one_line(Path(__file__).name, config.output_dir, DataError):
        train(config)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and train."""
    run(parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    run(CONFIG)
