"""Properties of this machine: cores, memory allocator, terminal, bf16."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

# glibc's parameters (malloc.h) and their default values
ALLOCATOR = {"trim_threshold": (-1, 128 << 10), "top_pad": (-2, 128 << 10), "mmap_max": (-4, 65536)}
KEEP_FREED = {"trim_threshold": 2**31 - 1, "top_pad": 64 << 20, "mmap_max": 0}


def usable_cores() -> int:
    """The number of cores that this process may use; all cores on macOS and Windows, which do not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> Callable[[], None]:
    """Let glibc keep freed memory for the next allocation; return a function that undoes it. Without effect elsewhere.

    By default glibc returns a large freed tensor to the system, and the next one costs a page fault for every 4 KiB:
    on a CPU a training step, which allocates the same tensors again and again, loses 5% of its time to them, and a
    network of features (EfficientNet-Lite0 at 224 pixels) two thirds, where page faults are slow.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return lambda: None
    for name, value in KEEP_FREED.items():
        mallopt(ALLOCATOR[name][0], value)

    def undo() -> None:
        for number, value in ALLOCATOR.values():
            mallopt(number, value)
        ctypes.CDLL(None).malloc_trim(0)

    return undo


def accept_any_text() -> None:
    """Let stdout and stderr escape characters that the terminal cannot encode, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Let what is written to stdout go nowhere from now on: its reader has ended, as `head` does after some lines."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_out(text: str) -> None:
    """Write to stdout, as far as somebody reads it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()


def cpu_has_bf16() -> bool:
    """Whether bf16 is fast here: on the GPU if there is one, else on the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    if not torch.backends.mkldnn.is_available():  # as on macOS
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(
        flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16")
    )


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8") if info.is_file() else ""
