"""Beta schedules and their tables, against their definitions to 50 digits, and as configs carry them about."""

import functools

import diffusers
import numpy as np
import pytest
import torch

from ddpm_hf import BETA_SCHEDULES, DDPMScheduler
from tests.support.reference_tables import (
    checked_timesteps,
    our_tables,
    reference_betas,
    reference_rescaled,
    reference_tables,
    relative_errors,
)

ALIASES = {"cosine": "squaredcos_cap_v2", "quadratic": "scaled_linear"}
SCHEDULES = [name for name in BETA_SCHEDULES if name not in ALIASES]
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
SAMPLERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler")
SAMPLERS += ("PNDMScheduler", "DDPMScheduler")


def previous_in_full_chain(t):
    return t - 1


def previous_in_strided_chain(t):
    return 3 * t // 5 - 1


@functools.cache
def betas_of(name, T, rescale):
    """The betas to 50 digits, made once for all tables."""
    return reference_rescaled(reference_betas(name, T)) if rescale else reference_betas(name, T)


@pytest.mark.every(7)
@pytest.mark.parametrize("previous", [previous_in_full_chain, previous_in_strided_chain])
@pytest.mark.parametrize("rescale", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("T", [10, 100, 1000, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_exact_to_rounding(name, T, rescale, previous):
    """Else a schedule is not the one it is named after, or a table loses digits before its one cast."""
    betas = betas_of(name, T, rescale)
    t = checked_timesteps(T)
    s = [previous(each) for each in t]
    config = {"num_train_timesteps": T, "beta_schedule": name, "rescale_betas_zero_snr": rescale}
    reference = reference_tables(betas, t, s)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-7)):
        errors = relative_errors(our_tables(config, t, s, dtype), reference)
        wrong = {table: error for table, error in errors.items() if not error < tolerance}
        assert not wrong, f"{dtype}: relative errors {wrong}"


def test_every_schedule_has_a_reference():
    """Else a new schedule goes unchecked by the test above."""
    for name in SCHEDULES:
        assert len(reference_betas(name, 10)) == 10


@pytest.mark.parametrize("T", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_betas_are_float64_in_range_and_lose_signal(name, T):
    """Else ᾱ does not fall, and a posterior variance is negative or zero inside the chain."""
    betas = BETA_SCHEDULES[name](T, 0.0001, 0.02)
    assert betas.dtype == np.float64
    assert betas.shape == (T,)
    assert ((betas > 0) & (betas <= 1)).all()
    alphas_cumprod = DDPMScheduler(num_train_timesteps=T, beta_schedule=name).exact_tables.alphas_cumprod
    assert (alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_saved_under_the_name_that_stock_knows(alias):
    """Else a config made with an alias does not load in stock."""
    ours, named = DDPMScheduler(beta_schedule=alias), DDPMScheduler(beta_schedule=ALIASES[alias])
    assert torch.equal(ours.exact_tables.betas, named.exact_tables.betas)
    assert ours.config.beta_schedule == ALIASES[alias]
    stock = diffusers.DDPMScheduler.from_config(ours.config)
    torch.testing.assert_close(stock.betas.double(), named.exact_tables.betas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("T", [10, 1000, 4000])
@pytest.mark.parametrize("name", STOCK_SCHEDULES)
def test_betas_are_those_of_stock(name, T):
    """Else a model trained in stock is sampled here with another noise schedule (float32 is all stock has)."""
    stock = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule=name, beta_start=0.00085, beta_end=0.012)
    ours = DDPMScheduler(num_train_timesteps=T, beta_schedule=name, beta_start=0.00085, beta_end=0.012)
    torch.testing.assert_close(ours.exact_tables.betas, stock.betas.double(), rtol=1e-6, atol=0)


def test_unknown_schedule_names_itself_and_the_known():
    """Else a typing error is met by a traceback that does not help."""
    with pytest.raises(NotImplementedError, match=r"squaredcos_cap_v2.*'cosin'"):
        DDPMScheduler(beta_schedule="cosin")


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, -0.1], [0.1, 1.5], [0.1, float("nan")]])
def test_impossible_trained_betas_are_refused(betas):
    """Else the tables are full of nan, which shows only in the images."""
    with pytest.raises(ValueError, match="beta"):
        DDPMScheduler(num_train_timesteps=2, trained_betas=betas)


# Zero terminal SNR


@pytest.mark.parametrize("T", [2, 10, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_ends_at_zero_and_starts_where_it_did(name, T):
    """Else the last step leaks the image (Lin et al. 2023), or the first step's noise changes with the rescaling."""
    plain = DDPMScheduler(num_train_timesteps=T, beta_schedule=name)
    rescaled = DDPMScheduler(num_train_timesteps=T, beta_schedule=name, rescale_betas_zero_snr=True)
    assert rescaled.exact_tables.alphas_cumprod[-1] == 0
    assert rescaled.exact_tables.betas[-1] == 1
    assert rescaled.exact_tables.alphas_cumprod[0] == plain.exact_tables.alphas_cumprod[0]
    assert (rescaled.exact_tables.alphas_cumprod[:-1] > 0).all()


@pytest.mark.parametrize("T", [1, 10, 1000])
def test_jsd_alpha_bar_is_the_fraction_of_steps_left(T):
    """Π(1 - 1/(T-i)) telescopes to (T-1-t)/T: else jsd is not Sohl-Dickstein's schedule."""
    expected = torch.arange(T - 1, -1, -1, dtype=torch.float64) / T
    torch.testing.assert_close(
        DDPMScheduler(num_train_timesteps=T, beta_schedule="jsd").exact_tables.alphas_cumprod, expected
    )


# Configs


@pytest.mark.parametrize("rescale", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_survive_saving_and_loading(name, rescale, tmp_path):
    """Else a saved model is sampled with other betas than it was trained with."""
    ours = DDPMScheduler(num_train_timesteps=50, beta_schedule=name, beta_end=0.03, rescale_betas_zero_snr=rescale)
    ours.save_pretrained(tmp_path)
    assert torch.equal(DDPMScheduler.from_pretrained(tmp_path).exact_tables.betas, ours.exact_tables.betas)


@pytest.mark.parametrize("through_disk", [False, True], ids=["", "through_disk"])
@pytest.mark.parametrize("rescale", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_and_config_survive_a_swap_of_samplers(name, sampler, rescale, through_disk, tmp_path):
    """Else trying DPM-Solver on a pipeline and coming back changes the model's noise schedule."""
    ours = DDPMScheduler(
        num_train_timesteps=50,
        beta_schedule=name,
        beta_start=0.0002,
        beta_end=0.03,
        prediction_type="v_prediction",
        clip_sample_range=2.0,
        steps_offset=1,
        rescale_betas_zero_snr=rescale,
    )
    other = getattr(diffusers, sampler).from_config(ours.config)
    if not rescale:  # stock's rescaling is only good to 1e-3, and PNDM has none
        torch.testing.assert_close(other.betas.double(), ours.exact_tables.betas, rtol=1e-6, atol=0)
    if through_disk:
        other.save_pretrained(tmp_path)
        back = DDPMScheduler.from_pretrained(tmp_path)
    else:
        back = DDPMScheduler.from_config(other.config)
        public = {key: value for key, value in ours.config.items() if not key.startswith("_")}
        assert {key: back.config[key] for key in public} == public
    assert torch.equal(back.exact_tables.betas, ours.exact_tables.betas)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trained_betas_survive_saving_and_swaps(sampler, tmp_path):
    """Else a schedule that has no name is lost as soon as the sampler is changed."""
    betas = np.random.default_rng(0).uniform(0.001, 0.3, size=20)
    ours = DDPMScheduler(num_train_timesteps=20, trained_betas=betas)
    assert np.array_equal(ours.exact_tables.betas.numpy(), betas)
    other = getattr(diffusers, sampler).from_config(ours.config)
    torch.testing.assert_close(other.betas.double(), ours.exact_tables.betas, rtol=1e-6, atol=0)
    assert torch.equal(DDPMScheduler.from_config(other.config).exact_tables.betas, ours.exact_tables.betas)
    other.save_pretrained(tmp_path)
    assert torch.equal(DDPMScheduler.from_pretrained(tmp_path).exact_tables.betas, ours.exact_tables.betas)


@pytest.mark.parametrize(
    "change",
    [{"num_train_timesteps": 70}, {"beta_end": 0.05}, {"beta_start": 0.001}, {"beta_schedule": "linear"}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("through", [None, "DDIMScheduler"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_changing_the_schedule_by_from_config_recomputes_it(name, through, change):
    """Else the betas that were recorded for stock's sake overrule what the user asks for."""
    config = DDPMScheduler(num_train_timesteps=50, beta_schedule=name).config
    if through is not None:
        config = getattr(diffusers, through).from_config(config).config
    changed = DDPMScheduler.from_config(config, **change)
    expected = DDPMScheduler(**{"num_train_timesteps": 50, "beta_schedule": name} | change)
    assert torch.equal(changed.exact_tables.betas, expected.exact_tables.betas)


def test_arguments_by_position_survive_a_swap():
    """Else `DDPMScheduler(100, 0.001)` comes back from a swap as the default T=1000 chain."""
    ours = DDPMScheduler(100, 0.001, 0.05)
    other = diffusers.DDIMScheduler.from_config(ours.config)
    assert other.config.num_train_timesteps == 100
    assert torch.equal(DDPMScheduler.from_config(other.config).exact_tables.betas, ours.exact_tables.betas)


@pytest.mark.parametrize("name", ["sigmoid", "laplace"])
def test_a_stock_config_that_names_its_schedule_loads(name):
    """Else a stock DDPM model with such a schedule, which has no trained_betas in its config, cannot be used."""
    stock = diffusers.DDPMScheduler(num_train_timesteps=50, beta_schedule=name)
    ours = DDPMScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.exact_tables.betas, stock.betas.double(), rtol=1e-6, atol=0)
