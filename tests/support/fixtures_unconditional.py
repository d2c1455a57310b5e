"""What the tests of data, flags and bad input share: tiny images, a tiny UNet, and runs of the script in-process."""

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import train_unconditional


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


# A run of four steps; {shop} holds datasets and models
BASE = {
    "train_data_dir": "{shop}/photos", "model_config_name_or_path": "{shop}/tiny", "resolution": 8,
    "train_batch_size": 4, "num_epochs": 2, "ddpm_num_inference_steps": 2, "eval_batch_size": 1, "cpu_threads": 1,
    "seed": 0, "logger": "none", "lr_warmup_steps": 0, "logging_steps": 1,
}  # fmt: skip


def fill(flags: dict, shop: Path) -> dict:
    """Flags with the place of datasets and models filled in."""
    return {name: value.format(shop=shop) if isinstance(value, str) else value for name, value in flags.items()}


class Run(NamedTuple):
    """What a run of the script left behind."""

    code: int  # 0 or the exit code
    out: str
    err: str
    folder: Path  # --output_dir

    def files(self) -> list[str]:
        """All files in the output folder, relative to it."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def json(self, name: str) -> dict:
        """A JSON file of the output folder."""
        return json.loads((self.folder / name).read_text())

    def error(self) -> str:
        """The one line that says what is wrong, at the beginning of a line of its own."""
        lines = [line for line in self.err.splitlines() if re.match(r"\S+: error: ", line)]
        assert len(lines) == 1, f"want one line of error, on a line of its own, in: {self.err!r}"
        return lines[0]


def words(flags: dict) -> list[str]:
    """Flags and values as a command line; True is a switch, None leaves a flag out, a list is several words."""
    chosen = {name: value for name, value in flags.items() if value is not None and value is not False}
    said = {
        name: value if isinstance(value, (list, tuple)) else [value] * (value is not True)
        for name, value in chosen.items()
    }
    return [word for name, values in said.items() for word in (f"--{name}", *map(str, values))]


def run_script(argv: list[str], folder: Path) -> Run:
    """`train_unconditional.main(argv)` in this process, with all that it sets globally put back afterwards."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    verbosity, threads = diffusers_logging.get_verbosity(), torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ),
        torch.random.fork_rng(),
        quiet(),
    ):
        try:
            train_unconditional.main(argv)
        except SystemExit as end:
            code = end.code or 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            diffusers_logging.set_verbosity(verbosity)
            torch.set_num_threads(threads)
    return Run(code, out.getvalue(), err.getvalue(), Path(folder))


def parse(argv: list[str]) -> train_unconditional.UnconditionalConfig:
    """The settings that a command line stands for."""
    return train_unconditional.parse_layers(
        train_unconditional.UnconditionalConfig, argv, train_unconditional.weaker_layers
    )
