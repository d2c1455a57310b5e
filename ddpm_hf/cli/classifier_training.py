"""Training a classifier of noised images, whose gradient guides sampling (Dhariwal & Nichol 2021, sec. 4)."""

import functools
import shlex
from typing import Any

import torch
import torch.nn.functional as F

from ..common.errors import DataError, UsageError, one_line
from ..common.layout import layout
from ..common.randomness import StepKeys, to_device
from ..data.batches import held_out_means, make_batches, open_images, plan_steps
from ..data.dataset import ImageDataset
from ..data.images import to_model_range
from ..models.acceleration import accelerate_for_training, choose_execution
from ..models.classifier import NoisyClassifier
from ..models.gradient_gate import recorded_call
from ..models.recipes import advice_on_a_cpu
from ..models.saving import save_model
from ..models.sizes import model_size, settle_resolution, unet_arguments
from ..models.unet import time_blindness
from ..objectives.losses import QUARTILES, quartile_of
from ..objectives.timestep_samplers import UniformTimestepSampler
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from ..training.ending import end_training, ends_in_one_line
from ..training.flags import Flags
from ..training.loop import training_loop
from ..training.meter import Losses
from ..training.rehearsal import rehearse, show_dry_run
from ..training.reporting import parameter_count, run_lines
from ..training.run import Run
from ..training.setup.begin import begin_training, run_facts, start_run
from ..training.setup.claiming import check_resumable, start_writing
from ..training.state import averaged_weights, unwrap
from .classifier_flags import CLASSIFIER_PROGRAM, parse_classifier_flags


def compute_loss(
    model: torch.nn.Module, batch: dict, keys: StepKeys, *, scheduler: DDPMScheduler, device: torch.device
) -> Losses:
    """Cross-entropy (nats) of the class of a noised image, at uniform t."""
    x_start = to_model_range(batch["images"].to(device, non_blocking=True))  # [N, C, H, W]
    timesteps = to_device(UniformTimestepSampler(len(scheduler)).sample(keys.uniform("timestep"))[0], x_start.device)
    x_t = scheduler.add_noise(x_start, keys.normal_like(x_start), timesteps)
    logits = model(x_t, timesteps).float()
    losses = F.cross_entropy(logits, to_device(batch["labels"], x_start.device), reduction="none")
    return Losses(losses, groups=quartile_of(timesteps, len(scheduler)))


def validation_accuracy(
    model: torch.nn.Module, *, run: Run, held_out: ImageDataset, scheduler: DDPMScheduler
) -> dict[str, float]:
    """Accuracy over the held-out images, as they are (t = 0) and noised to the same random timesteps each time."""
    uniform = UniformTimestepSampler(len(scheduler))

    def measure(batch: dict, keys: StepKeys) -> list[torch.Tensor]:
        x_start, labels = to_model_range(batch["images"].to(run.device)), batch["labels"].to(run.device)
        timesteps = uniform.sample(keys.uniform("timestep"))[0].to(x_start.device)
        noised = scheduler.add_noise(x_start, keys.normal_like(x_start), timesteps)
        logits = model(x_start, torch.zeros_like(timesteps)), model(noised, timesteps)
        return [one.argmax(dim=1) == labels for one in logits]

    return held_out_means(run, held_out, ("accuracy_clean", "accuracy_noised"), measure)


def make_classifier(
    arguments: dict[str, Any], scheduler: DDPMScheduler, names: list[str], seed: int
) -> NoisyClassifier:
    """The classifier, initialised from the seed.

    Args:
        arguments: of the UNet whose encoder it has.
        names: of the classes, by id.

    Raises:
        UsageError: arguments that no UNet has.
    """
    torch.manual_seed(seed)
    try:
        model = NoisyClassifier(  # by keyword: `from_config` takes what was given by position for a default
            unet=arguments,
            num_classes=len(names),
            num_train_timesteps=len(scheduler),
            trained_betas=scheduler.exact_tables.betas.tolist(),
            id2label={str(number): name for number, name in enumerate(names)},
        )
    except (ValueError, TypeError) as error:
        raise UsageError(one_line(error)) from error
    return model


def train(flags: Flags) -> None:
    """From flags to a saved classifier."""
    flags.check()
    data, unet, schedule, training, hub = flags
    if training.ema_snapshot_steps:
        raise UsageError("--ema_snapshot_steps: `ddpm-hf ema` averages pipelines; leave it out, and give --use_ema")
    run = start_run(flags, layout(model=True), (data.train_data_dir, data.dataset_name))
    run.log(settle_resolution(data, *model_size(unet, token=hub.hub_token), usual="64"))
    arguments = unet_arguments(unet, data, token=hub.hub_token)
    scheduler = DDPMScheduler(
        num_train_timesteps=schedule.ddpm_num_steps,
        beta_schedule=schedule.ddpm_beta_schedule,
        rescale_betas_zero_snr=schedule.rescale_betas_zero_snr,
    )
    images = open_images(run, data, arguments["in_channels"], hub.hub_token)
    names = images.rows.label_names
    model = make_classifier(arguments, scheduler, names, run.seed)
    choose_execution(model, run.device, training.gradient_checkpointing, acceleration=training.acceleration)
    run.log(time_blindness(arguments))
    plan = plan_steps(run, images)
    facts = run_facts(run, images.count, plan, classes=names)
    model.register_to_config(trained_classes=images.trained_classes)
    check_resumable(run, model, facts, "classifier")

    state = begin_training(run, model, plan, facts, {"classifier": model}, QUARTILES)
    loss_of = functools.partial(compute_loss, scheduler=scheduler, device=run.device)
    with recorded_call(model) as call:
        batches = rehearse(run, state, plan, make_batches(run, images, plan, state.step), loss_of)
    parameters = parameter_count(model)
    name = unet.model_preset or unet.model_config_name_or_path or "the default UNet"
    lines = {
        **images.lines(),
        "model": f"the encoder of {name}, {parameters:,} parameters",
        **run_lines(run, plan, parameters, images.cached_bytes),
        "acceleration": accelerate_for_training(model, call, *run.execution(plan)[:2], graphs=False),
    }
    advice = advice_on_a_cpu(unet.model_preset, arguments["sample_size"])
    if training.dry_run:
        show_dry_run(run, lines, state, plan, batches, loss_of, advice)
        return
    start_writing(run, state.step, lines, "train_classifier")

    def save(trained: torch.nn.Module, step: int) -> None:
        save_model(trained, run.folder, within=run.folder)

    finished = training_loop(
        run,
        state,
        plan,
        batches,
        compute_loss=loss_of,
        validate=images.held_out
        and functools.partial(validation_accuracy, run=run, held_out=images.held_out, scheduler=scheduler),
        save=save,
        name_of=images.name_of,
        advice=advice,
    )
    if finished:
        with averaged_weights(state, unwrap(run.accelerator, state.model)) as trained:
            run.must_write(lambda: save(trained, state.step), "the classifier")
        run.log(f"saved to {training.output_dir}: NoisyClassifier.from_pretrained({training.output_dir!r})")
    guide = shlex.join(["ddpm-hf", "sample", "MODEL", "--class", names[0], "--classifier", training.output_dir])
    end_training(run, state, CLASSIFIER_PROGRAM, finished, looks=guide)


def run(flags: Flags) -> None:
    """Train; a mistake that the user can mend is one line and exit code 2."""
    with ends_in_one_line(CLASSIFIER_PROGRAM, flags.output_dir, DataError):
        train(flags)


def main(argv: list[str]) -> None:
    """Parse the flags and train."""
    run(parse_classifier_flags(argv))
