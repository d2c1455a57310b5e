"""Training a classifier of noised images, whose gradient guides sampling (Dhariwal & Nichol 2021, sec. 4)."""

import functools
import shlex
from typing import Any

import torch
import torch.nn.functional as F

from ..common.errors import DataError, UsageError
from ..common.layout import layout
from ..common.randomness import StepKeys
from ..data import ImageDataset, to_model_range
from ..data.batches import Images, held_out_means, make_batches, open_images, plan_steps
from ..models.classifier import NoisyClassifier
from ..models.recipes import advice_on_a_cpu
from ..models.saving import save_model
from ..models.sizes import model_size, settle_resolution, unet_arguments
from ..models.unet import time_blindness
from ..objectives.timestep_samplers import UniformTimestepSampler
from ..portable.acceleration_ddpm_hf import choose_attention
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from ..training.ending import ends_in_one_line
from ..training.logs import end_training
from ..training.loop import training_loop
from ..training.meter import Losses
from ..training.plan import StepPlan
from ..training.rehearsal import rehearse, show_dry_run
from ..training.reporting import ending, run_lines, weights_memory
from ..training.run import Run
from ..training.setup.begin import begin_training, run_facts, start_run
from ..training.setup.claiming import check_resumable, start_writing
from ..training.state import averaged_weights, unwrap
from .classifier_flags import CLASSIFIER_PROGRAM, ClassifierConfig, parse_classifier_flags

QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


def compute_loss(model, batch: dict, keys: StepKeys, *, scheduler: DDPMScheduler, device: torch.device) -> Losses:
    """Cross-entropy (nats) of the class of a noised image, at uniform t."""
    x_start = to_model_range(batch["images"].to(device, non_blocking=True))  # [N, C, H, W]
    timesteps = UniformTimestepSampler(len(scheduler)).sample(keys.uniform("timestep"))[0].to(x_start.device)
    x_t = scheduler.add_noise(x_start, keys.normal_like(x_start), timesteps)
    logits = model(x_t, timesteps).float()
    losses = F.cross_entropy(logits, batch["labels"].to(x_start.device), reduction="none")
    return Losses(losses, groups=timesteps * 4 // len(scheduler))


def validation_accuracy(model, *, run: Run, held_out: ImageDataset, scheduler: DDPMScheduler) -> dict[str, float]:
    """Accuracy over the held-out images, as they are (t = 0) and noised to the same random timesteps each time."""
    uniform = UniformTimestepSampler(len(scheduler))

    def measure(batch: dict, keys: StepKeys) -> list[torch.Tensor]:
        x_start, labels = to_model_range(batch["images"].to(run.device)), batch["labels"].to(run.device)
        timesteps = uniform.sample(keys.uniform("timestep"))[0].to(x_start.device)
        noised = scheduler.add_noise(x_start, keys.normal_like(x_start), timesteps)
        with run.accelerator.autocast():
            logits = model(x_start, torch.zeros_like(timesteps)), model(noised, timesteps)
        return [one.argmax(dim=1) == labels for one in logits]

    return held_out_means(run, held_out, ("accuracy_clean", "accuracy_noised"), measure)


def describe(run: Run, config: ClassifierConfig, images: Images, plan: StepPlan, parameters: int) -> dict[str, str]:
    """What runs: said at the start, and by --dry_run."""
    count = "a stream" if images.count is None else f"{images.count:,} images"
    unet = config.model_preset or config.model_config_name_or_path or "the default UNet"
    return {
        "data": f"{images.rows.name}: {count}, {len(images.rows.label_names)} classes in {config.label_column!r}",
        "images": f"{images.transform.channels} × {' × '.join(map(str, config.size()))}",
        "model": f"the encoder of {unet}, {parameters:,} parameters",
        **run_lines(run, plan),
        "memory": f"{weights_memory(parameters, config.use_ema)}; activations on top",
    }


def make_classifier(
    arguments: dict[str, Any], scheduler: DDPMScheduler, names: list[str], seed: int, device: torch.device
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
        raise UsageError(" ".join(str(error).split())) from error
    if device.type == "cpu":
        choose_attention(model)
    return model


def train(config: ClassifierConfig) -> None:
    """From flags to a saved classifier."""
    config.check()
    run = start_run(config, layout(model=True), (config.train_data_dir, config.dataset_name))
    run.log(settle_resolution(config, *model_size(config, token=config.hub_token), usual="64"))
    arguments = unet_arguments(config, config, token=config.hub_token)
    scheduler = DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )
    images = open_images(run, config, arguments["in_channels"], config.hub_token)
    names = images.rows.label_names
    model = make_classifier(arguments, scheduler, names, run.seed, run.device)
    run.log(time_blindness(arguments))
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    plan = plan_steps(run, images)
    facts = run_facts(run, images.count, plan, classes=names)
    check_resumable(run, model, facts, "classifier")
    model.register_to_config(trained_classes=images.trained_classes)

    state = begin_training(run, model, plan, facts, QUARTILES, parts={"classifier": model})
    loss_of = functools.partial(compute_loss, scheduler=scheduler, device=run.device)
    batches = rehearse(run, state, plan, make_batches(run, images, plan, state.step), loss_of)
    lines = describe(run, config, images, plan, sum(parameter.numel() for parameter in model.parameters()))
    advice = advice_on_a_cpu(config, arguments["sample_size"])
    if config.dry_run:
        show_dry_run(run, lines, state, plan, batches, loss_of, advice)
        return
    start_writing(run, state.step, lines, "train_classifier")
    finished = training_loop(
        run,
        state,
        plan,
        batches,
        compute_loss=loss_of,
        validate=images.held_out
        and functools.partial(validation_accuracy, run=run, held_out=images.held_out, scheduler=scheduler),
        save=lambda trained, step: save_model(trained, run.folder, within=run.folder),
        name_of=images.name_of,
        advice=advice,
    )
    if finished:
        with averaged_weights(state, unwrap(run.accelerator, state.model)) as trained:
            run.must_write(lambda: save_model(trained, run.folder, within=run.folder), "the classifier")
        run.log(f"saved to {config.output_dir}: NoisyClassifier.from_pretrained({config.output_dir!r})")
    guide = shlex.join(["ddpm-hf", "sample", "MODEL", "--class", names[0], "--classifier", config.output_dir])
    end_training(run, ending(run, state, CLASSIFIER_PROGRAM, finished, looks=guide))


def run(config: ClassifierConfig) -> None:
    """Train; a mistake that the user can mend is one line and exit code 2."""
    with ends_in_one_line(CLASSIFIER_PROGRAM, config.output_dir, DataError):
        train(config)


def main(argv: list[str]) -> None:
    """Parse the flags and train."""
    run(parse_classifier_flags(argv))
