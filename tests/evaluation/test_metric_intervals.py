"""The metrics' intervals: variances are derivatives, or what a computation without a group gives; and they cover."""

import dataclasses

import numpy as np
import pytest
import torch

from ddpm_hf.common.errors import DataError
from ddpm_hf.evaluation.features import Features
from ddpm_hf.evaluation.metrics import METRICS, balls, frechet
from ddpm_hf.evaluation.metrics.inputs import as_pair
from ddpm_hf.evaluation.metrics.intervals import GROUPS
from ddpm_hf.evaluation.metrics.kernel import discrepancy, sampling_variance
from ddpm_hf.evaluation.protocols import PROTOCOLS

PROTOCOL = PROTOCOLS["torch-fidelity"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def infinitesimal_jackknife(of_weights, count, step=1e-6):
    """The variance of a function of the samples' weights, from its derivatives by differences: Σ (dT/dw_i)² / N² about
    their mean, divided as a sample variance is."""
    derivatives = []
    for index in range(count):
        bump = np.zeros(count)
        bump[index] = step
        up, down = (of_weights((1 + sign * bump) / (1 + sign * bump).sum()) for sign in (1, -1))
        derivatives.append((up - down) / (2 * step) * count)
    return np.var(derivatives, ddof=1) / count


def weighted_frechet(first, second, weights):
    """The distance where the first set has weights; its covariance keeps the factor N / (N - 1)."""
    mean = weights @ first
    X = (first - mean) * np.sqrt(weights * len(first) / (len(first) - 1))[:, None]
    Y = (second - second.mean(axis=0)) / np.sqrt(len(second) - 1)
    root = np.linalg.svd(X @ Y.T, compute_uv=False).sum()
    return ((mean - second.mean(axis=0)) ** 2).sum() + (X**2).sum() + (Y**2).sum() - 2 * root


@pytest.mark.parametrize(("n", "m"), [(40, 30), (30, 40), (4, 30), (5, 4)])
def test_variances_of_frechet_distance_are_derivatives(n, m):
    # Breaks if a transport map or its direction is wrong. With fewer samples than dimensions as well.
    real, generated = normal(n, 6), normal(m, 6, seed=1) @ np.diag([1, 1.5, 2, 0.5, 1, 1]) + 0.4
    found = frechet.distance_and_variances(real, generated, 0)
    of_real = infinitesimal_jackknife(lambda weights: weighted_frechet(real, generated, weights), n)
    of_generated = infinitesimal_jackknife(lambda weights: weighted_frechet(generated, real, weights), m)
    assert (found.first, found.second) == pytest.approx((of_real, of_generated), rel=1e-4)
    assert found.value == pytest.approx(frechet.frechet_distance(real, generated), rel=1e-12)


def half_width(name, real, generated):
    figure = METRICS[name].function(real, generated, PROTOCOL, 0)
    return (figure.high - figure.value) / 1.959964


def test_variance_of_the_vendi_score_is_a_derivative():
    rows = normal(30, 4) + 0.5
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def score(weights):
        values = np.linalg.eigvalsh((unit * weights[:, None]).T @ unit)
        return np.exp(-(values * np.log(values)).sum())

    found = half_width("vendi", Features(rows), Features(rows)) ** 2
    assert found == pytest.approx(infinitesimal_jackknife(score, 30), rel=1e-4)


def test_variance_of_mind_is_a_derivative_where_it_is_known():
    # y = x + δ: the distance is δ², and its influence at y is 2 δ y, at x it is -2 δ x; a line has one direction.
    line = normal(50, 1)
    found = half_width("mind", Features(line), Features(line + 2)) ** 2
    assert found == pytest.approx(2 * 3**2 * 4**2 * line.var(ddof=1) / 50, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_variance_of_kernel_distance_is_that_over_other_samples(shift):
    # Breaks if the second order is left out, which is all there is where the distributions are the same.
    values, variances = [], []
    for repeat in range(300):
        sets = [torch.from_numpy(normal(n, 3, seed=(repeat, n)) + m) for n, m in ((40, 1), (60, 1 + shift))]
        values.append(discrepancy(*sets))
        variances.append(sampling_variance(sets[0], sets[1][:40], (40, 60)))
    assert 0.75 < np.mean(variances) / np.var(values) < 1.5  # the first order is not below 0, which adds to it


def test_figures_without_a_group_are_those_of_the_others(monkeypatch):
    # Breaks if a radius without a group still counts its samples, or a ball of the group is counted.
    monkeypatch.setattr(balls, "BLOCK", 32)
    sets = [balls.Samples(normal(80, 3, seed=seed) + seed / 5, np.zeros(3), seed) for seed in (0, 1)]
    found = balls.Balls(sets[0], balls.nearest_neighbours(sets[0], 3), 3, False, 80)
    balls.count_members(sets[0], sets[1], by_first=[found], by_second=[])
    real, points = (one.features.numpy() for one in sets)
    for group in range(GROUPS):
        others = real[(sets[0].groups != group).numpy()]
        own = np.sort(np.linalg.norm(others[:, None] - others[None], axis=2), axis=1)[:, 3]  # the first is itself
        inside = np.linalg.norm(others[:, None] - points[None], axis=2) <= own[:, None]
        assert found.counts_without[:, group].tolist() == inside.sum(axis=0).tolist()
        assert found.own_without[sets[0].groups != group, group].tolist() == inside.sum(axis=1).tolist()
        in_group = (sets[1].groups == group).numpy()
        across = np.linalg.norm(real[:, None] - points[None], axis=2) <= found.squared_radii.sqrt().numpy()[:, None]
        assert found.by_group_of_points[:, group].tolist() == across[:, in_group].sum(axis=1).tolist()


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_intervals_cover_the_mean_over_other_samples(shift):
    # FD∞ covers the distance of the distributions, which is Σ_d shift²; the others the mean of their own values.
    # At most 40 × 5% + 3 √(40 × 5% × 95%) = 6 of 40 may miss.
    names = ["fd-infinity", "fid", "precision", "recall", "density", "coverage", "vendi"]
    figures = {name: [] for name in names}
    for repeat in range(40):
        sets = [Features(normal(n, 4, seed=(repeat, n)) + m) for n, m in ((300, 0.0), (200, shift))]
        for name in names:
            figures[name].append(METRICS[name].function(*sets, PROTOCOL, repeat))
    for name, found in figures.items():
        true = 4 * shift**2 if name == "fd-infinity" else np.mean([one.value for one in found])
        assert sum(not one.low <= true <= one.high for one in found) <= 6, name


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.2), (0.0, 1.0)])
def test_intervals_of_fd_infinity_and_kid_cover_closed_forms(shift, scale):
    # docs/evaluation.md has 200 repeats; of 100, at least 95 - 3 √(100 × 95% × 5%) = 88 contain the true value.
    from benchmarks import interval_coverage

    real = interval_coverage.Gaussian(16, 0.0, 1.0, seed=1)
    generated = interval_coverage.Gaussian(16, shift, scale, seed=2 if shift else 1)
    protocol = dataclasses.replace(PROTOCOL, kernel_subset_size=500, shuffle_seed=None)
    found = interval_coverage.coverage(real, generated, (10_000, 2000), 100, ["fd-infinity", "kid"], protocol)
    assert min(found.values()) >= 0.88


# Input that no figure can be computed of


def refused(name, real, generated, text):
    with pytest.raises(DataError, match=text):
        METRICS[name].function(real, generated, PROTOCOL, 0)


def test_unusable_features_are_refused():
    good = Features(normal(30, 4), normal(30, 6), normal(30, 5))
    bad = Features(normal(30, 4), normal(30, 6), normal(30, 5))
    bad.pool[7, 2] = bad.spatial[7, 2] = bad.logits[7, 2] = np.nan
    for name, metric in METRICS.items():
        if metric.needs in ("pool", "spatial", "logits"):
            refused(name, good, bad, "of sample 7 are not finite; look at that image")
    pooled = [name for name, metric in METRICS.items() if metric.needs == "pool" and name != "vendi"]
    for name in pooled:
        refused(name, good, Features(normal(30, 3)), "have 4 dimensions and generated ones 3")
        refused(name, good, Features(normal(1, 4)), "1 samples?, and the metric requires|neighbours of each of 1")
    refused("is", good, Features(normal(9, 4), None, normal(9, 5)), "9 samples cannot be divided into 10 parts")
    refused("is", good, Features(normal(30, 4)), "requires a network with classes")
    refused("recall", good, Features(normal(5, 4)), "5 neighbours of each of 5 generated samples")
    refused("vendi", good, Features(np.zeros((30, 4))), "all 0")
    refused("sfid", good, Features(normal(30, 4)), "no spatial features")
    with pytest.raises(DataError, match=r"one row for each image \(got shape \[4\]\)"):
        as_pair(np.zeros(4), np.zeros((4, 1)))


def test_the_least_number_of_samples_is_enough_and_one_less_is_not():
    # Breaks if a command samples for hours, and then has too few.
    for name, metric in METRICS.items():
        if metric.needs not in ("pool", "spatial", "logits"):
            continue
        for protocol in PROTOCOLS.values():
            sets = [Features(normal(200, 4, seed=s), normal(200, 6, seed=s), normal(200, 5, seed=s)) for s in (1, 2)]
            least = metric.least(protocol)
            few = [Features(*(part[:least] for part in (one.pool, one.spatial, one.logits))) for one in sets]
            figure = metric.function(*few, protocol, 0)
            assert np.isfinite([figure.low, figure.value, figure.high]).all(), (name, protocol.name)
            fewer = [Features(*(part[:-1] for part in (one.pool, one.spatial, one.logits))) for one in few]
            with pytest.raises(DataError):
                metric.function(*fewer, protocol, 0)
