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

MOST_PENDING = 1000  # steps whose results are kept unread


class NonfiniteGuard:
    """Judges each step; what a skipped one changed after all, such as the learning rate, can be put back.

    Args:
        name_of: the name of a sample by its row, for messages.
    """

    def __init__(self, run: Run, state: TrainingState, name_of: Callable[[int], str]):
        self.run, self.state, self.name_of = run, state, name_of
        self.before = self.good = Snapshot(state)  # before the step that comes; before the first of those skipped
        self.rows: list[int] = []  # samples that were not finite, in these
        self.pending: list[tuple[Snapshot, StepResult]] = []  # steps of which a GPU has not told yet

    def before_step(self) -> None:
        """Remember the state."""
        self.before = Snapshot(self.state)

    def put_back(self) -> None:
        """Make the state that of before the steps that were skipped last."""
        if self.state.nonfinite_steps:
            self.good.put_back(self.state)

    def judge(self, result: StepResult, output: TrainingOutput) -> None:
        """Count the step that has been taken; what a GPU knows of it is read later, by `settle`."""
        self.pending.append((self.before, result))
        if not isinstance(result.finite, torch.Tensor) or len(self.pending) >= MOST_PENDING:
            self.settle(output)

    def settle(self, output: TrainingOutput) -> bool:
        """Read how the steps since the last call ended, and say what was not finite; True if the last was taken.

        Raises:
            UsageError: one was the last of `--max_nonfinite_steps` in a row; what came before them is saved.
        """
        pending, self.pending = self.pending, []
        read = torch.stack([torch.as_tensor(result.finite) for _, result in pending]).tolist() if pending else []
        for (before, result), finite in zip(pending, read):
            if finite:
                self.state.nonfinite_steps = 0
                continue
            if not self.state.nonfinite_steps:
                self.good, self.rows = before, []
            if isinstance(result.finite, torch.Tensor):
                for average, _ in self.state.averages:
                    average.optimization_step -= 1  # the host had counted it
            self.state.nonfinite_steps += 1
            self._skipped(before.step + 1, result, output)
        return not self.state.nonfinite_steps

    def _skipped(self, step: int, result: StepResult, output: TrainingOutput) -> None:
        rows = bad_samples(result.taken)
        self.rows += [row for row in rows if row not in self.rows]
        what = f"not finite: {named(rows, self.name_of)}"
        self.run.warn(f"step {step}: loss or gradient is {what}; step skipped")
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
    """The error of a run that skips every step; `good` is the step before the first of them."""
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
