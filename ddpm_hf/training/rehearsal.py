"""The first batch through the model and back, before anything on disk is touched; it changes nothing in the run."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from ..common.arguments import SHORTER_TRAINING
from ..common.errors import UsageError, one_line
from ..common.machine import write_out
from ..common.randomness import StepKeys, keyed_seed, seed_global
from .ending import explained
from .plan import StepPlan
from .reporting import LONG_ON_A_CPU, pace, peak_memory, table
from .run import Run
from .setup.claiming import describe_start
from .state import TrainingState
from .step import take_step
from .update import Updater

MOST_STEPS, MOST_SECONDS = 3, 20.0  # of what is measured


def rehearse(
    run: Run,
    state: TrainingState,
    plan: StepPlan,
    batches: Iterator[dict[str, torch.Tensor]],
    compute_loss: Callable,
) -> Iterator[dict[str, torch.Tensor]]:
    """Compute the loss and the gradient of the first batch, and forget them: about the cost of a training step.

    Weights, optimizer, averages, samplers and random generators stay as they are. All ranks take part.

    Args:
        batches: this rank's batches from `state.step` on.
        compute_loss: as for `training_loop`.

    Returns: the same batches, with the first one again.

    Raises:
        UsageError: the batch does not fit the model; what the model says about it.
        Exception: what reading the batch raised, or memory that ran out.
    """
    with agreed_failure(run):
        batch = next(batches)
    device = run.device
    devices = [] if device.type == "cpu" else [device]
    with agreed_failure(run), torch.random.fork_rng(devices, device_type=_random_device(device)):
        before = {name: _copy(one.state_dict()) for name, one in state.extra.items()}
        begin = time.perf_counter()
        try:
            _pass(run, state, plan, batch, compute_loss)
            state.first_pass = time.perf_counter() - begin
        except (RuntimeError, ValueError) as error:
            if explained(error, run.flags.output_dir, ()) is not None or _is_of_data(error):
                raise
            reason = one_line(error, 300)
            raise UsageError(f"the first batch does not fit the model: {reason}") from error
        finally:
            for name, one in state.extra.items():
                one.load_state_dict(before[name])
            state.model.zero_grad(set_to_none=True)
    return itertools.chain([batch], batches)


def measure_pace(
    run: Run,
    state: TrainingState,
    plan: StepPlan,
    batches: Iterator[dict[str, torch.Tensor]],
    compute_loss: Callable,
    advice: str = SHORTER_TRAINING,
) -> dict[str, str]:
    """How long training takes and what memory it needs, by taking a few steps after `rehearse`; for `--dry_run`.

    The run cannot go on afterwards. All ranks take part.

    Args:
        advice: what to do where it is long on a CPU.

    Returns: lines by their names.
    """
    left, update = plan.total - state.step, Updater(run, state)
    seconds, spent, taken = state.first_pass * len(plan.batches(state.step)), 0.0, 0
    while taken < MOST_STEPS:
        expected = [spent + seconds > MOST_SECONDS]
        if broadcast_object_list(expected)[0]:  # a pass alone has told enough
            break
        begin = time.perf_counter()
        with agreed_failure(run):
            fetched = [next(batches) for _ in plan.batches(state.step)]
        take_step(run, state, plan, fetched, compute_loss, update)
        state.step += 1
        taken += 1
        spent += time.perf_counter() - begin
        seconds = spent / taken
    # activations meet the optimizer's moments, which its first step makes, in the second
    moments = 0 if taken > 1 else 2 * sum(one.nbytes for one in state.model.parameters() if one.requires_grad)
    long = run.device.type == "cpu" and seconds * left > LONG_ON_A_CPU
    return {
        "time": f"{pace(seconds, left)}, pictures and files on top" + (f"; long on a CPU: {advice}" if long else ""),
        "peak": f"{(peak_memory(run.device) + moments) / 2**20:,.0f} MiB of memory measured"
        + (", the moments of Adam added" if moments else ""),
    }


def show_dry_run(
    run: Run,
    lines: dict[str, str],
    state: TrainingState,
    plan: StepPlan,
    batches: Iterator[dict[str, torch.Tensor]],
    compute_loss: Callable,
    advice: str = SHORTER_TRAINING,
) -> None:
    """What --dry_run prints: the lines of the run, its time and memory, and what becomes of the output folder."""
    lines = {**lines, **measure_pace(run, state, plan, batches, compute_loss, advice)}
    if run.accelerator.is_main_process:
        write_out(f"{table(lines)}\n{describe_start(run)}")


def _pass(run: Run, state: TrainingState, plan: StepPlan, batch: dict[str, Any], compute_loss: Callable) -> None:
    """A forward and a backward pass, as `training_loop` does them."""
    accelerator, number = run.accelerator, plan.batches(state.step).start
    begin, end = plan.own_samples(number, accelerator.process_index)
    first = accelerator.process_index * plan.batch_size
    state.model.train()
    seed_global(keyed_seed(run.seed, "dropout", plan.batches_before(state.step), first), run.device)
    kind = accelerator.distributed_type
    alone = kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)  # the ranks need not exchange gradients
    with accelerator.no_sync(state.model) if alone else contextlib.nullcontext():
        with accelerator.autocast():
            keys = StepKeys(run.seed, state.step, first, len(next(iter(batch.values()))), valid=end - begin)
            loss = compute_loss(state.model, batch, keys).losses.mean()
        if kind != DistributedType.DEEPSPEED:  # whose engine steps as it goes back
            accelerator.backward(loss)


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items()}


def _random_device(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def _is_of_data(error: Exception) -> bool:
    """Whether it is an error that names what the user can mend already: a subclass of ours of ValueError."""
    return type(error) not in (RuntimeError, ValueError)


@contextlib.contextmanager
def agreed_failure(run: Run) -> Iterator[None]:
    """Whatever one rank raises within ends all of them; the first of them to fail says why."""
    error = None
    try:
        yield
    except Exception as problem:
        error = problem
    failed = gather_object([error is not None])
    if any(failed):
        run.end(error if failed.index(True) == run.accelerator.process_index else None)
