"""Rows behind torch's DataLoader: batches of images, small datasets kept decoded, and batches of a stream."""

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..common.errors import DataError, ImageMismatchError
from .errors import broken_image, unreadable
from .images import ImageTransform, augmentation_uniforms, choose_caption, decode_row, peek, why_unreadable
from .labels import label_ids
from .pixels import PixelRange, has_alpha, is_deep, kind_of, prepare_image, range_of
from .rows import Rows


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
            ImageMismatchError: one that the settings do not fit, named; it is not skipped.
        """
        value = row[self.rows.image_column]
        name = self.rows.name_of(row, index)
        try:
            if isinstance(value, dict) and value.get("path") is not None and value.get("bytes") is None:
                self.rows.check_inside(value["path"])
            declared = self.rows.array_type
            return self.transform.resize(decode_row(value, name, declared and declared[0]))
        except ImageMismatchError as error:
            raise ImageMismatchError(f"image {name}: {error}") from error
        except Exception as error:  # also what damaged EXIF data or a palette without colours makes PIL raise
            if self.skip_broken:
                return None
            reason = why_unreadable(error)
            raise error if reason.startswith("broken image") else broken_image(name, reason) from error


def describe_pixels(rows: Rows, transform: ImageTransform, inspected: int = 16) -> list[str]:
    """How the values of a dataset become the model's, where that is not obvious: arrays, deep or transparent images.

    Inspects some images, evenly spread. Each line is for the log; what looks wrong begins with "warning: ".

    Raises:
        ImageMismatchError: arrays whose declared shape has channels that cannot become the model's.
    """
    declared = rows.array_type
    if declared is not None and declared[1] is not None and None not in declared[1]:
        try:
            prepare_image(np.zeros(declared[1], declared[0]), transform.channels, pixel_range=(0, 1))
        except ImageMismatchError as error:
            raise ImageMismatchError(f"column {rows.image_column!r} of {rows.name}: {error}") from error
    count = len(rows.dataset) if hasattr(rows.dataset, "__len__") else 0  # a stream is not inspected
    images = []
    for index in sorted({index * count // inspected for index in range(inspected)} if count else ()):
        with contextlib.suppress(Exception):  # a broken image is named when it is read for training
            value = rows.dataset[index][rows.image_column]
            if isinstance(value, dict) and value.get("bytes") is None:
                rows.check_inside(value["path"])
            images.append(peek(value, declared and declared[0]))
    deep = [image for image in images if isinstance(image, np.ndarray) or is_deep(image)]
    kinds = {kind_of(image) for image in deep} | ({declared[0]} if declared else set())
    lines = []
    for kind in sorted(kinds):
        most = max((float(np.max(np.asarray(image))) for image in deep if kind_of(image) == kind), default=0.0)
        lines += _lines_of_range(kind, most, transform.pixel_range)
    if images and not deep and transform.pixel_range is not None:
        lines.append("warning: --pixel_range is for arrays and for images of more than 8 bits, and these have 8 bits")
    channels = transform.channels
    if images and channels in (2, 4) and not any(has_alpha(image, channels) for image in images):
        lines.append(
            f"warning: --channels {channels} is with alpha, and none of {len(images)} inspected images is transparent;"
            f" --channels {channels - 1} trains without"
        )
    if channels > 4:
        lines.append(f"pictures show the first three of the {channels} channels")
    return lines


def _lines_of_range(kind: str, most: float, given: PixelRange | None) -> list[str]:
    """The range that values of a type are read in, and whether the highest that was seen is far below it."""
    low, high = given or range_of(kind)
    name = {"F": "32-bit float", "I": "32-bit integer"}.get(kind, "16-bit" if kind.startswith("I;") else kind)
    lines = [f"pixels: {name} values from {low:g} to {high:g} become -1 to 1" + ("" if given else " (--pixel_range)")]
    if given is None and 0 < most < high / 8:
        lines.append(
            f"warning: the highest {name} value in the inspected images is {most:g}, far below {high:g}: all images"
            f" will be dark; name the range of the values, such as --pixel_range 0 {math.ceil(most)}"
        )
    return lines


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
        self.cache: np.ndarray | list[np.ndarray] | None = None
        self.broken_left_out = False
        self.indices = np.arange(len(rows.dataset))  # of the rows that can be read, as far as is known
        if len(self.indices) == 0:
            raise DataError(f"{rows.name} has no images")
        self.labels: np.ndarray | None = None  # ids, one for each of `indices`
        if rows.label_column is not None:
            self.labels = label_ids(rows.dataset[rows.label_column], rows)
        self.captions: list[Any] | None = None  # as they stand in the column, one for each of `indices`
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

    @property
    def cached_bytes(self) -> int:
        """What the images take that are kept decoded."""
        return 0 if self.cache is None else sum(pixels.nbytes for pixels in self.cache)

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

    def read_pixels(self, index: int) -> tuple[int, np.ndarray]:
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
        samples = [self.read_pixels(index) for _, index in keys]
        uniforms = [augmentation_uniforms(self.seed, epoch, index) for epoch, index in keys]
        images = [self.transform.crop_and_flip(pixels, u) for u, (_, pixels) in zip(uniforms, samples)]
        chosen = [index for index, _ in samples]
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
                choose_caption(self.captions[index], float(u[3]), name)
                for index, u, name in zip(chosen, uniforms, named)
            ]
        return batch

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        """One image for a key (epoch, index)."""
        return {name: value[0] for name, value in self.__getitems__([key]).items()}


def identity(batch: Any) -> Any:
    """The collate function of a dataset that returns batches, not single images."""
    return batch


class StreamingBatches(torch.utils.data.IterableDataset):
    """Batches of a stream without end: the stream is shuffled in a buffer, anew each time it starts over.

    Each rank reads its own shards where there are as many as ranks, else each world-th row. A resumed run replays the
    stream up to where it stopped.
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
        """(epoch, index in this rank's stream, row), without end."""
        epoch = 0
        while True:
            self.stream.set_epoch(epoch)
            # one by one by `iter`: plain iteration shuffles otherwise where torch has a worker than where it has none
            index, rows = -1, self.stream.iter(batch_size=1)
            while (row := self._next(rows, epoch, index + 1)) is not None:
                index += 1
                yield epoch, index, row
            if index < 0:
                raise DataError(f"{self.decode.rows.name}: the stream gave rank {self.rank} no image")
            epoch += 1

    def _next(self, rows: Iterator[dict], epoch: int, index: int) -> dict | None:
        """The next row; None at the stream's end."""
        try:
            batch = next(rows, None)
            return None if batch is None else {name: values[0] for name, values in batch.items()}
        except Exception as error:  # whatever the stream is read with raises
            name = f"row {index} that rank {self.rank} reads of {self.decode.rows.name}, in epoch {epoch + 1},"
            raise unreadable(name, error) from error

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batch, to_skip = [], self.skip_batches * self.batch_size
        for epoch, index, row in self._samples():
            if to_skip and not self.decode.skip_broken:
                to_skip -= 1
                continue
            pixels = self.decode(row, index)
            if pixels is None:
                continue
            if to_skip:  # replaying: decoded only to know which rows are broken
                to_skip -= 1
                continue
            batch.append((epoch, index * self.world + self.rank, row, pixels))
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
            values, indices = zip(*((row[rows.label_column], sample) for _, sample, row, _ in samples))
            batch["labels"] = torch.from_numpy(label_ids(values, rows, indices))
        if rows.caption_column is not None:
            batch["captions"] = [
                choose_caption(row[rows.caption_column], float(u[3]), f"{sample} of {rows.name}")
                for u, (_, sample, row, _) in zip(uniforms, samples)
            ]
        return batch
