"""Starts commands as copies of this process, which has imported all that they need: seconds less for each of them."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any

from tqdm.auto import tqdm

from .running import Launcher, Process
from .tasks import Task
from .tied import tie


class ForkedProcess:
    """A copy of this process that runs a command."""

    def __init__(self, number: int):
        self.number, self.code = number, None

    code: int | None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end."""
        code = self._look(0)
        assert code is not None
        return code

    def _look(self, options: int) -> int | None:
        if self.code is None:
            number, status = os.waitpid(self.number, options)
            if number:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def terminate(self) -> None:
        """Ask it to save and end."""
        if self.poll() is None:
            os.kill(self.number, signal.SIGTERM)


class ForkingLauncher(Launcher):
    """For Linux without a GPU, where a process may be copied once torch is imported.

    Args:
        call: runs a command of `ddpm-hf` in this process; returns its exit code.
    """

    def __init__(self, *arguments: Any, call: Callable[[list[str]], int]):
        super().__init__(*arguments)
        self.call = call

    def begin(self, task: Task, slot: int, log: IO[bytes], handles: Sequence[int]) -> Process:
        """A copy of this process."""
        sys.stdout.flush()
        sys.stderr.flush()
        number = os.fork()
        if number:
            return ForkedProcess(number)
        code = 1
        try:
            self._become(slot, log)
            code = self.call(self.settled(task))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _become(self, slot: int, log: IO[bytes]) -> None:
        """Make of the copy a process of its own."""
        tie()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for handle, stands_for in ((nothing, 0), (log.fileno(), 1), (log.fileno(), 2)):
            os.dup2(handle, stands_for)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        tqdm.set_lock(threading.RLock())  # a thread of the original may have held the other
        os.environ.update(self.environment(slot))
