"""How often the 95% intervals of FD∞, KID, FID and MIND contain the true value, on Gaussians.

    python benchmarks/interval_coverage.py [--repeats 200] [--dimensions 16] [--real 10000] [--generated 2000]

Features are Gaussian, so that the Fréchet distance and the expectation of KID are known in closed form. FID and MIND
are compared with their own mean over the repeats: their interval is that of the value at this number of samples.
"""

import argparse
import dataclasses

import numpy as np
from tqdm.auto import tqdm

from ddpm_hf.common.machine import keep_freed_memory
from ddpm_hf.evaluation.features import Features
from ddpm_hf.evaluation.metrics import METRICS
from ddpm_hf.evaluation.protocols import PROTOCOLS, Protocol


class Gaussian:
    """N(mean, covariance), its covariance a random one with a spectrum from 1 down to 0.05."""

    def __init__(self, dimensions: int, shift: float, scale: float, seed: int):
        basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dimensions, dimensions)))
        self.root = basis * np.sqrt(scale * np.geomspace(1, 0.05, dimensions))  # [D, D]
        self.mean = np.full(dimensions, 1 + shift / dimensions**0.5)

    @property
    def covariance(self) -> np.ndarray:
        """[D, D]."""
        return self.root @ self.root.T

    def sample(self, count: int, seed: tuple[int, ...]) -> np.ndarray:
        """[count, D]."""
        noise = np.random.default_rng(seed).standard_normal((count, len(self.mean)))
        return self.mean + noise @ self.root.T


def true_frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|μ1 - μ2|² + tr Σ1 + tr Σ2 - 2 ‖Σ1^½ Σ2^½‖₁, with any roots."""
    roots = np.linalg.svd(first.root.T @ second.root, compute_uv=False).sum()
    return ((first.mean - second.mean) ** 2).sum() + (first.root**2).sum() + (second.root**2).sum() - 2 * roots


def true_kernel_mean(first: Gaussian, second: Gaussian) -> float:
    """E (x·y/D + 1)³ of independent x and y, from the moments of x·y."""
    d, a = len(first.mean), first.mean @ second.mean
    moments = [g.covariance + np.outer(g.mean, g.mean) for g in (first, second)]
    square = (moments[0] * moments[1]).sum()
    # given x, x·y is normal with mean x·μ2 and variance xᵀΣ2x
    v = second.mean @ first.covariance @ second.mean
    mixed = a * ((first.covariance * second.covariance).sum() + first.mean @ second.covariance @ first.mean)
    mixed += 2 * second.mean @ first.covariance @ second.covariance @ first.mean
    cube = a**3 + 3 * a * v + 3 * mixed
    return cube / d**3 + 3 * square / d**2 + 3 * a / d + 1


def true_kernel_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared maximum mean discrepancy under KID's kernel."""
    return true_kernel_mean(first, first) + true_kernel_mean(second, second) - 2 * true_kernel_mean(first, second)


def coverage(
    real: Gaussian, generated: Gaussian, counts: tuple[int, int], repeats: int, names: list[str], protocol: Protocol
) -> dict[str, float]:
    """For each metric, the share of repeats whose interval contains the true value; printed with its deviation."""
    truth = {"fd-infinity": true_frechet_distance(real, generated), "kid": true_kernel_distance(real, generated)}
    figures: dict[str, list] = {name: [] for name in names}
    for repeat in tqdm(range(repeats)):
        sets = [Features(g.sample(n, (repeat, side))) for side, (g, n) in enumerate(zip((real, generated), counts))]
        for name in names:
            figures[name].append(METRICS[name].function(*sets, protocol, repeat))
    covered = {}
    for name in names:
        values = np.array([one.value for one in figures[name]])
        true = truth.get(name, values.mean())
        covered[name] = float(np.mean([one.low <= true <= one.high for one in figures[name]]))
        width = np.mean([one.high - one.low for one in figures[name]])
        print(
            f"{name}: true {true:.4f}, mean {values.mean():.4f}, deviation {values.std():.4f},"
            f" mean width / 3.92 {width / 3.92:.4f}, covered {covered[name]:.1%}"
        )
    return covered


def main() -> None:
    """Print the coverage where the distributions differ, and where they are the same."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--dimensions", type=int, default=16)
    parser.add_argument("--real", type=int, default=10_000)
    parser.add_argument("--generated", type=int, default=2000)
    parser.add_argument("--metrics", nargs="+", default=["fd-infinity", "kid"])
    parser.add_argument("--subset_size", type=int, default=500, help="of KID's 100 subsets")
    arguments = parser.parse_args()
    keep_freed_memory()
    protocol = dataclasses.replace(
        PROTOCOLS["torch-fidelity"], kernel_subset_size=arguments.subset_size, shuffle_seed=None
    )
    counts = (arguments.real, arguments.generated)
    for shift, scale in ((0.5, 1.2), (0.0, 1.0)):
        print(f"shift {shift}, variances times {scale}; {counts[0]} real and {counts[1]} generated samples")
        real = Gaussian(arguments.dimensions, 0.0, 1.0, seed=1)
        generated = Gaussian(arguments.dimensions, shift, scale, seed=2 if shift else 1)
        coverage(real, generated, counts, arguments.repeats, arguments.metrics, protocol)


if __name__ == "__main__":
    main()
