"""AuthPct: the percentage of samples that are no closer to a training image than real images are to each other."""

from dataclasses import replace
from typing import Any

import numpy as np

from ...common.errors import DataError
from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .inputs import as_matrix
from .intervals import NORMAL_95
from .nearest import nearest


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of independent samples (Wilson 1927)."""
    square = NORMAL_95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_95 / (1 + square / count) * np.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return float(max(centre - half, 0)), float(min(centre + half, 1))


def authpct(
    real: Features, generated: Features, protocol: Protocol, seed: int, train: Any = None, train_labels: Any = None
) -> Figure:
    """The percentage of authentic samples (Alaa et al. 2022, as the FLS and dgm-eval suites compute it).

    A sample is authentic if its nearest training image is nearer to another training image than to the sample. In
    `details`, that of held-out images, which a model that copies nothing has too.
    """
    if train is None:
        raise DataError("AuthPct is measured against the training images; name the dataset of the training")
    samples, training = (
        as_matrix(generated.pool, "generated features", 2),
        as_matrix(train.pool, "training features", 2),
    )
    _, apart = nearest(training, training, apart=True)

    def authentic(features: np.ndarray) -> float:
        which, distances = nearest(features, training)
        return float(np.mean(apart[which] < distances))

    value = authentic(samples)
    low, high = wilson(value, len(samples))
    figure = Figure(100 * value, 100 * low, 100 * high, "binomial, over samples (Wilson)")
    if real is None:
        return figure
    reference = 100 * authentic(as_matrix(real.pool, "held-out features", 2))
    return replace(figure, details={"held_out": reference}, note=f"held-out images: {reference:.1f}")
