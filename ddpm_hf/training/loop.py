"""The training loop: one function that reads from top to bottom."""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..common.arguments import SHORTER_TRAINING
from ..common.errors import RunError
from ..common.randomness import StepKeys
from .checkpointing import save_checkpoint
from .earlier_run import replaces
from .faults import attempt, end_together, track, warn
from .flags import PipelineConfig, TrainingConfig
from .meter import Losses
from .nonfinite import bad_samples, diverged, named
from .plan import StepPlan
from .reporting import Progress
from .state import Snapshot, TrainingState, averaged_weights, unwrap
from .step import take_step
from .stopping import InterruptedLookError, Stop


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def training_loop(
    config: TrainingConfig,
    accelerator,
    state: TrainingState,
    plan: StepPlan,
    batches: Iterator[dict[str, torch.Tensor]],
    total_steps: int,
    *,
    compute_loss: Callable[[torch.nn.Module, dict, StepKeys], Losses],
    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    draw: Callable[[torch.nn.Module, int], Path | None] | None = None,
    save: Callable[[torch.nn.Module, int], None] | None = None,
    saves_checkpoints: bool = False,
    name_of: Callable[[int], str] = "sample {}".format,
    deadline: float | None = None,
    advice: str = SHORTER_TRAINING,
) -> bool:
    """Train until `total_steps`; True if that was reached, False if a signal or the clock asked to stop before.

    Args:
        batches: this rank's batches from `state.step` on, as `plan` says; their `index` [N] are the samples' rows.
        compute_loss: (model, batch, keys) -> `Losses`; what it draws, it draws from `keys`.
        validate, draw, save: given the model, in eval mode and with the EMA weights, the last two also the step.
            `validate` and `draw` run on all ranks, `save` on the main one. `draw` returns what it has written.
        saves_checkpoints: whether `save` is called at each checkpoint too, before it is written.
        name_of: a row's name, for messages.
        deadline: on the monotonic clock; it counts once a step has been trained.
        advice: what to do where training takes long on a CPU.

    Raises:
        UsageError: `config.max_nonfinite_steps` steps in a row had a loss or gradient that is not finite.
        RunError: `metrics.jsonl`, the last checkpoint or the last pipeline could not be written.
        Exception: what reading a batch raised, once the steps before it are saved.
    """
    output_dir = Path(config.output_dir)
    model = unwrap(accelerator, state.model)
    meter = state.meter
    since, seen = time.perf_counter(), 0
    before, bad = Snapshot(state), []  # as it was when a step was good last, and the rows that were not good since
    saved = state.step  # the newest step that is on disk, or needs not be
    state.model.train()

    progress = Progress(accelerator, total_steps, state.step, advice)
    with Stop(deadline) as stop, progress:  # a bar is closed before an error speaks
        if draw is not None and state.grid_due:
            look(draw, state, model, stop, progress)
        while state.step < total_steps:
            step, window, in_window = state.step, plan.batches(state.step), plan.samples_in(state.step)
            if not state.nonfinite_steps:
                before, bad = Snapshot(state), []
            fetched = stop.fetch(batches, len(window))
            if stop.agreed(accelerator):
                given_back = not stop.by_clock and earlier_run_waits(accelerator, output_dir)
                if not given_back:
                    wind_up(config, accelerator, state, before, saved)
                stop.raise_failure(accelerator)
                say_how_to_go_on(config, accelerator, state, stop.why, given_back)
                return False

            norm, finite, taken = take_step(config, accelerator, state, plan, fetched, compute_loss)
            state.step += 1
            state.nonfinite_steps = 0 if finite else state.nonfinite_steps + 1
            if not finite:
                meter.sums = before.sums.clone()
                rows = bad_samples(taken, accelerator)
                bad += [row for row in rows if row not in bad]
                what = f"not finite: {named(rows, name_of)}"
                warn(accelerator, f"step {state.step}: loss or gradient is {what}; step skipped")
            if state.nonfinite_steps >= config.max_nonfinite_steps:
                count, given_back = state.nonfinite_steps, earlier_run_waits(accelerator, output_dir)
                if not given_back:
                    wind_up(config, accelerator, state, before, saved)
                good = before.step
                error = diverged(config, count, good, named(bad, name_of), given_back)
                end_together(accelerator, error if accelerator.is_main_process else None)

            done = state.step == total_steps
            epoch_ends = state.step % plan.steps_per_epoch == 0 or done
            epoch = plan.epoch_of(step)
            seen, elapsed = seen + in_window, time.perf_counter() - since
            progress.done(state.step)
            record: dict[str, float] = {}
            if (state.step % config.logging_steps == 0 or done) and finite:
                record = {**meter.means(accelerator), "lr": state.lr_scheduler.get_last_lr()[0], "grad_norm": norm}
            if (
                validate is not None
                and config.validation_steps
                and (state.step % config.validation_steps == 0 or done)
            ):
                with progress.pause(), averaged_weights(state, model) as averaged:
                    record |= validate(averaged)
            if record:
                timing = {"seconds": round(elapsed, 3), "images_per_second": round(seen / elapsed, 1)}
                state.figures |= progress.figures(
                    epoch + 1, record, state.lr_scheduler.get_last_lr()[0], seen / elapsed
                )
                record = {"step": state.step, "epoch": epoch + 1, **record}
                write_record(accelerator, state, output_dir, record, timing)
                since, seen = time.perf_counter(), 0

            paused = time.perf_counter()
            if draw is not None and images_due(config, state.step, epoch, epoch_ends, done):
                look(draw, state, model, stop, progress)
            checkpoint_due = done or (state.step % config.checkpointing_steps == 0 and not state.nonfinite_steps)
            save_due = epoch_ends and (epoch % config.save_model_epochs == 0 or done)
            if save is not None and (save_due or (checkpoint_due and saves_checkpoints)):
                with averaged_weights(state, model) as averaged:
                    fault = attempt(accelerator, functools.partial(save, averaged, state.step))
                report(accelerator, fault, f"the model of step {state.step}", last=done)
            if checkpoint_due:
                limit = None if state.nonfinite_steps else config.checkpoints_total_limit
                fault = save_checkpoint(accelerator, state, output_dir, limit)
                report(accelerator, fault, f"checkpoint-{state.step}", last=done)
                saved = saved if fault else state.step
                if not fault:
                    progress.note(f"checkpoint-{state.step}")
            since += time.perf_counter() - paused
            progress.paused += time.perf_counter() - paused
            stop.armed = True
    return True


def images_due(config: PipelineConfig, step: int, epoch: int, epoch_ends: bool, done: bool) -> bool:
    """Whether pictures follow this step: at the end of training in any case, unless they are turned off."""
    if config.save_images_steps:
        return done or step % config.save_images_steps == 0
    return bool(config.save_images_epochs) and epoch_ends and (done or epoch % config.save_images_epochs == 0)


def look(draw: Callable, state: TrainingState, model: torch.nn.Module, stop: Stop, progress: Progress) -> None:
    """Draw the pictures of this step; a run that is to stop leaves them to the one that goes on from here."""
    state.grid_due = True
    with (
        contextlib.suppress(InterruptedLookError),
        averaged_weights(state, model) as averaged,
        stop.interrupting(state.whole_parts.values()),
    ):
        path = draw(averaged, state.step)
        state.grid_due = False
        if path is not None:
            progress.note(f"pictures in {path}")


def report(accelerator, fault: str | None, what: str, last: bool) -> None:
    """Say what could not be written; raise RunError where the run's end depends on it."""
    if fault is not None and last:
        error = RunError(f"{what} cannot be written ({fault}); make room")
        end_together(accelerator, error if accelerator.is_main_process else None)
    if fault is not None:
        warn(accelerator, f"{what} cannot be written ({fault}); training goes on")


def write_record(
    accelerator, state: TrainingState, output_dir: Path, record: dict[str, float], timing: dict[str, float]
) -> None:
    """A step's figures: into `metrics.jsonl`, which must work, and `timings.jsonl` and the tracker, which may fail."""
    fault = attempt(accelerator, lambda: append_jsonl(output_dir / "metrics.jsonl", record))
    report(accelerator, fault, "metrics.jsonl", last=True)
    if "timings.jsonl" not in state.given_up:
        timings = {"step": record["step"], **timing}
        fault = attempt(accelerator, lambda: append_jsonl(output_dir / "timings.jsonl", timings))
        report(accelerator, fault, "timings.jsonl", last=False)
        state.given_up |= {"timings.jsonl"} if fault else set()
    scalars = {name: value for name, value in record.items() if name != "step"}
    track(accelerator, lambda tracker: tracker.log({**scalars, **timing}, step=record["step"]))


def wind_up(config: TrainingConfig, accelerator, state: TrainingState, before: Snapshot, saved: int) -> None:
    """Save a run that ends early, as it was before steps that were skipped last, unless that is on disk."""
    if state.nonfinite_steps:
        before.put_back(state)
    if state.step > saved:
        limit = config.checkpoints_total_limit
        fault = save_checkpoint(accelerator, state, Path(config.output_dir), limit)
        report(accelerator, fault, f"checkpoint-{state.step}", last=True)


def earlier_run_waits(accelerator, output_dir: Path) -> bool:
    """Whether an earlier run is still set aside, to come back if this one ends now. All ranks take part."""
    return any(gather_object([replaces(output_dir) or replaces(output_dir.parent)]))


def say_how_to_go_on(config: TrainingConfig, accelerator, state: TrainingState, why: str, given_back: bool) -> None:
    """The line of a run that was stopped; `given_back`: before its first checkpoint, and so an earlier run is back."""
    if given_back:
        line = f"stopped at step {state.step} by {why}, before the first checkpoint: the earlier run is back"
        if accelerator.is_main_process:
            tqdm.write(line, file=sys.stderr)
        return
    instead = " in the place of --overwrite_output_dir" if config.overwrite_output_dir else ""
    if accelerator.is_main_process:
        tqdm.write(
            f"stopped at step {state.step} by {why}; go on with --resume_from_checkpoint latest{instead}",
            file=sys.stderr,
        )
