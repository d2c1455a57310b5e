"""What `ddpm-hf sample` writes: single images or an array, a grid, and the chains of some."""

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

MOST_IN_GRID = 1024
ANIMATED, CHAINS = 16, 8  # images whose chains the GIF and the strip show


def check_writable(out: Path) -> None:
    """Raise ValueError for a folder that cannot be made or written to."""
    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"--out {out} cannot be written; name another folder")


class Album:
    """The files of a call, written as the images come.

    Args:
        names: labels of the images, in turn: a grid of several has a row for each, with a legend.
        singles: whether each image is a file.
        pixels: whether to keep the images' pixels, for `save_npz`.
    """

    def __init__(self, out: Path, names: Sequence[str] = (), singles: bool = True, pixels: bool = False):
        self.out, self.names, self.singles = out, list(names), singles
        self.count, self.pixels = 0, [] if pixels else None
        self.images = []  # those of the grid, PIL
        self.written = []

    def add(self, images: list) -> None:
        """Write the next images."""
        import numpy as np

        from ..saving import save_image

        if self.singles:
            for index, image in enumerate(images, self.count):
                save_image(image, self.out / f"{index:04d}.png")
        if self.pixels is not None:
            self.pixels += [np.atleast_3d(np.asarray(image)) for image in images]  # [H, W, C]
        self.count += len(images)
        self.images += images[: MOST_IN_GRID - len(self.images)]

    def save_grid(self, columns: int | None = None) -> None:
        """All images as one picture, or the first of very many."""
        from ..saving import save_image

        save_image(grid(self.images, self.names, columns), self.out / "grid.png")
        self.written.append("grid.png" + (f" (the first {len(self.images):,})" if self.count > MOST_IN_GRID else ""))

    def save_chains(self, frames: list) -> None:
        """A strip of x̂_0 along the chains of the first images, and an animated GIF of x_t."""
        from ..data import image_grid
        from ..saving import save_image

        shown = min(CHAINS, len(self.images))
        moments = frames[:: max(1, len(frames) // 10)][-9:] + frames[-1:]
        strip = [moment.prediction[index] for index in range(shown) for moment in moments]
        legend = [self.names[index % len(self.names)] for index in range(shown)] if len(self.names) > 1 else None
        scale = scale_of(self.images)
        picture = image_grid(strip, columns=len(moments), scale=scale, legend=legend)
        save_image(picture, self.out / "progressive.png")
        write_animation([grid(frame.sample[:ANIMATED], self.names) for frame in frames], self.out / "chain.gif")
        self.written += ["progressive.png", "chain.gif"]

    def save_npz(self, labels: Sequence[int]) -> None:
        """All images as ADM's evaluation suite reads them: arr_0, uint8 [N, H, W, C]; of labels arr_1, int64 [N]."""
        import numpy as np

        arrays = [np.stack(self.pixels)] + ([np.asarray(labels, dtype=np.int64)] if len(labels) else [])
        self.out.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self.out, prefix=".samples.npz.", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, *arrays)
            os.chmod(partial, 0o644)
            os.replace(partial, self.out / "samples.npz")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        self.written.append("samples.npz")

    def summary(self) -> str:
        """What was written, for people."""
        singles = [f"0000.png to {self.count - 1:04d}.png" if self.count > 1 else "0000.png"] * self.singles
        return f"{self.count:,} image{'s'[: self.count != 1]} in {self.out}: {', '.join(singles + self.written)}"

    def left(self) -> str:
        """What is on disk if the work stops here."""
        if self.count and self.singles:
            return f"{self.count:,} finished images are in {self.out}"
        return f"nothing was written to {self.out}"


def grid(images: list, names: Sequence[str] = (), columns: int | None = None):
    """PIL images as one picture; a row for each of several names, which the images have in turn."""
    from PIL import Image

    from ..data import image_grid

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


def on_white(image):
    """A PIL image without its alpha, for GIF."""
    from PIL import Image

    if image.mode not in ("LA", "RGBA"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def write_animation(grids: list, path: Path) -> None:
    """PIL pictures as an animated GIF; the last one stays a while."""
    from ..training.checkpointing import write_whole

    frames = [on_white(picture).convert("P") for picture in grids]
    buffer = io.BytesIO()
    durations = [100] * (len(frames) - 1) + [2000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_whole(path, buffer.getvalue())
