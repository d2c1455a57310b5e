"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

A set's manifold is the union of balls about its samples, each as large as the distance to its k-th nearest other
sample. All four figures come from one pass over the distances between the two sets.
"""

import weakref
from typing import Any, NamedTuple

import numpy as np

from ...common.errors import DataError
from ..features import Features
from ..protocols import Protocol
from .balls import Balls, Samples, count_members, nearest_neighbours
from .figures import Figure
from .inputs import as_pair, chosen_rows
from .intervals import BY_GROUPS, GROUPS, STUDENT_95, share


class Estimate(NamedTuple):
    """A figure, its variance over samples, and how many samples it is a mean of."""

    value: float
    variance: float
    count: int  # type: ignore[assignment]  # tuple.count is not needed here


class Neighbourhoods(NamedTuple):
    """The four figures of two sets."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def jackknife(leaving_out: list[float]) -> float:
    """The variance of a figure, from its values without each group of samples."""
    values = np.array(leaving_out)
    return float(((values - values.mean()) ** 2).sum() * (len(values) - 1) / len(values))


def points_inside(balls: Balls) -> Estimate:
    """The share of points that are in any ball: precision, or recall."""
    inside = (balls.counts_of_points > 0).double()
    without = [float((balls.counts_without[:, group] > 0).double().mean()) for group in range(GROUPS)]
    variance = float(inside.var()) / len(inside) + jackknife(without)
    return Estimate(float(inside.mean()), variance, len(inside))


def points_density(balls: Balls) -> Estimate:
    """The number of balls that a point is in, in units of k: density."""
    counts = balls.counts_of_points.double() / balls.k
    without = [float(balls.counts_without[:, group].double().mean()) / balls.k for group in range(GROUPS)]
    return Estimate(float(counts.mean()), float(counts.var()) / len(counts) + jackknife(without), len(counts))


def balls_covered(balls: Balls) -> Estimate:
    """The share of balls with a point in them: coverage."""
    counts = balls.counts_of_balls
    covered = (counts > 0).double()
    own = balls.centres.groups
    without_balls = [float((balls.own_without[own != g, g] > 0).double().mean()) for g in range(GROUPS)]
    without_points = [float((counts > balls.by_group_of_points[:, g]).double().mean()) for g in range(GROUPS)]
    return Estimate(float(covered.mean()), jackknife(without_balls) + jackknife(without_points), len(covered))


def neighbourhoods(
    real: np.ndarray, generated: np.ndarray, *, k: int, strict: bool, density_k: int, seed: int = 0
) -> Neighbourhoods:
    """The four figures of checked features [N, D] and [M, D].

    Args:
        k: neighbours of precision and recall.
        strict: whether their balls exclude the surface; those of density and coverage do.
        density_k: neighbours of density and coverage.
        seed: of the groups of the jackknife.
    """
    for what, one in (("real", real), ("generated", generated)):
        if len(one) <= max(k, density_k):
            raise DataError(
                f"{max(k, density_k)} neighbours of each of {len(one)} {what} samples: there must be more samples than"
                " neighbours"
            )
    centre = real.mean(axis=0, dtype=np.float64)
    first, second = Samples(real, centre, seed), Samples(generated, centre, seed + 1)
    of_real = nearest_neighbours(first, max(k, density_k))
    manifold = Balls(first, of_real, k, strict, len(second))
    dense = Balls(first, of_real, density_k, True, len(second))
    samples = Balls(second, nearest_neighbours(second, k), k, strict, len(first))
    count_members(first, second, by_first=[manifold, dense], by_second=[samples])
    return Neighbourhoods(points_inside(manifold), points_inside(samples), points_density(dense), balls_covered(dense))


def precision_recall(real: Any, generated: Any, k: int = 3, *, strict: bool = False) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Args:
        real: [N, D], an array or tensor.
        generated: [M, D].
        k: neighbours that decide a ball's radius.
        strict: whether balls exclude their surface.

    Returns: the share of generated samples in the real manifold, and of real samples in the generated one.

    Raises:
        DataError: features that are not finite, of different dimensions, or no more samples than neighbours.
    """
    found = neighbourhoods(*as_pair(real, generated), k=k, strict=strict, density_k=k)
    return found.precision.value, found.recall.value


def density_coverage(real: Any, generated: Any, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020), with balls that exclude their surface.

    Args:
        real: [N, D], an array or tensor.
        generated: [M, D].
        k: neighbours that decide a ball's radius.

    Returns: the mean number of real balls that a generated sample is in, divided by k (1 is expected of more real
        samples; it can be higher), and the share of real balls with a generated sample.

    Raises:
        DataError: features that are not finite, of different dimensions, or no more samples than neighbours.
    """
    found = neighbourhoods(*as_pair(real, generated), k=k, strict=True, density_k=k)
    return found.density.value, found.coverage.value


class LastPass:
    """The figures of the last two sets: all four metrics ask for them, and a pass takes minutes."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.sets: list[weakref.ref[np.ndarray]] = []
        self.found: Neighbourhoods | None = None

    def __call__(self, real: np.ndarray, generated: np.ndarray, protocol: Protocol, seed: int) -> Neighbourhoods:
        key = (protocol.neighbours, protocol.strict, protocol.density_neighbours, protocol.manifold_samples, seed)
        same = key == self.key and all(one() is other for one, other in zip(self.sets, (real, generated)))
        if self.found is None or not same:
            most = protocol.manifold_samples
            pair = as_pair(real, generated)
            if most is not None:
                pair = chosen_rows(pair[0], most, seed), chosen_rows(pair[1], most, seed)
            self.found = neighbourhoods(
                *pair,
                k=protocol.neighbours,
                strict=protocol.strict,
                density_k=protocol.density_neighbours,
                seed=seed,
            )
            self.key, self.sets = key, [weakref.ref(real), weakref.ref(generated)]
        return self.found


last_pass = LastPass()


def precision(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """The share of generated samples in the real manifold."""
    found = last_pass(real.pool, generated.pool, protocol, seed).precision
    return share(*found, BY_GROUPS, {"neighbours": protocol.neighbours})


def recall(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """The share of real samples in the generated manifold."""
    found = last_pass(real.pool, generated.pool, protocol, seed).recall
    return share(*found, BY_GROUPS, {"neighbours": protocol.neighbours})


def density(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """How many real balls a generated sample is in, in units of k."""
    found = last_pass(real.pool, generated.pool, protocol, seed).density
    half = STUDENT_95 * found.variance**0.5
    details = {"neighbours": protocol.density_neighbours}
    return Figure(found.value, max(found.value - half, 0.0), found.value + half, BY_GROUPS, details)


def coverage(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """The share of real balls with a generated sample."""
    found = last_pass(real.pool, generated.pool, protocol, seed).coverage
    return share(*found, BY_GROUPS, {"neighbours": protocol.density_neighbours})
