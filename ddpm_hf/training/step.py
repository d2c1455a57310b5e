"""One optimizer step."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..common.randomness import StepKeys, keyed_seed
from .averaging import update_ema
from .meter import Losses
from .plan import StepPlan
from .run import Run
from .state import TrainingState


class StepResult(NamedTuple):
    """What an optimizer step came to."""

    norm: float | torch.Tensor  # of the gradient; NaN where the engine does not say it
    finite: bool | torch.Tensor  # whether it was taken; else weights, moments and EMA are as before
    taken: list[tuple[torch.Tensor | None, torch.Tensor]]  # of each batch: its samples' rows, and their losses


def take_step(
    run: Run,
    state: TrainingState,
    plan: StepPlan,
    fetched: list[dict[str, torch.Tensor]],
    compute_loss: Callable[[torch.nn.Module, dict, StepKeys], Losses],
) -> StepResult:
    """The optimizer step after `state.step`: losses and gradients of its batches, clipping, update, EMA.

    Returns: on a GPU that decides by itself whether the step is taken, tensors of it: nothing here waits for a GPU.
    """
    accelerator, step, seed = run.accelerator, state.step, run.seed
    window, in_window = plan.batches(step), plan.samples_in(step)
    taken, results = [], []
    for micro, (number, batch) in enumerate(zip(window, fetched)):
        begin, end = plan.own_samples(number, accelerator.process_index)
        count = len(next(iter(batch.values())))
        first = micro * plan.global_batch + accelerator.process_index * plan.batch_size
        torch.manual_seed(keyed_seed(seed, "dropout", plan.batches_before(step) + micro, first))
        accelerator.sync_gradients = last = micro == len(window) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(state.model):
            with accelerator.autocast():
                result = compute_loss(state.model, batch, StepKeys(seed, step, first, count, valid=end - begin))
            # The mean over the step's samples, whatever parts they come in; ranks average what each sums.
            loss = result.losses[: end - begin].sum() if end > begin else 0.0 * result.losses.sum()
            # the gradient of all ranks is NaN where one's loss is not finite
            spoils = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            accelerator.backward(loss * (spoils * (accelerator.num_processes / in_window)))
        results.append((result, end - begin))
        taken.append((batch.get("index"), result.losses.detach()[: end - begin or None]))

    norm = accelerator.clip_grad_norm_(state.model.parameters(), run.flags.max_grad_norm or math.inf)
    norm, finite = _update_weights(run, state, norm)
    state.optimizer.zero_grad(set_to_none=True)
    state.lr_scheduler.step()
    if finite is not False:
        for name, ema in state.emas.items():
            update_ema(ema, state.parts[name], None if finite is True else finite)
        for result, count in results:
            state.meter.add(result, count, None if finite is True else finite)
    return StepResult(norm, finite, taken)


def _update_weights(
    run: Run, state: TrainingState, norm: torch.Tensor | float | None
) -> tuple[float | torch.Tensor, bool | torch.Tensor]:
    """The optimizer's update, unless the gradient is not finite: the norm, and whether it was taken."""
    if device_decides(run, state):
        finite = torch.isfinite(torch.as_tensor(norm))
        # a fused optimizer reads it on the device, and skips the step
        state.optimizer.optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        state.optimizer.step()
        return torch.as_tensor(norm), finite
    norm = float("nan") if norm is None else float(norm)
    known = _known_norm(run.accelerator)
    if math.isfinite(norm) or run.accelerator.scaler is not None or not known:
        state.optimizer.step()  # a loss scaler skips what overflowed by itself
    return norm, math.isfinite(norm) or not known


def device_decides(run: Run, state: TrainingState) -> bool:
    """Whether a GPU skips a step by itself: with a fused optimizer and its averages, without loss scaler or engine."""
    accelerator, optimizer = run.accelerator, getattr(state.optimizer, "optimizer", None)
    return (
        run.device.type == "cuda"
        and accelerator.scaler is None
        and accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
        and bool(getattr(optimizer, "defaults", {}).get("fused"))
        and all(ema.shadow_params[0].device.type == "cuda" for ema in state.emas.values())
    )


def _known_norm(accelerator: Accelerator) -> bool:
    """Whether the gradient's norm is known here: DeepSpeed clips and skips by itself."""
    return accelerator.distributed_type != DistributedType.DEEPSPEED
