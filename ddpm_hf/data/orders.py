"""The order of an epoch's samples, keyed by seed and epoch."""

import numpy as np

from ..common.randomness import STREAMS, keyed_generator


def keyed_permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch's samples: a permutation of 0..length-1."""
    return keyed_generator(seed, "epoch_order", 0, epoch, STREAMS["order"]).permutation(length)


def keyed_balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """As many samples as there are labels [N], every class as often as any other, to within one.

    Small classes repeat, each time in a new order; of large ones each epoch has another part.
    """
    generator = keyed_generator(seed, "balanced_order", 0, epoch, STREAMS["order"])
    classes = generator.permutation(np.unique(labels))
    chosen = []
    for index, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        count = len(labels) // len(classes) + (index < len(labels) % len(classes))
        repeats = [generator.permutation(members) for _ in range(-(-count // len(members)))]
        chosen.append(np.concatenate(repeats)[:count])
    return generator.permutation(np.concatenate(chosen))


def bucketed_length(group_sizes: list[int], batch_size: int) -> int:
    """The number of samples in an epoch of full batches of one group each, at least one batch a group."""
    return sum(max(1, size // batch_size) * batch_size for size in group_sizes)


def keyed_bucketed_order(seed: int, epoch: int, group_sizes: list[int], batch_size: int) -> np.ndarray:
    """Indices into consecutive groups, such that each run of `batch_size` of them is of one group.

    Samples that do not fill a batch are left out, different ones each epoch; a group smaller than a batch repeats.
    """
    generator = keyed_generator(seed, "bucketed_order", 0, epoch, STREAMS["order"])
    batches, start = [], 0
    for size in group_sizes:
        count = max(1, size // batch_size) * batch_size
        chosen = np.concatenate([generator.permutation(size) for _ in range(-(-count // size))])[:count]
        batches += list((start + chosen).reshape(-1, batch_size))
        start += size
    return np.concatenate([batches[index] for index in generator.permutation(len(batches))])
