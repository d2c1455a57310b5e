"""What a run consists of, and what of it a checkpoint holds."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.errors import UsageError
from .averaging import averages_by_itself, ema_weights, load_ema, optimizer_average, save_ema
from .meter import Meter
from .power_averages import PowerAverage
from .sessions import Sessions
from .sharded import FullModel, full_ema

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class TrainingState:
    """What a run consists of. `extra` holds more objects with a `state_dict()` of tensors that belong to it."""

    model: torch.nn.Module  # as prepared by Accelerate
    parts: dict[str, torch.nn.Module]  # what of it is saved, by the name of its folder
    emas: dict[str, Any]  # a part's EMA, by the same name; empty without EMA
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    meter: Meter
    sessions: Sessions
    power: dict[str, list[PowerAverage]] = field(default_factory=dict)  # those of a part; empty without snapshots
    extra: dict[str, Any] = field(default_factory=dict)
    step: int = 0  # optimizer steps taken
    nonfinite_steps: int = 0  # skipped, in a row
    grid_due: bool = False  # pictures of this step that a stop prevented
    evaluation_due: bool = False  # figures of this step that a stop prevented
    full: FullModel | None = None  # where the model is sharded
    figures: dict[str, float] = field(default_factory=dict)  # those logged last, without the learning rate
    first_pass: float = 0.0  # seconds of the first batch, forward and backward, before training
    given_up: set[str] = field(default_factory=set)  # files that are no longer written
    facts: dict[str, Any] = field(default_factory=dict)  # what a resumed run must share; into the manifest

    @property
    def averages(self) -> list[tuple[Any, torch.nn.Module]]:
        """All averages of the weights that a step moves, each with its part of the model."""
        powers = [(one, self.parts[name]) for name, ones in self.power.items() for one in ones]
        return [(ema, self.parts[name]) for name, ema in self.emas.items()] + powers

    @property
    def full_parts(self) -> dict[str, torch.nn.Module]:
        """The parts that can be called and saved by one rank alone."""
        return self.parts if self.full is None else self.full.parts


def register_model_hooks(accelerator: "Accelerator", state: TrainingState) -> None:
    """Make Accelerate's checkpoints hold each part as Diffusers does: under `NAME/`, its EMA under `NAME_ema/`."""

    def save(models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        if state.full is not None:
            state.full.fill(state.model, {}, accelerator.device)
        for name, part in state.full_parts.items():
            with full_ema(state.emas[name]) if name in state.emas else contextlib.nullcontext() as ema:
                if accelerator.is_main_process:
                    part.save_pretrained(Path(output_dir) / name)
                if accelerator.is_main_process and ema is not None:
                    save_ema(ema, part, Path(output_dir) / f"{name}_ema")
        if accelerator.is_main_process:
            save_other_averages(state, Path(output_dir))
        while weights:  # what is left here Accelerate would save again
            weights.pop()

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        models.clear()  # what is left here Accelerate would load by itself
        for name, part in state.parts.items():
            if state.full is None:  # else Accelerate has loaded the shards
                loaded = type(part).from_pretrained(Path(input_dir) / name, use_safetensors=True)
                part.load_state_dict(loaded.state_dict())
            folder = Path(input_dir) / f"{name}_ema"
            if name in state.emas:
                if not folder.is_dir():
                    raise UsageError(f"{input_dir} has no EMA; resume without --use_ema, or train anew")
                load_ema(state.emas[name], part, folder)
            elif folder.is_dir() and not averages_by_itself(state.optimizer):
                raise UsageError(f"{input_dir} has an EMA, which would be lost; resume with --use_ema")

            load_power_averages(state, name, Path(input_dir) / f"{name}_power")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_other_averages(state: TrainingState, folder: Path) -> None:
    """Write the power averages, under `NAME_power/`, and a schedule-free optimizer's as an EMA."""
    for name, ones in state.power.items():
        (folder / f"{name}_power").mkdir(parents=True, exist_ok=True)
        for one in ones:
            one.save(name, state.parts[name], folder / f"{name}_power" / f"{one.std:.3f}.safetensors")
    if averages_by_itself(state.optimizer):
        with optimizer_average(state.optimizer):
            for name, part in state.parts.items():
                part.save_pretrained(folder / f"{name}_ema")


def load_power_averages(state: TrainingState, name: str, folder: Path) -> None:
    """Take over the power averages of a part.

    Raises:
        UsageError: the checkpoint has none and the run does, or the reverse.
    """
    if folder.is_dir() and name not in state.power:
        raise UsageError(f"{folder} would be lost; resume with --ema_snapshot_steps")
    for one in state.power.get(name, []):
        path = folder / f"{one.std:.3f}.safetensors"
        if not path.is_file():
            raise UsageError(f"{folder.parent} has no power averages; resume without --ema_snapshot_steps")
        one.load(state.parts[name], path)


def unwrap(accelerator: "Accelerator", model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, without what Accelerate and torch.compile put around it."""
    model = accelerator.unwrap_model(model)
    return model._orig_mod if hasattr(model, "_orig_mod") else model


def set_rates(state: TrainingState, settings: list[dict[str, Any]]) -> None:
    """Give the optimizer these settings of its groups, and the learning rates of the schedule's step.

    A learning rate is the base rate of the settings times the schedule's factor at the step: another base rate,
    warm-up or kind of schedule counts from this step on, as if it had been chosen from the beginning.
    """
    schedule = state.lr_scheduler
    schedule._last_lr = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)
    ]
    for group, options, rate in zip(state.optimizer.param_groups, settings, schedule._last_lr, strict=True):
        group.update({**options, "lr": rate})


@contextlib.contextmanager
def averaged_weights(state: TrainingState, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model in eval mode, with its averaged weights if there are any; then all as it was. All ranks take part."""
    if state.full is not None:
        yield state.full.fill(state.model, state.emas, next(state.model.parameters()).device).eval()
        return
    training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        stack.enter_context(optimizer_average(state.optimizer))
        for name, ema in state.emas.items():
            stack.enter_context(ema_weights(ema, state.parts[name]))
        try:
            yield model
        finally:
            model.train(training)


class Snapshot:
    """What steps that are skipped change after all, to put it back; weights, moments and EMA they leave alone."""

    def __init__(self, state: TrainingState):
        self.step = state.step
        self.schedule = state.lr_scheduler.state_dict().copy()
        self.rates = [group["lr"] for group in state.optimizer.param_groups]
        self.extra = {
            name: {key: value.clone() for key, value in one.state_dict().items()} for name, one in state.extra.items()
        }

    def put_back(self, state: TrainingState) -> None:
        """Make the state that of before the steps that were skipped."""
        state.step, state.nonfinite_steps, state.grid_due, state.evaluation_due = self.step, 0, False, False
        state.lr_scheduler.load_state_dict(self.schedule)
        for group, rate in zip(state.optimizer.param_groups, self.rates):
            group["lr"] = rate
        for name, one in state.extra.items():
            one.load_state_dict(self.extra[name])
