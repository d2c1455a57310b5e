"""What fails around a run: said in one line, known to all ranks, and survived where that is right.

Exit code 2 means that something must be changed before the run is started again (a flag, the data); 1, that the
machine failed (a disk, a process) and the same command line goes on once that is mended.
"""

import sys
from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..common.errors import RunError, one_line

OUT_OF_MEMORY = (
    "out of memory: make --train_batch_size smaller (--gradient_accumulation_steps makes up for it), add"
    " --gradient_checkpointing or --mixed_precision bf16; where a grid was sampled, make --eval_batch_size smaller"
)
DEAD_WORKER = (
    "a process that reads the data was killed, as happens when memory runs out: try fewer --dataloader_num_workers"
)
LOST_CONTACT = "lost contact with the run's other processes: one of them ended, and what it said is why"


class EndedTogetherError(Exception):
    """All ranks end for one reason, which one of them tells; `own` is that rank's error, None on the others."""

    def __init__(self, own: BaseException | None):
        super().__init__(str(own))
        self.own = own


def end_together(accelerator, own: BaseException | None) -> None:
    """Raise what all ranks agree to end for; `own` is None but on the rank that tells it."""
    raise own if accelerator.num_processes == 1 else EndedTogetherError(own) from own


def warn(accelerator, line: str) -> None:
    """A warning on stderr, from the main process, that leaves progress bars whole."""
    if accelerator.is_main_process:
        tqdm.write(f"warning: {line}", file=sys.stderr)


def storage_fault(error: BaseException) -> str | None:
    """What kept something from being written, in a few words; None for an error of another kind."""
    if isinstance(error, OSError):
        return (error.strerror or one_line(error)) + (f": {error.filename}" if error.filename else "")
    if isinstance(error, SafetensorError):
        return str(error).removeprefix("Error while serializing: ")
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save, of a disk that is full
        return "the optimizer's file could not be written"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device."""
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def attempt(accelerator, action: Callable[[], object], on_all: bool = False) -> str | None:
    """Let the main process, or all, write something: what failed, as all ranks then know, or None.

    Args:
        action: without communication between the ranks.

    Raises:
        Exception: an error that is not the storage's.
    """
    fault = None
    if on_all or accelerator.is_main_process:
        try:
            action()
        except Exception as error:
            fault = storage_fault(error)
            if fault is None:
                raise
    return next((one for one in gather_object([fault]) if one), None)


def must_write(accelerator, action: Callable[[], object], what: str) -> None:
    """`attempt` to write what the run depends on.

    Raises:
        RunError: it cannot be written; on all ranks.
    """
    fault = attempt(accelerator, action)
    if fault is not None:
        end_unwritten(accelerator, what, fault)


def end_unwritten(accelerator, what: str, fault: str) -> None:
    """Raise RunError on all ranks: something that the run depends on could not be written."""
    error = RunError(f"{what} cannot be written ({fault}); make room")
    end_together(accelerator, error if accelerator.is_main_process else None)


def track(accelerator, action: Callable[[object], object]) -> None:
    """Do something with each tracker, from the main process; one that fails is left out from then on."""
    for tracker in list(accelerator.trackers) if accelerator.is_main_process else []:
        try:
            action(tracker)
        except Exception as error:  # of whatever library: figures are in metrics.jsonl too
            accelerator.trackers.remove(tracker)
            reason = one_line(error, 200)
            warn(accelerator, f"{tracker.name} fails ({error.__class__.__name__}: {reason}); going on without it")
