"""The training loop: one function that reads from top to bottom, and the plan of steps and batches that it follows."""

import contextlib
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .averaging import ema_weights, load_ema, save_ema, update_ema
from .checkpointing import check_random_states, flush, load_tensors, read_manifest, rotate, save_tensors, seal
from .config import SHORTER_TRAINING, PipelineConfig, TrainingConfig, UsageError
from .faults import RunError, attempt, end_together, track, warn
from .ownership import claim_files, let_go, release_files, replaces
from .randomness import StepKeys, keyed_seed
from .reporting import Progress
from .sessions import Sessions
from .sharded import WholeModel, whole_ema
from .stopping import InterruptedLookError, Stop

LOGS = ("metrics.jsonl", "timings.jsonl")


class StepPlan(NamedTuple):
    """Which samples an optimizer step sees: all of it follows from the step's number.

    An epoch is a permutation of the data, cut into global batches of `batch_size` times `world`; the last batch, and
    the last accumulation, may be partial. `samples=None` is a stream: every batch is full and there are no epochs.
    """

    samples: int | None
    batch_size: int
    world: int
    accumulation: int
    steps_in_stream: int = 0  # a stream's one "epoch"

    @property
    def global_batch(self) -> int:
        """Samples of one forward pass, over all ranks."""
        return self.batch_size * self.world

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes in an epoch."""
        if self.samples is None:
            return self.steps_in_stream * self.accumulation
        return math.ceil(self.samples / self.global_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def batches(self, step: int) -> range:
        """The numbers, within their epoch, of the step's batches."""
        first = step % self.steps_per_epoch * self.accumulation
        return range(first, min(first + self.accumulation, self.batches_per_epoch))

    def samples_in(self, step: int) -> int:
        """The samples of the step, over all ranks: what its gradient is the mean of."""
        batches = self.batches(step)
        last = batches.stop * self.global_batch
        return (last if self.samples is None else min(last, self.samples)) - batches.start * self.global_batch

    def own_samples(self, batch: int, rank: int) -> tuple[int, int]:
        """Where in the epoch's order a rank's part of a batch begins and ends; it may be empty in the last batch."""
        begin = batch * self.global_batch + rank * self.batch_size
        end = begin + self.batch_size
        return (begin, end) if self.samples is None else (min(begin, self.samples), min(end, self.samples))

    def batches_before(self, step: int) -> int:
        """Forward passes before a step, from the beginning of training."""
        return self.epoch_of(step) * self.batches_per_epoch + self.batches(step).start


class KeyedBatchSampler(torch.utils.data.Sampler):
    """A rank's batches of keys (epoch, index), from a step on and without end; `order(epoch)` gives the indices."""

    def __init__(self, plan: StepPlan, order: Callable[[int], Sequence[int]], rank: int, first_step: int):
        self.plan, self.order, self.rank, self.first_step = plan, order, rank, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.plan.epoch_of(self.first_step)
        first = self.plan.batches(self.first_step).start
        while True:
            order = self.order(epoch)
            for batch in range(first, self.plan.batches_per_epoch):
                begin, end = self.plan.own_samples(batch, self.rank)
                # a rank without a sample of its own runs the epoch's first, at weight 0: all ranks must take part
                yield [(epoch, int(index)) for index in (order[begin:end] if end > begin else order[:1])]
            epoch, first = epoch + 1, 0


class Losses(NamedTuple):
    """What `compute_loss` gives: `losses` [N], whose mean is minimised, and what is logged of them."""

    losses: torch.Tensor
    logged: torch.Tensor | None = None  # [N], logged by group instead of the losses
    groups: torch.Tensor | None = None  # LongTensor [N]: the group of each sample


@dataclass
class Meter:
    """Running means, overall and by group, summed on the device and read only when they are logged.

    The sums are float32, which every device has, with Kahan's compensation for what rounding loses.
    """

    groups: tuple[str, ...]
    device: torch.device
    sums: torch.Tensor = field(init=False)  # [2, 1 + groups, 2]: sum and compensation, of losses and of their count

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums = torch.zeros(2, 1 + len(self.groups), 2, device=self.device)

    def add(self, result: Losses, count: int) -> None:
        """Take in the first `count` samples of a batch."""
        pairs = _with_count(result.losses[:count])  # [N, 2]
        values = torch.zeros_like(self.sums[0])
        values[0] = pairs.sum(0)
        if result.groups is not None:
            logged = pairs if result.logged is None else _with_count(result.logged[:count])
            values[1:].index_add_(0, result.groups[:count].to(self.device), logged)
        sums, compensation = self.sums
        values = values - compensation
        total = sums + values
        self.sums = torch.stack([total, (total - sums) - values])

    def gathered(self, accelerator) -> list:
        """Every rank's sums, for a checkpoint."""
        return accelerator.gather(self.sums[None]).tolist()

    def restore(self, gathered: list, accelerator) -> None:
        """Take up what `gathered` gave: this rank's sums where the ranks are as many, else all on the main one."""
        sums = torch.tensor(gathered, dtype=torch.float64)
        if sums.ndim == 3:  # of a checkpoint without compensation
            sums = torch.stack([sums, torch.zeros_like(sums)], dim=1)
        if sums.shape[1:] != self.sums.shape:
            raise UsageError("the checkpoint logs other groups of losses; resume with the script that wrote it")
        if len(sums) == accelerator.num_processes:
            self.sums = sums[accelerator.process_index].float().to(self.device)
        elif accelerator.is_main_process:
            self.sums = sums.sum(0).float().to(self.device)
        else:
            self.reset()

    def means(self, accelerator) -> dict[str, float]:
        """The means over all ranks since the last reset; a group that saw nothing is left out."""
        gathered = accelerator.gather(self.sums[None]).cpu().double()
        sums = (gathered[:, 0] - gathered[:, 1]).sum(0).tolist()
        self.reset()
        return {name: s / n for name, (s, n) in zip(("loss", *self.groups), sums) if n}


def _with_count(losses: torch.Tensor) -> torch.Tensor:
    """Losses [N] as pairs with a 1, float32 [N, 2]: their sum is the sum and the count."""
    losses = losses.detach().float()
    return torch.stack([losses, torch.ones_like(losses)], dim=1)


def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
    """Sums of all ranks added up, float64 on the CPU; all ranks take part."""
    return torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(0)


@dataclass
class TrainingState:
    """What a run consists of. `extra` holds more objects with a `state_dict()` of tensors that belong to it."""

    model: torch.nn.Module  # as prepared by Accelerate
    parts: dict[str, torch.nn.Module]  # what of it is saved, by its folder's name: {"unet": model}
    emas: dict[str, Any]  # a part's EMA, by the same name; empty without EMA
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    meter: Meter
    sessions: Sessions
    extra: dict[str, Any] = field(default_factory=dict)
    step: int = 0  # optimizer steps taken
    nonfinite_steps: int = 0  # skipped, in a row
    grid_due: bool = False  # pictures of this step that a stop prevented
    whole: WholeModel | None = None  # where the model is sharded
    figures: dict[str, float] = field(default_factory=dict)  # those logged last, without the learning rate
    first_pass: float = 0.0  # seconds of the first batch, forward and backward, before training
    given_up: set[str] = field(default_factory=set)  # files that are no longer written
    facts: dict[str, Any] = field(default_factory=dict)  # what a resumed run must share; into the manifest

    @property
    def whole_parts(self) -> dict[str, torch.nn.Module]:
        """The parts that can be called and saved by one rank alone."""
        return self.parts if self.whole is None else self.whole.parts


def register_model_hooks(accelerator, state: TrainingState) -> None:
    """Make Accelerate's checkpoints hold the model as Diffusers does: under `unet/`, its EMA under `unet_ema/`."""

    def save(models, weights, output_dir):
        if state.whole is not None:
            state.whole.fill(state.model, {}, accelerator.device)
        for name, part in state.whole_parts.items():
            with whole_ema(state.emas[name]) if name in state.emas else contextlib.nullcontext() as ema:
                if accelerator.is_main_process:
                    part.save_pretrained(Path(output_dir) / name)
                if accelerator.is_main_process and ema is not None:
                    save_ema(ema, part, Path(output_dir) / f"{name}_ema")
        while weights:  # what is left here Accelerate would save again
            weights.pop()

    def load(models, input_dir):
        models.clear()  # what is left here Accelerate would load by itself
        for name, part in state.parts.items():
            if state.whole is None:  # else Accelerate has loaded the shards
                loaded = type(part).from_pretrained(Path(input_dir) / name, use_safetensors=True)
                part.load_state_dict(loaded.state_dict())
            folder = Path(input_dir) / f"{name}_ema"
            if name in state.emas:
                if not folder.is_dir():
                    raise UsageError(f"{input_dir} has no EMA; resume without --use_ema, or train anew")
                load_ema(state.emas[name], part, folder)
            elif folder.is_dir():
                raise UsageError(f"{input_dir} has an EMA, which would be lost; resume with --use_ema")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def unwrap(accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, without what Accelerate and torch.compile put around it."""
    model = accelerator.unwrap_model(model)
    return model._orig_mod if hasattr(model, "_orig_mod") else model


def save_checkpoint(accelerator, state: TrainingState, output_dir: Path, limit: int | None) -> str | None:
    """Write `checkpoint-N`, whole or not at all, then let the oldest go. All ranks take part.

    Returns:
        What kept it from being written, for all ranks; then nothing of it is left, and no other has gone.
    """
    partial, final = (output_dir / f"checkpoint-{state.step}{suffix}" for suffix in (".partial", ""))
    meter = state.meter.gathered(accelerator)

    def begin():
        claim_files(output_dir, [f"{final.name}/"])
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # and no parent: where the folder has gone, as with a disk, another would fill in its place

    def finish():
        save_tensors(partial, state.extra)
        for log in LOGS:  # a checkpoint that outlives a power cut must find all that was logged before it
            if (output_dir / log).is_file():
                flush(output_dir / log)
        seal(
            partial,
            final,
            {
                "step": state.step,
                "nonfinite_steps": state.nonfinite_steps,
                "grid_due": state.grid_due,
                "meter": meter,
                "sessions": state.sessions.until(state.step),
                "lr_scheduler": json.loads(json.dumps(state.lr_scheduler.state_dict(), default=lambda _: None)),
                **state.facts,
            },
        )

    fault = attempt(accelerator, begin)
    fault = fault or attempt(accelerator, lambda: accelerator.save_state(str(partial)), on_all=True)
    fault = fault or attempt(accelerator, finish)
    if fault is not None and accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    if fault is None:
        let_earlier_run_go(accelerator, output_dir)
        let_old_go(accelerator, output_dir, limit)
    return fault


def let_earlier_run_go(accelerator, output_dir: Path) -> None:
    """Delete the run that this one replaces, now that it has a checkpoint. All ranks take part.

    An autoencoder's checkpoint counts: its folder lies within that of the run.
    """

    def remove():
        for folder in (output_dir, output_dir.parent):
            if replaces(folder):
                let_go(folder)

    if stuck := attempt(accelerator, remove):
        warn(accelerator, f"the earlier run cannot be removed: {stuck}")


def let_old_go(accelerator, output_dir: Path, limit: int | None) -> None:
    """Remove the checkpoints that are too many. All ranks take part."""

    def remove():
        release_files(output_dir, [f"{path.name}/" for path in rotate(output_dir, limit)])

    if stuck := attempt(accelerator, remove):
        warn(accelerator, f"an old checkpoint cannot be removed: {stuck}")


def load_checkpoint(accelerator, state: TrainingState, checkpoint: Path) -> None:
    """Take over a checkpoint: weights, moments, averages and counts. The settings of optimizer, schedule and EMA stay.

    The manifest has been verified.

    Raises:
        UsageError: it holds what no checkpoint of this run does. What is pickled is read with weights_only=True.
    """
    manifest = read_manifest(checkpoint)
    groups = state.optimizer.param_groups
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    try:
        check_random_states(checkpoint, accelerator.process_index)
        accelerator.load_state(str(checkpoint))
        load_tensors(checkpoint, state.extra)
        state.lr_scheduler.load_state_dict({**manifest["lr_scheduler"], "base_lrs": state.lr_scheduler.base_lrs})
        set_rates(state, settings)
        state.meter.restore(manifest["meter"], accelerator)
        state.step, state.nonfinite_steps = manifest["step"], int(manifest["nonfinite_steps"])
        state.sessions.resume(manifest.get("sessions", []), state.step)
        state.grid_due = bool(manifest.get("grid_due", False))
    except UsageError:
        raise
    except Exception as error:  # whatever a stranger's file makes the libraries raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{checkpoint} cannot be resumed: it holds what no checkpoint does ({type(error).__name__}: {reason})"
        ) from error


def set_rates(state: TrainingState, settings: list[dict[str, Any]]) -> None:
    """Give the optimizer these settings of its groups, and the learning rates of the schedule's step.

    A learning rate is the base rate of the settings times the schedule's factor at the step: another base rate,
    warm-up or kind of schedule counts from this step on, as if it had been chosen from the beginning.
    """
    schedule = state.lr_scheduler
    schedule._last_lr = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)
    ]
    for group, own, rate in zip(state.optimizer.param_groups, settings, schedule._last_lr, strict=True):
        group.update({**own, "lr": rate})


@contextlib.contextmanager
def averaged_weights(state: TrainingState, model: torch.nn.Module):
    """The model in eval mode, with its EMA weights where there are any; then all as it was. All ranks take part."""
    if state.whole is not None:
        yield state.whole.fill(state.model, state.emas, next(state.model.parameters()).device).eval()
        return
    training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        for name, ema in state.emas.items():
            stack.enter_context(ema_weights(ema, state.parts[name]))
        try:
            yield model
        finally:
            model.train(training)


class Snapshot:
    """What steps that are skipped change after all, to put it back; weights, moments and EMA they leave alone."""

    def __init__(self, state: TrainingState):
        self.step, self.sums = state.step, state.meter.sums.clone()
        self.schedule = state.lr_scheduler.state_dict().copy()
        self.rates = [group["lr"] for group in state.optimizer.param_groups]
        self.extra = {
            name: {key: value.clone() for key, value in one.state_dict().items()} for name, one in state.extra.items()
        }

    def put_back(self, state: TrainingState) -> None:
        """Make the state that of before the steps that were skipped."""
        state.step, state.nonfinite_steps, state.grid_due = self.step, 0, False
        state.meter.sums = self.sums.clone()
        state.lr_scheduler.load_state_dict(self.schedule)
        for group, rate in zip(state.optimizer.param_groups, self.rates):
            group["lr"] = rate
        for name, one in state.extra.items():
            one.load_state_dict(self.extra[name])


def bad_samples(taken: list[tuple[torch.Tensor | None, torch.Tensor]], accelerator) -> list[int]:
    """The rows of a step's samples whose own loss is not finite, of all ranks; from pairs of rows and losses [N]."""
    own = [
        int(row)
        for rows, losses in taken
        if rows is not None
        for row, loss in zip(rows.tolist(), losses.tolist())
        if not math.isfinite(loss)
    ]
    return sorted(set(gather_object(own)))


def named(rows: list[int], name_of: Callable[[int], str]) -> str:
    """Some samples' names, for a message."""
    if not rows:
        return "the gradient, with the loss of each sample finite"
    return f"of {', '.join(name_of(row) for row in rows[:8])}" + (f" and {len(rows) - 8} more" if rows[8:] else "")


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class StepResult(NamedTuple):
    """What an optimizer step came to."""

    norm: float  # of the gradient; NaN where the engine does not say it
    finite: bool  # whether it was taken; else weights, moments and EMA are as before
    taken: list[tuple[torch.Tensor | None, torch.Tensor]]  # of each batch: its samples' rows, and their losses


def take_step(
    config: TrainingConfig,
    accelerator,
    state: TrainingState,
    plan: StepPlan,
    fetched: list[dict[str, torch.Tensor]],
    compute_loss: Callable[[torch.nn.Module, dict, StepKeys], Losses],
) -> StepResult:
    """The optimizer step after `state.step`: losses and gradients of its batches, clipping, update, EMA."""
    step, seed, meter = state.step, config.seed, state.meter
    window, in_window = plan.batches(step), plan.samples_in(step)
    taken = []
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
            spoils = 1 + 0 * loss.detach()  # NaN of a loss that is not finite: then so is the gradient of all
            accelerator.backward(loss * (spoils * (accelerator.num_processes / in_window)))
        meter.add(result, end - begin)
        taken.append((batch.get("index"), result.losses.detach()[: end - begin or None]))

    norm = accelerator.clip_grad_norm_(state.model.parameters(), config.max_grad_norm or math.inf)
    norm = float("nan") if norm is None else float(norm)
    if math.isfinite(norm) or accelerator.scaler is not None or not _known_norm(accelerator):
        state.optimizer.step()  # a loss scaler skips what overflowed by itself
    finite = math.isfinite(norm) or not _known_norm(accelerator)
    state.optimizer.zero_grad(set_to_none=True)
    state.lr_scheduler.step()
    if finite:
        for name, ema in state.emas.items():
            update_ema(ema, state.parts[name])
    return StepResult(norm, finite, taken)


def training_loop(
    config: TrainingConfig,
    accelerator,
    state: TrainingState,
    plan: StepPlan,
    batches: Iterator[dict[str, torch.Tensor]],
    total_steps: int,
    *,
    compute_loss: Callable[[torch.nn.Module, dict, StepKeys], Losses],
    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    draw: Callable[[torch.nn.Module, int], Path | None] | None = None,
    save: Callable[[torch.nn.Module, int], None] | None = None,
    saves_checkpoints: bool = False,
    name_of: Callable[[int], str] = "sample {}".format,
    deadline: float | None = None,
    advice: str = SHORTER_TRAINING,
) -> bool:
    """Train until `total_steps`; True if that was reached, False if a signal or the clock asked to stop before.

    Args:
        batches: this rank's batches from `state.step` on, as `plan` says; their `index` [N] are the samples' rows.
        compute_loss: (model, batch, keys) -> `Losses`; what it draws, it draws from `keys`.
        validate, draw, save: given the model, in eval mode and with the EMA weights, the last two also the step.
            `validate` and `draw` run on all ranks, `save` on the main one. `draw` returns what it has written.
        saves_checkpoints: whether `save` is called at each checkpoint too, before it is written.
        name_of: a row's name, for messages.
        deadline: on the monotonic clock; it counts once a step has been trained.
        advice: what to do where training takes long on a CPU.

    Raises:
        UsageError: `config.max_nonfinite_steps` steps in a row had a loss or gradient that is not finite.
        RunError: `metrics.jsonl`, the last checkpoint or the last pipeline could not be written.
        Exception: what reading a batch raised, once the steps before it are saved.
    """
    output_dir = Path(config.output_dir)
    model = unwrap(accelerator, state.model)
    meter = state.meter
    since, seen = time.perf_counter(), 0
    before, bad = Snapshot(state), []  # as it was when a step was good last, and the rows that were not good since
    saved = state.step  # the newest step that is on disk, or needs not be
    state.model.train()

    progress = Progress(accelerator, total_steps, state.step, advice)
    with Stop(deadline) as stop, progress:  # a bar is closed before an error speaks
        if draw is not None and state.grid_due:
            look(draw, state, model, stop, progress)
        while state.step < total_steps:
            step, window, in_window = state.step, plan.batches(state.step), plan.samples_in(state.step)
            if not state.nonfinite_steps:
                before, bad = Snapshot(state), []
            fetched = stop.fetch(batches, len(window))
            if stop.agreed(accelerator):
                given_back = not stop.by_clock and earlier_run_waits(accelerator, output_dir)
                if not given_back:
                    wind_up(config, accelerator, state, before, saved)
                stop.raise_failure(accelerator)
                say_how_to_go_on(config, accelerator, state, stop.why, given_back)
                return False

            norm, finite, taken = take_step(config, accelerator, state, plan, fetched, compute_loss)
            state.step += 1
            state.nonfinite_steps = 0 if finite else state.nonfinite_steps + 1
            if not finite:
                meter.sums = before.sums.clone()
                rows = bad_samples(taken, accelerator)
                bad += [row for row in rows if row not in bad]
                what = f"not finite: {named(rows, name_of)}"
                warn(accelerator, f"step {state.step}: loss or gradient is {what}; step skipped")
            if state.nonfinite_steps >= config.max_nonfinite_steps:
                count, given_back = state.nonfinite_steps, earlier_run_waits(accelerator, output_dir)
                if not given_back:
                    wind_up(config, accelerator, state, before, saved)
                good = before.step
                error = diverged(config, count, good, named(bad, name_of), given_back)
                end_together(accelerator, error if accelerator.is_main_process else None)

            done = state.step == total_steps
            epoch_ends = state.step % plan.steps_per_epoch == 0 or done
            epoch = plan.epoch_of(step)
            seen, elapsed = seen + in_window, time.perf_counter() - since
            progress.done(state.step)
            record: dict[str, float] = {}
            if (state.step % config.logging_steps == 0 or done) and finite:
                record = {**meter.means(accelerator), "lr": state.lr_scheduler.get_last_lr()[0], "grad_norm": norm}
            if (
                validate is not None
                and config.validation_steps
                and (state.step % config.validation_steps == 0 or done)
            ):
                with progress.pause(), averaged_weights(state, model) as averaged:
                    record |= validate(averaged)
            if record:
                timing = {"seconds": round(elapsed, 3), "images_per_second": round(seen / elapsed, 1)}
                state.figures |= progress.figures(
                    epoch + 1, record, state.lr_scheduler.get_last_lr()[0], seen / elapsed
                )
                record = {"step": state.step, "epoch": epoch + 1, **record}
                write_record(accelerator, state, output_dir, record, timing)
                since, seen = time.perf_counter(), 0

            paused = time.perf_counter()
            if draw is not None and images_due(config, state.step, epoch, epoch_ends, done):
                look(draw, state, model, stop, progress)
            checkpoint_due = done or (state.step % config.checkpointing_steps == 0 and not state.nonfinite_steps)
            save_due = epoch_ends and (epoch % config.save_model_epochs == 0 or done)
            if save is not None and (save_due or (checkpoint_due and saves_checkpoints)):
                with averaged_weights(state, model) as averaged:
                    fault = attempt(accelerator, functools.partial(save, averaged, state.step))
                report(accelerator, fault, f"the model of step {state.step}", last=done)
            if checkpoint_due:
                limit = None if state.nonfinite_steps else config.checkpoints_total_limit
                fault = save_checkpoint(accelerator, state, output_dir, limit)
                report(accelerator, fault, f"checkpoint-{state.step}", last=done)
                saved = saved if fault else state.step
                if not fault:
                    progress.note(f"checkpoint-{state.step}")
            since += time.perf_counter() - paused
            progress.paused += time.perf_counter() - paused
            stop.armed = True
    return True


def images_due(config: PipelineConfig, step: int, epoch: int, epoch_ends: bool, done: bool) -> bool:
    """Whether pictures follow this step: at the end of training in any case, unless they are turned off."""
    if config.save_images_steps:
        return done or step % config.save_images_steps == 0
    return bool(config.save_images_epochs) and epoch_ends and (done or epoch % config.save_images_epochs == 0)


def look(draw: Callable, state: TrainingState, model: torch.nn.Module, stop: Stop, progress: Progress) -> None:
    """Draw the pictures of this step; a run that is to stop leaves them to the one that goes on from here."""
    state.grid_due = True
    with (
        contextlib.suppress(InterruptedLookError),
        averaged_weights(state, model) as averaged,
        stop.interrupting(state.whole_parts.values()),
    ):
        path = draw(averaged, state.step)
        state.grid_due = False
        if path is not None:
            progress.note(f"pictures in {path}")


def report(accelerator, fault: str | None, what: str, last: bool) -> None:
    """Say what could not be written; raise RunError where the run's end depends on it."""
    if fault is not None and last:
        error = RunError(f"{what} cannot be written ({fault}); make room")
        end_together(accelerator, error if accelerator.is_main_process else None)
    if fault is not None:
        warn(accelerator, f"{what} cannot be written ({fault}); training goes on")


def write_record(
    accelerator, state: TrainingState, output_dir: Path, record: dict[str, float], timing: dict[str, float]
) -> None:
    """A step's figures: into `metrics.jsonl`, which must work, and `timings.jsonl` and the tracker, which may fail."""
    fault = attempt(accelerator, lambda: append_jsonl(output_dir / "metrics.jsonl", record))
    report(accelerator, fault, "metrics.jsonl", last=True)
    if "timings.jsonl" not in state.given_up:
        timings = {"step": record["step"], **timing}
        fault = attempt(accelerator, lambda: append_jsonl(output_dir / "timings.jsonl", timings))
        report(accelerator, fault, "timings.jsonl", last=False)
        state.given_up |= {"timings.jsonl"} if fault else set()
    scalars = {name: value for name, value in record.items() if name != "step"}
    track(accelerator, lambda tracker: tracker.log({**scalars, **timing}, step=record["step"]))


def wind_up(config: TrainingConfig, accelerator, state: TrainingState, before: Snapshot, saved: int) -> None:
    """Save a run that ends early, as it was before steps that were skipped last, unless that is on disk."""
    if state.nonfinite_steps:
        before.put_back(state)
    if state.step > saved:
        limit = config.checkpoints_total_limit
        fault = save_checkpoint(accelerator, state, Path(config.output_dir), limit)
        report(accelerator, fault, f"checkpoint-{state.step}", last=True)


def earlier_run_waits(accelerator, output_dir: Path) -> bool:
    """Whether an earlier run is still set aside, to come back if this one ends now. All ranks take part."""
    return any(gather_object([replaces(output_dir) or replaces(output_dir.parent)]))


def say_how_to_go_on(config: TrainingConfig, accelerator, state: TrainingState, why: str, given_back: bool) -> None:
    """The line of a run that was stopped; `given_back`: before its first checkpoint, and so an earlier run is back."""
    if given_back:
        line = f"stopped at step {state.step} by {why}, before the first checkpoint: the earlier run is back"
        if accelerator.is_main_process:
            tqdm.write(line, file=sys.stderr)
        return
    instead = " in the place of --overwrite_output_dir" if config.overwrite_output_dir else ""
    if accelerator.is_main_process:
        tqdm.write(
            f"stopped at step {state.step} by {why}; go on with --resume_from_checkpoint latest{instead}",
            file=sys.stderr,
        )


def diverged(config: TrainingConfig, count: int, good: int, what: str, given_back: bool = False) -> UsageError:
    """The error of a run whose steps are skipped for ever; `good` is the step before the first of them."""
    if given_back:
        return UsageError(
            f"{count} steps in a row up to {good + count} had a loss or gradient that is not finite ({what}), before"
            " the first checkpoint: look at these samples, or train with a lower --learning_rate; the earlier run is"
            " back"
        )
    kept = f"checkpoint-{good} in {config.output_dir} is from before" if good else "no step before was good"
    return UsageError(
        f"{count} steps in a row up to {good + count} had a loss or gradient that is not finite ({what}); {kept}:"
        " look at these samples, or go on from there with --resume_from_checkpoint latest and a lower --learning_rate"
    )


def _known_norm(accelerator) -> bool:
    """Whether the gradient's norm is ours to judge: DeepSpeed clips and skips by itself."""
    return str(accelerator.distributed_type) != "DistributedType.DEEPSPEED"
