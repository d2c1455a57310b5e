"""Figures of a restoration: PSNR, SSIM, and what several solutions say together."""

from typing import NamedTuple

import torch

INTERVAL = (0.05, 0.95)  # the quantiles that bound the 90% interval
WINDOW, DEVIATION = 11, 1.5  # SSIM's window in pixels, and the deviation of its weights (Wang et al. 2004)


class Summary(NamedTuple):
    """What solutions [S, C, H, W] say together, each [C, H, W]: mean, deviation, and the 90% interval."""

    mean: torch.Tensor
    deviation: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def summarize(solutions: torch.Tensor) -> Summary:
    """The mean, the standard deviation (0 of one solution) and the pixelwise 90% interval of [S, C, H, W]."""
    low, high = (torch.quantile(solutions, quantile, dim=0) for quantile in INTERVAL)
    return Summary(solutions.mean(0), solutions.std(0, correction=int(len(solutions) > 1)), low, high)


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images [N, C, H, W] in [0, 1], clipped to it; [N].

    >>> psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1)).round(decimals=4).tolist()
    [20.0]
    """
    error = (images.clamp(0, 1) - truth.clamp(0, 1)).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-12))


def ssim(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of images [N, C, H, W] in [0, 1], the mean over channels; [N].

    The window of 11 pixels is cut to the image where that is smaller.
    """
    size = min(WINDOW, *images.shape[-2:])
    weights = torch.exp(-0.5 * ((torch.arange(size, dtype=images.dtype) - (size - 1) / 2) / DEVIATION) ** 2)
    kernel = torch.outer(weights, weights)
    kernel = (kernel / kernel.sum()).to(images.device).expand(images.shape[1], 1, -1, -1)

    def blur(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, kernel, groups=x.shape[1])

    a, b = images.clamp(0, 1), truth.clamp(0, 1).expand(images.shape)
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).flatten(1).mean(1)


def coverage(summary: Summary, truth: torch.Tensor) -> float:
    """The share of the truth's values [C, H, W] that lie in the 90% interval."""
    return float(((summary.low <= truth) & (truth <= summary.high)).float().mean())


def expected_coverage(solutions: int) -> float:
    """The coverage of a calibrated model: the interval of few solutions is narrower than that of the distribution.

    Quantiles are interpolated between S order statistics, whose S + 1 gaps are equally likely: 0.9 (S - 1)/(S + 1).

    >>> round(expected_coverage(4), 3), round(expected_coverage(64), 3)
    (0.54, 0.872)
    """
    low, high = INTERVAL
    return (high - low) * (solutions - 1) / (solutions + 1)


def feature_distance(solutions: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 - cosine of features [N, D] and [1, D]: a perceptual distance, from 0 to 2; [N]."""
    return 1 - torch.nn.functional.cosine_similarity(solutions, truth, dim=1)
