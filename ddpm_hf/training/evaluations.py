"""Figures that take long, such as those of samples: every few epochs, also after a stop that came in between."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Evaluation(NamedTuple):
    """Figures of a model that are computed every few epochs.

    Args:
        measure: the model in eval mode, with its EMA weights -> figures by their names; all ranks call it. It lets
            `InterruptedSamplingError` through, on all ranks.
        epochs: between evaluations; the last step is evaluated in any case.
        title: what it does, for people.
    """

    measure: Callable[[torch.nn.Module], dict[str, float]]
    epochs: int
    title: str
