"""What a metric is, and what it gives: a figure with its 95% interval."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..protocols import Protocol
from .least import two


@dataclass(frozen=True)
class Figure:
    """A value with its 95% confidence interval.

    Args:
        value: in the metric's unit.
        low: lower end of the interval.
        high: upper end of the interval.
        interval: how the interval was computed.
        details: further numbers of the computation, such as the spread over subsets; JSON takes them.
        note: what a reader should know beside the value, in a few words.
    """

    value: float
    low: float
    high: float
    interval: str
    details: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`.

    Args:
        name: as in `--metrics`.
        label: as in tables.
        unit: of the value; empty for a number without unit.
        lower_is_better: which direction is better; None if neither is.
        needs: what it compares: a part of `Features` ("pool", "spatial", "logits"), or "images", that is what
            `summary` makes of them; with "+train" also that of the training images.
        home: module of this package and its function, "frechet:fid"; imported when it is used.
        least: how many samples each set must have, by protocol.
        summary_home: likewise, of the function that makes a row [n, ...] of each of a batch of images, uint8
            [n, C, H, W].
        picture_home: likewise, of the function that plots the rows of `summary` of real and of generated images.
    """

    name: str
    label: str
    unit: str
    lower_is_better: bool | None
    needs: str
    home: str
    least: Callable[[Protocol], int] = two
    summary_home: str | None = None
    picture_home: str | None = None

    @property
    def title(self) -> str:
        """The label with the unit, such as "colour shift (levels)"."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def function(self) -> Callable[..., Figure]:
        """`function(real, generated, protocol, seed) -> Figure`, of two `Features`, or of rows of `summary`.

        Where training images are needed too, with `train` and `train_labels`. Raises DataError for features that are
        not finite, too few, or of different dimensions.
        """
        return imported(self.home)

    @property
    def summary(self) -> Callable[..., Any] | None:
        """`summary(images) -> rows`, of a batch of images; None for a metric of features."""
        return imported(self.summary_home) if self.summary_home else None

    @property
    def picture(self) -> Callable[..., Any] | None:
        """`picture(real, generated) -> matplotlib's Figure`, of rows of `summary`; None if there is none."""
        return imported(self.picture_home) if self.picture_home else None


def imported(home: str) -> Callable[..., Any]:
    """The function of a module of this package, "module:function"."""
    module, name = home.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)
