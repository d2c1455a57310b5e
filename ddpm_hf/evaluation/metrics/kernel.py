"""The kernel distance, KID: the squared maximum mean discrepancy of a cubic kernel (Bińkowski et al. 2018).

k(x, y) = (x·y / D + 1)³. As all tools do, it is averaged over random subsets; within a set the unbiased estimate
leaves the pairs of a sample with itself out.
"""

from typing import Any

import numpy as np
import torch

from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .inputs import as_pair, chosen_rows
from .intervals import symmetric

VARIANCE_ROWS = 2000  # of each set, from whose pairs the variance is estimated


def kernel(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[N, D], [M, D] -> [N, M]."""
    return (first @ second.T).div_(first.shape[1]).add_(1).pow_(3)


def discrepancy(real: torch.Tensor, generated: torch.Tensor, unbiased: bool = True) -> float:
    """The squared discrepancy of two sets [N, D] and [M, D]."""
    within = 0.0
    for one in (real, generated):
        values, count = kernel(one, one), len(one)
        pairs = count * (count - 1) if unbiased else count**2
        within += float(values.sum() - (values.trace() if unbiased else 0)) / pairs
    return within - 2 * float(kernel(real, generated).mean())


def subset_distances(
    real: np.ndarray, generated: np.ndarray, subsets: int, size: int, unbiased: bool, seed: int
) -> np.ndarray:
    """The distances [subsets] of random subsets, drawn as torch-fidelity does with this seed."""
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        rows = random.choice(len(real), size, replace=False), random.choice(len(generated), size, replace=False)
        chosen = [torch.tensor(one[which], dtype=torch.float64) for one, which in zip((real, generated), rows)]
        found.append(discrepancy(chosen[0], chosen[1], unbiased))
    return np.array(found)


def kernel_distance(
    real: Any,
    generated: Any,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    unbiased: bool = True,
    seed: int = 2020,
) -> float:
    """The kernel distance of two sets of features, as KID reports it.

    Args:
        real: [N, D], an array or tensor.
        generated: [M, D].
        subsets: how many random subsets it is averaged over.
        subset_size: samples of each set in a subset; all, where a set has fewer. The unbiased distance is the same for
            any size, but for its error.
        unbiased: leave the pairs of a sample with itself out; it can then be slightly below 0.
        seed: of the subsets.

    Raises:
        DataError: features that are not finite, fewer than two, or of different dimensions.
    """
    first, second = as_pair(real, generated, least=2)
    size = min(subset_size, len(first), len(second))
    return float(subset_distances(first, second, subsets, size, unbiased, seed).mean())


def sampling_variance(real: torch.Tensor, generated: torch.Tensor, counts: tuple[int, int]) -> float:
    """The variance of the unbiased distance of all samples, as a U-statistic (Serfling 1980, sec. 5.2).

    The first order comes from the mean of h(x) = E k(x, X') - E k(x, Y) over each set; the second order, which is all
    of it where both distributions are the same, from the products of two samples.

    Args:
        real: some of the samples, as many as of `generated`: [n, D].
        generated: [n, D].
        counts: how many samples the distance itself has of each set.
    """
    across = kernel(real, generated)
    first_order = 0.0
    squares = []
    for one, cross, count in ((real, across, counts[0]), (generated, across.T, counts[1])):
        terms = kernel(one, one) - cross  # [n, n], unbiased off its diagonal
        terms.fill_diagonal_(0)
        first_order += 4 * max(spread_of_means(terms), 0.0) / count
    for one, other in ((real, real), (generated, generated), (real, generated)):
        squares.append(interaction(kernel(one, other), one is other))
    n, m = counts
    return first_order + 2 * squares[0] / n**2 + 2 * squares[1] / m**2 + 4 * squares[2] / (n * m)


def spread_of_means(terms: torch.Tensor) -> float:
    """The variance over i of E[terms_ij | i], without the noise of the mean over j; the diagonal [n, n] is 0."""
    n = len(terms)
    sums, squares = terms.sum(dim=1), terms.square().sum()
    products = (sums.square().sum() - squares) / (n * (n - 1) * (n - 2))  # E[terms_ij terms_ik], j ≠ k
    return float(products - (sums.sum() / (n * (n - 1))) ** 2)


def interaction(values: torch.Tensor, symmetric_pairs: bool) -> float:
    """The variance of a kernel's values [n, n] that neither sample alone explains."""
    if symmetric_pairs:  # the diagonal is of a sample with itself
        values = values.clone()
        values.fill_diagonal_(0)
        values.diagonal().copy_(values.sum(dim=1) / (len(values) - 1))
    centred = values - values.mean(dim=0) - values.mean(dim=1, keepdim=True) + values.mean()
    return float(centred.square().mean())


def kid(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """KID over the protocol's subsets: the mean of their distances, and in `details` their spread.

    Subsets of the same samples are not independent: their spread says nothing of other samples. The interval adds the
    variance of the distance over samples and, of the mean over subsets, that over the choice of subsets.
    """
    first, second = as_pair(real.pool, generated.pool, least=4)
    size = min(protocol.kernel_subset_size, len(first), len(second))
    subset_seed = seed if protocol.shuffle_seed is None else protocol.shuffle_seed
    distances = subset_distances(first, second, protocol.kernel_subsets, size, True, subset_seed)
    rows = min(VARIANCE_ROWS, len(first), len(second))
    some = [
        torch.tensor(chosen_rows(one, rows, seed + index), dtype=torch.float64)
        for index, one in enumerate((first, second))
    ]
    variance = sampling_variance(some[0], some[1], (len(first), len(second)))
    if size < max(len(first), len(second)):
        variance += float(distances.var()) / len(distances)
    details = {"subsets": len(distances), "subset_size": size, "standard_deviation_of_subsets": float(distances.std())}
    return symmetric(
        float(distances.mean()), variance, "variance of the U-statistic and of the choice of subsets", details=details
    )
