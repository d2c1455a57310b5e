"""What `ddpm-hf sample` writes."""

import io
from pathlib import Path


def check_writable(out: Path) -> None:
    """Raise ValueError for a folder that cannot be made or written to."""
    import os

    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"--out {out} cannot be written; name another folder")


def write_images(images: list, out: Path, grid_only: bool) -> None:
    """The grid of PIL images, and each of them."""
    from ..data import image_grid
    from ..saving import save_image

    save_image(image_grid(images, scale=scale_of(images)), out / "grid.png")
    if not grid_only:
        for index, image in enumerate(images):
            save_image(image, out / f"{index:04d}.png")


def scale_of(images: list) -> int:
    """How many times to enlarge images in a grid."""
    return max(1, 64 // images[0].width)


def write_chains(frames: list, images: list, out: Path) -> None:
    """A strip of x̂_0 along the chains of the first images, and an animated GIF of x_t."""
    from ..data import image_grid
    from ..saving import save_image

    shown, scale = min(8, len(images)), scale_of(images)
    moments = frames[:: max(1, len(frames) // 10)][-9:] + frames[-1:]
    strip = [moment.prediction[index] for index in range(shown) for moment in moments]
    save_image(image_grid(strip, columns=len(moments), scale=scale), out / "progressive.png")
    write_animation([frame.sample[:16] for frame in frames], out / "chain.gif", scale)


def on_white(image):
    """A PIL image without its alpha, for GIF."""
    from PIL import Image

    if image.mode not in ("LA", "RGBA"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def write_animation(frames: list[list], path: Path, scale: int) -> None:
    """An animated GIF of a grid along the chain; the last frame stays a while."""
    from ..data import image_grid
    from ..training.checkpointing import write_whole

    grids = [on_white(image_grid(images, scale=scale)).convert("P") for images in frames]
    buffer = io.BytesIO()
    durations = [100] * (len(grids) - 1) + [2000]
    grids[0].save(buffer, "GIF", save_all=True, append_images=grids[1:], duration=durations, loop=0)
    write_whole(path, buffer.getvalue())
