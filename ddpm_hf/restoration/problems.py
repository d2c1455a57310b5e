"""The problem that a picture poses: what is observed of which image, how noisy it is; and figures of its solutions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..common.randomness import keyed_seed
from . import figures
from .tasks import TASKS, Settings

if TYPE_CHECKING:
    from ..portable.linear_ddpm_hf import Operator

QUANTIZATION = 2 / 255 / 12**0.5  # deviation of the rounding to 8 bits, in [-1, 1]


@dataclass
class Picture:
    """An image to restore.

    Args:
        name: of its outputs.
        y: [1, ...], the observation.
        truth: [C, H, W] in [-1, 1], where it is known.
        sigma_y: deviation of y's noise.
    """

    name: str
    operator: "Operator"
    y: torch.Tensor
    truth: torch.Tensor | None
    sigma_y: float


def noise_of(seed: int, index: int) -> torch.Generator:
    """The generator of the noise of an observation that is made from image `index`."""
    return torch.Generator().manual_seed(keyed_seed(seed, "noise", 0, index))


def pose(
    name: str,
    image: torch.Tensor,
    task: str,
    settings: Settings,
    pipeline: Any,
    *,
    degrade: bool = False,
    sigma_y: float | None = None,
    generator: torch.Generator | None = None,
) -> Picture:
    """The problem that an image [C, H, W] in [-1, 1] poses to a restoration pipeline.

    Args:
        degrade: whether it is a true image, from which y is made; else it is y.
        sigma_y: None is estimated, or 0 where y is made.
        generator: of the noise of a y that is made.

    Raises:
        ValueError: an image, mask or setting that does not fit the model.
    """
    from ..portable.restoration_ddpm_hf import estimate_sigma

    enlarged = settings.factor if task == "super-resolution" and not degrade else 1
    height, width = (enlarged * side for side in image.shape[1:])
    operator = TASKS[task].operator((pipeline.image_channels, height, width), settings)
    pipeline.check_size(operator)
    if degrade:
        y = operator.observe(image[None], sigma_y or 0.0, generator)
        return Picture(name, operator, y, image, sigma_y or 0.0)
    y = image[None]
    if sigma_y is None:
        sigma_y = max(estimate_sigma(y, getattr(operator, "mask", None)), QUANTIZATION)
    return Picture(name, operator, y, None, sigma_y)


def measure(
    picture: Picture, solutions: torch.Tensor, features: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, Any]:
    """The figures of a picture's solutions [S, C, H, W] in [0, 1].

    Args:
        features: uint8 images -> features, for a perceptual distance.
    """
    x = solutions * 2 - 1
    error = picture.operator.observed(picture.y - picture.operator.forward(x)).flatten(1)
    row: dict[str, Any] = {
        "image": picture.name,
        "solutions": len(solutions),
        "sigma_y": picture.sigma_y,
        "residual": float(error.square().mean(1).sqrt().mean()),
    }
    if picture.truth is None:
        return row
    truth, summary = picture.truth / 2 + 0.5, figures.summarize(solutions)
    row["psnr"] = float(figures.psnr(solutions, truth[None]).mean())
    row["ssim"] = float(figures.ssim(solutions, truth[None]).mean())
    if len(solutions) > 1:
        row["psnr_of_mean"] = float(figures.psnr(summary.mean[None], truth[None]))
        row["ssim_of_mean"] = float(figures.ssim(summary.mean[None], truth[None]))
        row["coverage"] = figures.coverage(summary, truth)
        row["calibrated"] = figures.expected_coverage(len(solutions))
    if features is not None:
        both = (torch.cat([solutions, truth[None]]).clamp(0, 1) * 255).round().byte()
        described = features(both)
        row["feature_distance"] = float(figures.feature_distance(described[:-1], described[-1:]).mean())
    return row
