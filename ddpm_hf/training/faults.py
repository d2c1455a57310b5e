"""What fails around a run: said in one line, known to all ranks, and survived where that is right.

Exit code 2 means that something must be changed before the run is started again (a flag, the data); 1, that the
machine failed (a disk, a process) and the same command line goes on once that is mended.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from tqdm.auto import tqdm

from .checkpointing import list_checkpoints
from .config import UsageError, one_line
from .ownership import EARLIER, end_replacing, replaces
from .process import process_kept

OUT_OF_MEMORY = (
    "out of memory: make --train_batch_size smaller (--gradient_accumulation_steps makes up for it), add"
    " --gradient_checkpointing or --mixed_precision bf16; where a grid was sampled, make --eval_batch_size smaller"
)
DEAD_WORKER = (
    "a process that reads the data was killed, as happens when memory runs out: try fewer --dataloader_num_workers"
)
LOST_CONTACT = "lost contact with the run's other processes: one of them ended, and what it said is why"


class RunError(RuntimeError):
    """The machine failed, not the command line: one line and exit code 1."""


class Terminated(BaseException):
    """SIGTERM, outside of the training loop."""


def end_by_sigterm(number, frame) -> None:
    """Handle SIGTERM by unwinding, so that an earlier run comes back."""
    raise Terminated


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
        return (error.strerror or " ".join(str(error).split())) + (f": {error.filename}" if error.filename else "")
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


def track(accelerator, action: Callable[[object], object]) -> None:
    """Do something with each tracker, from the main process; one that fails is left out from then on."""
    for tracker in list(accelerator.trackers) if accelerator.is_main_process else []:
        try:
            action(tracker)
        except Exception as error:  # of whatever library: figures are in metrics.jsonl too
            accelerator.trackers.remove(tracker)
            reason = " ".join(str(error).split())[:200]
            warn(accelerator, f"{tracker.name} fails ({error.__class__.__name__}: {reason}); going on without it")


def where_it_goes_on(output_dir: str) -> str:
    """How to go on from a run's last checkpoint, as the end of a sentence; nothing where there is none."""
    if replaces(output_dir):
        return f"; the run that was in {output_dir} is there again"
    checkpoints = list_checkpoints(Path(output_dir), complete=True)
    return f"; {checkpoints[-1]} is whole, go on with --resume_from_checkpoint latest" if checkpoints else ""


def explained(error: BaseException, output_dir: str, mendable: tuple[type, ...]) -> tuple[int, str] | None:
    """An error's exit code and line; None for one that is not understood."""
    if isinstance(error, (UsageError, *mendable)):
        return 2, str(error)
    goes_on = where_it_goes_on(output_dir)
    if out_of_memory(error):
        return 2, OUT_OF_MEMORY + goes_on
    if isinstance(error, RunError):
        return 1, f"{error}{goes_on}"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return 1, DEAD_WORKER + goes_on
    lost = any(words in str(error) for words in ("gloo", "onnection closed by peer", "onnection reset by peer"))
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and lost):
        return 1, LOST_CONTACT + goes_on
    if isinstance(error, OSError) and error.errno is not None:
        return 1, f"{storage_fault(error)}{goes_on}"
    return None


@contextlib.contextmanager
def ends_in_one_line(program: str, output_dir: str, *mendable: type):
    """Turn what is understood into one line on stderr and an exit code, with no traceback; the process is as before.

    Args:
        mendable: errors of the user's, in addition to `UsageError`.
    """
    with process_kept(), _in_one_line(program, output_dir, mendable):
        yield


@contextlib.contextmanager
def _in_one_line(program: str, output_dir: str, mendable: tuple[type, ...]):
    handler = signal.getsignal(signal.SIGTERM)
    if "WORLD_SIZE" not in os.environ and handler == signal.SIG_DFL:  # a rank that waits for others cannot answer
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, end_by_sigterm)
    try:
        yield
    except Terminated:
        print(f"{program}: ended by SIGTERM{where_it_goes_on(output_dir)}", file=sys.stderr)
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted{where_it_goes_on(output_dir)}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        own = error.own if isinstance(error, EndedTogetherError) else error
        found = (1, None) if own is None else explained(own, output_dir, mendable)
        if found is None and own is error:
            raise
        if found is None:
            traceback.print_exception(own)
        elif found[1] is not None:
            # another rank than the main one speaks into that one's progress bar
            before = "\n" if os.environ.get("LOCAL_RANK", "0") != "0" else ""
            print(f"{before}{program}: error: {one_line(found[1])}", file=sys.stderr, flush=True)
        if isinstance(error, EndedTogetherError):  # or a launcher would end the others before they have spoken
            with contextlib.suppress(RuntimeError):
                torch.distributed.barrier()
                torch.distributed.destroy_process_group()
        raise SystemExit(found[0] if found else 1) from None
    finally:
        give_back_earlier_run(output_dir)


def give_back_earlier_run(output_dir: str) -> None:
    """Where this process has set an earlier run aside and ends without a checkpoint, put it back."""
    if not replaces(output_dir):
        return
    try:
        end_replacing(output_dir)
    except OSError as error:
        reason = storage_fault(error)
        print(f"warning: the earlier run waits in {output_dir}/{EARLIER} ({reason})", file=sys.stderr)
