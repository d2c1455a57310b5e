"""Pictures of a restoration: an image, an observation, a deviation."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from ..portable.linear_ddpm_hf import Operator

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def picture(image: torch.Tensor) -> Image.Image:
    """[C, H, W] in [0, 1], clipped to it, as a PIL image; of more than four channels the first three."""
    image = image if len(image) in MODES else image[:3]
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, MODES[pixels.shape[2]])


def deviation_picture(deviation: torch.Tensor) -> Image.Image:
    """The mean deviation of the channels [C, H, W], white where it is largest."""
    gray = deviation.mean(0, keepdim=True)
    return picture(gray / gray.max().clamp(min=1e-6))


def observed_picture(y: torch.Tensor, operator: "Operator") -> Image.Image:
    """An observation as it is shown next to its solutions: at their size, hidden pixels gray.

    What is not an image is shown as its pseudo-inverse.
    """
    height, width = operator.shape[1:]
    if y.ndim != 3 or height % y.shape[1] or width % y.shape[2]:
        y = operator.pseudo_inverse(y[None])[0]
    enlarged = picture(operator.observed(y[None])[0] / 2 + 0.5 if y.shape == operator.shape else y / 2 + 0.5)
    return enlarged.resize((width, height), Image.Resampling.NEAREST)


def on_white(image: Image.Image) -> Image.Image:
    """A PIL image without its alpha."""
    if image.mode not in ("LA", "RGBA"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_tensor(pixels: "Image.Image | np.ndarray") -> torch.Tensor:
    """A PIL image or uint8 array [H, W, C] as [C, H, W] in [-1, 1]."""
    array = np.atleast_3d(np.asarray(pixels))
    return torch.from_numpy(array.copy()).movedim(-1, 0).float() / 127.5 - 1
