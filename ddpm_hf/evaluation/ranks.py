"""The processes that share an evaluation."""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
LONGEST_WAIT = datetime.timedelta(days=1)  # for a rank that measures, or samples on a slower device


def _alone(value: Any) -> list:
    return [value]


class Ranks(NamedTuple):
    """This process among those that share the work; by default it is alone.

    Args:
        rank: of this process, from 0.
        world: how many there are.
        wait: returns once all of them have called it.
        gather: an object of each -> all of them, in the order of the ranks, on each.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], object] = lambda: None
    gather: Callable[[Any], list] = _alone

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of the items: every world-th."""
        return list(items[self.rank :: self.world])


def launched_ranks() -> Ranks:
    """The processes that `accelerate launch` or `torchrun` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    import torch
    from accelerate import PartialState

    return ranks_of(PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT))


def ranks_of(state: Any) -> Ranks:
    """The processes of an `accelerate.PartialState`, or of an `Accelerator`."""
    from accelerate.utils import gather_object

    return Ranks(
        state.process_index, state.num_processes, state.wait_for_everyone, lambda value: gather_object([value])
    )
