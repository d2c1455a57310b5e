"""Nearest training images, AuthPct and C_T, against their definitions written out."""

import numpy as np
import pytest

from ddpm_hf.common.errors import DataError
from ddpm_hf.evaluation.features import Features
from ddpm_hf.evaluation.metrics import METRICS
from ddpm_hf.evaluation.metrics.authenticity import wilson
from ddpm_hf.evaluation.metrics.data_copying import mann_whitney_z
from ddpm_hf.evaluation.metrics.nearest import nearest
from ddpm_hf.evaluation.protocols import PROTOCOLS

RNG = np.random.default_rng(0)
TRAIN, HELD_OUT, SAMPLES = (RNG.normal(size=(n, 6)) for n in (400, 300, 350))


def measure(name, samples=SAMPLES, held_out=HELD_OUT, train=TRAIN):
    sets = [None if one is None else Features(one) for one in (held_out, samples, train)]
    return METRICS[name].function(sets[0], sets[1], PROTOCOLS["adm"], 0, train=sets[2])


def distances(a, b):
    """By differences, [N, M]."""
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far from 0"])
def test_the_nearest_is_that_of_all_differences(offset, monkeypatch):
    """Else another training image is shown, or a copy has a distance; in blocks, and far from the origin too."""
    monkeypatch.setattr("ddpm_hf.evaluation.metrics.nearest.BLOCK", 20_000)
    queries, references = SAMPLES + offset, TRAIN + offset
    queries[:5], references[7] = references[10:15], references[8]
    which, found = nearest(queries, references)
    everything = distances(queries, references)
    np.testing.assert_allclose(found, everything.min(axis=1), rtol=1e-9)
    np.testing.assert_allclose(found, everything[np.arange(350), which], rtol=1e-12)
    assert (found[:5] == 0).all()
    which, found = nearest(references, references, apart=True)
    np.fill_diagonal(everything := distances(references, references), np.inf)
    np.testing.assert_allclose(found, everything.min(axis=1), rtol=1e-9)
    assert (which != np.arange(400)).all()
    assert found[7] == found[8] == 0


def test_copies_in_single_precision_have_no_distance():
    """Features are float32: else 1,000 copies have the distance of rounding errors."""
    references = (TRAIN * 30 + 500).astype(np.float32)
    which, found = nearest(references[:100], references)
    assert which.tolist() == list(range(100))
    assert (found == 0).all()


def test_authpct_is_its_definition():
    """Authentic: nearer training neighbours than the sample is; with copies, some are not."""
    samples = SAMPLES.copy()
    samples[:70] = TRAIN[:70] + 0.01
    to_train, among = distances(samples, TRAIN), distances(TRAIN, TRAIN)
    np.fill_diagonal(among, np.inf)
    which = to_train.argmin(axis=1)
    authentic = among.min(axis=1)[which] < to_train.min(axis=1)
    figure = measure("authpct", samples)
    assert figure.value == pytest.approx(100 * authentic.mean(), rel=1e-12)
    assert (figure.low, figure.high) == pytest.approx([100 * end for end in wilson(authentic.mean(), 350)])
    assert figure.value < figure.details["held_out"] == measure("authpct", HELD_OUT).value
    assert figure.note == f"held-out images: {figure.details['held_out']:.1f}"
    assert measure("authpct", TRAIN[:50]).value == 0


def test_mann_whitney_is_scipys():
    """The z of the reference code: U of the generated distances, with its continuity correction."""
    stats = pytest.importorskip("scipy.stats")
    a, b = np.round(RNG.gamma(2, size=90), 1), np.round(RNG.gamma(2.2, size=70), 1)  # with ties
    u = stats.mannwhitneyu(a, b).statistic
    expected = (u - (90 * 70 / 2 - 0.5)) / np.sqrt(90 * 70 * (90 + 70 + 1) / 12)
    assert mann_whitney_z(a, b) == pytest.approx(expected, rel=1e-12)


def test_ct_is_the_weighted_mean_of_its_cells():
    """Three separate clusters are its cells: the z of each, with distances within the cell, by the held-out share."""
    centres = np.array([[0.0, 0, 0, 0, 0, 0], [40, 0, 0, 0, 0, 0], [0, 40, 0, 0, 0, 0]])
    parts = [np.array([0, 0, 1, 1, 1, 2, 2])[np.arange(len(one)) % 7] for one in (TRAIN, HELD_OUT, SAMPLES)]
    train, held_out, samples = (one + centres[part] for one, part in zip((TRAIN, HELD_OUT, SAMPLES), parts))
    copied = np.flatnonzero(parts[2] == 1)[:20]
    samples[copied] = train[np.flatnonzero(parts[0] == 1)[:20]]
    z = [
        mann_whitney_z(
            distances(samples[parts[2] == cell], train[parts[0] == cell]).min(axis=1),
            distances(held_out[parts[1] == cell], train[parts[0] == cell]).min(axis=1),
        )
        for cell in range(3)
    ]
    weights = np.bincount(parts[1]) / len(held_out)
    figure = measure("ct", samples, held_out, train)
    assert figure.value == pytest.approx(weights @ z, rel=1e-9)
    assert sorted(row["z"] for row in figure.details["cells"]) == pytest.approx(sorted(z))
    assert (figure.high - figure.low) / 2 == pytest.approx(1.96 * np.sqrt((weights**2).sum()), rel=1e-3)


def test_ct_tells_copies_from_honest_samples():
    """Else its sign is wrong: about 0 for real images, below -3 for copies, above 3 for samples far away."""
    figures = [measure("ct", samples) for samples in (SAMPLES, TRAIN[:350] + 0.01 * SAMPLES, SAMPLES * 3)]
    assert abs(figures[0].value) < 3
    assert figures[1].value < -3
    assert figures[2].value > 3
    assert [figure.note for figure in figures] == ["", "below -3: copies", "above 3: far from the training images"]


def test_ct_has_components_of_many_dimensions():
    """As dgm-eval: 64 of them, fitted to the training images; noise in other dimensions does not count."""
    turned = np.linalg.qr(RNG.normal(size=(80, 80)))[0]
    sets = [np.hstack([one * 10, np.zeros((len(one), 74))]) @ turned for one in (SAMPLES, HELD_OUT, TRAIN)]
    assert measure("ct", *sets).value == pytest.approx(measure("ct").value, abs=1e-6)


def test_the_nearest_ratio_falls_with_copies():
    """Else a copier's distances are those of an honest model; and the pairs shown are the nearest."""
    honest = measure("nearest")
    expected = np.median(distances(SAMPLES, TRAIN).min(axis=1)) / np.median(distances(HELD_OUT, TRAIN).min(axis=1))
    assert honest.value == pytest.approx(expected, rel=1e-9)
    assert honest.low < 1 < honest.high
    samples = SAMPLES.copy()
    samples[100:300] = TRAIN[100:300]
    copied = measure("nearest", samples)
    assert copied.high < 1
    assert all(100 <= i < 300 and i == j and d == 0 for i, j, d in copied.details["nearest"])
    assert len(copied.details["nearest"]) == 64


@pytest.mark.parametrize("name", ["nearest", "ct", "authpct"])
def test_what_is_missing_is_said(name):
    """Else a figure is of other images than it says."""
    with pytest.raises(DataError, match="training images; name the dataset"):
        measure(name, train=None)
    if name == "authpct":
        assert measure(name, held_out=None).details == {}
        return
    with pytest.raises(DataError, match="held-out images; name a split"):
        measure(name, held_out=None)
    with pytest.raises(DataError, match="are training images"):
        measure(name, held_out=TRAIN[:100])
    if name == "ct":
        with pytest.raises(DataError, match="20 samples: C_T requires"):
            measure(name, SAMPLES[:20])
