"""Small pictures, and datasets, folders and models to train on them."""

import contextlib
import io
import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ddpm_hf.data.rows import Rows


def encoded(image, form: str = "PNG", **options) -> bytes:
    """A picture, PIL or array, as the bytes of a file."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def random_pixels(count: int, height: int = 12, width: int = 10, seed: int = 0) -> np.ndarray:
    """Colour noise: uint8 [count, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def image_rows(files: list[bytes], column: str = "image", **more: list) -> datasets.Dataset:
    """A dataset with an image column, of encoded pictures, and whatever other columns."""
    features = datasets.Features({column: datasets.Image()})
    rows = datasets.Dataset.from_dict({column: [{"bytes": one, "path": None} for one in files]}, features=features)
    for name, values in more.items():
        rows = rows.add_column(name, values)
    return rows


def write_rows(folder: Path, files: list[bytes], column: str = "image", **more: list) -> Path:
    """A `save_to_disk` folder of encoded pictures."""
    with quiet():
        image_rows(files, column, **more).save_to_disk(str(folder))
    return folder


def write_images(folder: Path, pixels: np.ndarray, name: str = "{}.png") -> Path:
    """A folder of PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(pixels):
        (folder / name.format(number)).write_bytes(encoded(one))
    return folder


def plain_rows(count: int = 8, **options) -> Rows:
    """Rows of colour noise, in memory."""
    files = [encoded(pixels) for pixels in random_pixels(count, **options)]
    rows = image_rows(files).cast_column("image", datasets.Image(decode=False))
    return Rows(rows, "noise", "image")


TINY_UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": None,
}


def write_unet(folder: Path, without: tuple[str, ...] = (), **changed) -> Path:
    """The config of a UNet small enough to train in a blink, with some of its arguments changed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in {**TINY_UNET, **changed}.items() if name not in without}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def quiet():
    """Without the progress bars of datasets."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
