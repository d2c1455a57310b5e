"""Do few samples rank the checkpoints of a run as many do? MIND at 1,000 and FD∞ at 2,000 against FID at 10,000.

    python benchmarks/checkpoint_ranking.py FEATURES SAMPLES

FEATURES is as in `ddpm-hf evaluate --features`, such as classifier:FOLDER, or "pixels". SAMPLES holds
`checkpoint-STEP.npz`, each with a checkpoint's sampled digits as `images`, uint8 [N, H, W, C]. The real images are the
4,000 training digits; the 1,000 held-out ones are evaluated as if they were samples, to compare with the first 1,000
of each checkpoint.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau

from ddpm_hf.common.machine import keep_freed_memory
from ddpm_hf.data import ImageTransform, embedded_digits
from ddpm_hf.data.images import decode_row
from ddpm_hf.evaluation.features import Features, extract, load_extractor
from ddpm_hf.evaluation.metrics import METRICS
from ddpm_hf.evaluation.protocols import PROTOCOLS

PROTOCOL = PROTOCOLS["torch-fidelity"]
# column -> metric and number of samples
COLUMNS = {
    "FID, 10,000": ("fid", 10_000),
    "MIND, 1,000": ("mind", 1000),
    "FD∞, 2,000": ("fd-infinity", 2000),
    "FID, 1,000": ("fid", 1000),
    "KID, 1,000": ("kid", 1000),
}


def real_digits(part: str, side: int) -> np.ndarray:
    """uint8 [N, H, W, 1] of a part of the embedded digits."""
    rows = embedded_digits(part, (side, side))
    transform = ImageTransform(side, side, channels=1)
    return np.stack([transform.resize(decode_row(row["image"], "digit")) for row in rows.dataset]).reshape(
        -1, side, side, 1
    )


def main() -> None:
    """Print the table and the rank correlations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("features")
    parser.add_argument("samples", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    extractor = None if arguments.features == "pixels" else load_extractor(arguments.features, protocol=PROTOCOL)

    def features_of(images: np.ndarray) -> Features:
        if extractor is None:
            return Features(images.reshape(len(images), -1) / np.float32(255))
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(250)
        return Features(extract(extractor, batches, keep=()).pool)

    files = sorted(arguments.samples.glob("checkpoint-*.npz"), key=lambda path: int(path.stem.rpartition("-")[2]))
    sets = {}
    for path in files:
        with np.load(path) as archive:
            sets[path.stem] = features_of(archive["images"])
        side = archive_side(path)
    real = features_of(real_digits("train", side))
    sets["held-out digits"] = features_of(real_digits("test", side))

    print(f"{len(real)} training digits, features of {real.pool.shape[1]} dimensions\n")
    print("| images | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    table: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for name, features in sets.items():
        cells = []
        for column, (metric, count) in COLUMNS.items():
            if len(features) < count:
                cells.append("")
                continue
            figure = METRICS[metric].function(real, Features(features.pool[:count]), PROTOCOL, 0)
            cells.append(f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})")
            if name in {path.stem for path in files}:
                table[column].append(figure.value)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print()
    first, *others = COLUMNS
    for column in others:
        print(f"Kendall's τ of {column} with {first}: {kendalltau(table[first], table[column]).statistic:.2f}")


def archive_side(path: Path) -> int:
    """The images' height."""
    with np.load(path) as archive:
        return int(archive["images"].shape[1])


if __name__ == "__main__":
    main()
