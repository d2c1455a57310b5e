"""Exponential moving averages of weights: Diffusers' EMAModel, sampled with, saved and loaded."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

from ..common.files import write_atomically
from .flags import TrainingFlags
from .sharded import cut_like

SCALARS = "ema.json"  # where a model of transformers keeps what Diffusers' models keep in their config


def make_ema(flags: TrainingFlags, part: torch.nn.Module, device: torch.device) -> EMAModel:
    """The EMA of a part's weights, on its device, or on the CPU with --offload_ema.

    Its decay at a step is 1 - (1 + step / inv_gamma)^-power, within the minimum and the maximum.
    """
    ema = EMAModel(
        part.parameters(),
        decay=flags.ema_max_decay,
        min_decay=flags.ema_min_decay,
        use_ema_warmup=True,
        inv_gamma=flags.ema_inv_gamma,
        power=flags.ema_power,
        foreach=flags.foreach_ema,
        model_cls=type(part),
        model_config=part.config,
    )
    ema.pin_memory() if flags.offload_ema and device.type == "cuda" else ema.to(device)
    return ema


def update_ema(ema: EMAModel, part: torch.nn.Module) -> None:
    """Take in the part's weights after a step, wherever the average is kept."""
    device = ema.shadow_params[0].device
    ema.step([own.detach().to(device).requires_grad_(own.requires_grad) for own in part.parameters()])


def count_step(ema: EMAModel) -> None:
    """Count a step, which sets the average's decay; `move_average` then takes in the weights."""
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)


def move_average(ema: EMAModel, part: torch.nn.Module, share: torch.Tensor) -> None:
    """Move an average by a share of its way to the part's weights.

    Args:
        share: a number on the average's device: 1 - decay, or 0 for a step that was skipped.
    """
    moved = torch._foreach_sub([one.detach() for one in part.parameters()], ema.shadow_params)
    torch._foreach_mul_(moved, share)
    torch._foreach_add_(ema.shadow_params, moved)


@contextlib.contextmanager
def ema_weights(ema: EMAModel, part: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The part with its averaged weights; then with its own again."""
    ema.store(part.parameters())
    ema.copy_to(part.parameters())
    try:
        yield part
    finally:
        ema.restore(part.parameters())


@contextlib.contextmanager
def raw_weights(ema: EMAModel, part: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Within `ema_weights`: the part with its own weights; then with the averaged ones again."""
    ema.restore(part.parameters())
    try:
        yield part
    finally:
        ema.store(part.parameters())
        ema.copy_to(part.parameters())


def averages_by_itself(optimizer: Any) -> bool:
    """Whether an optimizer averages the weights, as schedule-free ones do."""
    return bool(optimizer.param_groups) and "train_mode" in optimizer.param_groups[0]


@contextlib.contextmanager
def optimizer_average(optimizer: Any) -> Iterator[None]:
    """Within, the weights are those that a schedule-free optimizer averages; then those that it trains, to the bit.

    Other optimizers average nothing.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # what Accelerate prepared
    if not averages_by_itself(optimizer) or not optimizer.param_groups[0]["train_mode"]:
        yield
        return
    parameters = [one.detach() for group in optimizer.param_groups for one in group["params"]]
    trained = [one.clone() for one in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        torch._foreach_copy_(parameters, trained)  # there and back rounds twice


def save_ema(ema: EMAModel, part: torch.nn.Module, folder: Path) -> None:
    """Write the averaged weights as a model of the part's kind, with the EMA's counters in a file next to it."""
    if isinstance(part, ModelMixin):
        ema.save_pretrained(folder)
        return
    with ema_weights(ema, part):
        part.save_pretrained(folder)
    scalars = {name: value for name, value in ema.state_dict().items() if name != "shadow_params"}
    write_atomically(folder / SCALARS, json.dumps(scalars, indent=1) + "\n")


def load_ema(ema: EMAModel, part: torch.nn.Module, folder: Path) -> None:
    """Take over the weights and the count of updates that `save_ema` wrote; how they decay is this run's."""
    before = ema.shadow_params
    if isinstance(part, ModelMixin):
        _, scalars = type(part).from_config(type(part).load_config(folder), return_unused_kwargs=True)
    else:
        scalars = json.loads((folder / SCALARS).read_text(encoding="utf-8"))
    averaged = type(part).from_pretrained(folder, use_safetensors=True)
    weights = [parameter.data for parameter in averaged.parameters()]
    ema.load_state_dict({"optimization_step": scalars["optimization_step"], "shadow_params": weights})
    ema.shadow_params = cut_like(ema.shadow_params, before)
    ema.to(before[0].device)
