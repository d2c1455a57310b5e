"""Colour and contrast shift: the distance, its interval, its direction and its picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.common.errors import DataError
from ddpm_hf.evaluation.metrics import METRICS
from ddpm_hf.evaluation.metrics.colour import PERMUTATIONS, colour_picture, colour_summary, wasserstein
from ddpm_hf.evaluation.protocols import PROTOCOLS


def measure(name, real, generated, seed=0):
    return METRICS[name].function(real, generated, PROTOCOLS["adm"], seed)


def summaries(n, mean=(100, 120, 140), spread=10, contrast=50, seed=0):
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.normal(mean, spread, (n, 3)), rng.normal(contrast, spread, n)])


def test_a_summary_is_that_of_the_pixels():
    """Else colours are of another scale, or contrast of another grey than PIL's."""
    images = torch.randint(256, (4, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = colour_summary(images)
    for row, image in zip(found, images.permute(0, 2, 3, 1).numpy()):
        np.testing.assert_allclose(row[:3], image.reshape(-1, 3).mean(axis=0))
        assert row[3] == pytest.approx(np.asarray(Image.fromarray(image).convert("L"), float).std(), abs=0.5)
    grey = colour_summary(images[:, :1])
    np.testing.assert_allclose(grey[:, 1], images[:, 0].double().flatten(1).std(dim=1, correction=0))


@pytest.mark.parametrize("sizes", [(50, 50), (37, 80)])
def test_the_distance_is_scipys(sizes):
    """For sets of unequal sizes and with ties, and the potential gives the distance back."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    a, b = np.round(rng.normal(0, 2, sizes[0]), 1), np.round(rng.normal(0.3, 1, sizes[1]), 1)
    order = np.argsort(np.concatenate([a, b]), kind="stable")
    is_real = np.arange(sum(sizes)) < sizes[0]
    value, potential = wasserstein(np.concatenate([a, b])[order], is_real[order])
    assert value == pytest.approx(stats.wasserstein_distance(a, b), rel=1e-12)
    assert value == pytest.approx(potential[is_real[order]].mean() - potential[~is_real[order]].mean(), rel=1e-12)


def test_a_shift_is_as_large_as_it_is():
    """Samples that are 8 levels too red and 4 too blue, by the same images: 12/3 on average, and the signs."""
    real = summaries(500)
    generated = real + np.array([8.0, 0, -4, 6])
    colour = measure("colour", real, generated)
    assert colour.value == pytest.approx(4, rel=1e-9)
    assert colour.low < 4 < colour.high
    assert [colour.details[name]["mean_change"] for name in ("red", "green", "blue")] == pytest.approx([8, 0, -4])
    assert colour.details["p_value"] == 1 / (1 + PERMUTATIONS)
    assert colour.note.startswith("red +8.0, green +0.0, blue -4.0; two samples of one set: ")
    contrast = measure("contrast", real, generated)
    assert [contrast.value, contrast.details["contrast"]["mean_change"]] == pytest.approx([6, 6])
    assert contrast.details["contrast"]["spread_ratio"] == pytest.approx(1)


def test_the_interval_covers_a_shift(monkeypatch):
    """Means that differ by 5: W1 is 5, and of 200 intervals 90 to 99% contain it."""
    monkeypatch.setattr("ddpm_hf.evaluation.metrics.colour.PERMUTATIONS", 1)
    covered = 0
    for seed in range(200):
        real, generated = summaries(150, seed=2 * seed), summaries(200, contrast=55, seed=2 * seed + 1)
        figure = METRICS["contrast"].function(real, generated, PROTOCOLS["adm"], seed)
        covered += figure.low <= 5 <= figure.high
    assert 0.9 <= covered / 200 <= 0.99


def test_two_samples_of_one_set_do_not_differ(monkeypatch):
    """Else chance is a shift: p-values are uniform, and the distance is what it is expected to be of one set."""
    monkeypatch.setattr("ddpm_hf.evaluation.metrics.colour.PERMUTATIONS", 39)
    figures = [measure("colour", summaries(60, seed=2 * i), summaries(80, seed=2 * i + 1)) for i in range(60)]
    p_values = [figure.details["p_value"] for figure in figures]
    assert 0.3 < np.mean(np.array(p_values) <= 0.5) < 0.7
    assert np.mean([figure.value / figure.details["expected_of_one_set"] for figure in figures]) == pytest.approx(
        1, abs=0.1
    )


def test_a_picture_shows_each_distribution():
    """Else nothing is seen of a shift: a panel for each channel and for contrast, named with its change."""
    real = summaries(300)
    picture = colour_picture(real, real + 7)
    assert [axes.get_title() for axes in picture.axes] == [
        "mean of red: +7.0", "mean of green: +7.0", "mean of blue: +7.0", "contrast: +7.0",
    ]  # fmt: skip
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    assert np.asarray(Image.open(buffer).convert("L")).std() > 5
    assert len(colour_picture(real[:, 2:], real[:, 2:]).axes) == 2


def test_what_does_not_compare_is_refused():
    """Else grey samples are compared with the red of real images."""
    with pytest.raises(DataError, match="real images have 3 channels and generated ones 1"):
        measure("colour", summaries(5), summaries(5)[:, 2:])
    with pytest.raises(DataError, match="1 generated images: colour shift requires 2"):
        measure("colour", summaries(5), summaries(1))
