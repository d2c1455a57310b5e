"""The files of `ddpm-hf sample`: single images or an array, a grid, and the chains of some images."""

import functools
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

PART = "samples"  # of the folder's manifest
PATTERNS = ("#.png", "grid.png", "progressive.png", "chain.gif", "samples.npz")
MAX_GRID_IMAGES = 1024
GIF_IMAGES, STRIP_IMAGES = 16, 8  # images whose chains are shown


def check_out(out: Path, part: str = PART, patterns: Sequence[str] = PATTERNS) -> None:
    """Raise ValueError for a folder that cannot be written to, or that holds such files written by others.

    Args:
        part, patterns: as of `check_replaceable`.
    """
    from ..common.ownership import check_replaceable

    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"--out {out} cannot be written; name another folder")
    check_replaceable(out, part, patterns, "out")


def write_pictures(
    images: list,
    frames: list,
    out: Path,
    names: Sequence[str] = (),
    columns: int | None = None,
    singles: bool = True,
    arrays: dict | None = None,
) -> str:
    """Write a grid of PIL images and what else is requested, replacing the files of an earlier call.

    Args:
        frames: of the chains, for a strip and an animation; empty for none.
        names: labels of the images, in turn: a grid of several has a row for each, with a legend.
        singles: whether each image is a file.
        arrays: those of an npz file, by their names.

    Returns: a line that says what was written.
    """
    from ..common.ownership import replace_files

    shown = images[:MAX_GRID_IMAGES]
    files: dict[str, Callable[[], bytes]] = {"grid.png": lambda: encoded(grid(shown, names, columns))}
    if frames:
        files["progressive.png"] = lambda: encoded(strip_of(frames, images, names))
        files["chain.gif"] = lambda: animation([grid(frame.sample[:GIF_IMAGES], names) for frame in frames])
    if arrays:
        files["samples.npz"] = lambda: npz(arrays)
    others = ", ".join(files)
    if singles:
        files |= {f"{index:04d}.png": functools.partial(encoded, image) for index, image in enumerate(images)}
    replace_files(out, PART, files)
    few = f" (of the first {len(shown):,})" if len(images) > len(shown) else ""
    return f"{len(images):,} images in {out}: {others}{few}"


def encoded(image: "Image.Image") -> bytes:
    """A PIL image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def grid(images: list, names: Sequence[str] = (), columns: int | None = None) -> "Image.Image":
    """PIL images as one picture; with several names a row for each, image i having name i modulo their number."""
    from PIL import Image

    from ..common.pictures import image_grid

    rows = min(len(names), len(images))
    if rows < 2:
        return image_grid(images, columns, scale=scale_of(images))
    columns = -(-len(images) // rows)
    blank = Image.new(images[0].mode, images[0].size, "white")
    by_row = [images[row::rows] for row in range(rows)]
    cells = [image for row in by_row for image in row + [blank] * (columns - len(row))]
    return image_grid(cells, columns, scale=scale_of(images), legend=names[:rows])


def scale_of(images: list) -> int:
    """How many times to enlarge images in a grid."""
    return max(1, 64 // images[0].width)


def strip_of(frames: list, images: list, names: Sequence[str] = ()) -> "Image.Image":
    """x̂_0 along the chains of the first images, as one image."""
    from ..common.pictures import image_grid

    shown = min(STRIP_IMAGES, len(images))
    shown_frames = frames[:: max(1, len(frames) // 10)][-9:] + frames[-1:]
    strip = [frame.prediction[index] for index in range(shown) for frame in shown_frames]
    legend = [names[index % len(names)] for index in range(shown)] if len(names) > 1 else None
    return image_grid(strip, columns=len(shown_frames), scale=scale_of(images), legend=legend)


def on_white(image: "Image.Image") -> "Image.Image":
    """A PIL image without its alpha, for GIF."""
    from PIL import Image

    if image.mode not in ("LA", "RGBA"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def animation(grids: list) -> bytes:
    """PIL pictures as an animated GIF; the last one is shown longer."""
    frames = [on_white(picture).convert("P") for picture in grids]
    buffer = io.BytesIO()
    durations = [100] * (len(frames) - 1) + [2000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()


def adm_arrays(images: list, labels: Sequence[int]) -> dict:
    """PIL images as ADM's evaluation suite reads them: arr_0, uint8 [N, H, W, C]; of labels arr_1, int64 [N]."""
    import numpy as np

    arrays = {"arr_0": np.stack([np.atleast_3d(np.asarray(image)) for image in images])}
    return arrays | ({"arr_1": np.asarray(labels, dtype=np.int64)} if len(labels) else {})


def npz(arrays: dict) -> bytes:
    """Arrays as the content of an npz file."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
