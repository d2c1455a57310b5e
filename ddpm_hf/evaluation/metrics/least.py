"""How many samples of each set a metric requires, by protocol."""

from ..protocols import Protocol

SMALLEST_SUBSET = 2  # of FD∞, which has subsets of a tenth of the samples


def two(protocol: Protocol) -> int:
    """That have a covariance."""
    return 2


def four(protocol: Protocol) -> int:
    """Whose pairs have a variance."""
    return 4


def ten_subsets(protocol: Protocol) -> int:
    """Of which a tenth has a covariance."""
    return 10 * SMALLEST_SUBSET


def parts(protocol: Protocol) -> int:
    """As many as parts of the Inception Score."""
    return 2 if protocol.split_size is not None else max(protocol.splits, 2)


def fifty(protocol: Protocol) -> int:
    """Whose nearest training images can be compared."""
    return 50


def cells(protocol: Protocol) -> int:
    """Enough for more than 20 in one of the three cells of C_T, however they are divided."""
    return 64


def neighbours(protocol: Protocol) -> int:
    """More than neighbours."""
    return max(protocol.neighbours, protocol.density_neighbours) + 1
