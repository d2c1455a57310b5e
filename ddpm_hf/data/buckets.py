"""Images of several aspect ratios: each is cropped to the nearest of some sizes, and a batch holds one size.

All sizes have about the area of the resolution, so that a batch costs the same whatever its shape.
"""

import math
from typing import Any

import numpy as np
import torch

from ..training.reporting import task
from .dataset import ImageDataset
from .images import ImageTransform, decode_row, image_size
from .rows import Rows

MAX_ASPECT_RATIO = 2.0  # the longer side over the shorter
PART_STRIDE = 2**40  # a row's index in a batch is its row plus this times the number of its part


def bucket_sizes(height: int, width: int, step: int) -> list[tuple[int, int]]:
    """Sizes (height, width) of multiples of `step`, of up to the area height · width and up to twice as wide as high.

    >>> bucket_sizes(64, 64, 16)
    [(80, 48), (64, 64), (48, 80)]
    """
    widest: dict[int, int] = {}  # height -> the largest width
    for w in range(step, math.isqrt(int(height * width * MAX_ASPECT_RATIO)) + 1, step):
        h = height * width // w // step * step
        if h and max(h / w, w / h) <= MAX_ASPECT_RATIO:
            widest[h] = w
    return sorted(widest.items(), reverse=True) or [(height, width)]


def nearest_bucket(height: int, width: int, sizes: list[tuple[int, int]]) -> int:
    """Which size has the aspect ratio that is nearest to an image's, by its logarithm."""
    return int(np.argmin([abs(math.log(height / width) - math.log(h / w)) for h, w in sizes]))


def aspect_ratios(rows: Rows, channels: int = 3) -> list[tuple[int, int]]:
    """(height, width) of each image, upright; (0, 0) for a broken one, which the dataset reports."""
    sizes = []
    with task("reading sizes", len(rows.dataset), len(rows.dataset) >= 2000) as bar:
        for index, row in enumerate(rows.dataset):
            try:
                sizes.append(image_size(decode_row(row[rows.image_column], str(index)), channels))
            except Exception:  # decoders and EXIF have no common base for errors
                sizes.append((0, 0))
            bar.update(1)
    return sizes


class BucketedDataset(torch.utils.data.Dataset):
    """Several datasets of one image size each, concatenated; a batch never mixes sizes."""

    def __init__(self, parts: list[Any]):
        self.parts = parts
        self.group_sizes = [len(part) for part in parts]
        self.starts = np.concatenate([[0], np.cumsum(self.group_sizes)])
        self.labels = None
        captions = [part.captions for part in parts]
        self.captions = None if captions[0] is None else [caption for some in captions for caption in some]
        self.cache = True if all(part.cache is not None for part in parts) else None
        self.cached_bytes = sum(part.cached_bytes for part in parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        """A batch for keys (epoch, index), all of one part."""
        group = int(np.searchsorted(self.starts, keys[0][1], side="right")) - 1
        start, end = self.starts[group], self.starts[group + 1]
        if not all(start <= index < end for _, index in keys):
            raise ValueError("a batch holds images of one size")
        batch = self.parts[group].__getitems__([(epoch, int(index - start)) for epoch, index in keys])
        return {**batch, "index": batch["index"] + group * PART_STRIDE}

    def name_of(self, row: int) -> str:
        """What to call one of a batch's `index`."""
        group, local_row = divmod(row, PART_STRIDE)
        return self.parts[group].name_of(local_row)


def bucketed(images: ImageDataset, sizes: list[tuple[int, int]], cached: bool) -> BucketedDataset:
    """The images by the size that is nearest to each; a size without images is left out."""
    rows, transform = images.rows, images.transform
    members: list[list[int]] = [[] for _ in sizes]
    for index, (height, width) in enumerate(aspect_ratios(rows, transform.channels)):
        members[nearest_bucket(max(height, 1), max(width, 1), sizes)].append(index)
    parts = []
    for (height, width), chosen in zip(sizes, members):
        if chosen:
            resized: ImageTransform = transform._replace(height=height, width=width)
            skip = images.decode.skip_broken
            parts.append(ImageDataset(rows.part(np.array(chosen)), resized, images.seed, cached, skip))
            parts[-1].leave_out_broken()  # the plan of the batches needs the exact count
    return BucketedDataset(parts)
