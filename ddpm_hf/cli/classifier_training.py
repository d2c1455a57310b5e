"""Training a classifier of noised images, whose gradient guides sampling (Dhariwal & Nichol 2021, sec. 4)."""

import functools
import shlex

import torch
import torch.nn.functional as F
from diffusers.utils import logging as diffusers_logging

from ..common.errors import DataError, UsageError, one_line
from ..common.layout import layout
from ..common.randomness import StepKeys
from ..data import ImageDataset, to_model_range
from ..data.batches import make_batches, make_plan, open_images
from ..models.acceleration import compiled
from ..models.attention import choose_attention
from ..models.classifier import NoisyClassifier
from ..models.recipes import advice_on_a_cpu
from ..models.saving import save_model
from ..models.sizes import model_size, settle_resolution, unet_arguments
from ..models.unet import time_blindness
from ..objectives.timestep_samplers import UniformTimestepSampler
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from ..training.ending import ends_in_one_line
from ..training.faults import must_write
from ..training.logs import end_training, log, start_trackers
from ..training.loop import training_loop
from ..training.meter import Losses, sum_over_ranks
from ..training.rehearsal import measure_pace, rehearse
from ..training.reporting import ending, run_lines, show, table, weights_memory
from ..training.setup.accelerator import start_accelerator
from ..training.setup.begin import begin_training, run_facts
from ..training.setup.claiming import check_resumable, check_unchanged, claim_output_dir, describe_start, find_run
from ..training.setup.settings import agree_on_seed, save_settings
from ..training.state import averaged_weights, unwrap
from ..training.stopping import deadline_of
from .classifier_flags import CLASSIFIER_PROGRAM, ClassifierConfig, parse_classifier_flags

QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


def compute_loss(model, batch: dict, keys: StepKeys, *, scheduler: DDPMScheduler, accelerator) -> Losses:
    """Cross-entropy (nats) of the class of a noised image, at uniform t."""
    x_start = to_model_range(batch["images"].to(accelerator.device, non_blocking=True))  # [N, C, H, W]
    timesteps = UniformTimestepSampler(len(scheduler)).sample(keys.uniform("timestep"))[0].to(x_start.device)
    x_t = scheduler.add_noise(x_start, keys.normal_like(x_start), timesteps)
    logits = model(x_t, timesteps).float()
    losses = F.cross_entropy(logits, batch["labels"].to(x_start.device), reduction="none")
    return Losses(losses, groups=timesteps * 4 // len(scheduler))


@torch.no_grad()
def validation_accuracy(model, *, held_out: ImageDataset, config, scheduler: DDPMScheduler, accelerator) -> dict:
    """Accuracy over the held-out images, as they are (t = 0) and noised to the same random timesteps each time."""
    total = torch.zeros(3, dtype=torch.float64)
    uniform = UniformTimestepSampler(len(scheduler))
    starts = list(range(0, len(held_out), config.eval_batch_size))
    for first in starts[accelerator.process_index :: accelerator.num_processes]:
        batch = held_out.__getitems__(
            [(0, i) for i in range(first, min(first + config.eval_batch_size, len(held_out)))]
        )
        x_start, labels = (
            to_model_range(batch["images"].to(accelerator.device)),
            batch["labels"].to(accelerator.device),
        )
        keys = StepKeys(config.seed, 0, first, len(x_start), validation=True)
        timesteps = uniform.sample(keys.uniform("timestep"))[0].to(x_start.device)
        noised = scheduler.add_noise(x_start, keys.normal_like(x_start), timesteps)
        for place, (x, t) in enumerate(((x_start, torch.zeros_like(timesteps)), (noised, timesteps))):
            with accelerator.autocast():
                total[place] += (model(x, t).argmax(dim=1) == labels).sum().cpu()
        total[2] += len(labels)
    total = sum_over_ranks(total)
    return {"accuracy_clean": float(total[0] / total[2]), "accuracy_noised": float(total[1] / total[2])}


def train(config: ClassifierConfig) -> None:
    """From flags to a saved classifier."""
    config.check()
    deadline = deadline_of(config.max_train_hours)
    accelerator = start_accelerator(config)
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # an error is one line, and main says it
    log(accelerator, settle_resolution(config, *model_size(config, token=config.hub_token), usual="64"))
    arguments = unet_arguments(config, config, token=config.hub_token)
    scheduler = DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )
    written = layout(model=True)
    found = find_run(config, accelerator, written, (config.train_data_dir, config.dataset_name))
    config.seed = agree_on_seed(config, found and found[1])
    check_unchanged(config, found and found[1])
    resumed_classes = found and found[1].get("classes")
    images = open_images(config, config, arguments["in_channels"], accelerator, classes=resumed_classes)

    names = images.rows.label_names
    torch.manual_seed(config.seed)
    id2label = {str(number): name for number, name in enumerate(names)}
    try:
        model = NoisyClassifier(  # by keyword: `from_config` takes what was given by position for a default
            unet=arguments,
            num_classes=len(names),
            num_train_timesteps=len(scheduler),
            trained_betas=scheduler.exact_tables.betas.tolist(),
            id2label=id2label,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(one_line(error)) from error
    log(accelerator, time_blindness(arguments))
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if accelerator.device.type == "cpu":
        choose_attention(model)
    plan, total_steps = make_plan(images, config, accelerator.num_processes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    count = "a stream" if images.count is None else f"{images.count:,} images"
    lines = {
        "data": f"{images.rows.name}: {count}, {len(names)} classes in {config.label_column!r}",
        "images": f"{images.transform.channels} × {' × '.join(map(str, config.size()))}",
        "model": f"the encoder of {config.model_preset or config.model_config_name_or_path or 'the default UNet'},"
        f" {parameters:,} parameters",
        **run_lines(config, accelerator, plan, total_steps),
        "memory": f"{weights_memory(parameters, config.use_ema)}; activations on top",
    }
    facts = run_facts(config, images.count, plan, total_steps, classes=names)
    check_resumable(found, config, model, facts, accelerator, "classifier")
    model.register_to_config(trained_classes=images.trained_classes)
    parts = {"classifier": model}
    state = begin_training(config, accelerator, model, total_steps, QUARTILES, facts, found, parts=parts)
    if config.compile and not config.dry_run:  # compiling takes minutes
        state.model = compiled(state.model)
    shared = {"scheduler": scheduler, "accelerator": accelerator}
    loss_of = functools.partial(compute_loss, **shared)
    batches = make_batches(images, config, config, plan, state.step, accelerator)
    batches = rehearse(config, accelerator, state, plan, batches, loss_of)
    advice = advice_on_a_cpu(config, arguments["sample_size"])
    if config.dry_run:
        lines |= measure_pace(config, accelerator, state, plan, batches, loss_of, total_steps, advice)
        show(accelerator, table(lines), describe_start(config, found))
        return
    claim_output_dir(config, accelerator, written, state.step)
    start_trackers(config, accelerator, "train_classifier")
    must_write(accelerator, lambda: save_settings(config), "training_config.json")
    log(accelerator, table(lines))

    finished = training_loop(
        config,
        accelerator,
        state,
        plan,
        batches,
        total_steps,
        compute_loss=loss_of,
        validate=images.held_out
        and functools.partial(validation_accuracy, held_out=images.held_out, config=config, **shared),
        save=lambda trained, step: save_model(trained, config.output_dir, within=config.output_dir),
        name_of=images.name_of,
        deadline=deadline,
        advice=advice,
    )
    if finished:
        with averaged_weights(state, unwrap(accelerator, state.model)) as trained:
            must_write(
                accelerator, lambda: save_model(trained, config.output_dir, within=config.output_dir), "the classifier"
            )
        log(accelerator, f"saved to {config.output_dir}: NoisyClassifier.from_pretrained({config.output_dir!r})")
    guide = shlex.join(["ddpm-hf", "sample", "MODEL", "--class", names[0], "--classifier", config.output_dir])
    log(accelerator, ending(config, state, CLASSIFIER_PROGRAM, finished, looks=guide))
    end_training(accelerator)


def run(config: ClassifierConfig) -> None:
    """Train; a mistake that the user can mend is one line and exit code 2."""
    with ends_in_one_line(CLASSIFIER_PROGRAM, config.output_dir, DataError):
        train(config)


def main(argv: list[str]) -> None:
    """Parse the flags and train."""
    run(parse_classifier_flags(argv))
