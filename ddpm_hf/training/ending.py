"""How a program ends: with what came of it, or with one line for what a user can mend, and an exit code."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common.errors import RunError, UsageError, one_line
from ..common.layout import EARLIER
from .complete_checkpoints import complete_checkpoints
from .earlier_run import end_replacing, replaces
from .faults import DEAD_WORKER, LOST_CONTACT, OUT_OF_MEMORY, EndedTogetherError, out_of_memory, storage_fault
from .process import process_kept
from .reporting import ending
from .run import Run
from .state import TrainingState


class Terminated(BaseException):
    """SIGTERM, outside of the training loop."""


def end_by_sigterm(number: int, frame: Any) -> None:
    """Handle SIGTERM by unwinding, so that an earlier run comes back."""
    raise Terminated


def where_it_goes_on(output_dir: str) -> str:
    """How to go on from a run's last checkpoint, as the end of a sentence; nothing where there is none."""
    if replaces(output_dir):
        return f"; the run that was in {output_dir} is there again"
    checkpoints = complete_checkpoints(Path(output_dir))
    return f"; {checkpoints[-1]} is complete, go on with --resume_from_checkpoint latest" if checkpoints else ""


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
    lost = any(
        words in str(error).lower() for words in ("gloo", "connection closed by peer", "connection reset by peer")
    )
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and lost):
        return 1, LOST_CONTACT + goes_on
    if isinstance(error, OSError) and error.errno is not None:
        return 1, f"{storage_fault(error)}{goes_on}"
    return None


@contextlib.contextmanager
def ends_in_one_line(program: str, output_dir: str, *mendable: type) -> Iterator[None]:
    """Turn what is understood into one line on stderr and an exit code, with no traceback; the process is as before.

    Args:
        mendable: errors of the user's, in addition to `UsageError`.
    """
    with process_kept(), _in_one_line(program, output_dir, mendable):
        yield


@contextlib.contextmanager
def _in_one_line(program: str, output_dir: str, mendable: tuple[type, ...]) -> Iterator[None]:
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
        cause = error.local if isinstance(error, EndedTogetherError) else error
        code, line = (1, None) if cause is None else explained(cause, output_dir, mendable) or (1, None)
        if line is None and cause is error:
            raise
        if line is None and cause is not None:
            traceback.print_exception(cause)
        elif line is not None:
            # another rank than the main one writes into that one's progress bar
            before = "\n" if os.environ.get("LOCAL_RANK", "0") != "0" else ""
            print(f"{before}{program}: error: {one_line(line)}", file=sys.stderr, flush=True)
        if isinstance(error, EndedTogetherError):  # or a launcher would end the others before they have spoken
            with contextlib.suppress(RuntimeError):
                torch.distributed.barrier()
                torch.distributed.destroy_process_group()
        raise SystemExit(code) from None
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


def end_training(
    run: Run,
    state: TrainingState,
    program: str,
    finished: bool,
    sample: Sequence[str] | None = None,
    looks: str | None = None,
) -> None:
    """Say what came of it, as `ending` does; close the trackers, and the connection of the processes."""
    run.log(ending(run, state, program, finished, sample, looks))
    run.track(lambda tracker: tracker.finish())
    run.accelerator.trackers.clear()
    run.accelerator.end_training()
