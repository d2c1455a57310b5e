"""The Fréchet distance of Gaussians fitted to features: FID, sFID (Heusel et al. 2017; Dowson & Landau 1982).

|μ1 - μ2|² + tr Σ1 + tr Σ2 - 2 tr √(Σ1 Σ2). With any F such that FᵀF = Σ1, the eigenvalues of F Σ2 Fᵀ, symmetric and
not negative, are those of Σ1 Σ2. Where there are fewer samples than dimensions, F is the matrix of samples itself.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from ...common.errors import DataError
from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .inputs import as_pair, blocks, chosen_rows
from .intervals import INFINITESIMAL, symmetric

INFLUENCE_ROWS = 10_000  # whose spread of influence is precise to 1%


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] (divided by N - 1) of N samples, float64."""

    count: int  # type: ignore[assignment]  # tuple.count is not needed here
    mean: torch.Tensor
    covariance: torch.Tensor


def moments(features: np.ndarray) -> Moments:
    """The moments of features [N, D], summed in float64 about the mean."""
    count, dimensions = features.shape
    mean = torch.zeros(dimensions, dtype=torch.float64)
    for block in blocks(features):
        mean += block.sum(dim=0)
    mean /= count
    covariance = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for block in blocks(features):
        block -= mean
        covariance.addmm_(block.T, block)
    return Moments(count, mean, covariance / (count - 1))


def kept(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Which eigenvalues of a positive semidefinite matrix are not rounding errors of 0; their roots would add up."""
    if not len(eigenvalues):
        return eigenvalues > 0
    return eigenvalues > eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(torch.float64).eps


def covariance_factor(features: np.ndarray, fitted: Moments) -> torch.Tensor:
    """F [R, D] with FᵀF the covariance: the centred samples where these are few, else from its eigenvectors."""
    if len(features) <= features.shape[1]:
        centred = torch.tensor(features, dtype=torch.float64) - fitted.mean
        return centred / (fitted.count - 1) ** 0.5
    values, vectors = torch.linalg.eigh(fitted.covariance)
    real = kept(values)
    return values[real].sqrt()[:, None] * vectors[:, real].T  # [R, D]


def distance_of(first: Moments, factor: torch.Tensor, second: Moments) -> float:
    """The squared Fréchet distance of two Gaussians, the first one's covariance also as its factor [R, D]."""
    values = torch.linalg.eigvalsh(factor @ second.covariance @ factor.T)
    return assembled(first, second, values[kept(values)].sqrt())


def assembled(first: Moments, second: Moments, roots: torch.Tensor) -> float:
    """The distance, from the roots of the eigenvalues of Σ1 Σ2."""
    traces = first.covariance.trace() + second.covariance.trace() - 2 * roots.sum()
    return max(float((first.mean - second.mean).square().sum() + traces), 0.0)


def frechet_distance(real: Any, generated: Any) -> float:
    """The (squared) Fréchet distance between Gaussians fitted to two sets of features, as FID reports it.

    Args:
        real: [N, D], an array or tensor.
        generated: [M, D].

    Raises:
        DataError: features that are not finite, fewer than two, or of different dimensions.
    """
    first, second = as_pair(real, generated, least=2)
    if len(second) < len(first):
        first, second = second, first
    fitted = moments(first)
    return distance_of(fitted, covariance_factor(first, fitted), moments(second))


class Influence(NamedTuple):
    """The distance, and the variance of it that comes from either set's samples."""

    value: float
    first: float
    second: float


def distance_and_variances(first: np.ndarray, second: np.ndarray, seed: int) -> Influence:
    """The distance of two sets and its variance, by the infinitesimal jackknife.

    The distance changes with Σ2 by tr (I - T) dΣ2, where T is the linear map that carries the second Gaussian to the
    first (Olkin & Pukelsheim 1982): the influence of a sample y is 2 (μ2 - μ1)·(y - μ2) + (y - μ2)ᵀ(I - T)(y - μ2)
    less its mean, and that of the first set's samples accordingly.
    """
    swapped = len(second) < len(first)
    few, many = (second, first) if swapped else (first, second)
    small, large = moments(few), moments(many)
    factor = covariance_factor(few, small)
    values, vectors = torch.linalg.eigh(factor @ large.covariance @ factor.T)
    real = kept(values)
    roots, turned = values[real].sqrt(), factor.T @ vectors[:, real]  # [R], [D, R]
    # a map is W Wᵀ
    to_few = turned / roots.sqrt()
    to_many = large.covariance @ turned / roots**1.5
    variances = [
        influence_variance(few, small.mean, large.mean, to_many, seed),
        influence_variance(many, large.mean, small.mean, to_few, seed),
    ]
    return Influence(assembled(small, large, roots), *(variances[::-1] if swapped else variances))


def influence_variance(
    features: np.ndarray, mean: torch.Tensor, other: torch.Tensor, root: torch.Tensor, seed: int
) -> float:
    """The variance of the mean influence of a set's samples; root rootᵀ carries its Gaussian to the other one."""
    influence = []
    for block in blocks(chosen_rows(features, INFLUENCE_ROWS, seed)):
        block -= mean
        of_covariance = block.square().sum(dim=1) - (block @ root).square().sum(dim=1)
        influence.append(2 * block @ (mean - other) + of_covariance * len(features) / (len(features) - 1))
    return float(torch.cat(influence).var()) / len(features)


def fid(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """FID of the pool features; its interval is that of FID at this number of samples (FD∞ has none of its bias)."""
    return figure_of(real.pool, generated.pool, seed)


def sfid(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """sFID: the same distance of the spatial features, as guided-diffusion's evaluator computes it."""
    for one, what in ((real, "real"), (generated, "generated")):
        if one.spatial is None:
            raise DataError(f"sFID requires the network of FID, and the {what} images have no spatial features")
    return figure_of(real.spatial, generated.spatial, seed)


def figure_of(real: Any, generated: Any, seed: int) -> Figure:
    """The distance with its interval."""
    first, second = as_pair(real, generated, least=2)
    found = distance_and_variances(first, second, seed)
    return symmetric(found.value, found.first + found.second, INFINITESIMAL, floor=0.0)
