"""A dataset's rows, whose images are still encoded, so that a broken one can be named; and what its columns mean."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import DataError
from ..common.randomness import keyed_generator
from .errors import unreadable
from .pixels import array_type


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
    folders: tuple[str, ...] = ()  # that may contain its files; empty: any
    left_out: str = ""  # what of the dataset's files is not read, and why
    labels_are_names: bool = False  # integers in the label column name their class, and are not its id

    def name_of(self, row: dict, index: int) -> str:
        """What to call a row: its file, or its number in the dataset."""
        value = row[self.image_column]
        path = value.get("path") if isinstance(value, dict) else None
        return str(path or f"{self.number_of(index)} of {self.name}")

    def number_of(self, index: int) -> int:
        """A row's number in the dataset."""
        return index if self.numbers is None else int(self.numbers[index])

    @cached_property  # `features` is copied each time, which takes as long as decoding a small image
    def array_type(self) -> tuple[str, tuple[int | None, ...] | None] | None:
        """(NumPy type, shape or None) of a column of arrays; None for images, and where none is declared."""
        features = getattr(self.dataset, "features", None) or {}
        return array_type(features.get(self.image_column))

    def read(self, index: int) -> dict:
        """A row.

        Raises:
            DataError: the dataset's files can no longer be read.
        """
        try:
            return self.dataset[index]
        except Exception as error:  # whatever library reads the dataset's files
            raise unreadable(f"row {self.number_of(index)} of {self.name}", error) from error

    def check_inside(self, path: str) -> None:
        """Raise ValueError for a file outside of the dataset: an untrusted dataset must not read other files."""
        absolute = os.path.abspath(path)
        if self.folders and not any(absolute.startswith(os.path.join(folder, "")) for folder in self.folders):
            raise ValueError(f"it is outside of {self.name}; put the images into it (save_to_disk does)")

    def part(self, indices: np.ndarray) -> "Rows":
        """Some of the rows."""
        numbers = np.asarray(indices) if self.numbers is None else self.numbers[indices]
        return dataclasses.replace(self, dataset=self.dataset.select(indices), numbers=numbers)

    def fingerprint(self, sampled: int = 256) -> str | None:
        """A digest of the number of images and of some, evenly spread, as they are encoded; None for a stream."""
        if not hasattr(self.dataset, "__len__"):
            return None
        count = len(self.dataset)
        digest = hashlib.sha256(str(count).encode())
        indices = [i * count // sampled for i in range(sampled)] if count > sampled else range(count)
        for row in self.dataset.select_columns([self.image_column]).select(indices):
            digest.update(self._encoded(row[self.image_column]))
        return digest.hexdigest()[:16]

    def _encoded(self, value: Any) -> bytes:
        """An image's cell as bytes; empty for a missing one, which training reports."""
        if value is None:
            return b""
        if not isinstance(value, dict):
            return np.ascontiguousarray(value).tobytes()
        if value.get("bytes") is not None or value.get("path") is None:
            return value.get("bytes") or b""
        try:
            self.check_inside(value["path"])
            return Path(value["path"]).read_bytes()
        except (OSError, ValueError):
            return b""


def usable_share(count: int) -> float:
    """A usual share of so many images that holds out one at least, for messages.

    >>> usable_share(1000), usable_share(8)
    (0.05, 0.1)
    """
    return next((share for share in (0.05, 0.1, 0.25) if round(count * share) > 0), 0.5)


def split_rows(rows: Rows, held_out: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on, and a random share of them held out.

    Raises:
        DataError: a share that leaves either part empty.
    """
    count = len(rows.dataset)
    test = round(count * held_out)
    if not 0 < test < count:
        way_out = f"give {usable_share(count)}, for example" if count > 1 else "add images"
        raise DataError(
            f"--validation_split {held_out} of {count} images leaves nothing to train on or to hold out; {way_out}"
        )
    order = keyed_generator(seed, "split").permutation(count)
    return rows.part(np.sort(order[test:])), rows.part(np.sort(order[:test]))
