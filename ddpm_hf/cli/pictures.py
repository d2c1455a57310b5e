"""What `ddpm-hf sample` writes."""

import functools
import io
from collections.abc import Callable
from pathlib import Path

PART = "samples"  # of the manifest of the folder
PATTERNS = ("#.png", "grid.png", "progressive.png", "chain.gif")


def check_out(out: Path) -> None:
    """Raise ValueError for a folder that cannot be written to, or with such files of somebody else's."""
    import os

    from ..training.ownership import check_replaceable

    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"--out {out} cannot be written; name another folder")
    check_replaceable(out, PART, PATTERNS, "out")


def write_pictures(images: list, frames: list, out: Path, grid_only: bool, progressive: bool) -> None:
    """A grid of PIL images, each of them, and their chains, in the place of what an earlier call wrote."""
    from ..data import image_grid
    from ..training.ownership import replace_files

    files: dict[str, Callable[[], bytes]] = {
        "grid.png": lambda: encoded(image_grid(images, scale=scale_of(images))),
    }
    if not grid_only:
        files |= {f"{index:04d}.png": functools.partial(encoded, image) for index, image in enumerate(images)}
    if progressive:
        moments = [frame.sample[:16] for frame in frames]
        files["progressive.png"] = lambda: encoded(strip_of(frames, images))
        files["chain.gif"] = lambda: animation(moments, scale_of(images))
    replace_files(out, PART, files)


def encoded(image) -> bytes:
    """A PIL image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scale_of(images: list) -> int:
    """How many times to enlarge images in a grid."""
    return max(1, 64 // images[0].width)


def strip_of(frames: list, images: list):
    """x̂_0 along the chains of the first images, as one image."""
    from ..data import image_grid

    shown = min(8, len(images))
    moments = frames[:: max(1, len(frames) // 10)][-9:] + frames[-1:]
    strip = [moment.prediction[index] for index in range(shown) for moment in moments]
    return image_grid(strip, columns=len(moments), scale=scale_of(images))


def on_white(image):
    """A PIL image without its alpha, for GIF."""
    from PIL import Image

    if image.mode not in ("LA", "RGBA"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def animation(frames: list[list], scale: int) -> bytes:
    """An animated GIF of a grid along the chain; the last frame stays a while."""
    from ..data import image_grid

    grids = [on_white(image_grid(images, scale=scale)).convert("P") for images in frames]
    buffer = io.BytesIO()
    durations = [100] * (len(grids) - 1) + [2000]
    grids[0].save(buffer, "GIF", save_all=True, append_images=grids[1:], duration=durations, loop=0)
    return buffer.getvalue()
