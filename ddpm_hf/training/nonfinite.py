"""Steps whose loss or gradient is not finite: which samples, and when to give up."""

import math
from collections.abc import Callable

import torch
from accelerate.utils import gather_object

from ..common.errors import UsageError
from .flags import TrainingConfig


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
