"""The training loop: one function that reads from top to bottom, and the plan of steps and batches that it follows."""

import contextlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from .averaging import ema_weights, load_ema, save_ema, update_ema
from .checkpointing import check_random_states, load_tensors, read_manifest, rotate, save_tensors, seal, truncate_jsonl
from .config import TrainingConfig, UsageError
from .randomness import StepKeys, keyed_seed


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
    """Running means, overall and by group, summed on the device and read only when they are logged."""

    groups: tuple[str, ...]
    device: torch.device
    sums: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums = torch.zeros(1 + len(self.groups), 2, dtype=torch.float64, device=self.device)

    def add(self, result: Losses, count: int) -> None:
        """Take in the first `count` samples of a batch."""
        losses = result.losses.detach()[:count].double()
        self.sums[0] += torch.stack(
            [losses.sum(), torch.tensor(float(count), device=self.device, dtype=torch.float64)]
        )
        if result.groups is not None:
            logged = (result.losses if result.logged is None else result.logged).detach()[:count].double()
            pairs = torch.stack([logged, torch.ones_like(logged)], dim=1)  # [N, 2]
            self.sums[1:].index_add_(0, result.groups[:count].to(self.device), pairs)

    def gathered(self, accelerator) -> list:
        """Every rank's sums, for a checkpoint."""
        return accelerator.gather(self.sums[None]).tolist()

    def restore(self, gathered: list, accelerator) -> None:
        """Take up what `gathered` gave: this rank's own where the ranks are as many, else all on the main one."""
        rank, sums = accelerator.process_index, torch.tensor(gathered, dtype=torch.float64, device=self.device)
        if sums.shape[1:] != self.sums.shape:
            raise UsageError("the checkpoint logs other groups of losses; resume with the script that wrote it")
        same = len(sums) == accelerator.num_processes
        self.sums = sums[rank] if same else sums.sum(0) * (rank == 0)

    def means(self, accelerator) -> dict[str, float]:
        """The means over all ranks since the last reset; a group that saw nothing is left out."""
        sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        self.reset()
        return {name: s / n for name, (s, n) in zip(("loss", *self.groups), sums) if n}


@dataclass
class TrainingState:
    """What a run consists of. `extra` holds more objects with a `state_dict()` of tensors that belong to it."""

    model: torch.nn.Module  # as prepared by Accelerate
    parts: dict[str, torch.nn.Module]  # what of it is saved, by its folder's name: {"unet": model}
    emas: dict[str, Any]  # a part's EMA, by the same name; empty without EMA
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    meter: Meter
    extra: dict[str, Any] = field(default_factory=dict)
    step: int = 0  # optimizer steps taken
    nonfinite_steps: int = 0  # skipped, in a row
    facts: dict[str, Any] = field(default_factory=dict)  # what a resumed run must share; into the manifest


def register_model_hooks(accelerator, state: TrainingState) -> None:
    """Make Accelerate's checkpoints hold the model as Diffusers does: under `unet/`, its EMA under `unet_ema/`."""

    def save(models, weights, output_dir):
        if accelerator.is_main_process:
            for name, part in state.parts.items():
                part.save_pretrained(Path(output_dir) / name)
            for name, ema in state.emas.items():
                save_ema(ema, state.parts[name], Path(output_dir) / f"{name}_ema")
        while weights:  # what is left here Accelerate would save again
            weights.pop()

    def load(models, input_dir):
        models.clear()  # what is left here Accelerate would load by itself
        for name, part in state.parts.items():
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


def save_checkpoint(accelerator, state: TrainingState, output_dir: Path, limit: int | None) -> None:
    """Write `checkpoint-N`, whole or not at all, then let the oldest go. All ranks take part."""
    partial, final = (output_dir / f"checkpoint-{state.step}{suffix}" for suffix in (".partial", ""))
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    meter = state.meter.gathered(accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_tensors(partial, state.extra)
        seal(
            partial,
            final,
            {
                "step": state.step,
                "nonfinite_steps": state.nonfinite_steps,
                "meter": meter,
                "lr_scheduler": json.loads(json.dumps(state.lr_scheduler.state_dict(), default=lambda _: None)),
                **state.facts,
            },
        )
        rotate(output_dir, limit)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, state: TrainingState, checkpoint: Path, output_dir: Path) -> None:
    """Take over a checkpoint, and drop what was logged after it. The manifest has been verified.

    Raises:
        UsageError: it holds what no checkpoint of this run does. What is pickled is read with weights_only=True.
    """
    manifest = read_manifest(checkpoint)
    try:
        check_random_states(checkpoint, accelerator.process_index)
        accelerator.load_state(str(checkpoint))
        load_tensors(checkpoint, state.extra)
        state.lr_scheduler.load_state_dict(manifest["lr_scheduler"])
        state.meter.restore(manifest["meter"], accelerator)
        state.step, state.nonfinite_steps = manifest["step"], int(manifest["nonfinite_steps"])
    except UsageError:
        raise
    except Exception as error:  # whatever a stranger's file makes the libraries raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{checkpoint} cannot be resumed: it holds what no checkpoint does ({type(error).__name__}: {reason})"
        ) from error
    if accelerator.is_main_process:
        for name in ("metrics.jsonl", "timings.jsonl"):
            truncate_jsonl(output_dir / name, state.step)
    accelerator.wait_for_everyone()


@contextlib.contextmanager
def averaged_weights(state: TrainingState, model: torch.nn.Module):
    """The model in eval mode and with its EMA weights, where there are any; then all as it was."""
    training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        for name, ema in state.emas.items():
            stack.enter_context(ema_weights(ema, state.parts[name]))
        try:
            yield model
        finally:
            model.train(training)


class _StopRequest:
    """SIGTERM and SIGINT ask the loop to save and end; a second one ends at once."""

    def __init__(self):
        self.signal = None
        self.previous = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread: signals are not ours
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


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
    draw: Callable[[torch.nn.Module, int], None] | None = None,
    save: Callable[[torch.nn.Module], None] | None = None,
) -> bool:
    """Train until `total_steps`; True if that was reached, False if a signal asked to stop before.

    Args:
        batches: this rank's batches from `state.step` on, as `plan` says.
        compute_loss: (model, batch, keys) -> `Losses`; what it draws, it draws from `keys`.
        validate, draw, save: given the model, in eval mode and with the EMA weights. `draw` also gets the step; it and
            `validate` run on all ranks, `save` on the main one.

    Raises:
        UsageError: `config.max_nonfinite_steps` steps in a row had a loss or gradient that is not finite.
    """
    output_dir, seed = Path(config.output_dir), config.seed
    model = unwrap(accelerator, state.model)
    meter = state.meter
    bar = tqdm(
        total=total_steps, initial=state.step, desc="training", unit="step", dynamic_ncols=True,
        disable=not accelerator.is_local_main_process,
    )  # fmt: skip
    since, seen = time.perf_counter(), 0
    shown: dict[str, str] = {}
    state.model.train()

    with _StopRequest() as stop, bar:  # the bar is closed before an error speaks
        while state.step < total_steps:
            step, window, in_window = state.step, plan.batches(state.step), plan.samples_in(state.step)
            for micro, number in enumerate(window):
                batch = next(batches)
                begin, end = plan.own_samples(number, accelerator.process_index)
                count = len(next(iter(batch.values())))
                first = micro * plan.global_batch + accelerator.process_index * plan.batch_size
                torch.manual_seed(keyed_seed(seed, "dropout", plan.batches_before(step) + micro, first))
                accelerator.sync_gradients = last = micro == len(window) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(state.model):
                    with accelerator.autocast():
                        result = compute_loss(
                            state.model, batch, StepKeys(seed, step, first, count, valid=end - begin)
                        )
                    # The mean over the step's samples, whatever parts they come in; ranks average what each sums.
                    loss = result.losses[: end - begin].sum() if end > begin else 0.0 * result.losses.sum()
                    accelerator.backward(loss * (accelerator.num_processes / in_window))
                meter.add(result, end - begin)

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
            state.step += 1
            state.nonfinite_steps = 0 if finite else state.nonfinite_steps + 1
            if not finite:
                tqdm.write(f"step {state.step}: loss or gradient is not finite, step skipped", file=sys.stderr)
                meter.reset()
            if state.nonfinite_steps >= config.max_nonfinite_steps:
                raise UsageError(
                    f"{state.nonfinite_steps} steps in a row up to {state.step} had a loss or gradient that is not"
                    f" finite; resume from the last checkpoint in {output_dir} with a lower --learning_rate"
                )

            done = state.step == total_steps
            epoch_ends = state.step % plan.steps_per_epoch == 0 or done
            epoch = plan.epoch_of(step)
            seen, elapsed = seen + in_window, time.perf_counter() - since
            record: dict[str, float] = {}
            if (state.step % config.logging_steps == 0 or done) and finite:
                record = {**meter.means(accelerator), "lr": state.lr_scheduler.get_last_lr()[0], "grad_norm": norm}
            if (
                validate is not None
                and config.validation_steps
                and (state.step % config.validation_steps == 0 or done)
            ):
                with averaged_weights(state, model):
                    record |= validate(model)
            if record:
                shown |= {
                    name: f"{value:.3g}" for name, value in record.items() if "loss" in name and "_q" not in name
                }
                bar.set_postfix(epoch=epoch + 1, **shown, lr=f"{state.lr_scheduler.get_last_lr()[0]:.1e}")
                if accelerator.is_main_process:
                    append_jsonl(output_dir / "metrics.jsonl", {"step": state.step, "epoch": epoch + 1, **record})
                    timing = {"seconds": round(elapsed, 3), "images_per_second": round(seen / elapsed, 1)}
                    append_jsonl(output_dir / "timings.jsonl", {"step": state.step, **timing})
                accelerator.log({**record, "epoch": epoch + 1, "images_per_second": seen / elapsed}, step=state.step)
                since, seen = time.perf_counter(), 0
            bar.update(1)

            paused = time.perf_counter()
            if draw is not None and epoch_ends and (epoch % config.save_images_epochs == 0 or done):
                with averaged_weights(state, model):
                    draw(model, state.step)
            if save is not None and epoch_ends and (epoch % config.save_model_epochs == 0 or done):
                with averaged_weights(state, model):
                    if accelerator.is_main_process:
                        save(model)
                accelerator.wait_for_everyone()
            stopping = _any_rank(accelerator, stop.signal is not None)
            if state.step % config.checkpointing_steps == 0 or done or stopping:
                save_checkpoint(accelerator, state, output_dir, config.checkpoints_total_limit)
            since += time.perf_counter() - paused
            if stopping and not done:
                return False
    return True


def _known_norm(accelerator) -> bool:
    """Whether the gradient's norm is ours to judge: DeepSpeed clips and skips by itself."""
    return str(accelerator.distributed_type) != "DistributedType.DEEPSPEED"


def _any_rank(accelerator, flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)
