"""C_T, the test of data copying of Meehan et al. 2020, and the cells of a training set that it looks at."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...common.errors import DataError
from ...common.package import install_command
from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .intervals import symmetric
from .nearest import nearest, refuse_training_images, three_sets

# dgm-eval's settings: principal components, cells, and how many samples a cell must exceed to count
COMPONENTS, CELLS, LEAST_IN_CELL = 64, 3, 20


def mann_whitney_z(generated: np.ndarray, held_out: np.ndarray) -> float:
    """The z of the Mann-Whitney U of two sets of distances; negative where the generated ones are smaller."""
    m, n = len(generated), len(held_out)
    ordered = np.sort(held_out)
    smaller = np.searchsorted(ordered, generated, "left") + np.searchsorted(ordered, generated, "right")
    u = smaller.sum() / 2  # pairs in which the generated one is larger; a tie is half a pair
    return float((u - (n * m / 2 - 0.5)) / np.sqrt(n * m * (n + m + 1) / 12))


def data_copying(
    real: Features, generated: Features, protocol: Protocol, seed: int, train: Any = None, train_labels: Any = None
) -> Figure:
    """C_T (Meehan et al. 2020) with dgm-eval's settings: below about -3, samples are copies; above 3, too far away.

    In each cell of the training set, the Mann-Whitney z of the distances to its training images, of samples against
    held-out images; their mean, weighted by the share of held-out images. The interval is that of the scores' spread.
    """
    held_out, samples, training = three_sets(real, generated, train)
    refuse_training_images(nearest(held_out, training)[1])
    held_out, samples, training = reduced([held_out, samples, training], seed)
    cells = cells_of(training, CELLS, seed)
    of_training, of_held_out, of_samples = (cells(each) for each in (training, held_out, samples))
    rows = []
    for cell in range(CELLS):
        members = training[of_training == cell]
        n, m = int((of_held_out == cell).sum()), int((of_samples == cell).sum())
        if len(members) and n and m > LEAST_IN_CELL:
            distances = (
                nearest(each, members)[1] for each in (samples[of_samples == cell], held_out[of_held_out == cell])
            )
            rows.append({"z": mann_whitney_z(*distances), "held_out": n, "samples": m, "training": len(members)})
    if not rows:
        raise DataError(f"{len(samples)} samples: C_T requires more than {LEAST_IN_CELL} in a cell; use more samples")
    weights = np.array([row["held_out"] for row in rows]) / sum(row["held_out"] for row in rows)
    value = float(weights @ [row["z"] for row in rows])
    figure = symmetric(value, float((weights**2).sum()), "normal scores of the cells", details={"cells": rows})
    note = "below -3: copies" if value < -3 else "above 3: far from the training images" if value > 3 else ""
    return replace(figure, note=note)


def reduced(sets: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """The first principal components of the last set, of all sets; as they are where there are no more dimensions."""
    if sets[-1].shape[1] <= COMPONENTS or len(sets[-1]) <= COMPONENTS:
        return sets
    require_sklearn()
    from sklearn.decomposition import PCA

    components = PCA(COMPONENTS, random_state=seed).fit(sets[-1])
    return [components.transform(each) for each in sets]


def cells_of(training: np.ndarray, count: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """k-means of training features [N, D]: a function from features to the indices of their cells."""
    require_sklearn()
    from sklearn.cluster import KMeans

    return KMeans(count, n_init=10, random_state=seed).fit(training).predict


def require_sklearn() -> None:
    """Raise DataError, with the way out, if scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise DataError(f"C_T and regions require scikit-learn: {install_command('eval', 'scikit-learn')}") from error
