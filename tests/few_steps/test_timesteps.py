"""Timesteps by dynamic programming against all chains, and weights where the solution is known."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_hf import DDPMScheduler
from ddpm_hf.common.errors import UsageError
from ddpm_hf.evaluation.bound import BoundBatch, measure_bound
from ddpm_hf.evaluation.model_bound import even_timesteps
from ddpm_hf.few_steps.pictures import MOST_TRIALS, fit_pictures, search
from ddpm_hf.few_steps.timesteps import (
    deviations,
    likelihood_costs,
    likelihood_timesteps,
    picture_timesteps,
    shortest_path,
    steps_cost,
)
from ddpm_hf.few_steps.trajectories import fit_weights, follow
from ddpm_hf.portable.multistep_ddpm_hf import EpsilonMultistepScheduler
from tests.support.gaussian_data import GaussianData, within


@pytest.mark.parametrize("growth", [1.0, 1.15])
@pytest.mark.parametrize("jumps", [1, 2, 3, 6])
def test_the_shortest_path_is_the_shortest_of_all(jumps, growth):
    """Else the dynamic programming misses the best chain: here all of them are tried."""
    costs = np.random.default_rng(jumps).random((7, 7))

    def cost(path):
        return sum(growth**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise(path)))

    paths = [(0, *middle, 6) for middle in itertools.combinations(range(1, 6), jumps - 1)]
    found = shortest_path(costs, jumps, growth)
    assert cost(found) == pytest.approx(min(map(cost, paths)), rel=1e-12)
    assert tuple(found) in paths
    with pytest.raises(ValueError, match="7 jumps"):
        shortest_path(costs, 7)


T = 30
MIXED = torch.tensor([0.02, 0.02, 0.6], dtype=torch.float64)  # variances of the data's dimensions


def mixed_data():
    """A scheduler with the fitted variance of data whose dimensions differ, and their exact network."""
    scheduler = DDPMScheduler(T, beta_end=0.4, clip_sample=False)
    parts = [GaussianData(scheduler, v) for v in MIXED.tolist()]

    def network(x_t, t):
        t = int(t[0])
        factors = torch.tensor([one.epsilon(1.0, t) for one in parts], dtype=x_t.dtype).reshape(1, -1, 1, 1)
        return SimpleNamespace(sample=factors * x_t)

    variances = [np.mean([v * (1 - p.alpha_bar(t)) / p.marginal(t) for v, p in zip(MIXED.tolist(), parts)])
                 for t in range(T)]  # fmt: skip
    scheduler.use_x_start_variances(variances)
    return scheduler, network, torch.cat([p.draw(1500, 1, 2, 2, seed=n) for n, p in enumerate(parts)], dim=1)


def test_the_costs_are_the_terms_of_the_bound():
    """Else the chains are chosen by something else: each step's expected term, for steps of any length."""
    scheduler, network, images = mixed_data()
    for chain in ([0, 3, 11, T - 1], [0, 20, T - 1], list(range(T))):
        bound = measure_bound(network, scheduler, [BoundBatch(0, images)], timesteps=chain, latent=True)
        costs = likelihood_costs(scheduler)
        expected = [costs[t, s] for s, t in itertools.pairwise(chain)]
        np.testing.assert_allclose(bound.terms[1:], expected, rtol=0.08)
        steps = torch.from_numpy(bound.total - bound.prior - bound.decoder)
        assert within(steps, steps_cost(scheduler, chain[::-1]))


def test_the_chain_for_the_likelihood_is_the_best_of_all():
    """Else another subsequence of as many timesteps has a lower bound; and it beats even spacing."""
    scheduler, _, _ = mixed_data()
    middles = itertools.combinations(range(1, T - 1), 2)
    best = min(([T - 1, b, a, 0] for a, b in middles), key=lambda chain: steps_cost(scheduler, chain))
    assert likelihood_timesteps(scheduler, 4) == best
    assert likelihood_timesteps(scheduler, T) == list(range(T - 1, -1, -1))
    assert likelihood_timesteps(scheduler, 2) == [T - 1, 0]
    costs = [steps_cost(scheduler, likelihood_timesteps(scheduler, n)) for n in range(2, T + 1)]
    assert costs == sorted(costs, reverse=True)
    assert costs[6] < steps_cost(scheduler, even_timesteps(T, 8)) - 0.01
    for number in (1, T + 1):
        with pytest.raises(UsageError, match=f"--calls {number}"):
            likelihood_timesteps(scheduler, number)
    with pytest.raises(UsageError, match="fit-variance"):
        likelihood_timesteps(DDPMScheduler(T), 4)


def flow(v=0.05):
    """A sampler, and the exact network of Gaussian data: the probability flow is known."""
    scheduler = EpsilonMultistepScheduler(200, beta_end=0.1)
    alpha_bar = scheduler.diffusion.exact_tables.alphas_cumprod.tolist()

    def predict(x_t, t):
        a = alpha_bar[int(t[0])]
        return math.sqrt(1 - a) / (a * v + 1 - a) * x_t

    noise = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = alpha_bar[-1]
    return scheduler, predict, noise, noise * math.sqrt(v / (end * v + 1 - end))


def test_the_teacher_follows_the_flow():
    """Else everything is fitted to something else."""
    scheduler, predict, noise, exact = flow()
    scheduler.set_timesteps(150)
    teacher = follow(predict, scheduler, noise, scheduler.timesteps.tolist(), 5)
    torch.testing.assert_close(teacher.states[-1], exact, rtol=5e-3, atol=0)
    assert (len(teacher.states), len(teacher.epsilons), teacher.timesteps[-1]) == (151, 150, -1)


def test_deviations_are_those_of_single_steps():
    """Else the path is the cheapest through other costs."""
    scheduler, predict, noise, _ = flow()
    chain = [199, 120, 60, 20, 0]
    teacher = follow(predict, scheduler, noise, chain, 12)
    costs = deviations(teacher)
    scheduler.max_order = 1
    x = teacher.states[1] * scheduler.signal_and_rho(120)[0]
    single = follow(predict, scheduler, x, [120, 20], 12).states[1]
    expected = (single - teacher.states[3]).flatten(1).norm(dim=1).mean() / 2
    assert costs[1, 3] == pytest.approx(expected.item(), rel=1e-9)
    assert (costs[np.tril_indices(6)] == 0).all()
    signal = scheduler.signal_and_rho(20)[0]
    assert deviations(teacher, scaled=True)[1, 3] == pytest.approx(signal * expected.item(), rel=1e-9)
    assert picture_timesteps(teacher, 5) == chain
    assert picture_timesteps(teacher, 2)[0] == 199


def test_fitted_weights_reach_the_teacher_where_they_can():
    """Else least squares errs: a Gaussian's ε of a step are multiples of each other, and one weight suffices."""
    scheduler, predict, noise, exact = flow()
    scheduler.set_timesteps(60)
    teacher = follow(predict, scheduler, noise, scheduler.timesteps.tolist(), 12)
    chain = [teacher.timesteps[node] for node in (0, 20, 40)]
    weights = fit_weights(predict, scheduler, noise, chain, teacher.at([*chain[1:], -1]), 12)
    assert [len(row) for row in weights] == [1, 2, 3]
    reached = follow(predict, scheduler, noise, chain, 12, weights)
    for node, t in enumerate([*chain[1:], -1]):
        torch.testing.assert_close(reached.states[node + 1], teacher.at([t])[0], rtol=1e-2, atol=1e-3)
    usual = follow(predict, scheduler, noise, chain, 12).states[-1]
    assert (usual - exact).norm() > 10 * (reached.states[-1] - exact).norm()


def test_candidates_are_judged_by_other_noise():
    """Else a fit looks better than it is; the best comes first, and beats even spacing here."""
    scheduler, predict, noise, _ = flow()
    fitted = fit_pictures(predict, scheduler, noise, [4, 6], teacher_steps=40)
    for number, candidates in fitted.items():
        errors = {one.name: one.error for one in candidates}
        assert [one.error for one in candidates] == sorted(one.error for one in candidates)
        assert errors["even timesteps, iPNDM"] > 3 * candidates[0].error
        assert all(len(one.timesteps) == number for one in candidates)
        assert candidates[0].weights is not None
    for options, named in (
        ({"calls": [1]}, "--calls 1"), ({"calls": [40]}, "--calls 40"), ({"teacher_steps": 2}, "--teacher-steps 2"),
        ({"noise": noise[:4]}, "--trajectories 4"),
    ):  # fmt: skip
        given = {"noise": noise, "calls": [4], "teacher_steps": 40, **options}
        with pytest.raises(UsageError, match=named):
            fit_pictures(predict, scheduler, given["noise"], given["calls"], teacher_steps=given["teacher_steps"])


def test_the_search_ends_where_no_move_helps():
    """Else it stops early, leaves the nodes or repeats a timestep: here the best chain is known."""
    nodes, asked = list(range(30, -1, -1)), []

    def loss(path):
        assert path[0] == 30
        assert sorted(set(path), reverse=True) == path
        asked.append(tuple(path))
        return sum((t - best) ** 2 for t, best in zip(path, (30, 22, 9, 7)))

    assert search([30, 20, 12, 1], nodes, loss) == [30, 22, 9, 7]
    assert search([30, 29, 28, 27], nodes, lambda path: 1.0) == [30, 29, 28, 27]
    asked.clear()
    search([30, 2, 1, 0], nodes, lambda path: -loss([30, *sorted(path[1:], reverse=True)]))
    assert len(set(asked)) <= MOST_TRIALS + 1
