"""A model whose weights FSDP2 has cut into shards, whole again where it is looked at or saved."""

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, whole on every rank; all take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WholeModel:
    """A copy of a model, made before it is sharded, that takes its weights to be looked at or saved.

    Sampling from shards would make each rank wait for all others in each step, and they do not draw equally many.
    """

    def __init__(self, model: torch.nn.Module, parts: dict[str, torch.nn.Module]):
        self.model = copy.deepcopy(model)
        places = {id(module): place for place, module in model.named_modules()}
        self.parts = {name: self.model.get_submodule(places[id(part)]) for name, part in parts.items()}

    @torch.no_grad()
    def fill(self, sharded: torch.nn.Module, emas: dict, device: torch.device) -> torch.nn.Module:
        """Take the model's weights, and of the parts that have one their average; all ranks take part."""
        self.model.to(device)
        for own, shard in zip(self.model.parameters(), sharded.parameters(), strict=True):
            own.copy_(whole(shard))
        for name, ema in emas.items():
            for own, shard in zip(self.parts[name].parameters(), ema.shadow_params, strict=True):
                own.copy_(whole(shard))
        return self.model


@contextlib.contextmanager
def whole_ema(ema: "EMAModel") -> "Iterator[EMAModel]":
    """An EMA with all of its weights on each rank; all take part."""
    shards = ema.shadow_params
    ema.shadow_params = [whole(shard) for shard in shards]
    try:
        yield ema
    finally:
        ema.shadow_params = shards


def cut_like(values: list[torch.Tensor], shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """Whole tensors cut as others are, where those are cut."""
    from torch.distributed.tensor import distribute_tensor

    return [
        distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements)
        if isinstance(shard, DTensor)
        else value
        for value, shard in zip(values, shards, strict=True)
    ]
