"""Bits per dimension, on Gaussian data whose exact model and exact answer are known.

For x_0 ~ N(0, v) every x_t is N(0, M_t) with M_t = ᾱ_t v + 1 - ᾱ_t, and the reverse conditionals are Gaussian:
q(x_s | x_t) = N(√(ᾱ_t/ᾱ_s) M_s/M_t x_t, σ*²) with σ*² = M_s β_{t|s} / M_t, M_{-1} = v and β_{t|s} = 1 - ᾱ_t/ᾱ_s.
The mean is the one that E[ε | x_t] = √(1-ᾱ_t)/M_t x_t stands for. With both, p(x_s|x_t) = q(x_s|x_t), so that

- E KL(q(x_s|x_t,x_0) ‖ p(x_s|x_t)) = ½ log(σ*²/β̃), as σ*² = β̃ + Var(mean of q(x_s|x_t,x_0) | x_t), and
- the whole bound is the entropy of x_0 plus KL(q(x_T) ‖ N(0, I)), in a strided chain as in the full one.
"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from ddpm_hf import DDPMScheduler, bits_per_dim
from ddpm_hf.objectives.bound import prior_bpd, vb_terms_bpd
from tests.support.gaussian_data import LOG2, GaussianData, within

N = 30_000  # images of 4 dimensions: this leaves standard errors of 0.005 bits/dim


class PerfectUNet(torch.nn.Module):
    """E[ε | x_t], and where the variance is learned the exact log-variance of the chain's step from t."""

    def __init__(self, data, chain, learned=True):
        super().__init__()
        self.data, self.learned = data, learned
        self.previous = dict(zip(chain, [-1, *chain[:-1]]))

    def forward(self, x_t, t):
        output = self.data.epsilon(x_t, t)
        if self.learned:
            log_variance = math.log(self.data.reverse_variance(t, self.previous[t]))
            output = torch.cat([output, torch.full_like(x_t, log_variance)], dim=1)
        return SimpleNamespace(sample=output)


def continuous_decoder_bpd(scheduler, unet, x_0, t):
    """-log p(x_0 | x_t) by the moments of the chain's last step, without discretization: [N]."""
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, noise, t)
    p = scheduler.p_mean_variance(unet(x_t, t).sample, t, x_t, -1, clip_sample=False)
    log_likelihood = torch.distributions.Normal(p.mean, (0.5 * p.log_variance).exp()).log_prob(x_0)
    return -log_likelihood.flatten(1).mean(dim=1) / LOG2


CHAINS = {
    "full": lambda T: list(range(T)),
    "strided": lambda T: [0, 1, 4, 5, T // 2, T - 2, T - 1],
    "strided, from above 0": lambda T: [3, T // 3, T - 1],
    "one step": lambda T: [T - 1],
}
chains = pytest.mark.parametrize("chain", CHAINS)
data_variances = pytest.mark.parametrize("v", [0.05, 1.0, 3.0])
schedules = pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])


def setting(schedule, chain, v, variance_type="learned", T=12):
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule=schedule, beta_end=0.5, variance_type=variance_type)
    return scheduler, CHAINS[chain](T), GaussianData(scheduler, v)


@functools.cache
def exact_model(schedule, chain, v):
    """`bits_per_dim` of the exact model on N images, and its continuous decoder's term."""
    scheduler, chain, data = setting(schedule, chain, v)
    unet, x_0 = PerfectUNet(data, chain), data.draw(N, 1, 2, 2)
    generator = torch.Generator().manual_seed(1)
    bound = bits_per_dim(unet, scheduler, x_0, chain, generator=generator, clip_sample=False)
    return data, chain, bound, continuous_decoder_bpd(scheduler, unet, x_0, chain[0])


@pytest.mark.every(3)
@data_variances
@chains
@schedules
def test_the_bound_of_the_exact_model_is_the_entropy(schedule, chain, v):
    """Else bits/dim are off: here the answer is known, and the KL to the prior (T=12 leaves some) is part of it."""
    data, _, bound, decoder = exact_model(schedule, chain, v)
    total = bound.prior + bound.vb[:, 1:].sum(dim=1) + decoder
    assert total.mean().item() == pytest.approx(data.expected_bpd(), abs=0.02)
    assert within(total, data.expected_bpd())


@data_variances
@chains
@schedules
def test_each_term_of_the_exact_model_is_known(schedule, chain, v):
    """E L_{t-1} = ½ log2(σ*²/β̃) for every step, strided or not; x̂_0 and ε are off by their posterior variances."""
    data, chain, bound, decoder = exact_model(schedule, chain, v)
    for i, (t, s) in enumerate(zip(chain, [-1, *chain[:-1]])):
        if s >= 0:
            expected = 0.5 * math.log2(data.reverse_variance(t, s) / data.posterior_variance(t, s))
            assert within(bound.vb[:, i], expected), f"L at t={t}"
        assert within(bound.x_start_mse[:, i], data.reverse_variance(t, -1)), f"x_0 at t={t}"
        assert within(bound.epsilon_mse[:, i], data.alpha_bar(t) * v / data.marginal(t)), f"ε at t={t}"
    assert within(decoder, 0.5 * math.log2(2 * math.pi * math.e * data.reverse_variance(chain[0], -1)))
    last = len(data.alphas_cumprod) - 1
    assert within(bound.prior, 0.5 * (data.marginal(last) - 1 - math.log(1 - data.alpha_bar(last))) / LOG2)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 2), (2, 3, 2, 2)], ids=str)
def test_terms_are_known_in_any_shape(shape):
    """Bits are per dimension, whatever the number of dimensions and their layout."""
    scheduler, _, data = setting("linear", "full", 0.5)
    n, generator = 5000, torch.Generator().manual_seed(0)
    t = torch.randint(1, len(scheduler), (n,), generator=generator)
    x_0, noise = data.draw(n, *shape), torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, noise, t)
    epsilon = torch.stack([data.epsilon(x, i) for x, i in zip(x_t, t.tolist())])
    for s in (t - 1, t // 2):
        pairs = list(zip(t.tolist(), s.tolist()))
        exact = torch.tensor([data.reverse_variance(*pair) for pair in pairs], dtype=torch.float64)
        smallest = torch.tensor([data.posterior_variance(*pair) for pair in pairs], dtype=torch.float64)
        log_variance = exact.log().view(n, *[1] * len(shape)).expand_as(x_t)
        output = torch.cat([epsilon, log_variance], dim=1)
        terms = vb_terms_bpd(scheduler, output, x_0, x_t, t, s, clip_sample=False).bits_per_dim
        assert within(terms - 0.5 * torch.log2(exact / smallest), 0.0)


@schedules
def test_fixed_large_is_exact_for_unit_variance(schedule):
    """For x_0 ~ N(0, I), σ*² = β (Ho et al., sec. 3.2): fixed and exact variance must give one bound."""
    bounds = []
    for variance_type in ("fixed_large", "learned"):
        scheduler, chain, data = setting(schedule, "strided", 1.0, variance_type)
        unet, x_0 = PerfectUNet(data, chain, learned=variance_type == "learned"), data.draw(200, 1, 2, 2)
        generator = torch.Generator().manual_seed(1)
        bounds.append(bits_per_dim(unet, scheduler, x_0, chain, generator=generator, clip_sample=False))
    torch.testing.assert_close(bounds[0].vb[:, 1:], bounds[1].vb[:, 1:])


@schedules
def test_fixed_small_is_exact_for_a_point(schedule):
    """For data at one point, σ*² = β̃ and every KL is 0 (Ho et al., sec. 3.2)."""
    scheduler, chain, data = setting(schedule, "full", 1e-300, "fixed_small")
    x_0 = torch.zeros(50, 1, 2, 2, dtype=torch.float64)
    unet = PerfectUNet(data, chain, learned=False)
    bound = bits_per_dim(unet, scheduler, x_0, clip_sample=False, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bound.vb[:, 1:], torch.zeros_like(bound.vb[:, 1:]), rtol=0, atol=1e-10)
    assert (bound.vb[:, 0] > 0).all()


@chains
def test_a_worse_model_has_a_larger_bound(chain):
    """By the KL of the wrong variance, ½(r - 1 - log r) a dimension and step: else the bound is not one."""
    scheduler, chain, data = setting("linear", chain, 0.5)
    if len(chain) < 2:
        chain = [0, *chain]
    x_0 = data.draw(N, 1, 2, 2)
    unet = PerfectUNet(data, chain)

    class Wrong(torch.nn.Module):
        def forward(self, x_t, t):
            output = unet(x_t, t).sample
            output[:, 1:] += math.log(1.7)
            return SimpleNamespace(sample=output)

    exact, worse = (
        bits_per_dim(each, scheduler, x_0, chain, generator=torch.Generator().manual_seed(1), clip_sample=False)
        for each in (unet, Wrong())
    )
    r = 1 / 1.7
    for i in range(1, len(chain)):
        assert within(worse.vb[:, i] - exact.vb[:, i], 0.5 * (r - 1 - math.log(r)) / LOG2)


@pytest.mark.parametrize("v", [0.05, 0.08])
def test_the_discretized_bound_is_the_entropy_in_bins(v):
    """Where x_1 is noisy against a bin of 2/255, the decoder's bits are -log2 of density times width."""
    data, _, bound, decoder = exact_model("squaredcos_cap_v2", "full", v)
    expected = data.expected_bpd() + math.log2(255 / 2)
    assert bound.total.mean().item() == pytest.approx(expected, abs=0.03)
    assert bound.vb[:, 0].mean().item() == pytest.approx(decoder.mean().item() + math.log2(255 / 2), abs=0.03)


# What the function promises besides


def untrained(x_t, t, class_labels=None):
    """A model that is far from perfect, with images within the range where x̂_0 is clipped."""
    shift = 0 if class_labels is None else class_labels.view(-1, 1, 1, 1)
    return SimpleNamespace(sample=torch.sin(3 * x_t + t) + 0.1 * shift)


def images(n=3, dtype=torch.float64):
    levels = torch.randint(256, (n, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    return (levels.double() / 127.5 - 1).to(dtype)


def evaluate(scheduler=None, x_0=None, timesteps=None, unet=untrained, seed=0, **options):
    return bits_per_dim(
        unet,
        scheduler or DDPMScheduler(num_train_timesteps=20),
        images() if x_0 is None else x_0,
        timesteps,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


@pytest.mark.parametrize("timesteps", [None, [0, 3, 11, 19]], ids=str)
@pytest.mark.parametrize("clip_sample", [True, False])
def test_columns_ascend_and_sum_to_the_total(clip_sample, timesteps):
    """Column i belongs to timesteps[i]: each is the term at its own x_t, and the total is the prior plus all."""
    scheduler, x_0, seen = DDPMScheduler(num_train_timesteps=20), images(), {}

    def unet(x_t, t):
        seen[t] = x_t
        return untrained(x_t, t)

    bound = evaluate(scheduler, x_0, timesteps, unet, clip_sample=clip_sample)
    chain = timesteps or list(range(20))
    assert sorted(seen) == chain
    assert bound.vb.shape == bound.x_start_mse.shape == bound.epsilon_mse.shape == (3, len(chain))
    for i, (t, s) in enumerate(zip(chain, [-1, *chain[:-1]])):
        terms = vb_terms_bpd(scheduler, untrained(seen[t], t).sample, x_0, seen[t], t, s, clip_sample)
        torch.testing.assert_close(bound.vb[:, i], terms.bits_per_dim)
        error = (terms.pred_original_sample - x_0).flatten(1).square().mean(dim=1)
        torch.testing.assert_close(bound.x_start_mse[:, i], error)
        # x_t is the same, so the error of ε is that of x̂_0 times ᾱ/(1-ᾱ)
        snr = scheduler.exact_tables.alphas_cumprod[t] / (1 - scheduler.exact_tables.alphas_cumprod[t])
        torch.testing.assert_close(bound.epsilon_mse[:, i], snr * error)
    torch.testing.assert_close(bound.prior, prior_bpd(scheduler, x_0))
    torch.testing.assert_close(bound.total, bound.prior + bound.vb.sum(dim=1))


def test_order_of_the_timesteps_is_irrelevant():
    """Else a list from `scheduler.timesteps`, which descends, gives other figures."""
    for other in ([19, 11, 3, 0], [3, 19, 0, 11], torch.tensor([11, 0, 3, 19])):
        assert all(torch.equal(*pair) for pair in zip(evaluate(timesteps=[0, 3, 11, 19]), evaluate(timesteps=other)))


def test_all_timesteps_is_the_default():
    """Else the figure of a full chain depends on how it is asked for."""
    assert all(torch.equal(*pair) for pair in zip(evaluate(), evaluate(timesteps=range(20))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype):
    """float64 stays float64 throughout, the noise included: else figures carry the noise of float32 unasked."""
    scheduler, x_0, seen = DDPMScheduler(num_train_timesteps=20), images(dtype=dtype), {}

    def unet(x_t, t):
        seen[t] = x_t
        return untrained(x_t, t)

    assert {column.dtype for column in evaluate(scheduler, x_0, unet=unet)} == {dtype}
    assert {x_t.dtype for x_t in seen.values()} == {dtype}
    noise = scheduler.predict_epsilon(x_0.double(), 19, seen[19].double())
    distance_to_float32 = (noise - noise.float().double()).abs().max()
    assert (distance_to_float32 > 1e-10) or dtype == torch.float32


def test_nothing_is_learned_from_an_evaluation():
    """No graph is kept: else a long chain runs out of memory."""
    layer = torch.nn.Conv2d(2, 2, 1, dtype=torch.float64)
    bound = evaluate(unet=lambda x_t, t: SimpleNamespace(sample=layer(x_t)))
    assert not any(column.requires_grad for column in bound)


def test_class_labels_reach_the_model():
    """Else a class-conditional model is evaluated without its labels."""
    with_labels = evaluate(class_labels=torch.tensor([0, 1, 2]))
    without = evaluate()
    assert torch.equal(with_labels.vb[0], without.vb[0])
    assert (with_labels.vb[1:] != without.vb[1:]).any(dim=1).all()


def test_the_scheduler_is_left_as_it_was():
    """Evaluating in the middle of training or sampling must change nothing."""
    scheduler = DDPMScheduler(num_train_timesteps=20)
    scheduler.set_timesteps(5)
    evaluate(scheduler, timesteps=[0, 7, 19])
    assert scheduler.timesteps.tolist() == [16, 12, 8, 4, 0]


@pytest.mark.parametrize("timesteps", [[], [0, 3, 3], [-1, 5], [5, 20]], ids=str)
def test_impossible_chains_are_refused(timesteps):
    """Else a repeated timestep costs infinitely many bits, or -1 means the last."""
    with pytest.raises(ValueError, match=r"0\.\.19"):
        evaluate(timesteps=timesteps)


def test_zero_terminal_snr_with_epsilon_is_refused():
    """Else the bound is nan; without T-1 in the chain, or with another prediction, it is finite."""
    config = {"num_train_timesteps": 20, "rescale_betas_zero_snr": True}
    with pytest.raises(ValueError, match="zero terminal SNR"):
        evaluate(DDPMScheduler(**config))
    for scheduler, timesteps in (
        (DDPMScheduler(**config), [0, 5, 18]),
        (DDPMScheduler(**config, prediction_type="v_prediction"), None),
    ):
        assert torch.isfinite(evaluate(scheduler, timesteps=timesteps).total).all()
