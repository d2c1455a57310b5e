"""A Python command that is asked to end when the process that began it is gone, killed without notice for example.

    python tied.py SCRIPT ARGUMENTS...

Linux alone has this. The program replaces this one.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie() -> None:
    """Let this process receive SIGTERM when the one that began it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    tie()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
