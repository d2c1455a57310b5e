"""Power-function averages of the weights, whose snapshots give an average of any width after training.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C: the
average at step t weighs the weights of step τ by τ^γ, and its width is its profile's standard deviation relative to t.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from ..common.files import write_atomically
from ..common.layout import EMA_SNAPSHOTS
from ..common.ownership import claim_files, listed, release_files, remove

WIDTHS = (0.05, 0.10)  # those that are kept while training


def exponent(std: float) -> float:
    """γ of a relative width: the positive root of σ² (γ + 2)² (γ + 3) = γ + 1 (Algorithm 2).

    >>> round(exponent(0.05), 2), round(exponent(0.10), 2)
    (16.97, 6.94)
    """
    t = std**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def relative_std(gamma: float) -> float:
    """The width of a γ: σ = √((γ + 1) / ((γ + 2)² (γ + 3))).

    >>> relative_std(exponent(0.05))
    0.05
    """
    return round(math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))), 12)


class PowerAverage:
    """The power-function average of a model's weights over steps, with the interface of Diffusers' EMAModel."""

    def __init__(self, std: float, parameters: Iterable[torch.nn.Parameter], device: torch.device):
        self.std, self.gamma = std, exponent(std)
        self.shadow_params = [one.detach().clone().to(device) for one in parameters]
        self.optimization_step = 0
        self.cur_decay_value = 0.0

    def get_decay(self, optimization_step: int) -> float:
        """β of the step t that has just been taken, from 1: (1 - 1/t)^(γ + 1)."""
        return (1 - 1 / optimization_step) ** (self.gamma + 1)

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.Tensor]) -> None:
        """Take in the weights after a step."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        values = [one.detach() for one in parameters]
        torch._foreach_lerp_(self.shadow_params, values, 1 - self.cur_decay_value)

    def tensors(self, part: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The averaged weights, by the names of the model's parameters."""
        names = [name for name, _ in part.named_parameters()]
        return {name: value.contiguous() for name, value in zip(names, self.shadow_params, strict=True)}

    def save(self, name: str, part: torch.nn.Module, path: Path) -> None:
        """Write the averaged weights, with the part's name, the width and the count of steps."""
        about = {"part": name, "std": repr(self.std), "step": str(self.optimization_step)}
        write_atomically(path, save(self.tensors(part), about))

    def load(self, part: torch.nn.Module, path: Path) -> None:
        """Take over what `save` wrote."""
        values = load_file(path)
        for name, kept in zip([name for name, _ in part.named_parameters()], self.shadow_params, strict=True):
            kept.copy_(values[name])
        self.optimization_step = int(read_about(path)["step"])


def read_about(path: Path) -> dict[str, str]:
    """What a file of averaged weights says of itself: `part`, `std` and `step`."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


# Snapshots


def snapshot_name(part: str, std: float, step: int) -> str:
    """Where an average of a step lies in a run's folder."""
    return f"{EMA_SNAPSHOTS}/{part}-{std:.3f}-{step:08d}.safetensors"


def write_snapshots(
    folder: Path, averages: Mapping[str, Sequence[PowerAverage]], parts: Mapping[str, torch.nn.Module], step: int
) -> None:
    """Write the averages of a step, of each part of the model."""
    names = {snapshot_name(part, one.std, step): (part, one) for part, ones in averages.items() for one in ones}
    claim_files(folder, list(names))
    (folder / EMA_SNAPSHOTS).mkdir(exist_ok=True)
    for name, (part, average) in names.items():
        average.save(part, parts[part], folder / name)


def drop_later_snapshots(folder: Path, step: int) -> None:
    """Remove the run's snapshots after a step: a run that goes on from there writes them anew."""
    ours = [name for name in listed(folder) if name.startswith(f"{EMA_SNAPSHOTS}/")]
    steps = {name: Path(name).stem.rpartition("-")[2] for name in ours}
    later = [name for name, number in steps.items() if number.isdecimal() and int(number) > step]
    for name in later:
        remove(folder, name)
    release_files(folder, later)
