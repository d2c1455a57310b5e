"""What a run changes of its process, put back when it ends: a notebook trains more than once, among other things."""

import contextlib
import functools
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from ..common.errors import UsageError
from ..common.machine import keep_freed_memory


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Put back, at the end, what a run changes of its process: Accelerate's state, threads, logs, signals."""
    started, partial = bool(AcceleratorState._shared_state), bool(PartialState._shared_state)
    with contextlib.ExitStack() as stack:
        stack.callback(forget_accelerator, started, partial)
        for put_back in (*_of_torch(), *_of_libraries(), *_of_the_process()):
            stack.callback(put_back)
        yield


def forget_accelerator(started: bool, partial: bool) -> None:
    """Let the next run choose its devices and precision, unless an Accelerator of the caller's was there before."""
    if not started:
        AcceleratorState._reset_state(reset_partial_state=not partial)
        GradientState._reset_state()


def check_accelerator(mixed_precision: str) -> None:
    """Raise UsageError where the caller's own Accelerator has settled on another precision."""
    state = AcceleratorState._shared_state
    if state and state.get("_mixed_precision") not in (None, mixed_precision):
        raise UsageError(
            f"--mixed_precision {mixed_precision}: an Accelerator of this process computes in"
            f" {state['_mixed_precision']} already; train before it is made, in another process, or with"
            f" --mixed_precision {state['_mixed_precision']}"
        )


def _of_torch() -> Iterator[Callable[[], object]]:
    threads = torch.get_num_threads()
    yield lambda: torch.set_num_threads(threads)
    if not torch.accelerator.is_available():
        yield keep_freed_memory()
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        yield _attribute(backend, "allow_tf32")
    state = torch.get_rng_state()
    yield lambda: torch.set_rng_state(state)


def _attribute(owner: object, name: str) -> Callable[[], object]:
    value = getattr(owner, name)
    return lambda: setattr(owner, name, value)


def _of_libraries() -> Iterator[Callable[[], object]]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        level, shown = library.get_verbosity(), library.is_progress_bar_enabled()
        yield functools.partial(library.set_verbosity, level)
        yield library.enable_progress_bar if shown else library.disable_progress_bar
    tensorboard = logging.getLogger("torch.utils.tensorboard")
    yield functools.partial(tensorboard.setLevel, tensorboard.level)


def _of_the_process() -> Iterator[Callable[[], object]]:
    handler = signal.getsignal(signal.SIGTERM)

    def put_back() -> None:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, handler)

    yield put_back
    rank = os.environ.get("LOCAL_RANK")
    yield lambda: os.environ.pop("LOCAL_RANK", None) if rank is None else os.environ.update(LOCAL_RANK=rank)
    numbers, arrays = random.getstate(), np.random.get_state()
    yield lambda: (random.setstate(numbers), np.random.set_state(arrays))
