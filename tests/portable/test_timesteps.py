"""The timesteps of a chain: set_timesteps, of every length and spacing."""

import math

import diffusers
import pytest
import torch

from ddpm_hf import DDPMScheduler
from tests.support.fixtures_pipeline import randn

SPACINGS = ("leading", "linspace", "trailing")


# set_timesteps


@pytest.mark.parametrize("T", [10, 61, 100, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_every_length(spacing, T):
    """Stock's trailing emits -1 or one timestep too many for some lengths; each must be n descending within 0..T-1."""
    scheduler = DDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    for n in range(1, T + 1):
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps
        assert timesteps.dtype == torch.int64
        assert len(timesteps) == n == scheduler.num_inference_steps
        assert (timesteps.diff() < 0).all()
        assert timesteps[-1] >= 0
        assert timesteps[0] < T
        if spacing == "leading":
            assert timesteps.tolist() == [math.floor(i * T / n) for i in reversed(range(n))]
        if spacing == "trailing":
            assert timesteps[0] == T - 1
        if spacing == "linspace" and n > 1:
            assert (timesteps[0], timesteps[-1]) == (T - 1, 0)
    assert timesteps.tolist() == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("T", [61, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_stock_where_stock_is_right(spacing, T):
    """Else images with the same seed differ from stock's."""
    ours = DDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    stock = diffusers.DDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    compared = 0
    for n in range(1, T + 1):
        stock.set_timesteps(n)
        right = len(stock.timesteps) == n and stock.timesteps[-1] >= 0
        if right and (spacing != "leading" or T % n == 0):
            ours.set_timesteps(n)
            assert ours.timesteps.tolist() == stock.timesteps.tolist(), f"n={n}"
            compared += 1
    assert compared > (1 if spacing == "leading" else T // 2)


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_an_offset_leaves_no_timestep(offset):
    """Else a chain of as many steps as T, which stock cannot run with Stable Diffusion's configs, fails here too."""
    scheduler = DDPMScheduler(num_train_timesteps=100, steps_offset=offset)
    for count in range(1, 101):
        scheduler.set_timesteps(count)
        assert len(set(scheduler.timesteps.tolist())) == count
        assert 0 <= scheduler.timesteps.min() <= offset
        assert scheduler.timesteps.max() <= 99


def test_steps_offset_shifts_leading_alone():
    """Stable Diffusion's configs have steps_offset=1: else its timesteps are off by one."""
    for spacing, shift in (("leading", 1), ("linspace", 0), ("trailing", 0)):
        plain = DDPMScheduler(timestep_spacing=spacing)
        offset = DDPMScheduler(timestep_spacing=spacing, steps_offset=1)
        plain.set_timesteps(50)
        offset.set_timesteps(50)
        assert torch.equal(offset.timesteps, plain.timesteps + shift)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({}, {"num_inference_steps": 0}),
        ({}, {"num_inference_steps": -3}),
        ({}, {"num_inference_steps": 101}),
        ({}, {}),
        ({}, {"num_inference_steps": 3, "timesteps": [5, 4, 3]}),
        ({}, {"timesteps": []}),
        ({}, {"timesteps": [3, 4]}),
        ({}, {"timesteps": [4, 4]}),
        ({}, {"timesteps": [100, 4]}),
        ({}, {"timesteps": [4, -1]}),
        ({"timestep_spacing": "sideways"}, {"num_inference_steps": 10}),
    ],
    ids=str,
)
def test_refused_timesteps_leave_the_chain_as_it_was(config, arguments):
    """Else a caught error leaves a scheduler that is half in the new chain."""
    scheduler, x = DDPMScheduler(num_train_timesteps=100, **config), randn(1, 2)
    scheduler.set_timesteps(timesteps=[90, 40, 7])
    before = scheduler.step(x, 40, x, torch.Generator().manual_seed(0)).prev_sample
    with pytest.raises(ValueError, match=r"`|timestep_spacing|steps_offset"):
        scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == [90, 40, 7]
    assert scheduler.custom_timesteps
    assert scheduler.num_inference_steps is None
    assert torch.equal(scheduler.step(x, 40, x, torch.Generator().manual_seed(0)).prev_sample, before)


def test_moments_do_not_depend_on_the_chain():
    """Only `step` may know the chain: else a likelihood changes after sampling with fewer steps."""
    scheduler, x = DDPMScheduler(), randn(1, 2)
    before = scheduler.p_mean_variance(x, 500, x), scheduler.q_posterior_mean_variance(x, x, 500)
    scheduler.set_timesteps(timesteps=[999, 500, 3])
    after = scheduler.p_mean_variance(x, 500, x), scheduler.q_posterior_mean_variance(x, x, 500)
    assert all(torch.equal(*pair) for moments in zip(before, after) for pair in zip(*moments))
