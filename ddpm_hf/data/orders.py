"""The order of an epoch's samples, keyed by seed and epoch."""

import numpy as np

from ..common.randomness import STREAMS, keyed_generator


def keyed_permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch's samples: a permutation of 0..length-1."""
    return keyed_generator(seed, "epoch_order", 0, epoch, STREAMS["order"]).permutation(length)


def keyed_balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """As many samples as there are labels [N], every class as often as any other, to within one.

    Small classes repeat, each time in a new order; large ones show another part of themselves each epoch.
    """
    generator = keyed_generator(seed, "balanced_order", 0, epoch, STREAMS["order"])
    classes = generator.permutation(np.unique(labels))
    drawn = []
    for place, one in enumerate(classes):
        members = np.flatnonzero(labels == one)
        wanted = len(labels) // len(classes) + (place < len(labels) % len(classes))
        repeats = [generator.permutation(members) for _ in range(-(-wanted // len(members)))]
        drawn.append(np.concatenate(repeats)[:wanted])
    return generator.permutation(np.concatenate(drawn))


def bucketed_length(group_sizes: list[int], batch_size: int) -> int:
    """The samples of an epoch whose batches hold one group each: whole batches alone, at least one of each group."""
    return sum(max(1, size // batch_size) * batch_size for size in group_sizes)


def keyed_bucketed_order(seed: int, epoch: int, group_sizes: list[int], batch_size: int) -> np.ndarray:
    """Indices through groups that follow one another, so that each `batch_size` of them are of one group.

    What does not fill a batch is left out, others each epoch; a group of less than a batch repeats.
    """
    generator = keyed_generator(seed, "bucketed_order", 0, epoch, STREAMS["order"])
    batches, start = [], 0
    for size in group_sizes:
        wanted = max(1, size // batch_size) * batch_size
        drawn = np.concatenate([generator.permutation(size) for _ in range(-(-wanted // size))])[:wanted]
        batches += list((start + drawn).reshape(-1, batch_size))
        start += size
    return np.concatenate([batches[place] for place in generator.permutation(len(batches))])
