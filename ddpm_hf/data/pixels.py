"""From stored pixel values to a model's channels: one scale for a dataset, by the type of its values.

8-bit images are 0 to 255, 16-bit ones 0 to 65535, floats 0 to 1, whatever values an image happens to hold, unless
`--pixel_range` names another range. An array [H, W], [H, W, C] or [C, H, W] is bands; alpha is that of image files.
"""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..common.errors import DataError, ImageMismatchError

PixelRange = tuple[float, float]  # the values that become black and white, -1 and 1 to the model

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of 8-bit images in so many channels
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as PIL
RANGES = {"bool": (0.0, 1.0), "uint16": (0.0, 65535.0), "I": (0.0, 65535.0), "F": (0.0, 1.0)}
OTHER_INTEGERS = (0.0, 255.0)
ROUNDING = 1e-4  # share of the range by which floats may exceed it


def is_deep(image: Image.Image) -> bool:
    """Whether an image holds integers of more than 8 bits, or floats."""
    return image.mode.startswith("I") or image.mode == "F"


def kind_of(image: Image.Image | np.ndarray) -> str:
    """What decides the range of an image's values: an array's type, or the mode of a PIL image."""
    return image.dtype.name if isinstance(image, np.ndarray) else image.mode


def has_alpha(image: Image.Image | np.ndarray, channels: int) -> bool:
    """Whether an image fills the last of a model's 2 or 4 channels: it has alpha, or as many bands."""
    if isinstance(image, Image.Image):
        return image.mode in TRANSPARENT or "transparency" in image.info
    return image.ndim == 3 and image.shape[channel_axis(image.shape, channels)] in (2, 4)


def range_of(kind: str) -> PixelRange:
    """The range of a type's values: `kind` is a NumPy type's name, or the mode of a PIL image."""
    if kind.startswith("I;"):
        kind = "uint16"
    if kind.startswith("float"):
        kind = "F"
    return RANGES.get(kind, OTHER_INTEGERS)


def _unit_floats(pixels: np.ndarray, kind: str, pixel_range: PixelRange | None) -> np.ndarray:
    """Values in [0, 1], float64: linear in the range of their type, or in the one given, to which they are clipped.

    Raises:
        DataError: NaN or infinity.
        ImageMismatchError: values outside the range of their type.
    """
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise DataError("holds NaN or infinity")
    low, high = pixel_range or range_of(kind)
    if pixel_range is None:
        smallest, largest = float(pixels.min()), float(pixels.max())
        tolerance = ROUNDING * (high - low) if pixels.dtype.kind == "f" else 0.0
        if smallest < low - tolerance or largest > high + tolerance:
            raise ImageMismatchError(
                f"values from {smallest:g} to {largest:g}, and {kind} is read as {low:g} to {high:g}: name the range"
                f" of the dataset's values, such as --pixel_range {_usual_range(smallest, largest)}"
            )
    return np.clip((pixels.astype(np.float64) - low) / (high - low), 0, 1)


def _usual_range(smallest: float, largest: float) -> str:
    """The narrowest usual range that holds the values, as on a command line."""
    for low, high in ((0, 1), (-1, 1), (0, 255), (0, 65535)):
        if low <= smallest and largest <= high:
            return f"{low} {high}"
    return f"{math.floor(smallest)} {math.ceil(largest)}"


def check_array(pixels: np.ndarray) -> np.ndarray:
    """An array of numbers with two or three axes, none of them empty.

    Raises:
        ValueError: it is not.
    """
    if pixels.dtype.kind not in "biuf" or pixels.ndim not in (2, 3) or not pixels.size:
        shape = list(pixels.shape)
        raise ValueError(
            f"an array of {pixels.dtype} {shape} is not an image; images are numbers [H, W], [H, W, C], [C, H, W]"
        )
    return pixels


def channel_axis(shape: tuple[int, ...], channels: int) -> int:
    """Which axis of [H, W, C] or [C, H, W] holds the channels: of the model's number of channels, else the shorter.

    >>> channel_axis((64, 64, 3), 3), channel_axis((5, 64, 64), 5), channel_axis((4, 64, 64), 3)
    (2, 0, 0)
    """
    for axis in (2, 0):
        if shape[axis] == channels:
            return axis
    return 2 if shape[2] <= shape[0] else 0


def _with_channels_last(pixels: np.ndarray, channels: int) -> np.ndarray:
    """[H, W, C] of [H, W], [H, W, C] or [C, H, W]."""
    if pixels.ndim == 2:
        return pixels[:, :, None]
    return np.moveaxis(pixels, channel_axis(pixels.shape, channels), 2)


def _mismatch(source: int, channels: int) -> ImageMismatchError:
    return ImageMismatchError(
        f"it has {source} channels and the model {channels}: train a model of {source} (--channels {source}), or give"
        f" images of {channels} channels"
    )


def _in_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Values in [0, 1] with one, two (gray, alpha), three or four (colour, alpha) channels in as many as the model's.

    Raises:
        ImageMismatchError: more channels than four on either side, and not the same number.
    """
    source = pixels.shape[2]
    if source == channels:
        return pixels
    if max(source, channels) > 4:
        raise _mismatch(source, channels)
    alpha = np.ones((*pixels.shape[:2], 1))
    if source in (2, 4):
        pixels, alpha = pixels[:, :, :-1], pixels[:, :, -1:]
    if channels in (1, 3):  # on white
        pixels = pixels * alpha + (1 - alpha)
    if pixels.shape[2] == 3 and channels < 3:
        pixels = (pixels @ LUMA)[:, :, None]
    elif pixels.shape[2] == 1 and channels > 2:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.concatenate([pixels, alpha], axis=2) if channels in (2, 4) else pixels


def _in_mode(image: Image.Image, channels: int) -> Image.Image:
    """An 8-bit image of any mode as L, LA, RGB or RGBA: with its alpha, or on white."""
    if channels not in MODES:
        raise _mismatch(len(image.getbands()), channels)
    if image.mode in TRANSPARENT or "transparency" in image.info:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # alpha not multiplied in
        image = (image.convert(straight) if straight else image).convert("RGBA")
        if channels in (1, 3):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    via_rgb = ("LAB", "HSV") if channels in (1, 3) else ("LAB", "HSV", "1", "P", "CMYK", "YCbCr", "RGBX")
    if image.mode in via_rgb:
        image = image.convert("RGB")
    return image.convert(MODES[channels])


def prepare_image(
    image: Image.Image | np.ndarray,
    channels: int,
    keep_precision: bool = False,
    pixel_range: PixelRange | None = None,
) -> Image.Image | np.ndarray:
    """Any image, upright, in the model's channels: 8-bit PIL images as PIL's mode of so many channels, else an array.

    Args:
        image: PIL of any mode, or an array of numbers [H, W], [H, W, C] or [C, H, W].
        channels: of the model. A transparent file keeps its alpha in 2 and 4, and lies on white in 1 and 3.
        keep_precision: give arrays as float32 in [0, 1] instead of rounding them to bytes.
        pixel_range: the values that become 0 and 1; by default those of the values' type. Not of 8-bit PIL images.

    Returns: a PIL image, or an array [H, W, C].

    Raises:
        DataError: NaN or infinity.
        ImageMismatchError: values outside the range of their type, or channels that cannot become the model's.
    """
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if not is_deep(image):
            return _in_mode(image, channels)
    kind = kind_of(image)
    pixels = check_array(np.asarray(image))
    pixels = _with_channels_last(pixels, channels)  # [H, W, C']
    if kind == "uint8" and pixel_range is None and pixels.shape[2] == channels:
        return pixels.astype(np.float32) / 255 if keep_precision else pixels
    units = _in_channels(_unit_floats(pixels, kind, pixel_range), channels)  # [H, W, C]
    return units.astype(np.float32) if keep_precision else np.round(units * 255).astype(np.uint8)


def array_type(feature: Any) -> tuple[str, tuple[int | None, ...] | None] | None:
    """(NumPy type, shape) of a column of arrays or nested lists of numbers, as `datasets` declares it; else None.

    The shape is None where each row may have another.
    """
    shape, depth = getattr(feature, "shape", None), 0
    while hasattr(feature, "feature"):
        feature, depth = feature.feature, depth + 1
    if shape is None and depth < 2:  # no rows and columns
        return None
    name = getattr(feature, "dtype", None)
    try:
        kind = np.dtype(name).kind if isinstance(name, str) else ""
    except TypeError:  # not a NumPy type
        return None
    return (name, shape) if isinstance(name, str) and kind in tuple("biuf") else None
