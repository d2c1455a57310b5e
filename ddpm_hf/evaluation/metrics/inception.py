"""The Inception Score (Salimans et al. 2016): exp of the mean KL(p(y|x) ‖ p(y)), over parts of the samples."""

from typing import Any

import numpy as np
import torch

from ...common.errors import DataError
from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .inputs import as_matrix, blocks
from .intervals import INFINITESIMAL, symmetric


def parts(count: int, splits: int, split_size: int | None) -> list[slice]:
    """The rows of each part: `splits` of nearly equal size, or parts of `split_size`, the last one with fewer."""
    if split_size is not None:
        return [slice(start, min(start + split_size, count)) for start in range(0, count, split_size)]
    return [slice(i * count // splits, (i + 1) * count // splits) for i in range(splits)]


def divergences(logits: np.ndarray) -> np.ndarray:
    """KL(p(y|x) ‖ p(y)) of each row of logits [N, K], in nats, with p(y) the mean over the rows: float64 [N]."""
    marginal = sum(block.softmax(dim=1).sum(dim=0) for block in blocks(logits)) / len(logits)
    log_marginal = marginal.log()
    found = []
    for block in blocks(logits):
        probabilities = block.softmax(dim=1)
        terms = probabilities * (block.log_softmax(dim=1) - log_marginal)
        found.append(torch.where(probabilities > 0, terms, 0).sum(dim=1))  # 0 log 0 = 0
    return torch.cat(found).numpy()


def part_divergences(logits: Any, splits: int, split_size: int | None, shuffle_seed: int | None) -> list[np.ndarray]:
    """The divergences of each part's samples."""
    matrix = as_matrix(logits, "logits", least=2)
    if split_size is None and len(matrix) < splits:
        raise DataError(f"{len(matrix)} samples cannot be divided into {splits} parts; use more samples")
    if shuffle_seed is not None:
        matrix = matrix[np.random.RandomState(shuffle_seed).permutation(len(matrix))]
    return [divergences(matrix[rows]) for rows in parts(len(matrix), splits, split_size)]


def inception_score(
    logits: Any, splits: int = 10, *, split_size: int | None = None, shuffle_seed: int | None = None
) -> tuple[float, float]:
    """The Inception Score: its mean over parts of the samples, and its standard deviation over them.

    Args:
        logits: of a classifier, [N, K], an array or tensor.
        splits: number of parts. More parts give a smaller score, of fewer samples each.
        split_size: samples in each part, in place of `splits`; the last part may be smaller.
        shuffle_seed: of a permutation before the samples are divided; None keeps their order.

    Raises:
        DataError: logits that are not finite, or fewer than parts.
    """
    scores = np.exp([one.mean() for one in part_divergences(logits, splits, split_size, shuffle_seed)])
    return float(scores.mean()), float(scores.std())


def inception(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """The Inception Score of the generated images; the real ones do not count.

    The influence of a sample on its part's score is the score times its divergence less the mean one. (That it also
    moves p(y) has no effect to first order.)
    """
    if generated.logits is None:
        raise DataError("the Inception Score requires a network with classes, and these features have no logits")
    found = part_divergences(generated.logits, protocol.splits, protocol.split_size, protocol.shuffle_seed)
    scores = np.exp([one.mean() for one in found])
    # a part of one sample has no spread of its own: the variance is pooled
    influences = np.concatenate([score * (one - one.mean()) for score, one in zip(scores, found)])
    spread = float((influences**2).sum()) / max(len(influences) - len(found), 1)
    variance = spread * sum(1 / len(one) for one in found) / len(found) ** 2
    details = {"parts": len(found), "standard_deviation_of_parts": float(scores.std())}
    return symmetric(float(scores.mean()), variance, INFINITESIMAL, floor=1.0, details=details)
