"""An image in the model's channels, resized, cropped and flipped, and as a tensor in [-1, 1]."""

import io
import math
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..common.errors import DataError, one_line
from ..common.randomness import keyed_generator
from .errors import broken_image
from .formats import EXECUTED, register_plugins
from .pixels import PixelRange, channel_axis, check_array, is_deep, prepare_image

MAX_SIDE_RATIO = 32  # an image's side over the crop's; of a longer strip only the middle is resized


class ImageTransform(NamedTuple):
    """Resize until the image covers height × width, crop to it, flip half of the images."""

    height: int
    width: int
    channels: int
    center_crop: bool = False
    random_flip: bool = False
    keep_precision: bool = False
    interpolation: str = "bilinear"
    pixel_range: PixelRange | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), in PIL's order."""
        return self.width, self.height

    def resize(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The deterministic part: [H', W', C], uint8, or float32 in [0, 1] with `keep_precision`.

        Raises:
            DataError, ImageMismatchError: as `prepare_image`.
        """
        prepared = prepare_image(image, self.channels, self.keep_precision, self.pixel_range)
        if isinstance(prepared, Image.Image):
            pixels = np.asarray(self._fit(prepared))
            pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
        else:  # band by band: PIL takes a fourth band for alpha, and weights the others by it
            bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(prepared, 2, 0)]
            pixels = np.stack([np.asarray(self._fit(band)) for band in bands], axis=2)
        if self.keep_precision and pixels.dtype == np.uint8:
            pixels = pixels.astype(np.float32) / 255
        return pixels  # [H', W', C]

    def _fit(self, image: Image.Image) -> Image.Image:
        """An image that covers height × width; cropped to it with `center_crop`."""
        scale = max(self.height / image.height, self.width / image.width)
        most = [min(length, math.ceil(MAX_SIDE_RATIO * side / scale)) for length, side in zip(image.size, self.size)]
        if most != list(image.size):
            left, top = ((length - kept) // 2 for length, kept in zip(image.size, most))
            image = image.crop((left, top, left + most[0], top + most[1]))
        size = (max(self.width, round(image.width * scale)), max(self.height, round(image.height * scale)))
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        if self.center_crop:
            left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
            image = image.crop((left, top, left + self.width, top + self.height))
        return image

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
    return keyed_generator(seed, "augmentation", 0, sample, epoch).random(4)


def choose_caption(value: Any, uniform: float, name: str) -> str:
    """One of an image's captions by a number in [0, 1); a missing one is the empty string.

    Raises:
        DataError: neither a string nor a list of strings.
    """
    if isinstance(value, (list, tuple, np.ndarray)):
        value = value[int(uniform * len(value))] if len(value) else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"the caption of {name} is {value!r}; captions are strings or lists of strings")
    return value


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in 0..255, or floats in [0, 1], to float32 in [-1, 1]; the shape stays.

    >>> to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float() * 2 - 1


def decode_row(value: Any, name: str, dtype: str | None = None) -> Image.Image | np.ndarray:
    """A dataset's cell, which is encoded bytes, a path, an array or an image, as a PIL image or an array.

    Args:
        dtype: of the column's arrays, which `datasets` gives as lists.

    Raises:
        DataError: named, if it is not one of these or cannot be decoded.
    """
    try:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        if isinstance(value, Image.Image):
            return value
        if isinstance(value, (list, np.ndarray)):
            return check_array(np.asarray(value, dtype=dtype))
        if not isinstance(value, (bytes, str, os.PathLike)):
            raise ValueError(
                f"{type(value).__name__} is not an image; name the column of the images with --image_column"
            )
        register_plugins()
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        if image.format in EXECUTED:
            raise ValueError(f"{image.format} files are not supported")
        image.load()
        return image
    except Exception as error:  # PIL's decoders have no common base for the errors of a damaged file
        raise broken_image(name, why_unreadable(error)) from error


def peek(value: Any, dtype: str | None = None) -> Image.Image | np.ndarray:
    """As `decode_row`, but a file of 8 bits is only opened, which reads its header."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, (bytes, str)):
        register_plugins()
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        if not is_deep(image):
            return image
    return decode_row(value, "", dtype)


def image_size(image: Image.Image | np.ndarray, channels: int) -> tuple[int, int]:
    """(height, width) of what `decode_row` gives, upright."""
    if isinstance(image, np.ndarray):
        shape = list(image.shape)
        if len(shape) == 3:
            del shape[channel_axis(image.shape, channels)]
        return shape[0], shape[1]
    width, height = ImageOps.exif_transpose(image).size
    return height, width


def why_unreadable(error: Exception) -> str:
    """Why an image cannot be read, in the same words each time."""
    if isinstance(error, UnidentifiedImageError):  # its text contains a memory address
        return "not an image, or its header is corrupt"
    return one_line(error) or error.__class__.__name__
