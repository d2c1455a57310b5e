"""Each metric equals its formula, computed another way, on features with duplicates, ties and singular covariances."""

import math

import numpy as np
import pytest
import torch

from ddpm_hf.evaluation.metrics import (
    METRICS,
    balls,
    density_coverage,
    frechet_distance,
    frechet_distance_infinity,
    inception_score,
    kernel_distance,
    mind_distance,
    precision_recall,
    vendi_score,
)

D = 12


def features(count, shift=0.0, rank=D, seed=0):
    """Correlated features [count, D] whose covariance has this rank."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((D, D))[:rank]
    return random.standard_normal((count, rank)) @ mixing + shift


def with_copies(matrix, copies):
    return np.concatenate([matrix, copies])


A, B = features(300, seed=1), features(200, 0.3, seed=2)
SETS = {
    "more samples than dimensions": (A, B),
    "fewer samples than dimensions": (features(9, seed=3), features(7, 0.3, seed=4)),
    "few generated samples": (A, features(7, 0.3, seed=4)),
    "few real samples": (features(9, seed=3), B),
    "singular covariances": (features(300, rank=5, seed=5), features(200, 0.3, rank=4, seed=6)),
    "duplicates": (with_copies(A, A[:80]), with_copies(B, A[:30])),
    "the same sample": (A, np.repeat(B[:1], 5, axis=0)),
    "the same set": (A, A),
}


@pytest.fixture(params=SETS)
def pair(request):
    return SETS[request.param]


# The Fréchet distance


def frechet_by_singular_values(real, generated):
    """With X and Y the centred samples over √(N-1), tr √(Σ1 Σ2) is the sum of the singular values of X Yᵀ: no root of
    an eigenvalue, so that nothing is lost where a covariance is singular."""
    X, Y = ((one - one.mean(axis=0)) / math.sqrt(len(one) - 1) for one in (real, generated))
    root = np.linalg.svd(X @ Y.T, compute_uv=False).sum()
    return ((real.mean(axis=0) - generated.mean(axis=0)) ** 2).sum() + (X**2).sum() + (Y**2).sum() - 2 * root


def test_frechet_distance_equals_the_sum_of_singular_values(pair):
    # Breaks if eigenvalues that are 0 add their rounding errors' roots, which are 1e-8 each.
    real, generated = pair
    scale = np.trace(np.cov(real.T))  # the same set is at a distance of 0
    expected = frechet_by_singular_values(real, generated)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


def test_frechet_distance_of_commuting_covariances_is_that_of_each_axis():
    one, two = np.diag([1.0, 2.0, 3.0]), np.diag([2.0, 0.0, 5.0])
    corners = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    shift = np.array([1.0, 2.0, 3.0])
    # the covariance of the corners is 2/5 I
    expected = 14 + 0.4 * ((np.diag(one) - np.diag(two)) ** 2).sum()
    assert frechet_distance(corners @ one, corners @ two + shift) == pytest.approx(expected, rel=1e-12)


def test_float32_features_far_from_zero_lose_nothing():
    # Breaks if sums or products are in float32, or moments are not about the mean.
    real, generated = (one.astype(np.float32) for one in (A + 3000, B + 3000))
    exact = frechet_by_singular_values(real.astype(np.float64), generated.astype(np.float64))
    assert frechet_distance(real, generated) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(generated)) == pytest.approx(exact, rel=1e-9)


# FD∞


def test_fd_infinity_is_the_intercept_of_the_distances_of_subsets():
    random = np.random.default_rng(7)
    sizes = np.linspace(20, 200, 15).astype(int)
    distances = [frechet_distance(A, B[random.choice(200, size, replace=False)]) for size in sizes]
    design = np.stack([np.ones(15), 1 / sizes], axis=1)
    expected = np.linalg.lstsq(design, np.array(distances), rcond=None)[0][0]
    assert frechet_distance_infinity(A, B, seed=7) == pytest.approx(expected, rel=1e-9)


# KID


def kernel_by_pairs(real, generated, unbiased):
    """The definition, pair by pair."""

    def mean(first, second, without_same):
        pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if not (without_same and i == j)]
        return sum((first[i] @ second[j] / D + 1) ** 3 for i, j in pairs) / len(pairs)

    return mean(real, real, unbiased) + mean(generated, generated, unbiased) - 2 * mean(real, generated, False)


@pytest.mark.parametrize("unbiased", [True, False])
def test_kernel_distance_of_all_samples_equals_its_definition(unbiased):
    real, generated = with_copies(features(25, seed=1), A[:5]), with_copies(features(25, 0.3, seed=2), A[:5])
    found = kernel_distance(real, generated, subsets=1, subset_size=1000, unbiased=unbiased)
    assert found == pytest.approx(kernel_by_pairs(real, generated, unbiased), rel=1e-9)


def test_kernel_distance_is_the_mean_over_the_subsets_of_torch_fidelity():
    random = np.random.RandomState(2020)
    found = []
    for _ in range(3):
        chosen = A[random.choice(300, 30, replace=False)], B[random.choice(200, 30, replace=False)]
        found.append(kernel_by_pairs(*chosen, True))
    assert kernel_distance(A, B, subsets=3, subset_size=30) == pytest.approx(np.mean(found), rel=1e-9)


# The Inception Score


def score_of(logits):
    """exp(H(mean p) - mean H(p))."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    q = p.mean(axis=0)
    return math.exp(-(q * np.log(q)).sum() + (p * np.log(p)).sum(axis=1).mean())


LOGITS = 2 * np.random.default_rng(0).standard_normal((103, 7))


def test_inception_score_over_parts_equals_its_definition():
    order = np.random.RandomState(2020).permutation(103)
    parts = [score_of(LOGITS[order][i * 103 // 10 : (i + 1) * 103 // 10]) for i in range(10)]
    assert inception_score(LOGITS, 10, shuffle_seed=2020) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-9)
    parts = [score_of(LOGITS[start : start + 50]) for start in (0, 50, 100)]  # the last one has 3
    assert inception_score(LOGITS, split_size=50) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-9)


def test_inception_score_of_certain_and_of_indifferent_classifiers():
    # Breaks if a probability of 0 makes the score NaN.
    certain = 1e4 * np.eye(5)[np.arange(50) % 5]
    assert inception_score(certain, 2)[0] == pytest.approx(5, rel=1e-12)
    assert inception_score(np.pad(certain, ((0, 0), (0, 2)), constant_values=-1e4), 2)[0] == pytest.approx(
        5, rel=1e-12
    )
    assert inception_score(np.zeros((50, 5)), 2)[0] == pytest.approx(1, rel=1e-12)


# Precision, recall, density, coverage


def manifolds_by_pairs(real, generated, k, strict):
    """The four figures from all differences, as the papers define them."""

    def distances(first, second):
        return ((first[:, None].astype(float) - second[None].astype(float)) ** 2).sum(axis=2)

    def radii(one):
        own = distances(one, one)
        np.fill_diagonal(own, np.inf)
        return np.sort(own, axis=1)[:, k - 1]

    across = distances(real, generated)
    inside = np.less if strict else np.less_equal
    in_real, in_generated = inside(across, radii(real)[:, None]), inside(across, radii(generated)[None])
    in_open = across < radii(real)[:, None]
    return {
        "precision, recall": (in_real.any(axis=0).mean(), in_generated.any(axis=1).mean()),
        "density, coverage": (in_open.sum() / (k * len(generated)), in_open.any(axis=1).mean()),
    }


GRID = np.random.default_rng(0).integers(0, 4, (150, 2))  # most distances are ties, and there are duplicates
TIED = {
    "grids": (GRID[:90], GRID[60:]),
    "grids of quarters": (GRID[:90] / 4, GRID[60:] / 4),
    "copies": (A, A[:50]),
    "one sample": (A, np.repeat(A[:1], 10, axis=0)),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("name", [*TIED, "more samples than dimensions", "duplicates"])
def test_manifolds_equal_their_definition(name, k, strict, monkeypatch):
    # Breaks if rounding decides whether a sample lies on a ball's surface, or a block boundary loses a neighbour.
    monkeypatch.setattr(balls, "BLOCK", 64)
    real, generated = {**SETS, **TIED}[name]
    expected = manifolds_by_pairs(real, generated, k, strict)
    found = precision_recall(real, generated, k, strict=strict)
    assert found == pytest.approx(expected["precision, recall"], rel=1e-12)
    assert density_coverage(real, generated, k) == pytest.approx(expected["density, coverage"], rel=1e-12)


# MIND


def test_mind_on_a_line_is_three_times_the_transport_cost():
    real, generated = A[:200, :1], B[:, :1]
    expected = 3 * ((np.sort(real, axis=0) - np.sort(generated, axis=0)) ** 2).mean()
    assert mind_distance(real, generated, directions=2) == pytest.approx(expected, rel=1e-9)


def test_mind_is_the_mean_over_directions_of_equally_large_sets():
    random = torch.Generator().manual_seed(5)
    chosen = A[torch.randperm(300, generator=random)[:200].numpy()]
    directions = torch.randn(60, D, generator=random).numpy().astype(np.float64)
    found = []
    for direction in directions / np.linalg.norm(directions, axis=1, keepdims=True):
        found.append(((np.sort(chosen @ direction) - np.sort(B @ direction)) ** 2).mean())
    assert mind_distance(A, B, directions=60, seed=5) == pytest.approx(
        3 * D * np.mean(found), rel=1e-6
    )  # float32 lengths
    assert mind_distance(A, A) == 0


# Vendi


@pytest.mark.parametrize("name", ["more samples than dimensions", "fewer samples than dimensions", "duplicates"])
def test_vendi_equals_the_entropy_of_the_similarities(name):
    one = SETS[name][0]
    lengths = np.linalg.norm(one, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(one @ one.T / (lengths * lengths.T) / len(one))
    values = values[values > 1e-12]
    assert vendi_score(one) == pytest.approx(math.exp(-(values * np.log(values)).sum()), rel=1e-9)


def test_vendi_counts_different_samples():
    assert vendi_score(np.eye(8)) == pytest.approx(8, rel=1e-12)
    assert vendi_score(np.repeat(np.eye(8), 3, axis=0)) == pytest.approx(8, rel=1e-12)
    assert vendi_score(np.ones((6, 8))) == pytest.approx(1, rel=1e-12)


def test_every_row_has_a_function():
    # Breaks if a row names a module or function that is not there.
    assert all(callable(metric.function) and metric.name == name for name, metric in METRICS.items())
    assert all(callable(metric.summary) for metric in METRICS.values() if metric.needs.startswith("images"))
