"""Keyed draws: each sample's own, uniform and normal, and different for each purpose."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_hf.common.randomness import STREAMS, StepKeys, keyed_seed
from ddpm_hf.data.orders import keyed_permutation

# Keys: the randomness of a step


@settings(max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(2, 12), st.data())
def test_noise_is_a_samples_own_however_the_batch_is_split(seed, step, count, data):
    # Breaks if the noise of a sample depends on the rank, the batch or the accumulation that it falls into.
    cut = data.draw(st.integers(1, count - 1))
    shape = (count, 2, 3)
    whole, head, tail = (
        StepKeys(seed, step, first, n) for first, n in ((0, count), (0, cut), (cut, count - cut))
    )  # fmt: skip
    reference = torch.empty(shape)
    parts = [keys.normal_like(reference[:n]) for keys, n in ((head, cut), (tail, count - cut))]
    assert torch.equal(whole.normal_like(reference), torch.cat(parts))
    assert torch.equal(whole.uniform("timestep"), torch.cat([head.uniform("timestep"), tail.uniform("timestep")]))


def test_keys_tell_all_purposes_apart():
    # Breaks if timesteps and noise, two steps, two seeds, or training and validation share their randomness.
    draws = [
        StepKeys(seed, step, 0, 50, validation).uniform(name)
        for seed, step, validation, name in itertools.product((0, 1), (0, 1, 2), (False, True), ("noise", "timestep"))
    ]
    assert len(torch.cat(draws).unique()) == 50 * len(draws)
    seeds = {keyed_seed(*key) for key in itertools.product((0, 1), STREAMS, range(5), range(5))}
    assert len(seeds) == 2 * len(STREAMS) * 25
    assert len({tuple(keyed_permutation(seed, epoch, 20)) for seed in range(3) for epoch in range(3)}) == 9


def test_keyed_draws_are_uniform_and_normal():
    # Breaks if timesteps favour a part of the chain, or noise is not standard normal, within or across samples.
    count = 4000
    keys = StepKeys(11, 3, 0, count)
    u = keys.uniform("timestep")
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())
    histogram = torch.histc(u, 10, 0, 1)
    assert float(((histogram - count / 10) ** 2 / (count / 10)).sum()) < 9 + 5 * math.sqrt(18)  # chi², 9 degrees

    noise = keys.normal_like(torch.empty(count, 16, dtype=torch.float64))
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 / math.sqrt(n)
    assert abs(noise.var().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs((noise[:-1] * noise[1:]).mean().item()) < 5 / math.sqrt(n)  # neighbours' noise is independent
    steps = torch.stack([StepKeys(11, step, 0, 4).normal_like(torch.empty(4, 16)) for step in range(200)])
    assert abs((steps[:-1] * steps[1:]).mean().item()) < 5 / math.sqrt(steps[1:].numel())


def test_noise_comes_in_the_images_dtype():
    # Breaks if half or double precision training gets noise of another type.
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert StepKeys(0, 0, 0, 2).normal_like(torch.empty(2, 3, dtype=dtype)).dtype == dtype
