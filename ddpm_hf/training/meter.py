"""Losses, and their running means."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import gather_object

from ..common.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


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

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums = torch.zeros(2, 1 + len(self.groups), 2, device=self.device)

    def add(self, result: Losses, count: int, taken: torch.Tensor | None = None) -> None:
        """Take in the first `count` samples of a batch; nothing where `taken`, a bool on the device, is False."""
        pairs = _with_count(result.losses[:count], taken)  # [N, 2]
        values = torch.zeros_like(self.sums[0])
        values[0] = pairs.sum(0)
        if result.groups is not None:
            logged = pairs if result.logged is None else _with_count(result.logged[:count], taken)
            values[1:].index_add_(0, result.groups[:count].to(self.device), logged)
        sums, compensation = self.sums
        values = values - compensation
        total = sums + values
        self.sums = torch.stack([total, (total - sums) - values])

    def gathered(self, accelerator: "Accelerator") -> list:
        """Every rank's sums, for a checkpoint."""
        return accelerator.gather(self.sums[None]).tolist()

    def restore(self, gathered: list, accelerator: "Accelerator") -> None:
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

    def means(self, accelerator: "Accelerator") -> dict[str, float]:
        """The means over all ranks since the last reset; a group that saw nothing is left out."""
        gathered = accelerator.gather(self.sums[None]).cpu().double()
        sums = (gathered[:, 0] - gathered[:, 1]).sum(0).tolist()
        self.reset()
        return {name: s / n for name, (s, n) in zip(("loss", *self.groups), sums) if n}


def _with_count(losses: torch.Tensor, taken: torch.Tensor | None) -> torch.Tensor:
    """Losses [N] as pairs with a 1, float32 [N, 2]: their sum is the sum and the count; zeros if not `taken`."""
    losses = losses.detach().float()
    pairs = torch.stack([losses, torch.ones_like(losses)], dim=1)
    return pairs if taken is None else torch.where(taken, pairs, 0.0)


def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
    """Sums of all ranks added up, float64 on the CPU; all ranks take part."""
    return torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(0)
