"""Checked features, and their rows in blocks of float64."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ...common.errors import DataError

BLOCK_ROWS = 4096


def as_matrix(features: Any, what: str, least: int = 1) -> np.ndarray:
    """Features as a finite matrix [N, D] of their own precision; integers become float64.

    Args:
        features: an array, or a tensor of any device.
        what: which features, for messages.
        least: rows that the metric requires.

    Raises:
        DataError: another number of axes, too few rows, or values that are not finite.
    """
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        features = (features.float() if features.dtype in (torch.float16, torch.bfloat16) else features).numpy()
    matrix = np.asarray(features)
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise DataError(f"{what} must be a matrix, one row for each image (got shape {list(matrix.shape)})")
    if len(matrix) < least:
        raise DataError(f"{what} have {len(matrix)} samples, and the metric requires {least}; use more samples")
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float64)
    for start in range(0, len(matrix), BLOCK_ROWS):
        finite = np.isfinite(matrix[start : start + BLOCK_ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(finite.argmin())
            raise DataError(f"{what} of sample {row} are not finite; look at that image, or at the network's weights")
    return matrix


def as_pair(real: Any, generated: Any, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Two checked matrices [N, D] and [M, D].

    Raises:
        DataError: see `as_matrix`; or different dimensions.
    """
    first, second = as_matrix(real, "real features", least), as_matrix(generated, "generated features", least)
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"real features have {first.shape[1]} dimensions and generated ones {second.shape[1]}; compute both with"
            " the same network"
        )
    return first, second


def blocks(matrix: np.ndarray, rows: int = BLOCK_ROWS) -> Iterator[torch.Tensor]:
    """Consecutive rows as float64 tensors [rows, D], the last one with fewer."""
    for start in range(0, len(matrix), rows):
        yield torch.tensor(matrix[start : start + rows], dtype=torch.float64)


def chosen_rows(matrix: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` rows, chosen at random, in their order."""
    if len(matrix) <= most:
        return matrix
    return matrix[np.sort(np.random.default_rng(seed).choice(len(matrix), most, replace=False))]
