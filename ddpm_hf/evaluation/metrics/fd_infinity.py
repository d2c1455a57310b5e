"""The Fréchet distance extrapolated to infinitely many generated samples, FD∞ (Chong & Forsyth 2020).

The distance of n samples is too large by about c/n. It is computed for random subsets of several sizes, and a line in
1/n is fitted: its intercept is FD∞. The real set is taken as it is.
"""

from typing import Any, NamedTuple

import numpy as np

from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .frechet import covariance_factor, distance_and_variances, distance_of, moments
from .inputs import as_pair
from .intervals import NORMAL_95
from .least import SMALLEST_SUBSET

SIZES = 15
LEAST = 10 * SMALLEST_SUBSET


class Line(NamedTuple):
    """Distances [S] of subsets of these sizes, and the line in 1/size through them."""

    sizes: np.ndarray
    distances: np.ndarray
    intercept: float
    slope: float


def subset_sizes(count: int, points: int = SIZES) -> np.ndarray:
    """Sizes from min(5000, N/10) to N, in equal steps, as in dgm-eval."""
    return np.linspace(min(5000, max(count // 10, SMALLEST_SUBSET)), count, points).astype(int)


def fitted_line(real: np.ndarray, generated: np.ndarray, points: int, seed: int) -> Line:
    """The line through the distances of random subsets of the generated samples to all real ones."""
    random = np.random.default_rng(seed)
    reference = moments(real)
    factor = covariance_factor(real, reference)
    sizes = subset_sizes(len(generated), points)
    distances = []
    for size in sizes:
        chosen = generated[random.choice(len(generated), size, replace=False)]
        distances.append(distance_of(reference, factor, moments(chosen)))
    slope, intercept = np.polyfit(1 / sizes, distances, 1)
    return Line(sizes, np.array(distances), float(intercept), float(slope))


def frechet_distance_infinity(real: Any, generated: Any, *, points: int = SIZES, seed: int = 0) -> float:
    """The Fréchet distance extrapolated to infinitely many generated samples.

    Args:
        real: [N, D], an array or tensor; taken as it is.
        generated: [M, D].
        points: number of subset sizes.
        seed: of the subsets.

    Raises:
        DataError: features that are not finite, fewer than 20, or of different dimensions.
    """
    first, second = as_pair(real, generated, least=LEAST)
    return fitted_line(first, second, points, seed).intercept


def intercept_variance(line: Line, influence: float) -> float:
    """The variance of the intercept that comes from the choice of subsets, given all samples.

    A subset of n of N samples varies by s² (1/n - 1/N), where s² is the variance of a sample's influence, or what the
    scatter about the line amounts to if that is more: of small subsets, higher orders count as well.

    Args:
        influence: s².
    """
    inverse = 1 / line.sizes
    centred = inverse - inverse.mean()
    weights = 1 / len(inverse) - centred * inverse.mean() / (centred**2).sum()  # of the distances in the intercept
    leverage = 1 / len(inverse) + centred**2 / (centred**2).sum()
    relative = inverse - inverse[-1]
    residuals = line.distances - line.intercept - line.slope * inverse
    scatter = (residuals**2).sum() / ((1 - leverage) * relative).sum()
    return float(max(influence, scatter) * (weights**2 * relative).sum())


def fd_infinity(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """FD∞, with an interval for the distance of the distributions.

    It counts the samples of both sets and the choice of subsets. What the finite real set adds is estimated from its
    two halves, whose distances have twice that bias: the interval's lower end is lower by so much.
    """
    first, second = as_pair(real.pool, generated.pool, least=LEAST)
    line = fitted_line(first, second, SIZES, seed)
    found = distance_and_variances(first, second, seed)
    variance = found.first + found.second + intercept_variance(line, found.second * len(second))
    bias = max(real_set_bias(first, second, found.value, seed), 0.0)
    half = NORMAL_95 * variance**0.5
    details = {
        "sizes": line.sizes.tolist(),
        "distances": line.distances.tolist(),
        "slope": line.slope,
        "real_set_bias": bias,
    }
    method = "infinitesimal jackknife over samples, scatter of subsets, and the real set's own bias"
    return Figure(line.intercept, line.intercept - half - bias, line.intercept + half, method, details)


def real_set_bias(real: np.ndarray, generated: np.ndarray, distance: float, seed: int) -> float:
    """By how much a real set of this size makes the distance too large: what half of it adds once more."""
    order = np.random.default_rng([seed, 1]).permutation(len(real))
    reference = moments(generated)
    factor = covariance_factor(generated, reference)
    halves = [moments(real[half]) for half in np.array_split(order, 2)]
    return float(np.mean([distance_of(reference, factor, half) for half in halves])) - distance
