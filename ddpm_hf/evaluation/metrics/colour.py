"""Colour shift: whether samples have the colours and the contrast of real images.

For each image the mean of each channel, and its contrast (the standard deviation of its luminance), on 0..255; between
the distributions of real and of sampled images the Wasserstein distance W1 = ∫|F - G|, in levels.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...common.errors import DataError
from ..protocols import Protocol
from .figures import Figure
from .intervals import INFINITESIMAL, symmetric

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure as Picture

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL converts to grey
PERMUTATIONS = 199
COLOURS = {"red": "tab:red", "green": "tab:green", "blue": "tab:blue", "grey": "0.4", "contrast": "tab:purple"}


def colour_summary(images: "torch.Tensor") -> np.ndarray:
    """The mean of each channel and the contrast of images, uint8 [N, C, H, W] -> float64 [N, C + 1], on 0..255."""
    import torch

    pixels = images.to(torch.float64)
    weights = pixels.new_tensor(LUMINANCE if images.shape[1] == 3 else [1 / images.shape[1]] * images.shape[1])
    luminance = torch.einsum("nchw,c->nhw", pixels, weights)
    contrast = luminance.flatten(1).std(dim=1, correction=0)
    return torch.cat([pixels.mean(dim=(2, 3)), contrast[:, None]], dim=1).cpu().numpy()


def column_names(columns: int) -> list[str]:
    """What the columns of `colour_summary` are."""
    channels = {1: ["grey"], 3: ["red", "green", "blue"]}.get(
        columns - 1, [f"channel {i}" for i in range(columns - 1)]
    )
    return [*channels, "contrast"]


def wasserstein(ordered: np.ndarray, is_real: np.ndarray) -> tuple[float, np.ndarray]:
    """W1 of two sets on a line, and its potential h at each point: W1 = mean h(real) - mean h(generated).

    Args:
        ordered: the values of both sets, ascending, [N].
        is_real: whose each is, [N].
    """
    gaps = np.diff(ordered)
    above = np.cumsum(is_real / is_real.sum() - ~is_real / (~is_real).sum())[:-1]  # F - G between the values
    potential: np.ndarray = np.append(np.cumsum((gaps * np.sign(above))[::-1])[::-1], 0.0)
    return float((gaps * np.abs(above)).sum()), potential


def shift(real: Any, generated: Any, columns: slice, seed: int) -> Figure:
    """The mean W1 over some columns of two summaries [N, K] and [M, K].

    The interval is normal: at first order W1 is the difference of the mean potentials. `details` tells the direction:
    the change of each column's mean and the ratio of its spreads, generated against real. Two samples of one set
    differ too: `expected_of_one_set` is how much, `p_value` how often as much as these, both by permutation.
    """
    for summary, what in ((real, "real images"), (generated, "generated images")):
        if len(summary) < 2:
            raise DataError(f"{len(summary)} {what}: colour shift requires 2 or more")
    if real.shape[1] != generated.shape[1]:
        raise DataError(f"real images have {real.shape[1] - 1} channels and generated ones {generated.shape[1] - 1}")
    both = np.concatenate([real, generated])
    is_real = np.arange(len(both)) < len(real)
    names, chosen = column_names(both.shape[1])[columns], both[:, columns]
    orders = np.argsort(chosen, axis=0, kind="stable")
    ordered = np.take_along_axis(chosen, orders, axis=0)
    potentials, distances = np.zeros(len(both)), []
    for column, order in enumerate(orders.T):
        distance, potential = wasserstein(ordered[:, column], is_real[order])
        distances.append(distance)
        potentials[order] += potential / len(names)
    rng = np.random.default_rng(seed)
    of_one_set = []
    for _ in range(PERMUTATIONS):
        mixed = rng.permutation(is_real)
        of_one_set.append(np.mean([wasserstein(ordered[:, i], mixed[order])[0] for i, order in enumerate(orders.T)]))
    value = float(np.mean(distances))
    variance = sum(potentials[part].var(ddof=1) / part.sum() for part in (is_real, ~is_real))
    details: dict[str, Any] = {
        "expected_of_one_set": float(np.mean(of_one_set)),
        "p_value": float((1 + np.sum(np.array(of_one_set) >= value)) / (1 + PERMUTATIONS)),
    }
    for i, name in enumerate(names):
        parts = chosen[is_real, i], chosen[~is_real, i]
        spreads = [part.std(ddof=1) for part in parts]
        details[name] = {
            "distance": distances[i],
            "mean_change": float(parts[1].mean() - parts[0].mean()),
            "spread_ratio": float(spreads[1] / spreads[0]) if spreads[0] else None,
        }
    changes = ", ".join(f"{name} {details[name]['mean_change']:+.1f}" for name in names)
    chance = f"two samples of one set: {details['expected_of_one_set']:.2f}, p = {details['p_value']:.3f}"
    return replace(
        symmetric(value, float(variance), INFINITESIMAL, floor=0.0, details=details), note=f"{changes}; {chance}"
    )


def colour_shift(real: np.ndarray, generated: np.ndarray, protocol: Protocol, seed: int) -> Figure:
    """W1 of the per-image channel means, averaged over the channels, in levels of 0..255."""
    return shift(real, generated, slice(0, -1), seed)


def contrast_shift(real: np.ndarray, generated: np.ndarray, protocol: Protocol, seed: int) -> Figure:
    """W1 of the per-image contrast, in levels of 0..255."""
    return shift(real, generated, slice(-1, None), seed)


def colour_picture(real: np.ndarray, generated: np.ndarray) -> "Picture":
    """The distributions of each channel's mean and of the contrast: filled for real images, a line for samples."""
    from matplotlib.figure import Figure as Picture

    names = column_names(real.shape[1])
    picture = Picture(figsize=(3.2 * len(names), 3), layout="constrained")
    for i, (name, axes) in enumerate(zip(names, np.atleast_1d(picture.subplots(1, len(names))))):
        edges = np.histogram_bin_edges(np.concatenate([real[:, i], generated[:, i]]), bins=48)
        colour = COLOURS.get(name, "tab:gray")
        axes.hist(real[:, i], edges, density=True, color=colour, alpha=0.35, label="real")
        axes.hist(generated[:, i], edges, density=True, color=colour, histtype="step", linewidth=1.5, label="samples")
        change = generated[:, i].mean() - real[:, i].mean()
        title = "contrast" if name == "contrast" else f"mean of {name}"
        axes.set(title=f"{title}: {change:+.1f}", xlabel="level, 0..255", yticks=[])
        axes.legend(frameon=False, loc="upper right")
    return picture
