#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "numpy>=1.26", "diffusers>=0.38", "accelerate>=1.10", "transformers>=5.0", "tokenizers>=0.20",
#     "datasets>=4.0", "pandas>=2.0", "pyarrow>=15.0", "huggingface_hub>=1.0", "safetensors>=0.5", "pillow>=10.0",
#     "psutil>=5.9", "pyyaml>=6.0", "tqdm>=4.66", "matplotlib>=3.8", "typer>=0.15", "tensorboard>=2.16",
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
from typing import Any, ClassVar

from ddpm_hf.common.arguments import SHARE, HfArg, Need, synonyms
from ddpm_hf.common.errors import UsageError
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.latents.flags import LatentFlags, cache_folder
from ddpm_hf.models.flags import AttentionFlags, StartFlags, UNetFlags
from ddpm_hf.models.recipes import advice_on_a_cpu, weaker_layers
from ddpm_hf.objectives.flags import ObjectiveFlags, ScheduleFlags
from ddpm_hf.publishing.flags import HubFlags, PublishingFlags
from ddpm_hf.training.flags import Flags, GridFlags, TrainingFlags
from ddpm_hf.training.parsing import Program, parse_flags

# The settings that the model card shows
SHOWN = (
    "use_ema", "learning_rate", "train_batch_size", "prediction_type", "variance_type", "objective", "loss_type",
    "ddpm_num_steps", "ddpm_beta_schedule", "model_preset", "resolution", "label_column",
)  # fmt: skip


@dataclass
class ClassFlags:
    """Flags of training by class."""

    title: ClassVar[str] = "Classes"
    meanings: ClassVar[dict[str, str]] = synonyms("""
--class_dropout: p_uncond uncond_prob cond_drop_prob class_drop_prob label_dropout cfg_dropout unconditional_prob
--class_balanced: balanced class_balance balance_classes
""")
    needs: ClassVar[dict[str, Need]] = {
        "class_dropout": Need(lambda run: run.label_column, "has no effect without --label_column")
    }

    class_dropout: float = HfArg(
        range=SHARE,
        default=0.1,
        help="Share of the images to train without their label, for classifier-free guidance; 0 to disable.",
    )
    class_balanced: bool = HfArg(default=False, help="Sample every class equally often, however many images it has.")

    def check(self, flags: Flags) -> None:
        """Raise UsageError for classes that cannot be balanced."""
        if self.class_balanced and (flags.label_column is None or flags.streaming):
            raise UsageError("--class_balanced needs --label_column, and a dataset that is not a stream")


PROGRAM = Program(
    (
        DataFlags, UNetFlags, StartFlags, ScheduleFlags, ObjectiveFlags, ClassFlags, LatentFlags, TrainingFlags,
        GridFlags, AttentionFlags, PublishingFlags, HubFlags,
    ),
    weaker_layers,
    __doc__,
)  # fmt: skip


def parse(argv: list[str]) -> Flags:
    """The settings for a command line; a mistake is one line and exit code 2."""
    return parse_flags(PROGRAM, argv)


if __name__ == "__main__":  # before torch is imported, so that --help and an unknown flag are answered at once
    FLAGS = parse(sys.argv[1:])

import torch
from diffusers import AutoencoderKL, UNet2DModel

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.layout import layout
from ddpm_hf.common.randomness import StepKeys, to_device
from ddpm_hf.data import ImageDataset
from ddpm_hf.data.batches import Images, held_out_means, make_batches, open_images, plan_steps
from ddpm_hf.latents.cache import cached_latents, check_cacheable
from ddpm_hf.latents.encoding import x_start_of
from ddpm_hf.models.acceleration import accelerate_for_training, choose_execution
from ddpm_hf.models.autoencoder import load_autoencoder
from ddpm_hf.models.diffusion import make_scheduler, terminal_snr_warning
from ddpm_hf.models.gradient_gate import recorded_call
from ddpm_hf.models.pretrained import differences, revision_of_vae, source_of, start_from
from ddpm_hf.models.sizes import model_size, settle_resolution, unet_arguments
from ddpm_hf.models.unet import make_unet, time_blindness
from ddpm_hf.objectives.losses import QUARTILES, quartile_of, training_losses
from ddpm_hf.objectives.timestep_samplers import TIMESTEP_SAMPLERS, LossSecondMomentSampler, UniformTimestepSampler
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
from ddpm_hf.training.reporting import ending, parameter_count, run_lines, weights_memory
from ddpm_hf.training.run import Run
from ddpm_hf.training.setup.begin import begin_training, run_facts, start_run
from ddpm_hf.training.setup.claiming import check_resumable, start_writing


def compute_loss(
    model,
    batch: dict,
    keys: StepKeys,
    *,
    run: Run,
    scheduler: DDPMScheduler,
    sampler: UniformTimestepSampler | LossSecondMomentSampler,
    null_class: int,
    class_dropout: float,
    loss_options: dict[str, Any],
    vae: AutoencoderKL | None = None,
) -> Losses:
    """Draw t and noise, add it, predict, compare (Ho et al. 2020, Algorithm 1)."""
    x_start = x_start_of(batch, keys, vae, run.device)  # [N, C, H, W]
    timesteps, weights = (to_device(one, x_start.device) for one in sampler.sample(keys.uniform("timestep")))
    noise = keys.normal_like(x_start)
    conditioning = {}
    if "labels" in batch:
        labels = batch["labels"]
        if not keys.validation:  # a share of them become the null class (Ho & Salimans 2022, Algorithm 1)
            labels = torch.where(keys.uniform("class_dropout") < class_dropout, null_class, labels)
        conditioning["class_labels"] = to_device(labels, x_start.device)
    output = model(scheduler.add_noise(x_start, noise, timesteps), timesteps, **conditioning).sample.float()
    losses = training_losses(scheduler, output, x_start, noise, timesteps, **loss_options)
    if model.training and not isinstance(sampler, UniformTimestepSampler):  # it learns from the losses of all ranks
        pairs = torch.stack([timesteps.float(), losses.detach().float()], dim=1)[: keys.valid]  # [N, 2]
        pairs = run.gather_rows(pairs, run.flags.train_batch_size)
        sampler.update_with_losses(pairs[:, 0].long(), pairs[:, 1])
    return Losses(losses * weights, logged=losses, groups=quartile_of(timesteps, len(scheduler)))


def validation_loss(model, *, run: Run, held_out: ImageDataset, loss_type: str, **options: Any) -> dict[str, float]:
    """The mean simple loss over the held-out images, at the same uniform timesteps and noise each time."""
    options |= {"sampler": UniformTimestepSampler(len(options["scheduler"])), "loss_options": {"loss_type": loss_type}}
    loss_of = functools.partial(compute_loss, model, run=run, **options)
    return held_out_means(run, held_out, ["validation_loss"], lambda batch, keys: [loss_of(batch, keys).losses])


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


def describe(run: Run, images: Images, plan: StepPlan, parameters: int) -> dict[str, str]:
    """What runs: said at the start, and by --dry_run."""
    rows, flags = images.rows, run.settings
    cache = None if images.dataset is None else images.dataset.cache
    cache_bytes = sum(pixels.nbytes for pixels in ([] if cache is None else cache))
    named = (flags.pretrained_model_name_or_path, flags.model_preset, flags.model_config_name_or_path)
    name = next(filter(None, named), "the default UNet")
    by_class = f", {len(rows.label_names)} classes in {rows.label_column!r}" if rows.label_column else ""
    in_latents = f", in the latents of {flags.vae_name_or_path}" if flags.vae_name_or_path else ""
    return {
        **images.lines(f"column {rows.image_column!r}{by_class}", f", {'not ' * (cache is None)}kept decoded"),
        "model": f"{name}, {parameters:,} parameters{in_latents}",
        "diffusion": f"{flags.ddpm_beta_schedule}, T={flags.ddpm_num_steps}, {flags.prediction_type},"
        f" {flags.variance_type}, objective {flags.objective}",
        **run_lines(run, plan),
        "memory": f"{weights_memory(parameters, flags.use_ema)}, {cache_bytes / 2**20:,.0f} MiB for images;"
        " activations on top",
    }


def make_pipeline(
    model: UNet2DModel,
    scheduler: DDPMScheduler,
    class_names: list[str],
    vae: AutoencoderKL | None,
    trained_classes: list[int] | None = None,
) -> DDPMPipeline | ClassConditionalDDPMPipeline:
    """The pipeline that samples from the model, by class where it knows classes."""
    if class_names:
        return ClassConditionalDDPMPipeline(model, scheduler, dict(enumerate(class_names)), vae, trained_classes)
    return DDPMPipeline(model, scheduler, vae)


def train(flags: Flags) -> None:
    """From flags to a trained, saved and, if asked, published pipeline."""
    flags.check()
    data, unet, start, schedule, objective, classes, latents, training, _, attention, publishing, hub = flags
    vae_name, token = latents.vae_name_or_path, hub.hub_token
    written = layout("unet", "scheduler", *(["vae"] if vae_name else []))
    run = start_run(flags, written, (data.train_data_dir, data.dataset_name))
    source = source_of(start, token, run.resumed and run.resumed.checkpoint)
    vae = None
    if vae_name:
        vae = load_autoencoder(vae_name, revision_of_vae(start, vae_name), token=token)
        vae.eval().requires_grad_(False).to(run.device)
    scheduler = make_scheduler(schedule, objective, vae is not None, source)
    size, fresh = model_size(unet, vae, source, token), source is not None and run.resumed is None
    run.log(settle_resolution(data, *size, usual="64", trained=fresh))
    arguments = unet_arguments(unet, data, vae, source, token)

    images = open_images(run, data, arguments["in_channels"] if vae is None else vae.config.in_channels, token)
    class_names = images.rows.label_names if data.label_column else []
    embedded = len(class_names) + (classes.class_dropout > 0) if class_names else None
    model = make_unet(arguments, objective.variance_type, embedded, run.seed)
    xformers = attention.enable_xformers_memory_efficient_attention
    choose_execution(model, run.device, training.gradient_checkpointing, xformers, training.acceleration)
    if source is None:
        run.log(time_blindness(model.config))
    elif fresh:
        run.log(*start_from(model, source, class_names, scheduler, start.variant))
        run.log(*differences(flags.values(), source))
    if latents.cache_latents:
        images.dataset.leave_out_broken()  # before the batches are planned
        check_cacheable(images.dataset)
    plan = plan_steps(run, images)
    facts = run_facts(run, images.count, plan, classes=class_names)
    check_resumable(run, model, facts, "unet")
    facts["scheduler"] = json.loads(scheduler.to_json_string())  # so that a checkpoint can be sampled by itself
    repository = reserve_repository(run, publishing, token, bool(images.held_out))
    run.log(terminal_snr_warning(scheduler, schedule))

    sampler = TIMESTEP_SAMPLERS[objective.timestep_sampler](len(scheduler))
    extra = {} if isinstance(sampler, UniformTimestepSampler) else {"timestep_sampler": sampler}
    state = begin_training(run, model, plan, facts, {"unet": model}, QUARTILES, extra)
    by_class = {"null_class": len(class_names), "class_dropout": classes.class_dropout}
    shared = {"run": run, "scheduler": scheduler, "vae": vae, **by_class}
    loss_of = functools.partial(compute_loss, sampler=sampler, loss_options=objective.loss_options(), **shared)
    batches = make_batches(run, images, plan, state.step, classes.class_balanced)
    with recorded_call(model) as call:
        batches = rehearse(run, state, plan, batches, loss_of)
    lines = describe(run, images, plan, parameter_count(model))
    graphs = run.captures_steps(plan)
    lines["acceleration"] = accelerate_for_training(model, call, training.acceleration, run.autocast_dtype, graphs)
    advice = advice_on_a_cpu(unet.model_preset, arguments["sample_size"], trained=source is not None)
    if training.dry_run:
        show_dry_run(run, lines, state, plan, batches, loss_of, advice)
        return
    start_writing(run, state.step, lines, Path(__file__).stem)
    if latents.cache_latents:
        folder = cache_folder(data.cache_dir, training.output_dir)
        images = images._replace(dataset=cached_latents(images.dataset, vae, folder, run.accelerator))
        batches = make_batches(run, images, plan, state.step, classes.class_balanced)

    trained = images.trained_classes
    pipeline_of = functools.partial(
        make_pipeline, scheduler=scheduler, class_names=class_names, vae=vae, trained_classes=trained
    )
    names = class_names if trained is None else [class_names[label] for label in trained]
    about = describe_run(run, images, plan, model, SHOWN, names[: training.eval_batch_size])
    publisher = Publisher(run, publishing, token, state, pipeline_of, about, plan.total, repository)
    held_out, steps = images.held_out, min(objective.ddpm_num_inference_steps, len(scheduler))
    validate = functools.partial(validation_loss, held_out=held_out, loss_type=objective.loss_type, **shared)
    finished = training_loop(
        run,
        state,
        plan,
        batches,
        compute_loss=loss_of,
        validate=validate if held_out else None,
        draw=functools.partial(draw_samples, run=run, pipeline_of=pipeline_of, num_inference_steps=steps),
        save=publisher.save,
        saves_checkpoints=publishing.hub_strategy != "end",
        name_of=images.name_of,
        advice=advice,
    )
    publisher.close(finished)
    sample = ["ddpm-hf", "sample", *(["--class", names[0]] if names else [])]
    end_training(run, ending(run, state, f"accelerate launch {Path(__file__).name}", finished, sample))


def main(argv: list[str] | None = None, flags: Flags | None = None) -> None:
    """Parse the flags, if they are not given, and train; what the user can mend is one line and exit code 2."""
    flags = flags or parse(sys.argv[1:] if argv is None else argv)
    with ends_in_one_line(Path(__file__).name, flags.output_dir, DataError):
        train(flags)


if __name__ == "__main__":
    main(flags=FLAGS)
