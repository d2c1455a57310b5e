"""From images on disk or on the Hub to tensors in [-1, 1], by way of Hugging Face datasets.

A dataset is read as rows whose images are still encoded (`reading`, `rows`), so that a broken one can be named.
`prepare_image` makes any PIL image an array in the model's channels; `ImageTransform` resizes, crops and flips
(`images`); `ImageDataset` puts both behind torch's DataLoader and keeps small datasets decoded (`dataset`).
"""

from .dataset import ImageDataset, RowDecoder, StreamingBatches, identity, should_cache
from .digits import CAPTION_COLUMN, DIGIT_CAPTIONS, DIGIT_NAMES, EMBEDDED_DATASET, IMAGE_COLUMN, embedded_digits
from .errors import DataError, broken_image, unreadable
from .flags import DataFlags
from .images import (
    ImageTransform,
    augmentation_uniforms,
    choose_caption,
    decode_row,
    image_grid,
    prepare_image,
    to_model_range,
)
from .labels import classes_of_resumed, label_ids, label_warnings, trained_classes
from .reading import load_rows, read_dataset
from .rows import Rows, split_rows

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
    "choose_caption",
    "classes_of_resumed",
    "decode_row",
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
