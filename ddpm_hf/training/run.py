"""One start of a training, and what all its ranks do together: speak, write, end."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from tqdm.auto import tqdm

from ..common.errors import RunError, one_line
from ..common.layout import Entry
from .faults import EndedTogetherError, storage_fault
from .flags import Flags, GridFlags, TrainingFlags
from .plan import StepPlan


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from."""

    checkpoint: Path
    manifest: dict[str, Any]  # what it tells of its run


@dataclass
class Run:
    """One start of a training: its flags, its engine, its seed, its time limit and what it goes on from.

    All ranks call each method, but for those that speak.

    Args:
        flags: what it trains with.
        settings: all flags of the program, which its checkpoints hold.
        accelerator: Accelerate's engine.
        entries: what it writes into its output folder.
        deadline: on the monotonic clock; it stops after the first step that ends later.
        resumed: the checkpoint that it goes on from, or None.
        seed: of everything random.
        grids: when pictures are sampled; None for never.
    """

    flags: TrainingFlags
    settings: Flags
    accelerator: Accelerator
    entries: Sequence[Entry] = ()
    deadline: float | None = None
    resumed: Resumed | None = None
    seed: int = 0
    grids: GridFlags | None = None

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.flags.output_dir)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.accelerator.device

    def execution(self, plan: StepPlan) -> tuple[str, torch.dtype | None, bool]:
        """How the model is to be executed: --acceleration, what it is autocast to, whether CUDA graphs can hold it.

        They hold the model's part of a step of one process and one batch, with nothing recomputed.
        """
        alone = self.accelerator.distributed_type == DistributedType.NO and plan.accumulation == 1
        graphs = alone and not (self.flags.compile or self.flags.gradient_checkpointing)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return self.flags.acceleration, dtype, graphs

    @property
    def class_names(self) -> list[str] | None:
        """Those of the run that is resumed; None where it has none, or none is resumed."""
        return self.resumed and self.resumed.manifest.get("classes")

    def log(self, *lines: str | None) -> None:
        """Lines on stderr, from the main process; None is nothing to say."""
        for line in lines:
            if line is not None and self.accelerator.is_main_process:
                print(line, file=sys.stderr, flush=True)

    def warn(self, line: str) -> None:
        """A warning on stderr, from the main process, that leaves progress bars intact."""
        if self.accelerator.is_main_process:
            tqdm.write(f"warning: {line}", file=sys.stderr)

    def end(self, error: BaseException | None) -> None:
        """Raise what all ranks agreed to end for; `error` is None but on the rank that tells it."""
        if error is not None and self.accelerator.num_processes == 1:
            raise error
        raise EndedTogetherError(error) from error

    def end_by_main(self, error: BaseException) -> None:
        """End all ranks with an error that the main process tells."""
        self.end(error if self.accelerator.is_main_process else None)

    def gather_rows(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """The rows of all ranks, in the same order on each: [n, K], n up to `count` on each rank -> [N, K]."""
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)  # [n, K + 1]
        rows = torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])  # [count, K + 1]
        rows = self.accelerator.gather(rows)  # [ranks · count, K + 1]
        return rows[rows[:, -1] > 0, :-1]

    def attempt(self, action: Callable[[], object], on_all: bool = False) -> str | None:
        """Let the main process, or all, write something: what failed, as all ranks then know, or None.

        Args:
            action: without communication between the ranks.

        Raises:
            Exception: an error that is not the storage's.
        """
        fault = None
        if on_all or self.accelerator.is_main_process:
            try:
                action()
            except Exception as error:
                fault = storage_fault(error)
                if fault is None:
                    raise
        return next((one for one in gather_object([fault]) if one), None)

    def must_write(self, action: Callable[[], object], what: str) -> None:
        """`attempt` to write what the run depends on.

        Raises:
            RunError: it cannot be written; on all ranks.
        """
        fault = self.attempt(action)
        if fault is not None:
            self.end_unwritten(what, fault)

    def end_unwritten(self, what: str, fault: str) -> None:
        """Raise RunError on all ranks: something that the run depends on could not be written."""
        self.end_by_main(RunError(f"{what} cannot be written ({fault}); make room"))

    def track(self, action: Callable[[Any], object]) -> None:
        """Do something with each tracker, from the main process; one that fails is left out from then on."""
        for tracker in list(self.accelerator.trackers) if self.accelerator.is_main_process else []:
            try:
                action(tracker)
            except Exception as error:  # of whatever library: figures are in metrics.jsonl too
                self.accelerator.trackers.remove(tracker)
                reason = one_line(error, 200)
                self.warn(f"{tracker.name} fails ({error.__class__.__name__}: {reason}); going on without it")
