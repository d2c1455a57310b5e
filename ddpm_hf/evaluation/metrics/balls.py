"""Balls about samples, each as large as the distance to its k-th nearest other sample, and who is in them.

Squared distances come from |x|² + |y|² - 2 x·y about a common centre, in float64 and blocks. Where one is too near to
a radius for its rounding, the differences themselves are squared: ties and duplicates are exact.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from .intervals import GROUPS

BLOCK = 2048  # rows and columns of a block of distances
SPARE = 8  # neighbours beyond the k-th that are remembered, for the radius without a group of samples
ROUNDING = 1e-12  # of a squared distance, relative to |x|² + |y|²; 2,048 dimensions lose at most 5e-13
PAIRS = 100_000  # pairs that are counted together


class Samples:
    """A set's features [N, D], in an order that its groups are random in."""

    def __init__(self, features: np.ndarray, centre: np.ndarray, seed: int):
        order = np.random.default_rng(seed).permutation(len(features))
        self.features = torch.from_numpy(features[order])
        self.centre = torch.from_numpy(centre)
        self.groups = torch.arange(len(order)) % GROUPS
        self.squares = torch.cat([self.centred(rows).square().sum(dim=1) for rows in self.blocks()])

    def __len__(self) -> int:
        return len(self.features)

    def blocks(self) -> Iterator[slice]:
        """The rows of each block."""
        return (slice(start, min(start + BLOCK, len(self))) for start in range(0, len(self), BLOCK))

    def centred(self, rows: slice) -> torch.Tensor:
        """Some features about the centre, float64."""
        return self.features[rows].double() - self.centre


def squared_distances(first: Samples, rows: slice, second: Samples, columns: slice) -> torch.Tensor:
    """[rows, columns], rounded."""
    products = first.centred(rows) @ second.centred(columns).T
    return products.mul_(-2).add_(first.squares[rows, None]).add_(second.squares[columns])


def exact_squared_distances(
    first: Samples, rows: torch.Tensor, second: Samples, columns: torch.Tensor
) -> torch.Tensor:
    """Of pairs [P], from the differences; the same for the same two images, whichever set they are in."""
    pieces = zip(rows.split(BLOCK), columns.split(BLOCK))
    found = [(first.features[i].double() - second.features[j].double()).square().sum(dim=1) for i, j in pieces]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


class Neighbours(NamedTuple):
    """The nearest other samples of each, nearest first: squared distances [N, K] and indices [N, K]."""

    squares: torch.Tensor
    indices: torch.Tensor


def nearest_neighbours(samples: Samples, k: int) -> Neighbours:
    """The k nearest other samples of each sample, and some more."""
    count = min(k + SPARE, len(samples) - 1)
    squares = torch.full((len(samples), count), torch.inf, dtype=torch.float64)
    indices = torch.zeros(len(samples), count, dtype=torch.long)
    for rows in samples.blocks():
        for columns in samples.blocks():
            if columns.start < rows.start:
                continue  # the block's transpose has been seen
            block = squared_distances(samples, rows, samples, columns)
            if rows == columns:
                block.fill_diagonal_(torch.inf)
            else:
                keep_nearest(squares, indices, columns, block.T.contiguous(), rows.start)
            keep_nearest(squares, indices, rows, block, columns.start)
    return Neighbours(squares, indices)


def keep_nearest(
    squares: torch.Tensor, indices: torch.Tensor, rows: slice, block: torch.Tensor, first_column: int
) -> None:
    """Merge a block of distances [rows, columns] into the nearest neighbours of its rows."""
    nearest, which = block.topk(min(squares.shape[1], block.shape[1]), dim=1, largest=False)
    candidates = torch.cat([squares[rows], nearest], dim=1)
    of_which = torch.cat([indices[rows], which + first_column], dim=1)
    squares[rows], chosen = candidates.topk(squares.shape[1], dim=1, largest=False)
    indices[rows] = of_which.gather(1, chosen)


class Balls:
    """The balls of a set, and how many points of another one are in them.

    Args:
        centres: the set.
        neighbours: of each of its samples.
        k: which neighbour decides the radius.
        strict: whether a ball excludes its surface.
        points: number of samples of the other set.
    """

    def __init__(self, centres: Samples, neighbours: Neighbours, k: int, strict: bool, points: int):
        self.centres, self.k, self.strict = centres, k, strict
        everyone = torch.arange(len(centres))
        self.squared_radii = exact_squared_distances(centres, everyone, centres, neighbours.indices[:, k - 1])
        self.radii_without = self.without_groups(neighbours)  # [N, G]
        self.largest = torch.maximum(self.squared_radii, self.radii_without.amax(dim=1))
        self.counts_of_points = torch.zeros(points, dtype=torch.long)  # how many balls each point is in
        self.counts_without = torch.zeros(points, GROUPS, dtype=torch.int32)  # without the balls of a group
        self.counts_of_balls = torch.zeros(len(centres), dtype=torch.long)  # how many points are in each ball
        self.own_without = torch.zeros(len(centres), GROUPS, dtype=torch.int32)  # with the radius without a group
        self.by_group_of_points = torch.zeros(len(centres), GROUPS, dtype=torch.int32)

    def without_groups(self, neighbours: Neighbours) -> torch.Tensor:
        """Squared radii [N, G] if the samples of a group were not there; below 0 for those samples themselves."""
        radii = torch.empty(len(self.centres), GROUPS, dtype=torch.float64)
        groups = self.centres.groups[neighbours.indices]  # [N, K]
        for group in range(GROUPS):
            rank = (groups != group).cumsum(dim=1)
            at = (rank < self.k).sum(dim=1).clamp(max=groups.shape[1] - 1)  # the k-th of the others
            radii[:, group] = neighbours.squares.gather(1, at[:, None])[:, 0]
        radii[torch.arange(len(self.centres)), self.centres.groups] = -1
        return radii

    def count(self, block: torch.Tensor, rows: slice, points: Samples, columns: slice) -> None:
        """Count who of some points is in some balls.

        Args:
            block: squared distances of balls `rows` to points `columns`.
        """
        rounding = ROUNDING * (self.centres.squares[rows, None] + points.squares[columns].max())
        near = block <= self.largest[rows, None] + rounding
        balls, inside = near.nonzero(as_tuple=True)
        squares = block[balls, inside]
        for some in torch.arange(len(balls)).split(PAIRS):
            self.count_pairs(balls[some] + rows.start, points, inside[some] + columns.start, squares[some])

    def count_pairs(self, balls: torch.Tensor, points: Samples, which: torch.Tensor, squares: torch.Tensor) -> None:
        """Count pairs [P] of a ball and a point, at these squared distances."""
        radii = self.squared_radii[balls]
        rounding = ROUNDING * (self.centres.squares[balls] + points.squares[which])
        unsure = ((squares - radii).abs() <= rounding).nonzero()[:, 0]
        squares[unsure] = exact_squared_distances(self.centres, balls[unsure], points, which[unsure])
        inside = squares < radii if self.strict else squares <= radii
        ones = inside.long()
        self.counts_of_points.index_add_(0, which, ones)
        self.counts_of_balls.index_add_(0, balls, ones)
        self.by_group_of_points.index_put_((balls, points.groups[which]), ones.int(), accumulate=True)
        without = (squares[:, None] <= self.radii_without[balls]).int()  # [P, G]
        self.counts_without.index_add_(0, which, without)
        self.own_without.index_add_(0, balls, without)


def count_members(first: Samples, second: Samples, *, by_first: list[Balls], by_second: list[Balls]) -> None:
    """Count, for balls of the first set, who of the second is in them, and the other way round."""
    for rows in first.blocks():
        for columns in second.blocks():
            block = squared_distances(first, rows, second, columns)
            for balls in by_first:
                balls.count(block, rows, second, columns)
            if by_second:
                block = block.T.contiguous()
            for balls in by_second:
                balls.count(block, columns, first, rows)
