"""The comparison of what was observed, its solutions, what they say together, and the truth."""

from collections.abc import Sequence

import torch
from PIL import Image

from ..common.pictures import image_grid
from .figures import Summary
from .pictures import deviation_picture, on_white, picture

SHOWN = 4  # solutions of an image in a comparison


class Cells:
    """The pictures of one image in a comparison, by their titles."""

    def __init__(
        self, observed: Image.Image, solutions: torch.Tensor, summary: Summary, truth: torch.Tensor | None = None
    ):
        several = len(solutions) > 1
        self.pictures = [("observed", observed)]
        self.pictures += [("solution" if several else "restored", picture(one)) for one in solutions[:SHOWN]]
        if several:
            self.pictures += [
                ("mean", picture(summary.mean)),
                ("deviation", deviation_picture(summary.deviation)),
                ("5%", picture(summary.low)),
                ("95%", picture(summary.high)),
            ]
        if truth is not None:
            self.pictures.append(("truth", picture(truth)))


def comparison(rows: Sequence[Cells], names: Sequence[str] = ()) -> Image.Image:
    """A row for each image, with titles above, and names where there are several rows."""
    mode = "RGB" if any(image.mode != "L" for row in rows for _, image in row.pictures) else "L"
    cells = [on_white(image).convert(mode) for row in rows for _, image in row.pictures]
    titles = [title for title, _ in rows[0].pictures]
    legend = list(names) if len(rows) > 1 else None
    scale = max(1, 64 // cells[0].width)
    return image_grid(cells, len(titles), scale=scale, legend=legend, titles=titles)
