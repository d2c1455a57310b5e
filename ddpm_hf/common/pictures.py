"""Grids of images with legends, and writing pictures."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .files import write_atomically

LEGEND_LINE = 24  # characters in a line of a grid's label
LEGEND_FONT = 12  # pixels


def image_grid(
    images: list[Image.Image],
    columns: int | None = None,
    scale: int = 1,
    gap: int = 2,
    legend: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
) -> Image.Image:
    """PIL images of one size as one picture, row by row, enlarged `scale` times without smoothing.

    Args:
        columns: how many images are in a row; by default the picture is about as wide as high.
        legend: one label for each row, written at its left; long ones are wrapped, and cut off where the row ends.
        titles: one label for each column, written above it and cut off at its width.

    >>> image_grid([Image.new("L", (8, 8))] * 6, columns=3, gap=1).size
    (28, 19)
    >>> image_grid([Image.new("L", (24, 8))] * 12, gap=1).size
    (51, 55)
    """
    columns = columns or math.ceil(math.sqrt(len(images) * images[0].height / images[0].width))
    rows = -(-len(images) // columns)
    width, height = images[0].width * scale, images[0].height * scale
    labels = [_label(text, height) for text in legend or []]
    left = max((label.width + 2 * gap for label in labels), default=0)
    heads = [_label(text, 0) for text in titles or []]
    heads = [head.crop((0, 0, min(width, head.width), head.height)) for head in heads]
    above = LEGEND_FONT + 4 if heads else 0
    size = (left + gap + columns * (width + gap), above + gap + rows * (height + gap))
    canvas = Image.new(images[0].mode, size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (left + gap + column * (width + gap), above + gap + row * (height + gap)))
    for row, label in enumerate(labels[:rows]):
        top = above + gap + row * (height + gap) + max(0, height - label.height) // 2
        canvas.paste(label.convert(canvas.mode), (left - gap - label.width, top))
    for column, head in enumerate(heads):
        canvas.paste(head.convert(canvas.mode), (left + gap + column * (width + gap), gap))
    return canvas


def _label(text: str, max_height: int) -> Image.Image:
    """A text in black on white, wrapped, no higher than `max_height` if one line fits.

    Characters that the font lacks become boxes.
    """
    import matplotlib

    # has more scripts than Pillow's default font, and comes with matplotlib
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", LEGEND_FONT)
    text = text.encode("utf-8", "replace").decode("utf-8")
    lines = textwrap.wrap(text, LEGEND_LINE, max_lines=max(1, max_height // (LEGEND_FONT + 4)), placeholder="…")
    text = "\n".join(lines)
    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    label = Image.new("L", (max(1, math.ceil(right)), max(1, math.ceil(bottom))), "white")
    ImageDraw.Draw(label).multiline_text((0, 0), text, "black", font)
    return label


def save_image(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PIL picture atomically, in the format of its suffix; `text` is a PNG's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"pnginfo": PngImagePlugin.PngInfo()} if text else {}
    for name, value in (text or {}).items():
        options["pnginfo"].add_text(name, value)
    image.save(buffer, format=path.suffix[1:].upper(), **options)
    write_atomically(path, buffer.getvalue())
