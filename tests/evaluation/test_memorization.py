"""Copies of training images: found where planted, in any class, and not found where there are none."""

import numpy as np
import pytest
import torch

from ddpm_hf.common.errors import DataError
from ddpm_hf.evaluation.metrics import METRICS
from ddpm_hf.evaluation.metrics.memorization import (
    CANDIDATES,
    copy_scores,
    copy_test,
    difference_interval,
    memorization,
    thumbnails,
)
from ddpm_hf.evaluation.protocols import PROTOCOLS

PROTOCOL = PROTOCOLS["adm"]
CLASSES = 4


def smooth_images(count, seed, size=12):
    """Random smooth images of four brightnesses, their classes: uint8 [N, 1, size, size] and [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    coarse = torch.randn(count, 1, 5, 5, generator=generator) * 25 + 40 + 50 * labels.reshape(-1, 1, 1, 1)
    images = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    return images.round().clamp(0, 255).to(torch.uint8).numpy(), labels.numpy()


TRAIN, LABELS = smooth_images(400, 0)
HELD_OUT, SAMPLES = smooth_images(400, 1)[0], smooth_images(500, 2)[0]


def shifted(images, down, right):
    """By a pixel, filled with noise."""
    moved = np.roll(images, (down, right), (2, 3))
    filling = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    if down:
        moved[:, :, 0 if down > 0 else -1] = filling[:, :, 0]
    if right:
        moved[..., 0 if right > 0 else -1] = filling[..., 0]
    return moved


COPIES = {
    "exact": lambda images: images,
    "down": lambda images: shifted(images, 1, 0),
    "up and left": lambda images: shifted(images, -1, -1),
    "mirrored": lambda images: images[..., ::-1],
    "upside down, to the right": lambda images: shifted(images[..., ::-1, :], 0, 1),
}


def brute_force_distance(image, other):
    """The least RMS difference over flips and shifts, pixel by pixel; the other one without its border."""
    least = np.inf
    for flipped in (image, image[..., ::-1], image[..., ::-1, :]):
        for top in range(3):
            for left in range(3):
                window = flipped[:, top : top + other.shape[1] - 2, left : left + other.shape[2] - 2]
                difference = window.astype(float) - other[:, 1:-1, 1:-1].astype(float)
                least = min(least, np.sqrt((difference**2).mean()))
    return least


def test_a_score_is_the_ratio_of_distances_under_shifts_and_flips():
    """Else a score means something else: here against loops over every training image."""
    scores = copy_scores(SAMPLES[:6], TRAIN[: CANDIDATES + 1])
    for i in range(6):
        distances = np.sort([brute_force_distance(SAMPLES[i], other) for other in TRAIN[: CANDIDATES + 1]])
        assert scores.distance[i] == pytest.approx(distances[0])
        # one of the training images is no candidate: the least similar at a coarse resolution
        others = [(distances[1:].sum() - left_out) / (CANDIDATES - 1) for left_out in distances[1:]]
        assert min(abs(scores.score[i] - distances[0] / mean) for mean in others) < 1e-9
        assert scores.nearest[i] == np.argmin([brute_force_distance(SAMPLES[i], o) for o in TRAIN[: CANDIDATES + 1]])


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_has_no_distance_to_its_source(kind):
    """Else a model that shifts or flips what it copies is not caught."""
    scores = copy_scores(np.ascontiguousarray(COPIES[kind](TRAIN[:50])), TRAIN)
    assert (scores.score == 0).all()
    assert scores.nearest.tolist() == list(range(50))


def p_value(samples, seed=0, labels=LABELS):
    return memorization(HELD_OUT, samples, PROTOCOL, seed, train=TRAIN, train_labels=labels)


def test_planted_copies_are_found():
    """Else a model that copies a tenth of its samples passes, and nobody sees which."""
    samples = SAMPLES.copy()
    noise = np.random.default_rng(0).normal(0, 5, samples[:50].shape)
    samples[:50] = np.clip(np.round(TRAIN[100:150] + noise), 0, 255)
    figure = p_value(samples)
    assert figure.details["p_value"] <= 0.002
    assert figure.details["copies"]
    assert figure.note.startswith(f"p = {figure.details['p_value']:.3f}: copies")
    assert figure.low > 0
    assert 8 < figure.value < 12
    pairs = figure.details["nearest"]
    assert sorted(pair[0] for pair in pairs[:50]) == list(range(50))
    assert all(train == sample + 100 for sample, train, _ in pairs[:50])


@pytest.mark.parametrize("labels", [LABELS, None], ids=["classes", "cells"])
def test_copies_of_one_class_are_found_there(labels):
    """Else copies in a rare region hide behind the others: it must be named."""
    samples = SAMPLES.copy()
    of_class = np.flatnonzero(LABELS == 2)[:25]
    samples[np.flatnonzero(np.arange(500) % CLASSES == 2)[:25]] = TRAIN[of_class]
    figure = p_value(samples, labels=labels)
    assert figure.details["p_value"] <= 0.01
    assert {pair[1] for pair in figure.details["nearest"][:25]} == set(of_class.tolist())
    if labels is not None:
        worst = min(figure.details["regions"], key=lambda row: row["p_value"])
        assert worst["region"] == 2
        assert figure.note.endswith("copies, in regions 2")
        assert all(row["p_value"] > 0.05 for row in figure.details["regions"] if row["region"] != 2)


def test_without_copies_nothing_is_found():
    """Else honest models are accused."""
    figure = p_value(SAMPLES)
    assert figure.details["p_value"] > 0.05
    assert not figure.details["copies"]
    assert figure.note == f"p = {figure.details['p_value']:.3f}: no copies found"
    assert figure.low == 0


def test_p_values_are_uniform_without_copies():
    """Else false alarms are more than the level: over 300 draws of scores from one distribution, with ties."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(300):
        scores = np.round(rng.gamma(3, size=240), 1)
        regions = rng.integers(0, 5, 240)
        # the share of samples differs between regions, as it may
        is_sample = rng.random(240) < 0.3 + 0.1 * regions
        parts = [(scores[part], regions[part]) for part in (is_sample, ~is_sample)]
        rows = copy_test(parts[0][0], parts[1][0], parts[0][1], parts[1][1], seed, permutations=79)
        found.append(rows[0].p_value)
    for level in (0.05, 0.1, 0.2, 0.5):
        rate = np.mean(np.array(found) <= level)
        assert rate <= level + 3 * np.sqrt(level * (1 - level) / 300)
    assert np.mean(np.array(found) <= 0.5) > 0.3


def test_a_p_value_is_that_of_all_assignments():
    """For sets so small that all assignments can be listed: the sampled p-value is theirs."""
    from itertools import combinations

    scores = np.array([0.1, 0.2, 0.3, 0.35, 0.5, 0.6, 0.7, 0.8])
    lowest = [len({0, 1, 2, 3} & set(chosen)) for chosen in combinations(range(8), 4)]
    exact = np.mean(np.array(lowest) >= 3)  # depth 4: three of the four lowest are samples
    rows = copy_test(scores[[0, 1, 3, 7]], scores[[2, 4, 5, 6]], np.zeros(4, int), np.zeros(4, int), 0, 9999)
    assert rows[0].p_value == pytest.approx(exact, abs=0.02)
    assert [(row.samples, row.held_out) for row in rows] == [(4, 4), (4, 4)]


def test_copies_that_real_images_repeat_too_are_none():
    """Else a dataset whose images repeat, as frames of a film do, makes every model a copier."""
    held_out, samples = HELD_OUT.copy(), SAMPLES.copy()
    held_out[:80], samples[:100] = TRAIN[:80], TRAIN[100:200]
    figure = memorization(held_out, samples, PROTOCOL, 0, train=TRAIN, train_labels=LABELS)
    assert figure.details["p_value"] > 0.05


def test_the_result_is_a_function_of_the_seed():
    """Else a report cannot be repeated."""
    assert p_value(SAMPLES, 3) == p_value(SAMPLES, 3)


def test_thumbnails_are_means_of_areas():
    """Else large images take all memory, or small ones are changed."""
    images = torch.randint(256, (3, 3, 64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = thumbnails(images)
    assert small.shape == (3, 3, 16, 32)
    means = images.double().reshape(3, 3, 16, 4, 32, 4).mean(dim=(3, 5))
    np.testing.assert_allclose(small, means, atol=0.501)
    assert (thumbnails(images[..., :32, :32]) == images[..., :32, :32].numpy()).all()


def test_what_cannot_be_tested_is_refused():
    """One line that says what is missing: else the figure is of nothing."""
    with pytest.raises(DataError, match="requires 50 training images"):
        memorization(HELD_OUT, SAMPLES, PROTOCOL, 0, train=TRAIN[:10])
    with pytest.raises(DataError, match="requires 50 training images"):
        memorization(HELD_OUT, SAMPLES, PROTOCOL, 0)
    with pytest.raises(DataError, match="held-out images; name a split"):
        memorization(None, SAMPLES, PROTOCOL, 0, train=TRAIN)
    with pytest.raises(DataError, match="100% of the held-out images are training images"):
        memorization(TRAIN[:100], SAMPLES, PROTOCOL, 0, train=TRAIN)


def test_the_interval_of_a_difference_is_newcombes():
    """His example of 1998: 56 of 70 against 48 of 80 is 0.2, from 0.0524 to 0.3339."""
    assert difference_interval(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_row_is_this_metric():
    """Else `--metrics memorization` is another one."""
    assert METRICS["memorization"].function is memorization
    assert METRICS["memorization"].summary is thumbnails
