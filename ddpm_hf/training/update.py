"""What follows a backward pass: the gradient's norm and clipping, the optimizer's update, the averages."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from accelerate.utils import DistributedType

from .averaging import count_step, move_average, update_ema
from .run import Run
from .state import TrainingState

CAPTURES = 3  # at most, should the tensors of an update move


class Updater:
    """Takes the optimizer's steps, unless the gradient is not finite."""

    def __init__(self, run: Run, state: TrainingState):
        self.run, self.state = run, state
        self.on_device = DeviceUpdate(run, state) if device_decides(run, state) else None

    def __call__(self) -> tuple[float | torch.Tensor, bool | torch.Tensor]:
        """The gradient's norm (NaN where the engine does not say it), and whether the step was taken.

        Returns: on a GPU that decides by itself whether a step is taken, tensors of it: nothing waits for the GPU.
        """
        norm, finite = self._by_the_host() if self.on_device is None else self.on_device()
        self.state.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def _by_the_host(self) -> tuple[float, bool]:
        accelerator, state = self.run.accelerator, self.state
        norm = clipped(self.run, state)
        norm = float("nan") if norm is None else float(norm)
        known = accelerator.distributed_type != DistributedType.DEEPSPEED  # it clips and skips by itself
        finite = math.isfinite(norm) or not known
        if finite or accelerator.scaler is not None:
            state.optimizer.step()  # a loss scaler skips what overflowed by itself
        if finite:
            for average, part in state.averages:
                update_ema(average, part)
        return norm, finite


class DeviceUpdate:
    """An update of which a GPU decides by itself whether it is taken; once its tensors stay, one CUDA graph.

    Learning rates and the averages' rates are tensors, with and without the graph: the same kernels compute the same
    bits, whichever step a run was resumed at.
    """

    def __init__(self, run: Run, state: TrainingState):
        self.run, self.state = run, state
        self.rates = [torch.zeros((), device=run.device) for _ in state.optimizer.param_groups]
        self.moves = [torch.zeros((), device=run.device) for _ in state.averages]
        self.places: tuple[int, ...] = ()  # of the tensors of the update before
        self.replay: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None
        alone = run.accelerator.distributed_type == DistributedType.NO
        self.captures = CAPTURES if alone and run.flags.acceleration != "none" else 0

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient's norm, and whether the step was taken."""
        for rate, group in zip(self.rates, self.state.optimizer.param_groups):
            rate.fill_(group["lr"])
        for move, (average, _) in zip(self.moves, self.state.averages):
            count_step(average)
            move.fill_(1 - average.cur_decay_value)
        before, self.places = self.places, self._places()
        if self.places != before:  # gradients of a batch of another shape, of a step without graphs
            self.replay = None
        elif self.replay is None and self.captures:
            self.captures -= 1
            self.replay = recorded(self.update)
        if self.replay is None:
            return self.update()
        norm, finite = self.replay()
        return norm.clone(), finite.clone()  # the next replay writes over them

    def update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, step and average: operations on the device alone."""
        optimizer = self.state.optimizer.optimizer  # type: ignore[attr-defined]
        norm = torch.as_tensor(clipped(self.run, self.state))
        finite = torch.isfinite(norm)
        optimizer.found_inf = 1 - finite.float()  # a fused optimizer reads it on the device, and skips the step
        with rates_as_tensors(optimizer, self.rates):
            self.state.optimizer.step()
        for move, (average, part) in zip(self.moves, self.state.averages):
            move_average(average, part, move * finite)
        return norm, finite

    def _places(self) -> tuple[int, ...]:
        """Where the tensors lie that a graph would read and write."""
        optimizer = self.state.optimizer
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"]]
        moments = [one for state in list(optimizer.state.values())[:1] for one in state.values()]
        averages = [average.shadow_params[0] for average, _ in self.state.averages]
        return tuple(0 if one is None else one.data_ptr() for one in (*gradients, *moments, *averages))


def clipped(run: Run, state: TrainingState) -> torch.Tensor | float | None:
    """The norm of the gradient before it is clipped."""
    return run.accelerator.clip_grad_norm_(state.model.parameters(), run.flags.max_grad_norm or math.inf)


def device_decides(run: Run, state: TrainingState) -> bool:
    """Whether a GPU skips a step by itself: with a fused optimizer and its averages, without loss scaler or engine."""
    accelerator, optimizer = run.accelerator, getattr(state.optimizer, "optimizer", None)
    return (
        run.device.type == "cuda"
        and accelerator.scaler is None
        and accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
        and bool(getattr(optimizer, "defaults", {}).get("fused"))
        and all(average.shadow_params[0].device.type == "cuda" for average, _ in state.averages)
    )


@contextlib.contextmanager
def rates_as_tensors(optimizer: torch.optim.Optimizer, rates: list[torch.Tensor]) -> Iterator[None]:
    """Within, the learning rates are tensors, which a CUDA graph reads anew; what is saved keeps numbers."""
    kept = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group.update(lr=rate, capturable=True)
    try:
        yield
    finally:
        for group, (rate, capturable) in zip(optimizer.param_groups, kept):
            group.update(lr=rate, capturable=capturable)


def recorded(
    update: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]] | None:
    """An update, which has run before, as a CUDA graph; None if it cannot be one. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = update()
    except RuntimeError:  # an operation that cannot be captured
        torch.cuda.synchronize()
        return None

    def replay() -> tuple[torch.Tensor, torch.Tensor]:
        graph.replay()
        return results

    return replay
