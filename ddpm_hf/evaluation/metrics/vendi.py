"""The Vendi score (Friedman & Dieng 2023): the effective number of different samples."""

import dataclasses
from typing import Any

import numpy as np
import torch

from ...common.errors import DataError
from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .frechet import kept
from .inputs import as_matrix, blocks, chosen_rows
from .intervals import INFINITESIMAL, symmetric


def normalized(block: torch.Tensor) -> torch.Tensor:
    """Rows [N, D] of length 1."""
    lengths = block.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise DataError("the features of a sample are all 0, and have no direction; use another network")
    return block / lengths


def spectrum(matrix: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The eigenvalues [R] above 0 of K/N, K the cosine similarities of the rows [N, D], and directions [D, R].

    (1/N) XᵀX has the same eigenvalues, and is the smaller matrix where there are more samples than dimensions.
    """
    count, dimensions = matrix.shape
    if count < dimensions:
        rows = torch.cat([normalized(block) for block in blocks(matrix)])
        values, vectors = torch.linalg.eigh(rows @ rows.T / count)
        above = kept(values)
        return values[above], rows.T @ vectors[:, above] / (count * values[above]).sqrt()
    second_moment = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    for block in blocks(matrix):
        rows = normalized(block)
        second_moment.addmm_(rows.T, rows)
    values, vectors = torch.linalg.eigh(second_moment / count)
    above = kept(values)
    return values[above], vectors[:, above]


def vendi_score(features: Any) -> float:
    """exp of the entropy of the eigenvalues of K/N, with K the cosine similarities of N samples.

    Args:
        features: [N, D], an array or tensor.

    Returns: from 1, where all samples are the same, to N, where all are orthogonal.

    Raises:
        DataError: features that are not finite, or all 0 for a sample.
    """
    values, _ = spectrum(as_matrix(features, "generated features"))
    return float(torch.exp(-(values * values.log()).sum()))


def vendi(real: Features, generated: Features, protocol: Protocol, seed: int) -> Figure:
    """The Vendi score of the generated images, and in `details` that of as many real ones, to compare it with.

    Noise scores higher than any images: the nearer to the real ones the better.

    The influence of a sample x of length 1 on the entropy is -xᵀ log(C) x less its mean, with C = (1/N) XᵀX.
    """
    matrix = as_matrix(generated.pool, "generated features", least=2)
    values, directions = spectrum(matrix)
    score = float(torch.exp(-(values * values.log()).sum()))
    influence = torch.cat([-(normalized(block) @ directions).square() @ values.log() for block in blocks(matrix)])
    variance = score**2 * float(influence.var()) / len(matrix)
    of_real = vendi_score(chosen_rows(as_matrix(real.pool, "real features"), len(matrix), seed))
    figure = symmetric(score, variance, INFINITESIMAL, floor=1.0, details={"of_real_images": of_real})
    return dataclasses.replace(figure, note=f"{of_real:.4g} of as many real images")
