"""MIND, the Monge Inception Distance (Berthet et al. 2026, arXiv:2605.06797): transport along random directions.

3 D times the mean, over random unit directions, of the mean squared difference between the sorted projections of two
sets: the squared sliced Wasserstein distance on the scale of FID.
"""

from typing import Any

import numpy as np
import torch

from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .inputs import as_pair, blocks
from .intervals import symmetric

DIRECTIONS = 1000
AT_ONCE = 50  # directions whose projections are in memory together


def equal_sizes(real: np.ndarray, generated: np.ndarray, random: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The two sets, of the larger one a random choice of as many samples as of the other."""
    count = min(len(real), len(generated))
    chosen = [
        one if len(one) == count else one[torch.randperm(len(one), generator=random)[:count]]
        for one in (real, generated)
    ]
    return chosen[0], chosen[1]


def unit_directions(dimensions: int, count: int, random: torch.Generator) -> torch.Tensor:
    """Random directions [D, count] of length 1."""
    directions = torch.randn(count, dimensions, generator=random).double()
    return (directions / directions.norm(dim=1, keepdim=True)).T


def projected(matrix: np.ndarray, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sorted projections [L, N] of a set on directions [D, L], and which sample each is of."""
    return torch.cat([block @ directions for block in blocks(matrix)]).T.contiguous().sort(dim=1)


def mind_distance(real: Any, generated: Any, *, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """MIND of two sets of features.

    Args:
        real: [N, D], an array or tensor.
        generated: [M, D]; a larger set is reduced at random to the size of the other.
        directions: number of random directions.
        seed: of the directions, and of the choice of samples.

    Raises:
        DataError: features that are not finite, or of different dimensions.
    """
    random = torch.Generator().manual_seed(seed)  # used as in torch-fidelity
    first, second = equal_sizes(*as_pair(real, generated), random)
    lines = unit_directions(first.shape[1], directions, random)
    total = 0.0
    for some in lines.split(AT_ONCE, dim=1):
        difference = projected(first, some)[0] - projected(second, some)[0]
        total += float(difference.square().mean(dim=1).sum())
    return 3 * first.shape[1] * total / directions


def potentials(moved: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The Kantorovich potential of the transport of sorted values [L, N] to sorted targets, up to a constant.

    Its slope at y is 2 (y - T(y)); it is the influence of a sample at y on the squared distance (Santambrogio 2015,
    sec. 7.2).
    """
    slopes = 2 * (moved - target)
    steps = (slopes[:, 1:] + slopes[:, :-1]) / 2 * moved.diff(dim=1)
    return torch.cat([torch.zeros_like(moved[:, :1]), steps.cumsum(dim=1)], dim=1)


def mind(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """MIND over 1,000 directions; the interval counts the samples of both sets and the choice of directions."""
    random = torch.Generator().manual_seed(seed)
    first, second = equal_sizes(*as_pair(real.pool, generated.pool, least=2), random)
    count, dimensions = first.shape
    scale = 3 * dimensions
    distances = []
    influences = torch.zeros(2, count, dtype=torch.float64)
    for some in unit_directions(dimensions, DIRECTIONS, random).split(AT_ONCE, dim=1):
        (left, left_order), (right, right_order) = projected(first, some), projected(second, some)
        distances.append((left - right).square().mean(dim=1))
        for row, moved, target, order in ((0, left, right, left_order), (1, right, left, right_order)):
            influences[row].index_add_(0, order.flatten(), potentials(moved, target).flatten())
    each = scale * torch.cat(distances)  # [L]
    of_samples = (influences * scale / DIRECTIONS).var(dim=1).sum() / count
    variance = float(of_samples + each.var() / DIRECTIONS)
    details = {"directions": DIRECTIONS, "samples": count}
    method = "infinitesimal jackknife over samples, and spread of directions"
    return symmetric(float(each.mean()), variance, method, floor=0.0, details=details)
