"""The training loop: one function that reads from top to bottom."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..common.arguments import SHORTER_TRAINING
from ..common.randomness import StepKeys
from .due import Due
from .evaluations import Evaluation
from .meter import Losses
from .nonfinite import NonfiniteGuard
from .output import TrainingOutput
from .plan import StepPlan
from .reporting import Progress
from .run import Run
from .state import TrainingState, unwrap
from .step import take_step
from .stopping import Stop
from .update import Updater


def training_loop(
    run: Run,
    state: TrainingState,
    plan: StepPlan,
    batches: Iterator[dict[str, torch.Tensor]],
    *,
    compute_loss: Callable[[torch.nn.Module, dict, StepKeys], Losses],
    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    draw: Callable[[torch.nn.Module, int], Path | None] | None = None,
    save: Callable[[torch.nn.Module, int], None] | None = None,
    saves_checkpoints: bool = False,
    evaluation: Evaluation | None = None,
    name_of: Callable[[int], str] = "sample {}".format,
    advice: str = SHORTER_TRAINING,
) -> bool:
    """Train until `plan.total`; True if that was reached, False if a signal or the clock asked to stop before.

    Args:
        batches: this rank's batches from `state.step` on, as `plan` says; their `index` [N] are the samples' rows.
        compute_loss: (model, batch, keys) -> `Losses`; all its random numbers come from `keys`.
        validate, draw, save: given the model, in eval mode and with the EMA weights, the last two also the step.
            `validate` and `draw` run on all ranks, `save` on the main one. `draw` returns what it has written.
        saves_checkpoints: whether `save` is called at each checkpoint and evaluation too, before it is written.
        evaluation: figures of the model, every few epochs.
        name_of: a row's name, for messages.
        advice: what to do where training takes long on a CPU.

    Raises:
        UsageError: `--max_nonfinite_steps` steps in a row had a loss or gradient that is not finite.
        RunError: `metrics.jsonl`, the last checkpoint or the last pipeline could not be written.
        Exception: what reading a batch raised, once the steps before it are saved.
    """
    progress = Progress(run.accelerator, plan.total, state.step, advice)
    guard = NonfiniteGuard(run, state, name_of)
    output = TrainingOutput(run, state, unwrap(run.accelerator, state.model), progress, saved=state.step)
    update = Updater(run, state)
    state.model.train()
    with Stop(run.deadline) as stop, progress:  # a bar is closed before an error speaks
        if draw is not None and state.grid_due:
            output.save_samples(draw, stop)
        if evaluation is not None and state.evaluation_due and (figures := output.evaluated(evaluation, stop)):
            output.log(figures, plan.epoch_of(state.step - 1) + 1, time.perf_counter() - output.since)
        while state.step < plan.total:
            guard.before_step()
            fetched = stop.fetch(batches, len(plan.batches(state.step)))
            if stop.agreed(run):
                end_early(stop, guard, output)
                return False

            epoch, output.samples = plan.epoch_of(state.step) + 1, output.samples + plan.samples_in(state.step)
            result = take_step(run, state, plan, fetched, compute_loss, update)
            state.step += 1
            guard.judge(result, output)
            progress.done(state.step)

            due, record = Due.after(state.step, run, plan, evaluation.epochs if evaluation else 0), {}
            if any(due) and not guard.settle(output):
                due = due.if_skipped()
            seconds = time.perf_counter() - output.since
            if due.log:
                lr = state.lr_scheduler.get_last_lr()[0]
                record = {**state.meter.means(run.accelerator), "lr": lr, "grad_norm": float(result.norm)}
            if due.validate and validate is not None:
                record |= output.validated(validate)
            if due.evaluate and evaluation is not None:
                record |= output.evaluated(evaluation, stop)
            if record:
                output.log(record, epoch, seconds)
            with output.untimed():
                if due.samples and draw is not None:
                    output.save_samples(draw, stop)
                if save is not None and (due.model or (saves_checkpoints and (due.checkpoint or due.evaluate))):
                    output.save_model(save, last=due.end)
                if due.snapshot:  # before the checkpoint: a run that goes on from there has it
                    output.save_snapshots(last=due.end)
                if due.checkpoint:
                    output.save_checkpoint(last=due.end)
            stop.armed = True
    return True


def end_early(stop: Stop, guard: NonfiniteGuard, output: TrainingOutput) -> None:
    """Save a run that was asked to stop, or whose data cannot be read; but where an earlier run is to come back.

    Raises:
        Exception: what reading a batch raised.
    """
    guard.settle(output)
    given_back = not stop.by_clock and output.earlier_run_waits()
    if not given_back:
        guard.put_back()
        output.save_before_exit()
    stop.raise_failure(output.run)
    output.say_how_to_go_on(stop.why, given_back)
