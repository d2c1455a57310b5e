"""iPNDM: its order of convergence where the solution is known, and what it shares with DDIM."""

import itertools
import json
import math

import diffusers
import numpy as np
import pytest
import torch

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.inference.samplers import swap_sampler
from ddpm_hf.portable.multistep_ddpm_hf import (
    FITTED_TIMESTEPS,
    FITTED_WEIGHTS,
    EpsilonMultistepScheduler,
    karras_timesteps,
    multistep_weights,
)
from tests.support.fixtures_pipeline import tiny_unet

T = 4096
VARIANCES = torch.tensor([[0.3, 0.7, 1.0, 1.5, 3.0]], dtype=torch.float64)  # of Gaussian data


def even_rho(T=T, largest=40.0):
    """β such that ρ_t = √((1-ᾱ_t)/ᾱ_t) is even in t, where the method has its order."""
    alpha_bar = 1 / (1 + (largest * np.arange(1, T + 1) / T) ** 2)
    return (1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])).tolist()


def solve(scheduler, x, epsilon):
    """The end of the chain, x_0."""
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(epsilon(x, t), t, x).prev_sample
    return x


def gaussian(scheduler):
    """ε of data N(0, v), x_T = 1, and the exact x_0 of the probability flow, x̃ = c √(v + ρ²); for several v."""
    alpha_bar = scheduler.diffusion.exact_tables.alphas_cumprod.tolist()

    def epsilon(x, t):
        return math.sqrt(1 - alpha_bar[t]) / (alpha_bar[t] * VARIANCES + 1 - alpha_bar[t]) * x

    end = len(scheduler) - 1
    exact = torch.sqrt(VARIANCES / (alpha_bar[end] * VARIANCES + 1 - alpha_bar[end]))
    return epsilon, torch.ones_like(VARIANCES), exact


@pytest.mark.every(2)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_error_falls_with_the_order(order):
    """Else the weights, or the ε that they weigh, are wrong: half the step, 2^order less error."""
    scheduler = EpsilonMultistepScheduler(T, trained_betas=even_rho())
    scheduler.max_order = order
    epsilon, x, exact = gaussian(scheduler)
    errors = []
    for n in (512, 1024):
        scheduler.set_timesteps(n)
        errors.append((solve(scheduler, x, epsilon) - exact).norm().item())
    orders = -np.diff(np.log2(errors))
    assert order - 0.5 < orders[-1] < order + 0.8, (errors, orders)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("settings", [{"trained_betas": even_rho(64, 3.0)}, {}, {"timestep_spacing": "karras"}])
def test_polynomials_of_rho_are_integrated_exactly(settings, order):
    """Of degree below the number of ε, on any grid; else uneven steps extrapolate too far, and leave noise."""
    scheduler = EpsilonMultistepScheduler(64, **settings)
    scheduler.max_order = order
    scheduler.set_timesteps(16)
    coefficients = np.array([0.3, -0.7, 0.2, 0.5])[4 - order :]
    integral = np.polyint(coefficients)
    chain = [*scheduler.timesteps.tolist(), -1]
    x = torch.zeros(1, 1, dtype=torch.float64)
    for index, (t, s) in enumerate(itertools.pairwise(chain)):
        (signal_t, rho_t), (signal_s, rho_s) = scheduler.signal_and_rho(t), scheduler.signal_and_rho(s)
        noise = torch.full_like(x, np.polyval(coefficients, rho_t))
        after = scheduler.step(noise, t, x).prev_sample
        change = (after / signal_s - x / signal_t).item()
        exact = np.polyval(integral, rho_s) - np.polyval(integral, rho_t)
        assert (change == pytest.approx(exact, rel=1e-9, abs=1e-9)) == (index >= order - 1)
        x = after


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_of_order_one_it_is_ddim(prediction_type):
    """Else x̃ and ρ are not DDIM's, for some prediction type."""
    settings = {"num_train_timesteps": 100, "prediction_type": prediction_type, "clip_sample": False}
    ours = EpsilonMultistepScheduler(**settings)
    stock = diffusers.DDIMScheduler(**settings, set_alpha_to_one=True)
    ours.max_order = 1
    stock.set_timesteps(10)
    ours.set_timesteps(timesteps=stock.timesteps.tolist())
    generator = torch.Generator().manual_seed(0)
    x = y = torch.randn(2, 3, 4, 4, generator=generator)
    for t in stock.timesteps:
        output = torch.randn(x.shape, generator=generator)
        x, predicted = ours.step(output, t, x, return_dict=False)
        result = stock.step(output, t, y)
        y = result.prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(predicted, result.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_a_new_chain_forgets_the_last():
    """Else the second batch of images depends on the first."""
    scheduler = EpsilonMultistepScheduler(100)
    scheduler.set_timesteps(5)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    first, second = (solve(scheduler, x, lambda x, t: torch.tanh(x) + t / 100) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 100])
@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_spacings_have_as_many_timesteps_as_requested(spacing, n):
    """Else a timestep is visited twice, or x_T is not where the chain starts."""
    scheduler = EpsilonMultistepScheduler(100, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    chain = scheduler.timesteps.tolist()
    assert len(set(chain)) == n
    assert chain == sorted(chain, reverse=True)
    assert (chain[0], min(chain) >= 0) == (99, True)


def test_karras_timesteps_are_even_in_the_seventh_root():
    """Else the few calls are spent where they change nothing."""
    diffusion = DDPMScheduler()
    chain = karras_timesteps(diffusion, 8)
    alpha_bar = diffusion.exact_tables.alphas_cumprod.numpy()[chain]
    roots = ((1 - alpha_bar) / alpha_bar) ** (1 / 14)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots).mean(), rtol=0.15)


def test_fits_are_taken_for_their_number_of_steps(tmp_path):
    """Else what fit-timesteps wrote is ignored, or taken for another number; a list given is the list."""
    config = {
        **DDPMScheduler(100).config,
        FITTED_TIMESTEPS: {"3": [99, 40, 5], "4": [99, 60, 30, 4]},
        FITTED_WEIGHTS: {"3": [[1.0], [1.4, -0.4], [2.0, -1.5, 0.5]]},
    }
    scheduler = EpsilonMultistepScheduler.from_config(config)
    assert scheduler.fitted_calls() == [3, 4]
    epsilon = {99: 1.0, 40: 2.0, 5: 3.0}
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [99, 40, 5]
    x = solve(scheduler, torch.zeros(1, 1, dtype=torch.float64), lambda x, t: torch.full_like(x, epsilon[t]))
    rho = [scheduler.signal_and_rho(t)[1] for t in (99, 40, 5, -1)]
    steps = np.diff(rho)
    expected = steps[0] * 1 + steps[1] * (1.4 * 2 - 0.4 * 1) + steps[2] * (2 * 3 - 1.5 * 2 + 0.5 * 1)
    assert x.item() == pytest.approx(expected, rel=1e-12)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [99, 60, 30, 4]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [99, 79, 59, 39, 19]
    scheduler.set_timesteps(timesteps=[90, 40])
    assert scheduler.timesteps.tolist() == [90, 40]
    # saved as what Diffusers knows, with the fits
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (saved["_class_name"], saved[FITTED_TIMESTEPS]) == ("DDPMScheduler", config[FITTED_TIMESTEPS])
    again = EpsilonMultistepScheduler.from_pretrained(tmp_path)
    assert again.fitted_calls() == [3, 4]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 101}, "101"),
        ({}, "num_inference_steps"),
        ({"timesteps": [3, 5]}, "descending"),
        ({"timesteps": [50, 5], "weights": [[1.0]]}, "weights"),
        ({"timesteps": [50, 5], "weights": [[1.0, 2.0], [1.0]]}, "weights"),
    ],
)
def test_chains_that_cannot_be_are_refused(arguments, named):
    """Else a sampler steps where there is nothing, and the images are noise."""
    scheduler = EpsilonMultistepScheduler(100)
    with pytest.raises(ValueError, match=named):
        scheduler.set_timesteps(**arguments)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep 3"):
        scheduler.step(torch.zeros(1, 1), 3, torch.zeros(1, 1))


def test_pipelines_sample_with_it_and_are_saved_for_all(tmp_path):
    """Else it is for the command alone; a folder saved with it still loads as a DDPM, here and in Diffusers."""
    pipeline = DDPMPipeline(tiny_unet(), DDPMScheduler(50))
    pipeline.set_progress_bar_config(disable=True)
    ancestral = pipeline(1, torch.Generator().manual_seed(0), 8, "np").images
    config = dict(pipeline.scheduler.config)
    pipeline.use_multistep()
    assert {**DDPMScheduler.from_config(pipeline.scheduler.config).config, "_use_default_values": 0} == {
        **config,
        "_use_default_values": 0,
    }
    images = pipeline(1, torch.Generator().manual_seed(0), 8, "np").images
    assert np.abs(images - ancestral).max() > 1e-3
    assert swap_sampler(pipeline, "ipndm") == 10
    np.testing.assert_array_equal(pipeline(1, torch.Generator().manual_seed(0), 8, "np").images, images)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "multistep_ddpm_hf.py").is_file()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, DDPMScheduler)
    again.use_multistep()
    again.set_progress_bar_config(disable=True)
    drawn = again(1, torch.Generator().manual_seed(0), 8, "np").images
    np.testing.assert_allclose(drawn, images, atol=1e-5)


def test_on_an_even_grid_the_weights_are_those_of_adams_and_bashforth():
    """Else this is another method than iPNDM where iPNDM is right; and constant noise needs weights that sum to 1."""
    known = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    for weights in known:
        rhos = [1.0 + 0.3 * index for index in range(len(weights))]
        assert multistep_weights(rhos, 0.7) == pytest.approx(weights, abs=1e-12)
        uneven = [rho**3 for rho in rhos]
        assert sum(multistep_weights(uneven, 0.1)) == pytest.approx(1)
