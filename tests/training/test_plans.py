"""Which samples a step sees: epochs, ranks, accumulation, resumed plans."""

import functools
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_hf.data.orders import keyed_permutation
from ddpm_hf.training.plan import KeyedBatchSampler, StepPlan

# Plans: which samples a step sees

PLANS = st.builds(
    StepPlan, st.integers(1, 40), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.just(0)
)  # fmt: skip


def step_samples(plan: StepPlan, seed: int, steps: int, first: int = 0) -> list[list[tuple[int, int]]]:
    """The keys that each optimizer step sees, all ranks in order, without the stand-ins of weight 0."""
    order = functools.partial(keyed_permutation, seed, length=plan.samples)
    ranks = [iter(KeyedBatchSampler(plan, order, rank, first)) for rank in range(plan.world)]
    seen = []
    for step in range(first, first + steps):
        keys = []
        for batch in plan.batches(step):
            for rank, own in enumerate(ranks):
                drawn = next(own)
                begin, end = plan.own_samples(batch, rank)
                assert len(drawn) == max(1, end - begin)  # a rank always has something to run
                keys += drawn[: end - begin]
        seen.append(keys)
    return seen


@settings(max_examples=80)
@given(PLANS, st.integers(0, 2**32))
def test_an_epoch_is_a_permutation(plan, seed):
    # Breaks if an image is seen twice or not at all within an epoch, also with partial batches and idle ranks.
    steps = step_samples(plan, seed, 2 * plan.steps_per_epoch)
    for epoch in range(2):
        own = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(itertools.chain(*own)) == [(epoch, index) for index in range(plan.samples)]
        assert all(own)


@settings(max_examples=80)
@given(PLANS, st.integers(0, 2**32), st.data())
def test_a_resumed_plan_is_the_tail(plan, seed, data):
    # Breaks if resuming within an epoch replays it, skips some of it, or shuffles anew.
    total = 2 * plan.steps_per_epoch + 1
    first = data.draw(st.integers(0, total - 1))
    assert step_samples(plan, seed, total - first, first) == step_samples(plan, seed, total)[first:]


@settings(max_examples=80)
@given(st.integers(1, 50), st.integers(1, 6), st.integers(0, 2**32))
def test_ranks_and_accumulation_see_what_one_big_batch_sees(samples, batch, seed):
    # Breaks if two ranks of B, or B accumulated twice, are another training than one batch of 2B.
    big = StepPlan(samples, 2 * batch, 1, 1)
    steps = 2 * big.steps_per_epoch
    want = step_samples(big, seed, steps)
    for plan in (StepPlan(samples, batch, 2, 1), StepPlan(samples, batch, 1, 2)):
        assert plan.steps_per_epoch == big.steps_per_epoch
        assert step_samples(plan, seed, steps) == want


@settings(max_examples=80)
@given(PLANS)
def test_a_plan_adds_up(plan):
    # Breaks if a gradient is the mean over another number of samples than were seen, or a stream is mis-skipped.
    counts = [plan.samples_in(step) for step in range(plan.steps_per_epoch)]
    assert sum(counts) == plan.samples
    assert min(counts) > 0
    for step, count in enumerate(counts):
        owned = [plan.own_samples(b, rank) for b in plan.batches(step) for rank in range(plan.world)]
        assert sum(end - begin for begin, end in owned) == count
    for step in range(2 * plan.steps_per_epoch):
        assert plan.batches_before(step + 1) == plan.batches_before(step) + len(plan.batches(step))
        assert plan.epoch_of(step) == step // plan.steps_per_epoch


@settings(max_examples=20)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_a_streams_batches_are_full(batch, world, accumulation, steps):
    # Breaks if a streaming run ends early or weighs a batch as partial.
    plan = StepPlan(None, batch, world, accumulation, steps)
    assert plan.steps_per_epoch == steps
    for step in range(steps):
        assert plan.samples_in(step) == batch * world * accumulation
        assert plan.batches_before(step) == step * accumulation
