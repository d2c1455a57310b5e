"""The metrics beside the functions of torch-fidelity, torchmetrics and prdc, on the same float64 features.

    pip install torch-fidelity==0.4.0 torchmetrics==1.9.0 prdc==0.2
    python benchmarks/metric_agreement.py

Printed are relative differences. Where a covariance is singular, torch-fidelity and torchmetrics add the roots of
rounded eigenvalues of 0, about 1e-8 each; the last column compares with the sum of singular values, which has none.
"""

import contextlib
import io

import numpy as np
import torch
from prdc import compute_prdc
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from ddpm_hf.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

CUBIC = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}


def correlated(count: int, rank: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Features [count, 24] with a covariance of this rank."""
    mixing = np.random.default_rng(99).standard_normal((24, 24))[:rank]
    return np.random.default_rng(seed).standard_normal((count, rank)) @ mixing + shift


def relative(ours: float, theirs: float) -> float:
    """The difference in units of their value."""
    return abs(ours - theirs) / max(abs(theirs), 1e-300)


def frechet_differences(real: np.ndarray, generated: np.ndarray) -> list[float]:
    """To torch-fidelity, torchmetrics, and singular values."""
    tensors = torch.from_numpy(real), torch.from_numpy(generated)
    statistics = [fid_features_to_statistics(one) for one in tensors]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    moments = [moment for one in tensors for moment in (one.mean(dim=0), one.T.cov())]
    centred = [(one - one.mean(axis=0)) / (len(one) - 1) ** 0.5 for one in (real, generated)]
    roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    exact = ((real.mean(axis=0) - generated.mean(axis=0)) ** 2).sum() + sum((one**2).sum() for one in centred)
    ours = frechet_distance(real, generated)
    return [relative(ours, one) for one in (fidelity, float(_compute_fid(*moments)), exact - 2 * roots)]


def kernel_differences(real: np.ndarray, generated: np.ndarray) -> list[float]:
    """To torch-fidelity's subsets, and to torchmetrics' distance of one subset."""
    size = min(len(real), len(generated), 300)
    tensors = torch.from_numpy(real), torch.from_numpy(generated)
    found = kid_features_to_metric(
        *tensors, kid_subsets=10, kid_subset_size=size, verbose=False, rng_seed=2020, **CUBIC
    )
    ours = kernel_distance(real, generated, subsets=10, subset_size=size)
    one = kernel_distance(real[:size], generated[:size], subsets=1, subset_size=size)
    metrics = float(poly_mmd(tensors[0][:size], tensors[1][:size]))
    return [relative(ours, found["kernel_inception_distance_mean"]), relative(one, metrics)]


def manifold_differences(real: np.ndarray, generated: np.ndarray) -> list[float]:
    """To prdc's four figures with k = 5, and to torch-fidelity's two, which are float32, with k = 3."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = compute_prdc(real, generated, 5)
    ours = [*precision_recall(real, generated, 5, strict=True), *density_coverage(real, generated, 5)]
    of_prdc = max(relative(one, other) for one, other in zip(ours, found.values()))
    fidelity = calculate_precision_recall_full(torch.from_numpy(generated), torch.from_numpy(real), 3)
    return [of_prdc, max(relative(one, other) for one, other in zip(precision_recall(real, generated, 3), fidelity))]


def main() -> None:
    """Print the table, and the Inception Score's difference."""
    real, generated = correlated(900, 24, 1), correlated(700, 24, 2, 0.3)
    cases = {
        "more samples than dimensions": (real, generated),
        "fewer samples than dimensions": (real[:15], generated[:12]),
        "few real, many generated": (real[:15], generated),
        "singular covariances": (correlated(900, 7, 1), correlated(700, 5, 2, 0.3)),
        "duplicates": (np.concatenate([real, real[:100]]), np.concatenate([generated, real[:50]])),
    }
    print(
        "| features | FID: torch-fidelity | torchmetrics | singular values | KID: torch-fidelity | torchmetrics |",
        end="",
    )
    print(" prdc, all four | precision, recall: torch-fidelity |\n|" + "---|" * 8)
    for name, pair in cases.items():
        differences = [*frechet_differences(*pair), *kernel_differences(*pair), *manifold_differences(*pair)]
        print(f"| {name} | " + " | ".join(f"{one:.0e}" for one in differences) + " |")
    logits = 3 * np.random.default_rng(0).standard_normal((1003, 20))
    found = isc_features_to_metric(torch.from_numpy(logits), 10, True, 2020)
    ours = inception_score(logits, 10, shuffle_seed=2020)
    difference = max(relative(one, other) for one, other in zip(ours, found.values()))
    print(f"\nInception Score of 1,003 samples in 10 parts, mean and deviation, torch-fidelity: {difference:.0e}")


if __name__ == "__main__":
    main()
