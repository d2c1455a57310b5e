"""How long the metrics take on large sets of features, and how much memory.

    python benchmarks/metric_speed.py [fid kid ...] [--real 50000] [--generated 50000] [--dimensions 2048]

Features are random, as large as those of FID's network; seconds are those of one figure with its interval.
"""

import argparse
import resource
import time

import numpy as np
import torch

from ddpm_hf.common.machine import keep_freed_memory
from ddpm_hf.evaluation.features import Features
from ddpm_hf.evaluation.metrics import METRICS
from ddpm_hf.evaluation.protocols import PROTOCOLS


def random_features(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Float32 [count, dimensions], not negative, with a spectrum that falls as that of a network's features."""
    random = np.random.default_rng(seed)
    scales = np.geomspace(1, 1e-2, dimensions, dtype=np.float32)
    return np.abs(random.standard_normal((count, dimensions), dtype=np.float32) * scales)


def main() -> None:
    """Print a line for each metric."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("metrics", nargs="*", default=["fid", "kid"])
    parser.add_argument("--real", type=int, default=50_000)
    parser.add_argument("--generated", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=2048)
    arguments = parser.parse_args()
    keep_freed_memory()
    counts = (arguments.real, arguments.generated)
    features = [random_features(count, arguments.dimensions, seed) for seed, count in enumerate(counts)]
    logits = random_features(arguments.generated, 1008, 2)
    real, generated = Features(features[0]), Features(features[1], logits=logits)
    print(f"{counts[0]} and {counts[1]} x {arguments.dimensions}, {torch.get_num_threads()} threads")
    for name in arguments.metrics:
        start, processor = time.perf_counter(), time.process_time()
        figure = METRICS[name].function(real, generated, PROTOCOLS["torch-fidelity"], 0)
        seconds, busy = time.perf_counter() - start, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{name}: {figure.value:.6g} ({figure.low:.6g} to {figure.high:.6g}), {seconds:.0f} s,"
            f" {busy:.0f} s of processors, at most {peak:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
