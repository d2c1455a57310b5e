"""What `ddpm-hf restore` writes: pictures, and a table of figures."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pictures import encoded

if TYPE_CHECKING:
    import torch

    from ..restoration.problems import Picture

PART = "restored"  # of the folder's manifest
SHARED = ("comparison.png", "restored.json")
VIEWS = ("#.png", "observed.png", "mean.png", "deviation.png", "low.png", "high.png")  # of each image
SHOWN_ROWS = 32  # images in a comparison


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as text: a line for each image, and their mean where there are several."""
    names = [name for name in rows[0] if name not in ("image", "solutions")]
    lines = [[row["image"], *(f"{row[name]:.4g}" for name in names)] for row in rows]
    if len(rows) > 1:
        lines.append(["mean", *(f"{sum(row[name] for row in rows) / len(rows):.4g}" for name in names)])
    lines.insert(0, ["image", *names])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines)


def write_restored(
    out: Path,
    pictures: Sequence["Picture"],
    solutions: Sequence["torch.Tensor"],
    rows: Sequence[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """Write the solutions, their summaries, a comparison and the figures, replacing the files of an earlier call.

    Args:
        solutions: of each picture, [S, C, H, W] in [0, 1].
        settings: of the call, for restored.json.
    """
    from ..common.ownership import replace_files
    from ..restoration import comparison
    from ..restoration import pictures as made
    from ..restoration.figures import summarize

    files: dict[str, Callable[[], bytes]] = {}
    cells = []
    for picture, several in zip(pictures, solutions):
        folder = f"{picture.name}/" if len(pictures) > 1 else ""
        summary = summarize(several)
        views = {f"{index:04d}": made.picture(one) for index, one in enumerate(several)}
        views["observed"] = made.observed_picture(picture.y[0], picture.operator)
        if len(several) > 1:
            views["mean"], views["deviation"] = made.picture(summary.mean), made.deviation_picture(summary.deviation)
            views["low"], views["high"] = made.picture(summary.low), made.picture(summary.high)
        files |= {f"{folder}{name}.png": functools.partial(encoded, view) for name, view in views.items()}
        truth = None if picture.truth is None else picture.truth / 2 + 0.5
        cells.append(comparison.Cells(views["observed"], several, summary, truth))
    same = [one for one in cells[:SHOWN_ROWS] if one.pictures[0][1].size == cells[0].pictures[0][1].size]
    names = [picture.name for picture, one in zip(pictures, cells) if one in same]
    files["comparison.png"] = lambda: encoded(comparison.comparison(same, names))
    report = {"settings": settings, "images": list(rows)}
    files["restored.json"] = lambda: (json.dumps(report, indent=1) + "\n").encode()
    replace_files(out, PART, files)
