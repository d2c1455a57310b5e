"""Memorization: whether samples copy training images, by a test that is local and exact.

The score of an image says how much nearer its nearest training image is than the next ones, under shifts of a pixel
and flips: 0 for a copy, a little below 1 for an image that was never seen. Training images in crowded and in sparse
regions, and blurred samples, have comparable scores, since distances are divided by distances at the same place.

The scores of samples are compared with those of held-out real images, in each region (a class, or a cell of the
training set) and over all: if the model copies nothing that real images do not repeat, any assignment of the scores of
a region to the two sets is as probable as any other. The p-value by permutation is therefore exact, for all regions
together, whatever the images.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...common.errors import DataError
from ..protocols import Protocol
from .authenticity import wilson
from .data_copying import cells_of
from .figures import Figure
from .nearest import PAIRS, refuse_training_images

if TYPE_CHECKING:
    import torch

SIDE = 32  # pixels of a thumbnail's longer side
COARSE = 8  # pixels of the images by which candidates are searched
CANDIDATES = 20  # training images that an image is compared with in detail
BLOCK = 128  # images compared at once
REGIONS = 10  # cells of the training set where there are no labels
PERMUTATIONS = 999
CELLS_AT_ONCE = 2**22  # of the table of permuted labels
LEAST_TRAINING = 50
ALARM = 0.01  # the p-value below which copies are reported
QUANTILE = 0.01  # of held-out scores, below which a sample counts as a copy in the estimated share


def thumbnails(images: "torch.Tensor") -> np.ndarray:
    """Images uint8 [N, C, H, W], averaged over areas to at most 32×32 pixels: uint8 [N, C, h, w]."""
    import torch

    height, width = images.shape[2:]
    scale = SIDE / max(height, width)
    if scale < 1:
        size = max(3, round(height * scale)), max(3, round(width * scale))
        images = torch.nn.functional.adaptive_avg_pool2d(images.float(), size).round().to(torch.uint8)
    return images.cpu().numpy()


# Scores


class Scores(NamedTuple):
    """How images relate to the training images: for each of N images, a function of the image alone."""

    score: np.ndarray  # [N], the distance to the nearest training image over the mean of that to the next ones
    distance: np.ndarray  # [N], to the nearest one: RMS over pixels, in levels of 0..255
    nearest: np.ndarray  # [N], its index


def copy_scores(images: np.ndarray, train: np.ndarray) -> Scores:
    """The scores of thumbnails, uint8 [N, C, h, w], against those of the training images [M, C, h, w].

    Flips and shifts of an image are windows of it that leave a border out, as a training image's middle does. The
    training images whose middle looks like one of the windows at a coarse resolution are compared in detail.
    """
    import torch

    middles = torch.from_numpy(train[..., 1:-1, 1:-1]).float()
    coarse = coarsened(middles)
    parts = []
    for first in range(0, len(images), BLOCK):
        all_windows = windows(torch.from_numpy(images[first : first + BLOCK]).float())
        to_all = torch.cdist(coarsened(all_windows[0]), coarse)  # [n, M]
        for window in all_windows[1:]:
            to_all = torch.minimum(to_all, torch.cdist(coarsened(window), coarse))
        candidates = to_all.topk(min(CANDIDATES, len(train)), largest=False).indices  # [n, K]
        distances, order = detailed(all_windows, middles[candidates]).sort(dim=1)
        others = distances[:, 1:].mean(dim=1)
        score = torch.where(others > 0, distances[:, 0] / others, 0.0)
        parts.append((score, distances[:, 0], candidates.gather(1, order[:, :1])[:, 0]))
    return Scores(*(torch.cat(column).numpy() for column in zip(*parts)))


def windows(images: "torch.Tensor") -> "list[torch.Tensor]":
    """The parts of images [N, C, h, w] that a training image's middle may be: 27 of [N, C, h - 2, w - 2].

    Of the images as they are, flipped left to right and upside down, each at nine places.
    """
    height, width = images.shape[2:]
    return [
        flipped[:, :, top : height - 2 + top, left : width - 2 + left]
        for flipped in (images, images.flip(-1), images.flip(-2))
        for top in range(3)
        for left in range(3)
    ]


def coarsened(images: "torch.Tensor") -> "torch.Tensor":
    """Images [N, C, h, w] at a coarse resolution, as rows [N, D]."""
    import torch

    size = tuple(min(COARSE, side) for side in images.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(images, size).flatten(1)


def detailed(all_windows: "list[torch.Tensor]", middles: "torch.Tensor") -> "torch.Tensor":
    """The least RMS difference of the windows, of [n, C, h, w] each, to candidates [n, K, C, h, w]: float64 [n, K]."""
    import torch

    a = torch.stack([window.flatten(1) for window in all_windows], dim=1).double()  # [n, 27, D]
    b = middles.flatten(2).double()  # [n, K, D]
    # of whole numbers, and therefore exactly 0 for copies
    squares = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None] - 2 * a @ b.transpose(1, 2)  # [n, 27, K]
    return (squares.amin(dim=1) / a.shape[-1]).sqrt()


# The test


class Region(NamedTuple):
    """What the test says of one region; of all together where `region` is None."""

    region: int | None
    samples: int
    held_out: int
    p_value: float  # adjusted for the number of regions


def copy_test(
    samples: np.ndarray,
    held_out: np.ndarray,
    sample_regions: np.ndarray,
    held_out_regions: np.ndarray,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> list[Region]:
    """Whether samples have lower scores than held-out images, over all (the first row) and in each region.

    At several depths r, the r lowest scores of both sets together should contain as many samples as a random choice
    would; the statistic is the least of these (hypergeometric) probabilities, over depths and regions. Its null
    distribution is that under permutations within the regions, so that another share of classes is not a copy. Ties
    are ordered at random. The p-value of all together is that of the whole test.

    Args:
        samples, held_out: scores [N] and [M], lower for copies.
        sample_regions, held_out_regions: the region of each, integers [N] and [M].
    """
    rng = np.random.default_rng(seed)
    scores = np.concatenate([samples, held_out])
    order = np.lexsort((rng.permutation(len(scores)), scores))
    regions = np.concatenate([sample_regions, held_out_regions])[order]
    is_sample = (np.arange(len(scores)) < len(samples))[order]
    groups = [np.flatnonzero(regions == region) for region in np.unique(regions)]
    comparable = [group for group in groups if 0 < is_sample[group].sum() < len(group)]
    tails = [_tails(is_sample[group]) for group in (np.arange(len(scores)), *comparable)]

    def statistics(labels: np.ndarray) -> np.ndarray:
        """The log-probabilities of P labellings [P, N + M] in each part, the least over depths: [P, 1 + regions]."""
        columns = []
        for part, tail in zip([labels, *(labels[:, group] for group in comparable)], tails):
            counts = np.cumsum(part[:, : max(tail, default=0)], axis=1, dtype=np.int32)
            by_depth = [table[counts[:, depth - 1]] for depth, table in tail.items()]
            columns.append(np.min([np.zeros(len(part)), *by_depth], axis=0))
        return np.stack(columns, axis=1)

    observed = statistics(is_sample[None])[0]
    least = []
    size = max(1, CELLS_AT_ONCE // len(scores))
    for first in range(0, permutations, size):
        mixed = np.tile(is_sample, (min(size, permutations - first), 1))
        for group in groups:
            mixed[:, group] = rng.permuted(mixed[:, group], axis=1)
        least.append(statistics(mixed).min(axis=1))
    null = np.concatenate(least)
    adjusted = [float((1 + (null <= value + 1e-12).sum()) / (1 + permutations)) for value in observed]
    numbers = [int(regions[group[0]]) for group in comparable]
    rows = [
        Region(number, int(is_sample[group].sum()), int((~is_sample[group]).sum()), p)
        for number, group, p in zip(numbers, comparable, adjusted[1:])
    ]
    return [Region(None, len(samples), len(held_out), min(adjusted)), *rows]


def _tails(is_sample: np.ndarray) -> dict[int, np.ndarray]:
    """Depth -> log P(K >= k) for k = 0, 1, ...: of K samples among so many of the images, chosen at random."""
    total, samples = len(is_sample), int(is_sample.sum())
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])

    def log_choose(n: Any, k: Any) -> np.ndarray:
        inside = (k >= 0) & (k <= n)
        safe = np.where(inside, k, 0)
        return np.where(inside, log_factorials[n] - log_factorials[safe] - log_factorials[n - safe], -np.inf)

    tails = {}
    for depth in np.unique(np.round(4 * 2 ** (0.5 * np.arange(64))).astype(int)):
        if depth > total // 2:
            break
        k = np.arange(depth + 1)
        log_probability = (
            log_choose(samples, k) + log_choose(total - samples, depth - k) - log_choose(total, np.array(depth))
        )
        tails[int(depth)] = np.logaddexp.accumulate(log_probability[::-1])[::-1]
    return tails


# The metric


def memorization(
    real: np.ndarray,
    generated: np.ndarray,
    protocol: Protocol,
    seed: int,
    train: np.ndarray | None = None,
    train_labels: np.ndarray | None = None,
) -> Figure:
    """The percentage of samples that copy a training image, beyond what held-out real images do.

    It is the share of samples with a score below the lowest percent of held-out images, less that percent; the
    interval is Newcombe's (1998) for a difference of shares. `details` have the `p_value` of the test (below 0.01, it
    finds copies), that of each region, and the pairs with the lowest scores.

    Args:
        real: thumbnails of held-out images, uint8 [N, C, h, w].
        generated: those of samples.
        train: those of the training images.
        train_labels: class ids [M] of these, which are then the regions; else these are cells of the training set.

    Raises:
        DataError: a set is missing or too small, or the held-out images are the training images.
    """
    if train is None or len(train) < LEAST_TRAINING:
        raise DataError(f"memorization requires {LEAST_TRAINING} training images; name the dataset of the training")
    if real is None or len(real) < 2:
        raise DataError("memorization is calibrated with held-out images; name a split that was not trained on")
    of_real, of_samples = copy_scores(real, train), copy_scores(generated, train)
    refuse_training_images(of_real.distance)
    if train_labels is None:
        import torch

        rows = coarsened(torch.from_numpy(train).float()).numpy()
        train_labels = cells_of(rows, REGIONS, seed)(rows)
    labels = np.asarray(train_labels)
    tests = copy_test(of_samples.score, of_real.score, labels[of_samples.nearest], labels[of_real.nearest], seed)
    threshold = np.quantile(of_real.score, QUANTILE)
    shares = [float(np.mean(each.score < threshold)) for each in (of_samples, of_real)]
    low, high = difference_interval(shares[0], len(generated), shares[1], len(real))
    order = np.argsort(of_samples.score, kind="stable")[:PAIRS]
    details = {
        "p_value": tests[0].p_value,
        "copies": tests[0].p_value < ALARM,
        "regions": [row._asdict() for row in tests[1:]],
        "nearest": [[int(i), int(of_samples.nearest[i]), float(of_samples.distance[i])] for i in order],
        "scores": [float(of_samples.score[i]) for i in order],
    }
    value = max(shares[0] - shares[1], 0.0)
    interval = "difference of shares (Newcombe)"
    return Figure(100 * value, 100 * max(low, 0.0), 100 * max(high, 0.0), interval, details, verdict(tests))


def verdict(tests: list[Region]) -> str:
    """What the test says, in a few words."""
    p_value, found = tests[0].p_value, [row.region for row in tests[1:] if row.p_value < ALARM]
    if p_value >= ALARM:
        return f"p = {p_value:.3f}: no copies found"
    where = f", in regions {', '.join(map(str, found))}" if found else ""
    return f"p = {p_value:.3f}: copies{where}"


def difference_interval(p1: float, n1: int, p2: float, n2: int) -> tuple[float, float]:
    """The 95% interval of p1 - p2, shares of n1 and n2 independent samples (Newcombe 1998, method 10)."""
    (low1, high1), (low2, high2) = wilson(p1, n1), wilson(p2, n2)
    difference = p1 - p2
    return (
        difference - float(np.hypot(p1 - low1, high2 - p2)),
        difference + float(np.hypot(high1 - p1, p2 - low2)),
    )
