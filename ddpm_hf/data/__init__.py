"""From images on disk or on the Hub to tensors in [-1, 1], by way of Hugging Face datasets.

A dataset is read as rows whose images are still encoded (`reading`, `rows`), so that a broken one can be named.
`prepare_image` brings any image or array to the model's channels and one scale (`pixels`); `ImageTransform` resizes,
crops and flips (`images`); `ImageDataset` puts both behind torch's DataLoader and keeps small datasets decoded
(`dataset`). A column of labels becomes class names and ids (`labels`).

The names are imported when they are first used, so that `--help`, which needs the flags alone, is quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..common.errors import DataError
    from ..common.pictures import image_grid
    from .dataset import ImageDataset, RowDecoder, StreamingBatches, describe_pixels, identity, should_cache
    from .digits import CAPTION_COLUMN, DIGIT_CAPTIONS, DIGIT_NAMES, EMBEDDED_DATASET, IMAGE_COLUMN, embedded_digits
    from .errors import broken_image, unreadable
    from .flags import DataFlags
    from .images import ImageTransform, augmentation_uniforms, choose_caption, decode_row, to_model_range
    from .labels import classes_of_resumed, label_ids, label_warnings, trained_classes
    from .pixels import prepare_image
    from .reading import load_rows, read_dataset
    from .rows import Rows, split_rows
    from .texts import check_captions, count_empty

_HOMES = {
    "dataset": ("ImageDataset", "RowDecoder", "StreamingBatches", "describe_pixels", "identity", "should_cache"),
    "digits": (
        "CAPTION_COLUMN",
        "DIGIT_CAPTIONS",
        "DIGIT_NAMES",
        "EMBEDDED_DATASET",
        "IMAGE_COLUMN",
        "embedded_digits",
    ),
    "..common.errors": ("DataError",),
    "errors": ("broken_image", "unreadable"),
    "flags": ("DataFlags",),
    "images": (
        "ImageTransform",
        "augmentation_uniforms",
        "choose_caption",
        "decode_row",
        "to_model_range",
    ),
    "..common.pictures": ("image_grid",),
    "labels": ("classes_of_resumed", "label_ids", "label_warnings", "trained_classes"),
    "pixels": ("prepare_image",),
    "reading": ("load_rows", "read_dataset"),
    "rows": ("Rows", "split_rows"),
    "texts": ("check_captions", "count_empty"),
}

__all__ = [
    "CAPTION_COLUMN",
    "DIGIT_CAPTIONS",
    "DIGIT_NAMES",
    "EMBEDDED_DATASET",
    "IMAGE_COLUMN",
    "DataError",
    "DataFlags",
    "ImageDataset",
    "ImageTransform",
    "RowDecoder",
    "Rows",
    "StreamingBatches",
    "augmentation_uniforms",
    "broken_image",
    "check_captions",
    "choose_caption",
    "classes_of_resumed",
    "count_empty",
    "decode_row",
    "describe_pixels",
    "embedded_digits",
    "identity",
    "image_grid",
    "label_ids",
    "label_warnings",
    "load_rows",
    "prepare_image",
    "read_dataset",
    "should_cache",
    "split_rows",
    "to_model_range",
    "trained_classes",
    "unreadable",
]


def __getattr__(name: str):
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home if home.startswith(".") else f".{home}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
