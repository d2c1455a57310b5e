"""What fails around a run, in one line.

Exit code 2 means that something must be changed before the run is started again (a flag, the data); 1, that the
machine failed (a disk, a process) and the same command line goes on once that is mended.
"""

import torch
from safetensors import SafetensorError

from ..common.errors import one_line

OUT_OF_MEMORY = (
    "out of memory: make --train_batch_size smaller (--gradient_accumulation_steps makes up for it), add"
    " --gradient_checkpointing or --mixed_precision bf16; where a grid was sampled, make --eval_batch_size smaller"
)
DEAD_WORKER = (
    "a process that reads the data was killed, as happens when memory runs out: try fewer --dataloader_num_workers"
)
LOST_CONTACT = "lost contact with the run's other processes: one of them ended, and what it said is why"


class EndedTogetherError(Exception):
    """All ranks end for one reason, which one of them tells; `local` is that rank's error, None on the others."""

    def __init__(self, local: BaseException | None):
        super().__init__(str(local))
        self.local = local


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
