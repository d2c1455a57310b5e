"""One optimizer step."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..common.randomness import StepKeys, keyed_seed, seed_global
from .meter import Losses
from .plan import StepPlan
from .run import Run
from .state import TrainingState
from .update import Updater


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
    update: Updater,
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
        seed_global(keyed_seed(seed, "dropout", plan.batches_before(step) + micro, first), run.device)
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

    norm, finite = update()
    state.lr_scheduler.step()
    if finite is not False:
        for result, count in results:
            state.meter.add(result, count, None if finite is True else finite)
    return StepResult(norm, finite, taken)
