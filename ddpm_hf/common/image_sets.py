"""A set of images of one size, as an evaluation reads it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .arrays import read_npz
from .errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """Images that are read in batches.

    Args:
        name: for people.
        fingerprint: of the images and of how they are resized: equal sets have equal ones.
        shape: (C, H, W).
        count: how many there are.
        read: indices -> uint8 [n, C, H, W].
        labels: class ids [N], or None.
        label_names: of the classes.
        captions: a text for each image, or None.
    """

    name: str
    fingerprint: str
    shape: tuple[int, int, int]
    count: int
    read: Callable[[Sequence[int]], np.ndarray]
    labels: np.ndarray | None = None
    label_names: Sequence[str] = ()
    captions: Sequence[str] | None = None

    def part(self, count: int) -> "ImageSet":
        """So many of the images, evenly spread: of a set sorted by class, some of each."""
        if count == self.count:
            return self
        chosen = [index * self.count // count for index in range(count)]
        return replace(
            self,
            count=count,
            fingerprint=f"{self.fingerprint}-{count}",
            read=lambda indices: self.read([chosen[index] for index in indices]),
            labels=None if self.labels is None else self.labels[chosen],
            captions=None if self.captions is None else [self.captions[index] for index in chosen],
        )

    def batches(self, size: int = 64, indices: range | None = None) -> Iterator[torch.Tensor]:
        """All images in order, or those of consecutive indices, uint8 [n, C, H, W]."""
        chosen = range(self.count) if indices is None else indices
        for first in range(chosen.start, chosen.stop, size):
            yield torch.from_numpy(self.read(range(first, min(first + size, chosen.stop))))


def from_npz(path: Path) -> ImageSet:
    """The images of an npz file as ADM's evaluation suite writes it: arr_0, uint8 [N, H, W, C]; arr_1, the labels.

    Raises:
        DataError: it holds something else.
    """
    import hashlib

    try:
        arrays = read_npz(path, ("arr_0", "arr_1"))
    except ValueError as error:
        raise DataError(str(error)) from error
    images = arrays.get("arr_0")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(f"{path} has no array arr_0 of uint8 images [N, H, W, C], C being 1 or 3")
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # [N, C, H, W]
    fingerprint = hashlib.sha256(repr(images.shape).encode() + images.tobytes()).hexdigest()[:16]
    labels = arrays.get("arr_1")
    return ImageSet(
        path.name,
        fingerprint,
        (images.shape[1], images.shape[2], images.shape[3]),
        len(images),
        lambda indices: images[list(indices)],
        labels if labels is not None and labels.ndim == 1 and len(labels) == len(images) else None,
    )
