"""How a run ends before its end: a signal, a time limit, data that cannot be read; all ranks at the same step."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .run import Run

REASONS = ("", "the time limit of --max_train_hours", "SIGTERM", "SIGINT")  # by a rank's code; beyond them: it failed
FAILED = len(REASONS)


class InterruptedSamplingError(Exception):
    """A grid was being sampled when the run was asked to stop."""


class Stop:
    """Whether to go on. SIGTERM and SIGINT ask to save and end, and so does the clock at `deadline`, once armed."""

    def __init__(self, deadline: float | None):
        self.deadline, self.armed = deadline, False
        self.signal: int | None = None
        self.asked_at = 0.0
        self.failure: Exception | None = None
        self.codes = [0]  # of all ranks
        self.previous: dict[int, Any] = {}  # the handlers of signals

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread, which alone handles signals
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        # the launcher ends all ranks once one has ended: what went wrong is said before (`ends_in_one_line`)
        if error is not None and "WORLD_SIZE" in os.environ and self.previous:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: Any) -> None:
        # launchers pass on what the terminal has sent already, so a second one is the user's only a moment later
        if number == signal.SIGINT == self.signal and time.monotonic() - self.asked_at > 1:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self.asked_at = number, time.monotonic()

    def code(self) -> int:
        """This rank's, as in `REASONS`; `FAILED` if its data could not be read."""
        if self.failure is not None:
            return FAILED
        if self.signal is not None:
            return REASONS.index(signal.Signals(self.signal).name)
        return int(self.armed and self.deadline is not None and time.monotonic() > self.deadline)

    def fetch(self, batches: Iterator[Any], count: int) -> list[Any]:
        """The next batches; none if the run is to stop. What goes wrong is kept until all ranks know of it."""
        if self.code():
            return []
        try:
            return [next(batches) for _ in range(count)]
        except Exception as error:
            self.failure = error
            return []

    def agreed(self, run: Run) -> bool:
        """Whether any rank stops, and so all."""
        self.codes = [self.code()]
        if run.accelerator.num_processes > 1:
            self.codes = run.accelerator.gather(torch.tensor(self.codes, device=run.device)).tolist()
        return any(self.codes)

    @property
    def why(self) -> str:
        """The reason that all agreed on."""
        return next((REASONS[code] for code in self.codes if 0 < code < FAILED), "")

    @property
    def by_clock(self) -> bool:
        """Whether nothing but the time limit made the run stop."""
        return set(self.codes) <= {0, 1}

    def raise_failure(self, run: Run) -> None:
        """End all ranks if one of them failed; the first of these tells why."""
        if FAILED in self.codes:
            run.end(self.failure if self.codes.index(FAILED) == run.accelerator.process_index else None)

    @contextlib.contextmanager
    def interrupting(self, networks: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Within, a network that is called after this rank was asked to stop raises `InterruptedSamplingError`."""

        def check(*_: Any) -> None:
            if self.code():
                raise InterruptedSamplingError

        hooks = [network.register_forward_pre_hook(check) for network in networks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def deadline_of(max_train_hours: float | None) -> float | None:
    """The time, on the monotonic clock, after which no step is begun."""
    return None if max_train_hours is None else time.monotonic() + 3600 * max_train_hours
