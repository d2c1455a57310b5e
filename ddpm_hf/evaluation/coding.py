"""Progressive lossy coding: how many bits an image costs until it is how similar (Ho et al. 2020, sec. 4.3).

A receiver that holds x_t was sent the prior's term and the terms of all steps above t; its best guess is x̂_0(x_t).
After the decoder's term it holds the image itself, at the rate of the whole bound.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .bound import Bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 127.5  # levels of 0..255 in a unit of [-1, 1]


@dataclass(frozen=True)
class Coding:
    """Rate against distortion along the chain, in the order in which an image is received: P points.

    The last point is the image itself: timestep -1, the rate of the whole bound, and no distortion. The one before is
    x̂_0 at the last step, with which the paper's table 4 ends.
    """

    timesteps: np.ndarray  # [P], descending
    steps: np.ndarray  # [P], of the reverse process, done until x_t is known; S for the image itself
    rate: np.ndarray  # [P], bits/dim received until x_t is known, the prior's term included
    distortion: np.ndarray  # [P], the RMSE of x̂_0(x_t), over all elements of all images
    rate_unit: str
    distortion_unit: str

    def rows(self, count: int = 11) -> list[dict[str, Any]]:
        """The end and `count` points evenly spaced over the reverse process, the most complete first (table 4)."""
        targets = np.linspace(self.steps[-2], 0, count)
        nearest = {int(np.argmin(np.abs(self.steps[:-1] - target))) for target in targets}
        points = self.points()
        return [points[i] for i in [-1, *sorted(nearest, reverse=True)]]

    def points(self) -> list[dict[str, Any]]:
        """All points in the order received: `t`, `steps`, `rate` and `distortion`."""
        columns = zip(self.timesteps, self.steps, self.rate, self.distortion)
        return [{"t": int(t), "steps": int(n), "rate": float(r), "distortion": float(d)} for t, n, r, d in columns]

    def as_dict(self) -> dict[str, Any]:
        """Points and units, for JSON."""
        return {"rate_unit": self.rate_unit, "distortion_unit": self.distortion_unit, "points": self.points()}

    def table(self, count: int = 11) -> str:
        """`rows` as lines of text."""
        lines = [f"| reverse steps | rate ({self.rate_unit}) | distortion (RMSE, {self.distortion_unit}) |"]
        lines += ["|---|---|---|"]
        for row in self.rows(count):
            name = "the image itself" if row["t"] < 0 else row["steps"]
            lines.append(f"| {name} | {row['rate']:.5f} | {row['distortion']:.5f} |")
        return "\n".join(lines)

    def figure(self) -> "Figure":
        """The three plots of the paper's figure 5."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        panels = (
            (self.steps, self.distortion, "reverse steps", f"distortion (RMSE, {self.distortion_unit})"),
            (self.steps, self.rate, "reverse steps", f"rate ({self.rate_unit})"),
            (self.rate, self.distortion, f"rate ({self.rate_unit})", f"distortion (RMSE, {self.distortion_unit})"),
        )
        for axes, (x, y, x_label, y_label) in zip(figure.subplots(1, 3), panels):
            axes.plot(x, y, marker="." if len(x) < 60 else None)
            axes.set(xlabel=x_label, ylabel=y_label)
            axes.grid(alpha=0.3)
        return figure


def progressive_coding(bound: Bound) -> Coding:
    """The coding that a bound's parts describe; of a bound from few calls, at the timesteps that were evaluated.

    The rate at the end is the bound: `rate[-1]` equals `bound.bits_per_dim`.
    """
    prior = float(bound.prior.mean())
    received = prior + np.concatenate([np.cumsum(bound.shares[::-1])[::-1], [0.0]])  # [S + 1]: t's own term included
    seen = np.flatnonzero(bound.visits)[::-1]
    scale, unit = (1.0, "latent units") if bound.latent else (LEVELS, "0..255")
    last = len(bound.timesteps) - 1
    return Coding(
        np.append(bound.timesteps[seen], -1),
        np.append(last - seen, last + 1),
        np.append(received[1:][seen], received[0]),
        np.append(scale * np.sqrt(bound.x_start_mse[seen]), 0.0),
        bound.unit,
        unit,
    )
