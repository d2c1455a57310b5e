"""A dataset's images as an evaluation reads them: of one size, cropped in the centre, not flipped."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from ..common.errors import DataError
from ..common.image_sets import ImageSet
from .batches import Images
from .dataset import ImageDataset, should_cache
from .flags import DataFlags
from .images import ImageTransform, augmentation_uniforms
from .rows import Rows

CHANNELS = (1, 3)  # that networks of features read


def upright_images(rows: Rows, flags: DataFlags, shape: tuple[int, int, int]) -> ImageSet:
    """Rows as images of a shape, read as in training but without augmentation.

    Args:
        rows: those of a dataset that is not a stream; with a label column and a caption column if these are needed.
        flags: how images are resized, and whether broken ones are left out.
        shape: (C, H, W).

    Raises:
        DataError: other channels than 1 or 3, no images, or one that cannot be read; where they do not fit into
            memory, an image that cannot be read raises it when it is read.
    """
    channels, height, width = shape
    if channels not in CHANNELS:
        raise DataError(f"the model's images have {channels} channels; features are computed of 1 or 3")
    limits = (float(flags.pixel_range[0]), float(flags.pixel_range[1])) if flags.pixel_range else None
    transform = ImageTransform(
        height,
        width,
        channels,
        center_crop=True,
        interpolation=flags.image_interpolation_mode,
        pixel_range=limits,
    )
    dataset = ImageDataset(rows, transform, 0, should_cache(rows, transform, "auto"), flags.skip_broken_images)
    dataset.leave_out_broken()

    def read(indices: Sequence[int]) -> np.ndarray:
        return dataset.__getitems__([(0, index) for index in indices])["images"].numpy()

    captions = None
    if rows.caption_column is not None:
        everyone = list(range(len(dataset)))
        captions = dataset.described(everyone, [augmentation_uniforms(0, 0, index) for index in everyone])["captions"]
    known = f"{rows.fingerprint(sampled=len(rows.dataset))}{tuple(transform)}{len(dataset)}"
    fingerprint = hashlib.sha256(known.encode()).hexdigest()[:16]
    names = list(rows.label_names)
    return ImageSet(rows.name, fingerprint, shape, len(dataset), read, dataset.labels, names, captions)


def real_images(images: Images, flags: DataFlags) -> tuple[Callable[[], ImageSet], Callable[[], ImageSet] | None]:
    """Functions that read a run's training images and its held-out images, if there are any, as `upright_images`."""
    transform = images.transform
    shape = transform.channels, transform.height, transform.width
    rows = images.held_out.rows if images.held_out is not None else None
    held_out = None if rows is None else lambda: upright_images(rows, flags, shape)
    return lambda: upright_images(images.rows, flags, shape), held_out
