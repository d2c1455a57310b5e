"""What this machine is: its cores, its terminal."""

import os
import sys


def usable_cores() -> int:
    """The cores that this process may run on; all of the machine's where the system does not tell (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accept_any_text() -> None:
    """Let stdout and stderr escape the characters that the terminal's encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
