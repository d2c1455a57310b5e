"""What a training writes while it runs: figures, pictures, models, checkpoints; and what follows if that fails."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..common.errors import DataError
from ..common.layout import METRICS_FILE, TIMINGS_FILE
from .checkpointing import save_checkpoint
from .earlier_run import replaces
from .evaluations import Evaluation
from .faults import out_of_memory
from .power_averages import write_snapshots
from .reporting import Progress, duration
from .run import Run
from .state import TrainingState, averaged_weights
from .stopping import InterruptedSamplingError, Stop

ENDS = ("_low", "_high")  # of intervals, which are logged and not shown


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@dataclass
class TrainingOutput:
    """Writes what a training writes. All ranks call each method.

    Only what the run's end depends on must work: `metrics.jsonl`, the last checkpoint and the last model. What else
    cannot be written is named in a warning.

    Args:
        model: the one that is trained, without what Accelerate puts around it.
    """

    run: Run
    state: TrainingState
    model: torch.nn.Module
    progress: Progress
    saved: int = 0  # the newest step that is on disk, or needs not be
    since: float = field(default_factory=time.perf_counter)  # when the steps to be logged next began
    samples: int = 0  # trained on since then

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Within, time is not that of steps."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin
        self.progress.paused += time.perf_counter() - begin

    def validated(self, validate: Callable[[torch.nn.Module], dict[str, float]]) -> dict[str, float]:
        """The figures that `validate` gives."""
        with self.progress.pause(), averaged_weights(self.state, self.model) as averaged:
            return validate(averaged)

    def evaluated(self, evaluation: Evaluation, stop: Stop) -> dict[str, float]:
        """The figures of this step; none if there cannot be any, or if the run is to stop: a resumed run has them."""
        self.state.evaluation_due, begin = True, time.perf_counter()
        self.progress.note(evaluation.title)
        figures: dict[str, float] = {}
        with (
            contextlib.suppress(InterruptedSamplingError),
            self.progress.pause(),
            averaged_weights(self.state, self.model) as averaged,
            stop.interrupting(self.state.full_parts.values()),
        ):
            try:
                figures = evaluation.measure(averaged)
            except DataError as error:
                self.run.warn(f"no evaluation of step {self.state.step} ({error}); training goes on")
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self.run.warn(f"no evaluation of step {self.state.step} (out of memory); training goes on")
            self.state.evaluation_due = False
            self.progress.note(f"evaluated in {duration(time.perf_counter() - begin)}")
        return figures

    def log(self, record: dict[str, float], epoch: int, seconds: float) -> None:
        """Log a step's figures: `metrics.jsonl` must work, `timings.jsonl` and the tracker may fail.

        Args:
            epoch: counted from 1.
            seconds: of the steps since the last figures.
        """
        state, rate = self.state, self.samples / seconds
        timing = {"seconds": round(seconds, 3), "images_per_second": round(rate, 1)}
        unshown = (*state.meter.groups, "lr", "grad_norm")
        shown = {name: one for name, one in record.items() if name not in unshown and not name.endswith(ENDS)}
        self.progress.figures(epoch, shown, state.lr_scheduler.get_last_lr()[0], rate)
        state.figures |= shown
        record = {"step": state.step, "epoch": epoch, **record}
        fault = self.run.attempt(lambda: append_jsonl(self.run.folder / METRICS_FILE, record))
        self.report(fault, METRICS_FILE, last=True)
        if TIMINGS_FILE not in state.given_up:
            timings = {"step": state.step, **timing}
            fault = self.run.attempt(lambda: append_jsonl(self.run.folder / TIMINGS_FILE, timings))
            self.report(fault, TIMINGS_FILE, last=False)
            state.given_up |= {TIMINGS_FILE} if fault else set()
        scalars = {name: value for name, value in record.items() if name != "step"}
        self.run.track(lambda tracker: tracker.log({**scalars, **timing}, step=state.step))
        self.since, self.samples = time.perf_counter(), 0

    def save_samples(self, draw: Callable[[torch.nn.Module, int], Path | None], stop: Stop) -> None:
        """The pictures of this step; a run that is to stop leaves them to the one that goes on from here."""
        self.state.grid_due = True
        self.progress.note("sampling pictures")  # a chain of 1000 steps takes minutes on a CPU
        with (
            contextlib.suppress(InterruptedSamplingError),
            averaged_weights(self.state, self.model) as averaged,
            stop.interrupting(self.state.full_parts.values()),
        ):
            path = draw(averaged, self.state.step)
            self.state.grid_due = False
            if path is not None:
                self.progress.note(f"pictures in {path}")

    def save_model(self, save: Callable[[torch.nn.Module, int], None], last: bool) -> None:
        """The model of this step, as `save` saves it."""
        step = self.state.step
        with averaged_weights(self.state, self.model) as averaged:
            fault = self.run.attempt(lambda: save(averaged, step))
        self.report(fault, f"the model of step {step}", last)

    def save_snapshots(self, last: bool) -> None:
        """The power averages of this step, for `ddpm-hf ema`."""
        state = self.state
        fault = self.run.attempt(lambda: write_snapshots(self.run.folder, state.power, state.parts, state.step))
        self.report(fault, f"the averages of step {state.step}", last)

    def save_checkpoint(self, last: bool) -> None:
        """The checkpoint of this step; none is removed for it while steps are being skipped."""
        limit = None if self.state.nonfinite_steps else self.run.flags.checkpoints_total_limit
        fault = save_checkpoint(self.run, self.state, limit)
        self.report(fault, f"checkpoint-{self.state.step}", last)
        if not fault:
            self.saved = self.state.step
            self.progress.note(f"checkpoint-{self.state.step}")

    def report(self, fault: str | None, what: str, last: bool) -> None:
        """Say what could not be written.

        Raises:
            RunError: the run's end depends on it.
        """
        if fault is not None and last:
            self.run.end_unwritten(what, fault)
        if fault is not None:
            self.run.warn(f"{what} cannot be written ({fault}); training goes on")

    def earlier_run_waits(self) -> bool:
        """Whether an earlier run is still set aside, to come back if this one ends now."""
        return any(gather_object([replaces(self.run.folder) or replaces(self.run.folder.parent)]))

    def save_before_exit(self) -> None:
        """A checkpoint of a run that ends early, unless this step is on disk."""
        if self.state.step > self.saved:
            self.save_checkpoint(last=True)

    def say_how_to_go_on(self, why: str, given_back: bool) -> None:
        """The line of a run that was stopped.

        Args:
            given_back: whether that was before its first checkpoint, and so an earlier run is back.
        """
        instead = " instead of --overwrite_output_dir" if self.run.flags.overwrite_output_dir else ""
        what_next = (
            ", before the first checkpoint: the earlier run is back"
            if given_back
            else f"; go on with --resume_from_checkpoint latest{instead}"
        )
        if self.run.accelerator.is_main_process:
            tqdm.write(f"stopped at step {self.state.step} by {why}{what_next}", file=sys.stderr)
