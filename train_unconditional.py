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
    accelerate launch train_unconditional.py --train_data_dir photos --conditioning super-resolution

The output folder holds a pipeline that `DiffusionPipeline.from_pretrained` loads anywhere, sample grids, metrics and
checkpoints; `ddpm-hf sample ddpm-model-64` samples from it. `--dry_run` shows what would run, and how long it takes.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

from ddpm_hf.data.flags import ClassFlags, DataFlags
from ddpm_hf.evaluation.flags import EvaluationFlags
from ddpm_hf.latents.flags import LatentFlags, cache_folder
from ddpm_hf.models.conditioning import ConditioningFlags
from ddpm_hf.models.flags import AttentionFlags, StartFlags, UNetFlags
from ddpm_hf.models.recipes import advice_on_a_cpu, weaker_layers
from ddpm_hf.objectives.flags import ObjectiveFlags, ScheduleFlags
from ddpm_hf.publishing.flags import HubFlags, PublishingFlags
from ddpm_hf.training.flags import Flags, GridFlags, TrainingFlags
from ddpm_hf.training.parsing import Program, parse_flags

# The settings that the model card shows
SHOWN = (
    "use_ema", "optimizer", "learning_rate", "train_batch_size", "prediction_type", "variance_type", "objective",
    "loss_type", "loss_weighting", "snr_gamma", "ddpm_num_steps", "ddpm_beta_schedule", "model_preset", "resolution",
    "label_column", "conditioning",
)  # fmt: skip
PROGRAM = Program(
    (
        DataFlags, UNetFlags, StartFlags, ScheduleFlags, ObjectiveFlags, ClassFlags, LatentFlags, ConditioningFlags,
        TrainingFlags, GridFlags, EvaluationFlags, AttentionFlags, PublishingFlags, HubFlags,
    ),
    weaker_layers,
    __doc__,
)  # fmt: skip
parse = functools.partial(parse_flags, PROGRAM)  # the words of a command line -> the flags

if __name__ == "__main__":  # before torch is imported, so that --help and an unknown flag are answered at once
    FLAGS = parse(sys.argv[1:])

import torch
from diffusers import AutoencoderKL

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.layout import layout
from ddpm_hf.common.randomness import StepKeys, to_device
from ddpm_hf.data.batches import held_out_loss, make_batches, open_images, plan_steps, shown_images
from ddpm_hf.data.labels import class_input
from ddpm_hf.data.upright import real_images
from ddpm_hf.evaluation.in_training import evaluation_of
from ddpm_hf.latents.cache import cached_latents, prepare_caching
from ddpm_hf.latents.encoding import x_start_of
from ddpm_hf.models.acceleration import accelerate_for_training, choose_execution
from ddpm_hf.models.design import build_model, describe_model, design_model, make_pipeline
from ddpm_hf.models.gradient_gate import recorded_call
from ddpm_hf.objectives.losses import QUARTILES, quartile_of, training_losses
from ddpm_hf.objectives.timestep_samplers import TIMESTEP_SAMPLERS, LossSecondMomentSampler, UniformTimestepSampler
from ddpm_hf.portable.conditioning_ddpm_hf import Conditioning
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler
from ddpm_hf.publishing.publisher import Publisher, reserve_repository
from ddpm_hf.restoration.training import condition_of, strips_of
from ddpm_hf.training.ending import end_training, ends_in_one_line
from ddpm_hf.training.loop import training_loop
from ddpm_hf.training.meter import Losses
from ddpm_hf.training.previews import draw_grid
from ddpm_hf.training.rehearsal import rehearse, show_dry_run
from ddpm_hf.training.reporting import parameter_count, run_lines
from ddpm_hf.training.run import Run
from ddpm_hf.training.setup.begin import begin_training, run_facts, start_run
from ddpm_hf.training.setup.claiming import check_resumable, start_writing


def compute_loss(
    model: torch.nn.Module,
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
    conditioning: Conditioning | None = None,
) -> Losses:
    """Draw t and noise, add it, predict, compare (Ho et al. 2020, Algorithm 1)."""
    x_start = x_start_of(batch, keys, vae, run.device)  # [N, C, H, W]
    timesteps, weights = (to_device(one, x_start.device) for one in sampler.sample(keys.uniform("timestep")))
    noise = keys.normal_like(x_start)
    x_t, conditions = scheduler.add_noise(x_start, noise, timesteps), {}
    if "labels" in batch:
        conditions["class_labels"] = class_input(batch["labels"], keys, null_class, class_dropout, x_start.device)
    if conditioning is not None:  # the network reads the degraded image too (Saharia et al. 2021)
        x_t = torch.cat([x_t, condition_of(conditioning, x_start, keys)], dim=1)
    output = model(x_t, timesteps, **conditions).sample.float()
    losses = training_losses(scheduler, output, x_start, noise, timesteps, **loss_options)
    if model.training and not isinstance(sampler, UniformTimestepSampler):  # it learns from the losses of all ranks
        pairs = torch.stack([timesteps.float(), losses.detach().float()], dim=1)[: keys.valid]  # [N, 2]
        pairs = run.gather_rows(pairs, run.flags.train_batch_size)
        sampler.update_with_losses(pairs[:, 0].long(), pairs[:, 1])
    return Losses(losses * weights, logged=losses, groups=quartile_of(timesteps, len(scheduler)))


def train(flags: Flags) -> None:
    """From flags to a trained, saved and, if asked, published pipeline."""
    flags.check()
    data, unet, _, _, objective, classes, latents, _, training, _, evaluated, attention, publishing, hub = flags
    written = layout("unet", "scheduler", *(["vae"] if latents.vae_name_or_path else []))
    run = start_run(flags, written, (data.train_data_dir, data.dataset_name))
    design, line = design_model(flags, data, run.resumed and run.resumed.checkpoint, run.device, hub.hub_token)
    run.log(line)
    images = open_images(run, data, design.image_channels, hub.hub_token)
    class_names = images.rows.label_names if data.label_column else []
    model, lines = build_model(design, flags, class_names, run.seed)
    run.log(*lines)
    scheduler, vae = design.scheduler, design.vae
    xformers = attention.enable_xformers_memory_efficient_attention
    choose_execution(model, run.device, training.gradient_checkpointing, xformers, training.acceleration)
    if latents.cache_latents:
        prepare_caching(images.indexed)
    plan = plan_steps(run, images)
    facts = run_facts(run, images.count, plan, classes=class_names, scheduler=json.loads(scheduler.to_json_string()))
    check_resumable(run, model, facts, "unet")
    repository = reserve_repository(run, publishing, hub.hub_token, bool(images.held_out))
    evaluation = evaluation_of(evaluated, run, *real_images(images, data))

    sampler = TIMESTEP_SAMPLERS[objective.timestep_sampler](len(scheduler))
    extra = {} if isinstance(sampler, UniformTimestepSampler) else {"timestep_sampler": sampler}
    state = begin_training(run, model, plan, facts, {"unet": model}, QUARTILES, extra)
    shared: dict[str, Any] = {"run": run, "scheduler": scheduler, "vae": vae, "conditioning": design.conditioning}
    shared |= {"null_class": len(class_names), "class_dropout": classes.class_dropout}
    loss_of = functools.partial(compute_loss, sampler=sampler, loss_options=objective.loss_options(), **shared)
    batches = make_batches(run, images, plan, state.step, classes.class_balanced)
    with recorded_call(model) as call:
        batches = rehearse(run, state, plan, batches, loss_of)
    parameters = parameter_count(model)
    lines = images.lines() | describe_model(flags, parameters) | run_lines(run, plan, parameters, images.cached_bytes)
    lines["acceleration"] = accelerate_for_training(model, call, *run.execution(plan))
    advice = advice_on_a_cpu(unet.model_preset, model.config.sample_size, trained=design.source is not None)
    if training.dry_run:
        show_dry_run(run, lines, state, plan, batches, loss_of, advice)
        return
    start_writing(run, state.step, lines, Path(__file__).stem)
    if latents.cache_latents:
        folder = cache_folder(data.cache_dir, training.output_dir)
        images = images._replace(dataset=cached_latents(images.indexed, vae, folder, run.accelerator))
        batches = make_batches(run, images, plan, state.step, classes.class_balanced)

    trained = images.trained_classes
    pipeline_of = functools.partial(make_pipeline, design=design, class_names=class_names, trained_classes=trained)
    shown = trained or range(len(class_names))
    names, drawn_by = [class_names[label] for label in shown], pipeline_of
    if design.conditioning is not None:
        shown, names, drawn_by = strips_of(shown_images(images, training.eval_batch_size), pipeline_of, run.seed)
    publisher = Publisher(run, publishing, hub.hub_token, repository, state, plan, images, pipeline_of, SHOWN, names)
    publisher.record_evaluation(None if evaluation is None else evaluation.record())
    uniform, simple = UniformTimestepSampler(len(scheduler)), {"loss_type": objective.loss_type}
    simple_loss_of = functools.partial(compute_loss, sampler=uniform, loss_options=simple, **shared)
    steps = min(objective.ddpm_num_inference_steps, len(scheduler))
    finished = training_loop(
        run,
        state,
        plan,
        batches,
        compute_loss=loss_of,
        validate=held_out_loss(run, images, simple_loss_of),
        draw=lambda model, step: draw_grid(run, drawn_by(model), step, shown, names, num_inference_steps=steps),
        save=publisher.save,
        saves_checkpoints=publishing.hub_strategy != "end",
        evaluation=None if evaluation is None else evaluation.during(run, pipeline_of),
        name_of=images.name_of,
        advice=advice,
    )
    publisher.close(finished)
    sample = ["ddpm-hf", "sample", *(["--class", names[0]] if names else [])]
    sample += ["--image", "IMAGE"] if design.conditioning is not None else []
    end_training(run, state, f"accelerate launch {Path(__file__).name}", finished, sample)


def main(argv: list[str] | None = None, flags: Flags | None = None) -> None:
    """Parse the flags, if they are not given, and train; what the user can mend is one line and exit code 2."""
    flags = flags or parse(sys.argv[1:] if argv is None else argv)
    with ends_in_one_line(Path(__file__).name, flags.output_dir, DataError):
        train(flags)


if __name__ == "__main__":
    main(flags=FLAGS)
