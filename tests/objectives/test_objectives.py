"""Training losses, the terms of the bound and the timestep samplers, against what they stand for."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from ddpm_hf import DDPMScheduler
from ddpm_hf.objectives.bound import prior_bpd, vb_terms_bpd
from ddpm_hf.objectives.gaussians import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    mean_flat,
    normal_kl,
)
from ddpm_hf.objectives.losses import check_objective, training_losses
from ddpm_hf.objectives.timestep_samplers import LossSecondMomentSampler, UniformTimestepSampler
from ddpm_hf.objectives.weightings import min_snr_weights

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")
LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)
LOG2 = math.log(2)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(*shape, seed=0):
    """Random images on the 256 levels of a byte, in [-1, 1]."""
    return LEVELS[torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))]


def batch(scheduler, n=4, seed=0):
    """x_0, ε, t and x_t at timesteps from both ends of the chain."""
    T = len(scheduler)
    t = torch.tensor([0, 1, T // 2, T - 1])[:n]
    x_0, noise = images(n, 2, 2, 2, seed=seed), randn(n, 2, 2, 2, seed=seed + 1)
    return x_0, noise, t, scheduler.add_noise(x_0, noise, t)


# The closed forms


def test_normal_kl_is_that_of_torch():
    """Else every term of the bound is off."""
    mean1, mean2, log1, log2 = (randn(1000, seed=seed) for seed in range(4))
    expected = kl_divergence(Normal(mean1, (0.5 * log1).exp()), Normal(mean2, (0.5 * log2).exp()))
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), expected)


def test_normal_kl_is_the_integral():
    """∫ p log(p/q) dx by the trapezoid rule: the definition, with no closed form in between."""
    p, q = Normal(0.3, 0.7), Normal(-0.5, 1.3)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    integral = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x).item()
    arguments = (0.3, 2 * math.log(0.7), -0.5, 2 * math.log(1.3))
    kl = normal_kl(*(torch.tensor(each, dtype=torch.float64) for each in arguments)).item()
    assert kl == pytest.approx(integral, rel=1e-6)


def test_mean_flat_leaves_the_batch():
    """Else a loss is averaged over samples that have different weights."""
    x = randn(3, 2, 4, 5)
    torch.testing.assert_close(mean_flat(x), torch.stack([each.mean() for each in x]))


@pytest.mark.parametrize("log_scale", [-6.0, -3.0, -1.0, 0.5])
@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.2719, 1.0])
def test_discretized_likelihood_is_a_distribution_over_the_levels(mean, log_scale):
    """The 256 probabilities must sum to 1: else bits/dim are no code length."""
    probability = discretized_gaussian_log_likelihood(
        LEVELS, torch.tensor(mean).double(), torch.tensor(log_scale).double()
    ).exp()
    assert probability.sum().item() == pytest.approx(1, abs=256e-12 + 1e-14)  # each is floored at 1e-12
    assert (probability >= 0.99e-12).all()


@pytest.mark.parametrize("log_scale", [-5.0, -2.0, 0.0])
@pytest.mark.parametrize("mean", [-1.0, 0.1, 0.9])
def test_discretized_likelihood_is_the_mass_of_the_bin(mean, log_scale):
    """Against the exact normal CDF over bins of 2/255, within twice the error of its tanh form."""
    x = torch.linspace(-8, 8, 10001, dtype=torch.float64)
    cdf_error = (approx_standard_normal_cdf(x) - Normal(0.0, 1.0).cdf(x)).abs().max().item()
    assert cdf_error < 3e-4  # Page 1977
    normal = Normal(torch.tensor(mean).double(), torch.tensor(log_scale).double().exp())
    edges = torch.cat([torch.tensor([-1e9]), LEVELS[:-1] + 1 / 255, torch.tensor([1e9])]).double()
    exact = normal.cdf(edges).diff()
    log_likelihood = discretized_gaussian_log_likelihood(LEVELS, normal.mean, normal.stddev.log())
    torch.testing.assert_close(log_likelihood.exp(), exact, rtol=0, atol=2 * cdf_error + 1e-12)
    # and the density times the width where the bin is narrow; the slope of the tanh form is good to a percent
    if log_scale == 0.0:
        inner = slice(1, -1)
        density = normal.log_prob(LEVELS[inner]) + math.log(2 / 255)
        torch.testing.assert_close(log_likelihood[inner], density, rtol=0, atol=0.01)


# The variational bound


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_perfect_output_costs_nothing_but_the_decoder(prediction_type, strided):
    """With β̃ and the true mean, KL(q‖p) is 0 at every step but the last: else the bound has a floor of its own."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0, noise, t, x_t = batch(scheduler)
    s = t // 2 - (t == 1).long() - (t == 0).long() if strided else None  # -1, -1, 250, 499
    output = scheduler.training_target(x_0, noise, t)
    terms = vb_terms_bpd(scheduler, output, x_0, x_t, t, s)
    last = torch.tensor([True, strided, False, False])
    torch.testing.assert_close(
        terms.bits_per_dim[~last], torch.zeros_like(terms.bits_per_dim[~last]), atol=1e-8, rtol=0
    )
    assert (terms.bits_per_dim[last] > 0).all()
    torch.testing.assert_close(terms.pred_original_sample, x_0, rtol=0, atol=1e-8)


@pytest.mark.parametrize("previous", [None, torch.tensor([-1, -1, 100, 3])], ids=["full", "strided"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("clip_sample", [True, False])
def test_terms_are_the_kl_of_the_moments_or_the_decoder(clip_sample, variance_type, previous):
    """L_{t-1} = KL(q‖p) and L_0 = -log p(x_0|x_1), in bits per dimension: else the total is not a bound."""
    scheduler = DDPMScheduler(num_train_timesteps=300, variance_type=variance_type)
    x_0, _, t, x_t = batch(scheduler)
    channels = 4 if variance_type.startswith("learned") else 2
    output = 0.5 * randn(4, channels, 2, 2, seed=7)
    terms = vb_terms_bpd(scheduler, output, x_0, x_t, t, previous, clip_sample=clip_sample).bits_per_dim
    q = scheduler.q_posterior_mean_variance(x_0, x_t, t, previous)
    p = scheduler.p_mean_variance(output, t, x_t, previous, clip_sample=clip_sample)
    s = t - 1 if previous is None else previous
    for i in range(4):
        q_i, p_i = (Normal(each.mean[i], (0.5 * each.log_variance).exp().expand_as(x_0)[i]) for each in (q, p))
        nats = kl_divergence(q_i, p_i)
        if s[i] < 0:
            nats = -discretized_gaussian_log_likelihood(x_0[i], p_i.mean, p_i.stddev.log())
        assert terms[i].item() == pytest.approx(nats.mean().item() / LOG2, rel=1e-9)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_vlb_under_uniform_t_is_the_bound(variance_type):
    """The mean of the vlb losses over all t is the sum of the terms: else training optimises a multiple of it."""
    scheduler = DDPMScheduler(num_train_timesteps=40, beta_end=0.3, variance_type=variance_type)
    T = len(scheduler)
    t, noise = torch.arange(T), randn(T, 2, 2, 2, seed=1)
    x_0 = images(1, 2, 2, 2).expand(T, -1, -1, -1)
    output = 2 * randn(T, 4 if variance_type == "learned_range" else 2, 2, 2, seed=2)
    losses = training_losses(scheduler, output, x_0, noise, t, objective="vlb")
    x_t = scheduler.add_noise(x_0, noise, t)
    terms = [
        vb_terms_bpd(scheduler, output[i : i + 1], x_0[:1], x_t[i : i + 1], i, clip_sample=False).bits_per_dim
        for i in range(T)
    ]
    torch.testing.assert_close(losses.mean(), torch.stack(terms).sum())


@pytest.mark.parametrize("config", [{}, {"num_train_timesteps": 10}, {"rescale_betas_zero_snr": True}], ids=str)
def test_prior_is_the_kl_to_the_standard_normal(config):
    """Else the bound misses what a chain too short leaves in x_T; with ᾱ_T = 0 nothing is left and it is 0."""
    scheduler, x_0 = DDPMScheduler(**config), images(3, 2, 2, 2)
    alpha_bar = scheduler.exact_tables.alphas_cumprod[-1].item()
    q = Normal(math.sqrt(alpha_bar) * x_0, math.sqrt(1 - alpha_bar))
    expected = kl_divergence(q, Normal(torch.zeros_like(x_0), 1.0)).mean(dim=(1, 2, 3)) / LOG2
    torch.testing.assert_close(prior_bpd(scheduler, x_0), expected, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize(("schedule", "T"), [("squaredcos_cap_v2", 4000), ("linear", 1000)])
@pytest.mark.parametrize("objective", ["vlb", "hybrid"])
def test_bound_and_gradient_are_finite_at_every_timestep_in_float32(objective, schedule, T):
    """Learned variances train from noise: a nan in the branch that was not taken would stop the run."""
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule=schedule, variance_type="learned_range")
    t = torch.arange(T)
    x_0, noise = images(T, 1, 1, 2).float(), randn(T, 1, 1, 2).float()
    output = (2 * randn(T, 2, 1, 2, seed=3)).float().requires_grad_()
    losses = training_losses(scheduler, output, x_0, noise, t, objective=objective)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(output.grad).all()


@pytest.mark.parametrize("previous", [None, torch.tensor([-1, 0, 100, 3])], ids=["full", "strided"])
def test_float32_bound_is_that_of_float64(previous):
    """Else bits/dim depend on the precision of the evaluation."""
    scheduler = DDPMScheduler(variance_type="learned_range")
    x_0, _, t, x_t = batch(scheduler)
    output = torch.tanh(randn(4, 4, 2, 2, seed=2))
    exact = vb_terms_bpd(scheduler, output, x_0, x_t, t, previous)
    single = vb_terms_bpd(scheduler, output.float(), x_0.float(), x_t.float(), t, previous)
    assert exact.bits_per_dim.dtype == torch.float64
    assert single.bits_per_dim.dtype == torch.float32
    torch.testing.assert_close(single.bits_per_dim.double(), exact.bits_per_dim, rtol=1e-3, atol=1e-5)


# simple and min-SNR


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_simple_is_the_loss_to_the_target(prediction_type, loss_type, variance_type):
    """Else the network learns another quantity than sampling takes it for."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise, t, x_t = batch(scheduler)
    output = 2 * randn(4, 4 if variance_type == "learned_range" else 2, 2, 2, seed=5)
    alpha_bar = scheduler.exact_tables.alphas_cumprod[t].view(-1, 1, 1, 1)
    target = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0,
        "posterior_mean": scheduler.q_posterior_mean_variance(x_0, x_t, t).mean,
    }[prediction_type]
    losses = training_losses(scheduler, output, x_0, noise, t, loss_type=loss_type)
    expected = torch.stack([LOSSES[loss_type](o[:2], each) for o, each in zip(output, target)])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("snr_gamma", [1.0, 5.0, 1e6])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_an_error_on_x0_alike_for_every_prediction(prediction_type, snr_gamma):
    """An error δ of x̂_0 costs min(SNR, γ)·δ² however it is expressed: v-prediction is where others get it wrong."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0, noise = images(5, 2, 2, 2), randn(5, 2, 2, 2)
    t = torch.tensor([0, 1, 250, 500, 999])
    x_t = scheduler.add_noise(x_0, noise, t)
    delta = randn(5, 2, 2, 2, seed=4)
    # the output at which predict_original_sample gives x_0 + δ; it is affine in the output
    zero = torch.zeros_like(x_0)
    at_zero = scheduler.predict_original_sample(zero, t, x_t)
    slope = scheduler.predict_original_sample(zero + 1, t, x_t) - at_zero
    output = (x_0 + delta - at_zero) / slope
    losses = training_losses(scheduler, output, x_0, noise, t, snr_gamma=snr_gamma)
    snr = scheduler.exact_tables.alphas_cumprod[t] / (1 - scheduler.exact_tables.alphas_cumprod[t])
    torch.testing.assert_close(losses, snr.clamp(max=snr_gamma) * mean_flat(delta**2), rtol=1e-6, atol=0)


def test_min_snr_weights_are_the_known_ones():
    """Hang et al.'s min(SNR, γ)/SNR, /(SNR + 1) and min(SNR, γ); at SNR = 0 none may be nan."""
    for config in ({}, {"rescale_betas_zero_snr": True}):
        t, T = torch.arange(1000), 1000
        alpha_bar = DDPMScheduler(**config).exact_tables.alphas_cumprod
        snr = alpha_bar / (1 - alpha_bar)
        clipped = snr.clamp(max=5)
        expected = {
            "epsilon": torch.where(snr > 0, clipped / snr, 1.0),
            "v_prediction": clipped / (snr + 1),
            "sample": clipped,
        }
        for prediction_type, weights in expected.items():
            scheduler = DDPMScheduler(**config, prediction_type=prediction_type)
            torch.testing.assert_close(min_snr_weights(scheduler, t, 5.0, torch.float64), weights)
            torch.testing.assert_close(min_snr_weights(scheduler, t, 5.0), weights.float(), rtol=1e-5, atol=0)
        posterior_mean = DDPMScheduler(**config, prediction_type="posterior_mean")
        assert torch.isfinite(min_snr_weights(posterior_mean, t, 5.0)).all()
        assert len(posterior_mean) == T


def test_losses_keep_the_dtype_and_have_one_entry_for_each_sample():
    """Else float64 tables promote a float32 training step."""
    scheduler = DDPMScheduler(variance_type="learned_range")
    x_0, noise, t, _ = batch(scheduler)
    output = randn(4, 4, 2, 2)
    for dtype in (torch.float32, torch.float64):
        for objective in ("simple", "vlb", "hybrid"):
            gamma = None if objective == "vlb" else 5.0
            arguments = (each.to(dtype) for each in (output, x_0, noise))
            losses = training_losses(scheduler, *arguments, t, objective=objective, snr_gamma=gamma)
            assert losses.shape == (4,)
            assert losses.dtype == dtype


# hybrid


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("vlb_weight", [0.001, 0.5])
def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_vlb(vlb_weight, loss_type, variance_type):
    """The mean's gradient is that of simple alone, the variance's vlb_weight times the bound's (IDDPM, sec. 3.1)."""
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_end=0.2, variance_type=variance_type)
    x_0, noise, t, _ = batch(scheduler)

    def gradient(**options):
        output = (0.5 * randn(4, 4, 2, 2, seed=3)).requires_grad_()
        losses = training_losses(scheduler, output, x_0, noise, t, **options)
        losses.sum().backward()
        return losses.detach(), output.grad[:, :2], output.grad[:, 2:]

    hybrid, hybrid_mean, hybrid_variance = gradient(
        objective="hybrid", vlb_weight=vlb_weight, loss_type=loss_type, snr_gamma=5.0
    )
    simple, simple_mean, simple_variance = gradient(objective="simple", loss_type=loss_type, snr_gamma=5.0)
    vlb, vlb_mean, vlb_variance = gradient(objective="vlb")
    torch.testing.assert_close(hybrid, simple + vlb_weight * vlb)
    torch.testing.assert_close(hybrid_mean, simple_mean)
    torch.testing.assert_close(hybrid_variance, vlb_weight * vlb_variance)
    assert (simple_variance == 0).all()
    assert (vlb_mean != 0).any()
    assert (hybrid_variance != 0).any()


# Refusals


@pytest.mark.parametrize(
    ("variance_type", "options", "message"),
    [
        ("learned_range", {"objective": "elbo"}, "hybrid.*'elbo'"),
        ("learned_range", {"objective": "simple", "loss_type": "l3"}, "huber.*'l3'"),
        ("fixed_small", {"objective": "hybrid"}, "'fixed_small'.*learned_range"),
        ("fixed_large", {"objective": "vlb", "loss_type": "l1"}, "vlb"),
        ("fixed_large", {"objective": "vlb", "snr_gamma": 5.0}, "vlb"),
        ("fixed_large", {"objective": "simple", "snr_gamma": 0.0}, r"snr_gamma=0\.0"),
        ("fixed_large", {"objective": "simple", "snr_gamma": -1.0}, r"snr_gamma=-1\.0"),
        ("fixed_large", {"objective": "simple", "snr_gamma": float("nan")}, "snr_gamma=nan"),
    ],
)
def test_what_cannot_train_is_refused_with_the_way_out(variance_type, options, message):
    """Else a run trains for days on something else than its flags say."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    with pytest.raises(ValueError, match=message):
        check_objective(scheduler, **options)
    x_0, noise, t, _ = batch(scheduler)
    with pytest.raises(ValueError, match=message):
        training_losses(scheduler, noise, x_0, noise, t, **options)


@pytest.mark.parametrize("objective", ["simple", "vlb", "hybrid"])
def test_what_can_train_is_not_refused(objective):
    """Else the recipe of Improved DDPM cannot be run."""
    check_objective(DDPMScheduler(variance_type="learned_range"), objective)
    if objective != "hybrid":
        check_objective(DDPMScheduler(), objective)


# Timestep samplers


def evenly(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def warmed(T, history=4, seed=0, **options):
    """A sampler that has seen `history` losses, of very different sizes, at each timestep."""
    sampler = LossSecondMomentSampler(T, history_per_term=history, **options)
    losses = randn(history, T, seed=seed).exp()
    for row in losses:
        sampler.update_with_losses(torch.arange(T), row)
    return sampler, losses


def test_uniform_sampler_is_uniform():
    """Every timestep equally often with weight 1, and never T, however close u comes to 1."""
    sampler = UniformTimestepSampler(1000)
    timesteps, weights = sampler.sample(evenly(10_000))
    assert torch.equal(timesteps.bincount(minlength=1000), torch.full((1000,), 10))
    assert (weights == 1).all()
    assert sampler.sample(torch.tensor([0.0, 1 - 2**-53, 1.0]).double())[0].tolist() == [0, 999, 999]
    sampler.update_with_losses(timesteps, weights)
    sampler.load_state_dict(sampler.state_dict())
    assert torch.equal(sampler.sample(evenly(10))[0], torch.arange(50, 1000, 100))


@settings(max_examples=30)
@given(T=st.integers(1, 30), history=st.integers(1, 5), share=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_probabilities_are_the_formula(T, history, share, seed):
    """p ∝ √E[L²] with a uniform share (Nichol & Dhariwal, Eq. 18): else the sampling follows something else."""
    sampler, losses = warmed(T, history, seed, uniform_probability=share)
    root = losses.square().mean(dim=0).sqrt()
    expected = (1 - share) * root / root.sum() + share / T
    torch.testing.assert_close(sampler.probabilities(), expected)
    assert sampler.probabilities().sum().item() == pytest.approx(1, abs=1e-12)


def test_only_the_last_losses_count():
    """Else p remembers the untrained network for ever."""
    sampler, losses = warmed(5, history=2)
    sampler.update_with_losses(torch.tensor([3, 3]), torch.tensor([7.0, 11.0]).double())
    expected = losses.square().mean(dim=0).sqrt()
    expected[3] = math.sqrt((49 + 121) / 2)
    p = LossSecondMomentSampler(5, 2, uniform_probability=0.0)
    p.load_state_dict(sampler.state_dict())
    torch.testing.assert_close(p.probabilities(), expected / expected.sum())


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_importance_weights_leave_the_estimate_unbiased(share):
    """T·p(t)·weight(t) = 1 for each t, so Σ p·w·L is the mean of L: else importance sampling changes the objective."""
    T = 40
    sampler, _ = warmed(T, uniform_probability=share)
    p = sampler.probabilities()
    timesteps, weights = sampler.sample(evenly(200_000))
    assert torch.equal(timesteps.unique(), torch.arange(T))
    torch.testing.assert_close(T * p[timesteps] * weights.double(), torch.ones(200_000).double(), rtol=1e-6, atol=0)
    # and t is drawn with probability p: an even grid of u meets each interval of the CDF p(t)·n times, to within 1
    counts = timesteps.bincount(minlength=T).double()
    assert ((counts - 200_000 * p).abs() <= 1 + 1e-6).all()
    loss = randn(T, seed=8)
    weight = torch.zeros(T, dtype=torch.float64).index_put((timesteps,), weights.double())
    assert (p * weight * loss).sum().item() == pytest.approx(loss.mean().item(), abs=1e-6)


def test_uniform_until_every_timestep_is_warm():
    """Else the first losses alone decide what is ever visited."""
    sampler = LossSecondMomentSampler(6, history_per_term=2)
    for t in [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5]:
        sampler.update_with_losses(torch.tensor([t]), torch.tensor([float(t + 1)]))
        assert torch.equal(sampler.probabilities(), torch.full((6,), 1 / 6, dtype=torch.float64))
        assert (sampler.sample(evenly(6))[1] == 1).all()
    sampler.update_with_losses(torch.tensor([5]), torch.tensor([6.0]))
    assert sampler.probabilities().argmax() == 5


def test_state_dict_round_trip():
    """Else a resumed run draws other timesteps than an uninterrupted one."""
    sampler, _ = warmed(10)
    state = {key: value.clone() for key, value in sampler.state_dict().items()}
    resumed = LossSecondMomentSampler(10, history_per_term=4)
    resumed.load_state_dict(state)
    for each in (sampler, resumed):
        each.update_with_losses(torch.tensor([2, 7]), torch.tensor([3.0, 0.1]))
    u = evenly(100)
    assert all(torch.equal(*pair) for pair in zip(sampler.sample(u), resumed.sample(u)))
    assert not torch.equal(state["history"], resumed.state_dict()["history"])  # what was loaded is not shared
    with pytest.raises(ValueError, match="resume"):
        LossSecondMomentSampler(11, history_per_term=4).load_state_dict(state)


def test_samplers_fed_the_same_losses_agree():
    """Ranks that gather each other's losses must draw from one p; how they are batched must not matter."""
    one, two = LossSecondMomentSampler(7, 3), LossSecondMomentSampler(7, 3)
    t = torch.randint(7, (200,), generator=torch.Generator().manual_seed(0))
    losses = randn(200).exp()
    one.update_with_losses(t, losses)
    for start in range(0, 200, 8):
        two.update_with_losses(t[start : start + 8], losses[start : start + 8])
    assert torch.equal(one.probabilities(), two.probabilities())
    assert one.probabilities().std() > 0


def test_losses_that_are_not_finite_are_left_out():
    """Else one nan makes every probability nan, for good."""
    sampler, _ = warmed(5)
    before = sampler.probabilities()
    sampler.update_with_losses(torch.tensor([1, 2, 3]), torch.tensor([float("nan"), float("inf"), float("-inf")]))
    assert torch.equal(sampler.probabilities(), before)


def test_losses_that_are_all_zero_sample_uniformly():
    """Else p is 0/0."""
    sampler = LossSecondMomentSampler(4, history_per_term=1)
    sampler.update_with_losses(torch.arange(4), torch.zeros(4))
    torch.testing.assert_close(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))


def test_a_timestep_without_losses_is_never_drawn():
    """Its weight would be infinite: u = 0 must fall to the first timestep of any probability."""
    sampler = LossSecondMomentSampler(4, history_per_term=1, uniform_probability=0.0)
    sampler.update_with_losses(torch.arange(4), torch.tensor([0.0, 2.0, 0.0, 1.0]))
    timesteps, weights = sampler.sample(torch.tensor([0.0, 0.5, 0.9, 1 - 2**-53]).double())
    assert timesteps.tolist() == [1, 1, 3, 3]
    assert torch.isfinite(weights).all()
