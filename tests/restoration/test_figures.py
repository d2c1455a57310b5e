"""PSNR, SSIM, intervals and pictures of a restoration."""

import numpy as np
import torch

from ddpm_hf.portable.operators_ddpm_hf import OPERATORS
from ddpm_hf.restoration import figures, pictures
from ddpm_hf.restoration.tasks import TASKS, Settings
from tests.support.fixtures_pipeline import randn


def test_psnr_clips_as_pictures_do():
    """Else a figure counts what no picture shows."""
    images = torch.tensor([1.2, 0.5]).reshape(1, 1, 1, 2)
    truth = torch.tensor([1.0, 0.4]).reshape(1, 1, 1, 2)
    assert abs(float(figures.psnr(images, truth)) - -10 * np.log10(0.1**2 / 2)) < 1e-4


def test_ssim_is_its_formula_at_each_place():
    """Else figures do not compare with published ones (Wang et al. 2004: 11x11 weights of deviation 1.5)."""
    a, b = torch.rand(1, 2, 13, 12, dtype=torch.float64), torch.rand(1, 2, 13, 12, dtype=torch.float64)
    place = np.arange(11) - 5
    weights = np.exp(-0.5 * (place / 1.5) ** 2)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for channel in range(2):
        for top in range(3):
            for left in range(2):
                p, q = (one[0, channel, top : top + 11, left : left + 11].numpy() for one in (a, b))
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
                both = (weights * (p - mean_p) * (q - mean_q)).sum()
                c1, c2 = 1e-4, 9e-4
                values.append(
                    (2 * mean_p * mean_q + c1)
                    * (2 * both + c2)
                    / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
                )
    assert abs(float(figures.ssim(a, b)) - np.mean(values)) < 1e-9
    assert float(figures.ssim(a, a)) == 1.0


def test_the_interval_holds_nine_tenths():
    """Else "90%" is another share."""
    solutions = randn(4000, 1, 2, 2)
    summary = figures.summarize(solutions)
    assert abs(float(((solutions >= summary.low) & (solutions <= summary.high)).float().mean()) - 0.9) < 1e-3
    assert figures.coverage(summary, torch.zeros(1, 2, 2)) == 1.0
    assert figures.coverage(summary, torch.full((1, 2, 2), 3.0)) == 0.0
    assert float(figures.summarize(solutions[:1]).deviation.max()) == 0.0


def test_an_observation_is_shown_at_the_size_of_its_solutions():
    """Else a comparison is a row of pictures of several sizes."""
    for name in OPERATORS:
        options = {"mask": torch.eye(8)} if name == "mask" else {}
        operator = OPERATORS[name]((3, 8, 8), **options)
        shown = pictures.observed_picture(operator.forward(torch.ones(1, 3, 8, 8))[0], operator)
        assert shown.size == (8, 8)
    half = OPERATORS["half"]((1, 8, 8))
    shown = np.asarray(pictures.observed_picture(torch.ones(1, 8, 8), half))
    assert (shown[:, :4] == 255).all()
    assert (abs(shown[:, 4:].astype(int) - 128) <= 1).all()  # hidden pixels are gray


def test_every_task_is_an_operator():
    """Else a task of the command line does not exist."""
    for name, task in TASKS.items():
        settings = Settings(mask="box") if name == "inpaint" else Settings()
        assert task.operator((3, 8, 8), settings).shape == (3, 8, 8)
        assert set(task.reads) <= set(Settings._fields)
