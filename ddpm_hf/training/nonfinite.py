"""Steps whose loss or gradient is not finite: they are skipped; which samples were in them, and when to give up."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object

from ..common.errors import UsageError
from .output import TrainingOutput
from .run import Run
from .state import Snapshot, TrainingState
from .step import StepResult


class NonfiniteGuard:
    """Judges each step; what a skipped one changed after all, such as the learning rate, can be put back.

    Args:
        name_of: the name of a sample by its row, for messages.
    """

    def __init__(self, run: Run, state: TrainingState, name_of: Callable[[int], str]):
        self.run, self.state, self.name_of = run, state, name_of
        self.good = Snapshot(state)  # of the last step that was finite
        self.rows: list[int] = []  # samples that were not, since then

    def before_step(self) -> None:
        """Remember a good state."""
        if not self.state.nonfinite_steps:
            self.good, self.rows = Snapshot(self.state), []

    def put_back(self) -> None:
        """Make the state that of before the steps that were skipped last."""
        if self.state.nonfinite_steps:
            self.good.put_back(self.state)

    def judge(self, result: StepResult, output: TrainingOutput) -> None:
        """Count the step that has been taken, and say what was not finite in it.

        Raises:
            UsageError: it is one of `--max_nonfinite_steps` in a row; what came before them is saved.
        """
        if result.finite:
            self.state.nonfinite_steps = 0
            return
        self.state.nonfinite_steps += 1
        self.state.meter.sums = self.good.sums.clone()
        rows = bad_samples(result.taken)
        self.rows += [row for row in rows if row not in self.rows]
        what = f"not finite: {named(rows, self.name_of)}"
        self.run.warn(f"step {self.state.step}: loss or gradient is {what}; step skipped")
        count = self.state.nonfinite_steps
        if count >= self.run.flags.max_nonfinite_steps:
            given_back = output.earlier_run_waits()
            if not given_back:
                self.put_back()
                output.save_before_exit()
            what = named(self.rows, self.name_of)
            self.run.end_by_main(diverged(self.run.folder, count, self.good.step, what, given_back))


def bad_samples(taken: list[tuple[torch.Tensor | None, torch.Tensor]]) -> list[int]:
    """The rows of a step's samples whose own loss is not finite, of all ranks; from pairs of rows and losses [N]."""
    local = [
        int(row)
        for rows, losses in taken
        if rows is not None
        for row, loss in zip(rows.tolist(), losses.tolist())
        if not math.isfinite(loss)
    ]
    return sorted(set(gather_object(local)))


def named(rows: list[int], name_of: Callable[[int], str]) -> str:
    """Some samples' names, for a message."""
    if not rows:
        return "the gradient, with the loss of each sample finite"
    return f"of {', '.join(name_of(row) for row in rows[:8])}" + (f" and {len(rows) - 8} more" if rows[8:] else "")


def diverged(folder: Path, count: int, good: int, what: str, given_back: bool) -> UsageError:
    """The error of a run whose steps are skipped for ever; `good` is the step before the first of them."""
    if given_back:
        return UsageError(
            f"{count} steps in a row up to {good + count} had a loss or gradient that is not finite ({what}), before"
            " the first checkpoint: look at these samples, or train with a lower --learning_rate; the earlier run is"
            " back"
        )
    kept = f"checkpoint-{good} in {folder} is from before" if good else "no step before was good"
    return UsageError(
        f"{count} steps in a row up to {good + count} had a loss or gradient that is not finite ({what}); {kept}:"
        " look at these samples, or go on from there with --resume_from_checkpoint latest and a lower --learning_rate"
    )
