"""The training image nearest to each sample."""

from typing import Any

import numpy as np
import torch

from ...common.errors import DataError
from ..features import Features
from ..protocols import Protocol
from .figures import Figure
from .inputs import as_matrix

BLOCK = 2**26  # distances in memory at once
REFINED = 4  # neighbours whose distance is computed again by differences, which is exact for copies
PAIRS = 64  # of samples and training images, for a report
PERCENTILES = (1, 5, 50)
RESAMPLES = 999


def nearest(queries: np.ndarray, references: np.ndarray, apart: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The reference nearest to each query, [N, D] against [M, D]: its index and its Euclidean distance (float64), [N].

    Args:
        apart: the queries are the references themselves, and the nearest other one is meant.
    """
    targets = torch.from_numpy(np.ascontiguousarray(references))
    squares = targets.square().sum(dim=1)
    count = min(REFINED, len(references) - apart)
    indices, distances = [], []
    size = max(1, BLOCK // len(references))
    for first in range(0, len(queries), size):
        block = torch.from_numpy(np.ascontiguousarray(queries[first : first + size])).to(targets.dtype)
        to_all = torch.addmm(squares, block, targets.T, alpha=-2)  # less |query|², [n, M]
        if apart:
            to_all[torch.arange(len(block)), torch.arange(first, first + len(block))] = torch.inf
        candidates = to_all.topk(count, largest=False).indices.sort(dim=1).values  # [n, count]
        exact = torch.stack(
            [(block.double() - targets[column].double()).norm(dim=1) for column in candidates.T], dim=1
        )
        distance, chosen = exact.min(dim=1)
        indices.append(candidates.gather(1, chosen[:, None])[:, 0])
        distances.append(distance)
    return torch.cat(indices).numpy(), torch.cat(distances).numpy()


def three_sets(real: Features | None, generated: Features, train: Features | None) -> list[np.ndarray]:
    """The checked features of held-out, generated and training images.

    Raises:
        DataError: a set is missing, or the held-out images are the training images.
    """
    if train is None:
        raise DataError("memorization is measured against the training images; name the dataset of the training")
    if real is None:
        raise DataError("memorization is calibrated with held-out images; name a split that was not trained on")
    names = "held-out features", "generated features", "training features"
    return [as_matrix(each.pool, name, 2) for each, name in zip((real, generated, train), names)]


def refuse_training_images(distances: np.ndarray) -> None:
    """Raise DataError if most held-out images are at distance 0 from a training image."""
    copies = float(np.mean(distances == 0))
    if copies > 0.5:
        raise DataError(
            f"{copies:.0%} of the held-out images are training images; name a split that was not trained on"
        )


def nearest_training(
    real: Features, generated: Features, protocol: Protocol, seed: int, train: Any = None, train_labels: Any = None
) -> Figure:
    """The median distance of samples to their nearest training image, over that of held-out images.

    About 1 for a model that generalizes, and less for copies. The interval is the bootstrap's over the distances.
    """
    held_out, samples, training = three_sets(real, generated, train)
    of_real, (which, of_samples) = nearest(held_out, training)[1], nearest(samples, training)
    refuse_training_images(of_real)
    rng = np.random.default_rng(seed)
    medians = [
        [np.median(rng.choice(distances, len(distances))) for _ in range(RESAMPLES)]
        for distances in (of_samples, of_real)
    ]
    low, high = np.quantile(np.divide(*medians), [0.025, 0.975])
    order = np.argsort(of_samples, kind="stable")[:PAIRS]
    details = {
        "percentiles": list(PERCENTILES),
        "samples": np.percentile(of_samples, PERCENTILES).tolist(),
        "held_out": np.percentile(of_real, PERCENTILES).tolist(),
        "nearest": [[int(i), int(which[i]), float(of_samples[i])] for i in order],
    }
    value = np.median(of_samples) / np.median(of_real)
    return Figure(float(value), float(low), float(high), "bootstrap over samples", details)
