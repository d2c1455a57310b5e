"""Resizing, as each published tool does it: a table of functions from 8-bit images to values in 0..255.

FID moves by several points with another one, so each is exact.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...common.errors import DataError


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Grey images as RGB, in three equal channels, as all the tools do.

    Args:
        images: uint8 [N, C, H, W], C of 1 or 3.

    Raises:
        DataError: other channels, or values that are not bytes.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        shape = "x".join(map(str, images.shape))
        raise DataError(f"features require uint8 images [N, C, H, W], C of 1 or 3 (got {images.dtype} {shape})")
    return images.expand(-1, 3, -1, -1)


def tf1_bilinear(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """TensorFlow 1's `resize_bilinear`: output i reads input i·in/out, without half pixels or antialiasing."""
    images = images.float()
    left, right, across = _tf1_reads(images.shape[3], size[1], images.device)
    top, bottom, down = _tf1_reads(images.shape[2], size[0], images.device)

    def row(index: torch.Tensor) -> torch.Tensor:
        lines = images[:, :, index]
        start = lines[..., left]
        return start + (lines[..., right] - start) * across  # [N, C, height, width]

    above = row(top)
    return above + (row(bottom) - above) * down[:, None]


def _tf1_reads(length: int, wanted: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each output the two inputs that it lies between, and the second one's weight; in float32, as TensorFlow."""
    position = torch.arange(wanted, dtype=torch.float32, device=device) * torch.tensor(length / wanted)
    first = position.long()
    return first, (first + 1).clamp_max(length - 1), position - first


def torch_bilinear(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """torch's bilinear: half pixels, no antialiasing."""
    return F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)


def torch_bicubic_antialias(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """torch's bicubic with antialiasing; it may leave 0..255."""
    return F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)


def pil_bicubic_float(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pillow's bicubic of each channel in float32, clipped to 0..255 and not rounded."""

    def resize(plane: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(plane.astype(np.float32))  # mode F
        return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)).clip(0, 255)

    planes = images.flatten(0, 1).cpu().numpy()
    resized = np.stack([resize(plane) for plane in planes]).reshape(*images.shape[:2], *size)
    return torch.from_numpy(resized).to(images.device)


def pil_bicubic(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pillow's bicubic in 8 bits."""
    return _pil_each(images, lambda picture: picture.resize(size[::-1], Image.Resampling.BICUBIC))


def pil_bicubic_crop(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pillow's bicubic in 8 bits, so that the image covers the size, then its centre."""
    height, width = size

    def cover(picture: Image.Image) -> Image.Image:
        scale = max(height / picture.height, width / picture.width)
        covering = (max(width, int(picture.width * scale)), max(height, int(picture.height * scale)))
        resized = picture.resize(covering, Image.Resampling.BICUBIC)
        left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
        return resized.crop((left, top, left + width, top + height))

    return _pil_each(images, cover)


def _pil_each(images: torch.Tensor, change: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()  # [N, H, W, 3]
    changed = np.stack([np.asarray(change(Image.fromarray(one))) for one in np.ascontiguousarray(pixels)])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).float().to(images.device)


# uint8 RGB images [N, 3, H, W] and (height, width) -> float32 [N, 3, height, width] in 0..255
RESIZES: dict[str, Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]] = {
    "tf1-bilinear": tf1_bilinear,
    "torch-bilinear": torch_bilinear,
    "torch-bicubic-antialias": torch_bicubic_antialias,
    "pil-bicubic-float": pil_bicubic_float,
    "pil-bicubic": pil_bicubic,
    "pil-bicubic-crop": pil_bicubic_crop,
}
