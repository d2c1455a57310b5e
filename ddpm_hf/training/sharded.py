"""A model whose weights FSDP2 has sharded, with all weights on each rank where it is sampled from or saved."""

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded, on every rank; all take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class FullModel:
    """A copy of a model, made before it is sharded, which takes its weights to be sampled from or saved.

    Sampling from shards would make each rank wait for all others in each step, and not all sample equally many images.
    """

    def __init__(self, model: torch.nn.Module, parts: dict[str, torch.nn.Module]):
        self.model = copy.deepcopy(model)
        path_of = {id(module): path for path, module in model.named_modules()}
        self.parts = {name: self.model.get_submodule(path_of[id(part)]) for name, part in parts.items()}

    @torch.no_grad()
    def fill(self, sharded: torch.nn.Module, emas: dict, device: torch.device) -> torch.nn.Module:
        """Take the model's weights, and of the parts that have one their average; all ranks take part."""
        self.model.to(device)
        for parameter, shard in zip(self.model.parameters(), sharded.parameters(), strict=True):
            parameter.copy_(full(shard))
        for name, ema in emas.items():
            for parameter, shard in zip(self.parts[name].parameters(), ema.shadow_params, strict=True):
                parameter.copy_(full(shard))
        return self.model


@contextlib.contextmanager
def full_ema(ema: "EMAModel") -> Iterator["EMAModel"]:
    """An EMA with all of its weights on each rank; all take part."""
    shards = ema.shadow_params
    ema.shadow_params = [full(shard) for shard in shards]
    try:
        yield ema
    finally:
        ema.shadow_params = shards


def cut_like(values: list[torch.Tensor], shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors sharded as others are, where those are sharded."""
    from torch.distributed.tensor import distribute_tensor

    return [
        distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements)
        if isinstance(shard, DTensor)
        else value
        for value, shard in zip(values, shards, strict=True)
    ]
