"""From images on disk or on the Hub to tensors in [-1, 1], by way of Hugging Face datasets.

A dataset is read as rows whose images are still encoded (`reading`, `rows`), so that a broken one can be named.
`prepare_image` brings any image or array to the model's channels and one scale (`pixels`); `ImageTransform` resizes,
crops and flips (`images`); `ImageDataset` puts both behind torch's DataLoader and keeps small datasets decoded
(`dataset`). A column of labels becomes class names and ids (`labels`).

The names are imported when they are first used, so that `--help`, which needs only the flags, is quick.
"""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_exports

if TYPE_CHECKING:
    from ..common.errors import DataError as DataError
    from ..common.pictures import image_grid as image_grid
    from .dataset import ImageDataset as ImageDataset
    from .dataset import RowDecoder as RowDecoder
    from .dataset import StreamingBatches as StreamingBatches
    from .dataset import describe_pixels as describe_pixels
    from .dataset import identity as identity
    from .dataset import should_cache as should_cache
    from .digits import CAPTION_COLUMN as CAPTION_COLUMN
    from .digits import DIGIT_CAPTIONS as DIGIT_CAPTIONS
    from .digits import DIGIT_NAMES as DIGIT_NAMES
    from .digits import EMBEDDED_DATASET as EMBEDDED_DATASET
    from .digits import IMAGE_COLUMN as IMAGE_COLUMN
    from .digits import embedded_digits as embedded_digits
    from .errors import broken_image as broken_image
    from .errors import unreadable as unreadable
    from .flags import DataFlags as DataFlags
    from .images import ImageTransform as ImageTransform
    from .images import augmentation_uniforms as augmentation_uniforms
    from .images import choose_caption as choose_caption
    from .images import decode_row as decode_row
    from .images import to_model_range as to_model_range
    from .labels import classes_of_resumed as classes_of_resumed
    from .labels import label_ids as label_ids
    from .labels import label_warnings as label_warnings
    from .labels import trained_classes as trained_classes
    from .pixels import prepare_image as prepare_image
    from .reading import load_rows as load_rows
    from .reading import read_dataset as read_dataset
    from .rows import Rows as Rows
    from .rows import split_rows as split_rows
    from .texts import check_captions as check_captions
    from .texts import count_empty as count_empty

_HOMES = {
    ".dataset": ("ImageDataset", "RowDecoder", "StreamingBatches", "describe_pixels", "identity", "should_cache"),
    ".digits": (
        "CAPTION_COLUMN",
        "DIGIT_CAPTIONS",
        "DIGIT_NAMES",
        "EMBEDDED_DATASET",
        "IMAGE_COLUMN",
        "embedded_digits",
    ),
    "..common.errors": ("DataError",),
    ".errors": ("broken_image", "unreadable"),
    ".flags": ("DataFlags",),
    ".images": (
        "ImageTransform",
        "augmentation_uniforms",
        "choose_caption",
        "decode_row",
        "to_model_range",
    ),
    "..common.pictures": ("image_grid",),
    ".labels": ("classes_of_resumed", "label_ids", "label_warnings", "trained_classes"),
    ".pixels": ("prepare_image",),
    ".reading": ("load_rows", "read_dataset"),
    ".rows": ("Rows", "split_rows"),
    ".texts": ("check_captions", "count_empty"),
}

__all__ = [name for names in _HOMES.values() for name in names]

if not TYPE_CHECKING:  # else type checkers would accept any name
    __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
