"""The forward process q and the reverse process p: identities between their closed forms."""

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_hf import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")
FIXED = ("fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log")
LEARNED = ("learned", "learned_range")
CHAINS = ("linear", "squaredcos_cap_v2", "sigmoid_alpha_bar", "laplace", "jsd")

# (t, s): consecutive, strided, and from the middle straight to the data
PAIRS = [(1, 0), (2, 1), (500, 499), (999, 998), (100, 20), (999, 499), (999, 0), (0, -1), (30, -1), (999, -1)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(*shape, seed=0, dtype=torch.float64):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1).to(dtype)


def alpha_bar(scheduler, t):
    return 1.0 if t < 0 else scheduler.exact_tables.alphas_cumprod[t].item()


def output_for(scheduler, mean_output, seed=9):
    """The model's output: with a learned variance, with a second half that makes plausible log-variances."""
    if scheduler.variance_type not in LEARNED:
        return mean_output
    half = images(*mean_output.shape, seed=seed, dtype=mean_output.dtype)
    return torch.cat([mean_output, half - 3 if scheduler.variance_type == "learned" else half], dim=1)


# q


@pytest.mark.parametrize(("t", "s"), [pair for pair in PAIRS if pair[1] >= 0])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_posterior_is_bayes_rule(schedule, t, s):
    """Normalising q(x_t|x_s) q(x_s|x_0) on a grid: else Eqs. 6 and 7 are not the posterior of this chain."""
    scheduler = DDPMScheduler(beta_schedule=schedule)
    a_t, a_s = alpha_bar(scheduler, t), alpha_bar(scheduler, s)
    prior_mean, prior_variance = 0.7 * math.sqrt(a_s), 1 - a_s  # of x_s, before x_t is seen
    scale, step_variance = math.sqrt(a_t / a_s), 1 - a_t / a_s
    x_0 = torch.tensor([[0.7]], dtype=torch.float64)
    x_t = 0.7 * math.sqrt(a_t) + 0.8 * math.sqrt(1 - a_t)
    moments = scheduler.q_posterior_mean_variance(x_0, torch.tensor([[x_t]], dtype=torch.float64), t, s)

    narrowest = min(math.sqrt(prior_variance), math.sqrt(step_variance) / scale)
    x_s = np.arange(-12 * math.sqrt(prior_variance), 12 * math.sqrt(prior_variance), narrowest / 10) + prior_mean
    log_density = -((x_s - prior_mean) ** 2) / (2 * prior_variance) - (x_t - scale * x_s) ** 2 / (2 * step_variance)
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    mean = (weight * x_s).sum()
    variance = (weight * (x_s - mean) ** 2).sum()
    assert moments.mean.item() == pytest.approx(mean, abs=1e-9)
    assert moments.variance.item() == pytest.approx(variance, rel=1e-7)
    assert moments.log_variance.item() == pytest.approx(math.log(variance), abs=1e-7)


@pytest.mark.every(2)
@pytest.mark.parametrize("schedule", CHAINS)
def test_chained_steps_are_the_closed_form(schedule):
    """1000 steps of q(x_t|x_{t-1}) one after another: else q_mean_variance belongs to another chain."""
    scheduler = DDPMScheduler(beta_schedule=schedule)
    x_0 = images(3, 2)
    mean, variance = x_0, torch.zeros(1, dtype=torch.float64)
    for t in range(len(scheduler)):
        step = scheduler.q_step_mean_variance(mean, t)
        scale_squared = (scheduler.q_step_mean_variance(torch.ones(1, 1, dtype=torch.float64), t).mean ** 2).squeeze()
        mean, variance = step.mean, scale_squared * variance + step.variance
        closed = scheduler.q_mean_variance(x_0, t)
        torch.testing.assert_close(mean, closed.mean, rtol=1e-11, atol=0)
        torch.testing.assert_close(variance, closed.variance.expand_as(variance), rtol=1e-11, atol=0)


def test_add_noise_samples_q():
    """Else training sees another distribution than the one the bound is computed for."""
    scheduler = DDPMScheduler()
    x_0, noise, t = images(4, 3, 2, 2), randn(4, 3, 2, 2), torch.tensor([0, 10, 500, 999])
    moments = scheduler.q_mean_variance(x_0, t)
    torch.testing.assert_close(scheduler.add_noise(x_0, noise, t), moments.mean + moments.variance.sqrt() * noise)
    torch.testing.assert_close(moments.log_variance, moments.variance.log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "scaled_linear"])
def test_add_noise_in_half_precision_rounds_once(schedule, dtype):
    """Casting ᾱ to bf16 first makes it 1 and adds exactly no noise at the first timesteps."""
    scheduler, t = DDPMScheduler(beta_schedule=schedule), torch.arange(1000)
    zero, one = torch.zeros(1000, 1), torch.ones(1000, 1)
    deviation = scheduler.add_noise(zero.to(dtype), one.to(dtype), t)
    scale = scheduler.add_noise(one.to(dtype), zero.to(dtype), t)
    assert (deviation > 0).all()
    assert torch.equal(deviation.flatten(), torch.sqrt(1 - scheduler.exact_tables.alphas_cumprod).float().to(dtype))
    assert torch.equal(scale.flatten(), torch.sqrt(scheduler.exact_tables.alphas_cumprod).float().to(dtype))


def random_chain(draw):
    betas = draw(st.lists(st.floats(1e-4, 0.999), min_size=2, max_size=12))
    t = draw(st.integers(1, len(betas) - 1))
    return DDPMScheduler(num_train_timesteps=len(betas), trained_betas=betas), t, draw(st.integers(0, t - 1))


def posterior_coefficients(scheduler, t, s):
    """The factors of x_0 and x_t in the mean of q(x_s | x_t, x_0), and its variance."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    from_x0 = scheduler.q_posterior_mean_variance(one, zero, t, s)
    from_sample = scheduler.q_posterior_mean_variance(zero, one, t, s)
    return from_x0.mean.item(), from_sample.mean.item(), from_x0.variance.item()


@settings(max_examples=60)
@given(st.data())
def test_marginalising_the_posterior_gives_q_again(data):
    """∫ q(x_s|x_t,x_0) q(x_t|x_0) dx_t = q(x_s|x_0), for any betas and s < t: else a strided chain drifts off q."""
    scheduler, t, s = random_chain(data.draw)
    from_x0, from_sample, variance = posterior_coefficients(scheduler, t, s)
    a_t, a_s = alpha_bar(scheduler, t), alpha_bar(scheduler, s)
    assert from_x0 + from_sample * math.sqrt(a_t) == pytest.approx(math.sqrt(a_s), rel=1e-9)
    assert variance + from_sample**2 * (1 - a_t) == pytest.approx(1 - a_s, rel=1e-9)


@settings(max_examples=60)
@given(st.data())
def test_two_posterior_steps_are_one_strided_step(data):
    """q(x_r|x_t,x_0) = ∫ q(x_r|x_s,x_0) q(x_s|x_t,x_0) dx_s: else chains of different strides disagree."""
    scheduler, t, s = random_chain(data.draw)
    r = data.draw(st.integers(-1, s - 1))
    x0_ts, xt_ts, variance_ts = posterior_coefficients(scheduler, t, s)
    x0_sr, xs_sr, variance_sr = posterior_coefficients(scheduler, s, r)
    x0_tr, xt_tr, variance_tr = posterior_coefficients(scheduler, t, r)
    assert x0_tr == pytest.approx(x0_sr + xs_sr * x0_ts, rel=1e-9)
    assert xt_tr == pytest.approx(xs_sr * xt_ts, rel=1e-9)
    assert variance_tr == pytest.approx(variance_sr + xs_sr**2 * variance_ts, rel=1e-9)


@settings(max_examples=40)
@given(st.data())
def test_forward_steps_compose_for_any_betas(data):
    """Else ᾱ is not the product of 1-β for some betas."""
    scheduler, t, _ = random_chain(data.draw)
    mean, variance, one = 1.0, 0.0, torch.ones(1, 1, dtype=torch.float64)
    for each in range(t + 1):
        step = scheduler.q_step_mean_variance(one, each)
        mean, variance = mean * step.mean.item(), step.mean.item() ** 2 * variance + step.variance.item()
    closed = scheduler.q_mean_variance(one, t)
    assert closed.mean.item() == pytest.approx(mean, rel=1e-9)
    assert closed.variance.item() == pytest.approx(variance, rel=1e-9)


# Prediction types


@pytest.mark.parametrize("timesteps", [0, 700, [3, 999], torch.tensor([0, 400])], ids=["0", "700", "list", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4, 4), (2, 3, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_original_sample_inverts_add_noise(prediction_type, shape, dtype, timesteps):
    """A perfect network must give x_0 back, up to the rounding of its input and output."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0, noise = images(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    target = scheduler.training_target(x_0, noise, timesteps)
    predicted = scheduler.predict_original_sample(target, timesteps, x_t)
    assert x_t.dtype == target.dtype == predicted.dtype == dtype
    assert x_t.shape == target.shape == predicted.shape == x_0.shape

    # x̂_0 = a·x_t + b·output, each of which is off by a rounding
    one, zero = torch.ones(2, *[1] * (len(shape) - 1), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a = scheduler.predict_original_sample(zero.expand_as(one), timesteps, one)
    b = scheduler.predict_original_sample(one, timesteps, zero.expand_as(one))
    bound = 4 * torch.finfo(dtype).eps * ((a * x_t).abs() + (b * target).abs() + 1)
    assert ((predicted.double() - x_0.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [0, 300, 999])
def test_predict_epsilon_inverts_add_noise(t, dtype):
    """Else the ε-error that an evaluation reports is not the network's."""
    scheduler = DDPMScheduler()
    x_0, noise = images(2, 3, 2, 2, dtype=dtype), randn(2, 3, 2, 2, seed=1, dtype=dtype)
    x_t = scheduler.add_noise(x_0, noise, t)
    epsilon = scheduler.predict_epsilon(x_0, t, x_t)
    assert epsilon.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * ((x_t.abs() + x_0.abs()) / math.sqrt(1 - alpha_bar(scheduler, t)) + 1)
    assert ((epsilon - noise).abs() <= bound).all()


def test_velocity_is_the_rotation_of_sample_and_noise():
    """(x_t, v) is (x_0, ε) turned by an angle, so lengths stay: else v is not Salimans & Ho's."""
    scheduler, t = DDPMScheduler(), torch.tensor([0, 500, 999])
    x_0, noise = images(3, 2, 2, 2), randn(3, 2, 2, 2)
    x_t, v = scheduler.add_noise(x_0, noise, t), scheduler.get_velocity(x_0, noise, t)
    torch.testing.assert_close(x_t**2 + v**2, x_0**2 + noise**2)
    torch.testing.assert_close(
        x_t * x_0 + v * noise, (x_0**2 + noise**2) * scheduler.q_mean_variance(x_0 * 0 + 1, t).mean
    )


def test_training_target_of_posterior_mean_is_the_posterior_mean():
    """Else the paper's μ̃ is trained towards something else."""
    scheduler, t = DDPMScheduler(prediction_type="posterior_mean"), torch.tensor([0, 1, 999])
    x_0, noise = images(3, 2), randn(3, 2)
    x_t = scheduler.add_noise(x_0, noise, t)
    expected = scheduler.q_posterior_mean_variance(x_0, x_t, t).mean
    torch.testing.assert_close(scheduler.training_target(x_0, noise, t), expected)


@pytest.mark.parametrize("call", ["add_noise", "get_velocity", "q_mean_variance", "q_step_mean_variance"])
@pytest.mark.parametrize("t", [-1, 1000, torch.tensor([5, 1000])], ids=["-1", "1000", "tensor"])
def test_timesteps_out_of_range_are_refused(call, t):
    """Else t=-1 silently means the last entry of a table."""
    x = images(2, 3)
    arguments = (x, t) if call.startswith("q_") else (x, x, t)
    with pytest.raises(ValueError, match=r"0\.\.999"):
        getattr(DDPMScheduler(), call)(*arguments)


# p


@pytest.mark.parametrize(("t", "s"), PAIRS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_perfect_output_gives_the_posterior_mean(prediction_type, variance_type, t, s):
    """Else p cannot match q however well the network is trained."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise = images(2, 3, 2, 2), randn(2, 3, 2, 2)
    x_t = scheduler.add_noise(x_0, noise, t)
    output = output_for(scheduler, scheduler.training_target(x_0, noise, t))
    predicted = scheduler.p_mean_variance(output, t, x_t, s, clip_sample=False)
    torch.testing.assert_close(predicted.pred_original_sample, x_0, rtol=0, atol=1e-8)
    true = scheduler.q_posterior_mean_variance(x_0, x_t, t, s)
    torch.testing.assert_close(predicted.mean, true.mean, rtol=0, atol=1e-8)
    if variance_type == "fixed_small":
        assert torch.equal(predicted.variance, true.variance)
        assert torch.equal(predicted.log_variance, true.log_variance)


@pytest.mark.parametrize("previous", [None, torch.tensor([400, -1, -1, 10])], ids=["full", "strided"])
@pytest.mark.parametrize("variance_type", FIXED + LEARNED)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_batch_of_timesteps_is_each_on_its_own(prediction_type, variance_type, previous):
    """Else the samples of a training batch leak into each other's moments."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    t = torch.tensor([999, 0, 7, 20])
    x_t = randn(4, 2, 2, 2, seed=1)
    output = output_for(scheduler, randn(4, 2, 2, 2))
    batch = scheduler.p_mean_variance(output, t, x_t, previous)
    for i in range(4):
        s = None if previous is None else int(previous[i])
        alone = scheduler.p_mean_variance(output[i : i + 1], int(t[i]), x_t[i : i + 1], s)
        for moment, expected in zip(batch, alone):
            torch.testing.assert_close(moment.expand(4, 2, 2, 2)[i : i + 1], expected.expand(1, 2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variance_type", FIXED + LEARNED)
def test_moments_and_steps_keep_the_dtype(variance_type, dtype):
    """Else mixed-precision sampling is promoted to float64, or overflows on the way."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    x_t, output = randn(1, 2, 2, 2, dtype=dtype), output_for(scheduler, randn(1, 2, 2, 2, seed=1, dtype=dtype))
    for t in (999, 500, 0):
        assert {moment.dtype for moment in scheduler.p_mean_variance(output, t, x_t)} == {dtype}
        assert {moment.dtype for moment in scheduler.q_posterior_mean_variance(x_t, x_t, t)} == {dtype}
        step = scheduler.step(output, t, x_t)
        assert step.prev_sample.dtype == step.pred_original_sample.dtype == dtype
        assert torch.isfinite(step.prev_sample).all()


def closed_form_variances(scheduler, t, s):
    """β̃ and β of the step from t to s, and log β̃ with its rule for a chain's last step."""

    def step(t, s):
        beta = 1 - alpha_bar(scheduler, t) / alpha_bar(scheduler, s)
        return beta, (1 - alpha_bar(scheduler, s)) / (1 - alpha_bar(scheduler, t)) * beta

    beta, posterior_variance = step(t, s)
    if s >= 0:
        return posterior_variance, beta, math.log(posterior_variance)
    into = min(2 * t + 1, len(scheduler) - 1)
    return 0.0, beta, math.log(step(into, t)[1]) if into > t else math.log(beta)


@pytest.mark.parametrize(("t", "s"), [*PAIRS, (998, -1), (600, -1)])
def test_fixed_variances_and_the_last_step(t, s):
    """Else the decoder's likelihood is not the paper's, or sampling draws noise of another size."""
    small, large, min_log = closed_form_variances(DDPMScheduler(), t, s)
    x = randn(1, 2)
    got = {name: DDPMScheduler(variance_type=name).p_mean_variance(x, t, x, s) for name in FIXED}
    assert got["fixed_small"].variance.item() == pytest.approx(small, rel=1e-10)
    assert got["fixed_small"].log_variance.item() == pytest.approx(min_log, abs=1e-10)
    large_log = min_log if s < 0 else math.log(large)
    assert got["fixed_large"].log_variance.item() == pytest.approx(large_log, abs=1e-10)
    assert got["fixed_large"].variance.item() == pytest.approx(math.exp(large_log), rel=1e-10)
    posterior = DDPMScheduler().q_posterior_mean_variance(x, x, t, s)
    assert posterior.variance.item() == pytest.approx(small, rel=1e-10)
    assert posterior.log_variance.item() == pytest.approx(min_log, abs=1e-10)
    for name in ("fixed_small", "fixed_large"):  # the log_ names are the same variances
        assert all(torch.equal(*pair) for pair in zip(got[name], got[f"{name}_log"]))


@pytest.mark.parametrize("T", [1, 2, 3])
def test_shortest_chains_have_finite_log_variances(T):
    """Where there is no step into t, log β stands in: else the likelihood of a one-step chain is nan."""
    scheduler = DDPMScheduler(num_train_timesteps=T, trained_betas=[0.3, 0.4, 0.5][:T])
    x = randn(1, 2)
    log_variance = scheduler.q_posterior_mean_variance(x, x, T - 1, -1).log_variance.item()
    assert log_variance == pytest.approx(math.log(1 - alpha_bar(scheduler, T - 1)), abs=1e-12)


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_learned_variances(t, s):
    """learned: the output is the log; learned_range: ±1 are log β and log β̃, and 0 their geometric mean."""
    x = randn(1, 2)
    output = torch.cat([x, torch.tensor([[-2.0, 0.5]])], dim=1).double()
    learned = DDPMScheduler(variance_type="learned").p_mean_variance(output, t, x, s)
    assert torch.equal(learned.log_variance, output[:, 2:])
    torch.testing.assert_close(learned.variance, output[:, 2:].exp())

    _, large, min_log = closed_form_variances(DDPMScheduler(), t, s)
    for v, expected in ((-1.0, min_log), (1.0, math.log(large)), (0.0, 0.5 * (min_log + math.log(large)))):
        output = torch.cat([x, torch.full_like(x, v)], dim=1)
        ranged = DDPMScheduler(variance_type="learned_range").p_mean_variance(output, t, x, s)
        torch.testing.assert_close(ranged.log_variance, torch.full_like(x, expected), rtol=0, atol=1e-10)
        torch.testing.assert_close(ranged.variance, torch.full_like(x, math.exp(expected)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("variance_type", FIXED + LEARNED)
def test_get_variance_is_the_variance_of_the_step(variance_type):
    """A log or a deviation under this name is what made stock sample nan with fixed_large_log."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(timesteps=[999, 500, 30])
    x, half = randn(1, 2), images(1, 2, seed=3)
    output = torch.cat([x, half], dim=1) if variance_type in LEARNED else x
    for t, s in ((999, 500), (500, 30), (30, -1)):
        expected = scheduler.p_mean_variance(output, t, x, s).variance
        torch.testing.assert_close(scheduler._get_variance(t, half).expand_as(expected), expected.double())


@pytest.mark.parametrize("clip_config", [True, False])
@pytest.mark.parametrize("argument", [True, False, None])
def test_clip_sample_argument_overrules_the_config(argument, clip_config):
    """Else training losses clip, or a published likelihood is computed unclipped."""
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=clip_config, clip_sample_range=0.5)
    output, x_t = 3 * images(2, 3), randn(2, 3)
    predicted = scheduler.p_mean_variance(output, 500, x_t, clip_sample=argument)
    clips = clip_config if argument is None else argument
    expected = output.clamp(-0.5, 0.5) if clips else output
    assert torch.equal(predicted.pred_original_sample, expected)
    torch.testing.assert_close(predicted.mean, scheduler.q_posterior_mean_variance(expected, x_t, 500).mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 8), (3, 2, 4, 4), (3, 2, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("sample_max_value", [0.5, 1.0, 2.0])
def test_thresholding_is_that_of_stock(sample_max_value, shape, dtype):
    """Else Imagen's dynamic thresholding gives other images than in stock; it counts as clipping."""
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": sample_max_value}
    scheduler = DDPMScheduler(prediction_type="sample", **config)
    output = 2 * randn(*shape, dtype=dtype)
    as_image = output.reshape(*shape, *[1] * (4 - len(shape)))  # stock wants more than [N, C]
    expected = diffusers.DDPMScheduler(**config)._threshold_sample(as_image).reshape(shape)
    for argument in (None, True):
        predicted = scheduler.p_mean_variance(output, 500, output, clip_sample=argument)
        torch.testing.assert_close(predicted.pred_original_sample, expected, rtol=0, atol=1e-6)
    assert torch.equal(scheduler.p_mean_variance(output, 500, output, clip_sample=False).pred_original_sample, output)


@pytest.mark.parametrize("clip_sample", [True, False])
def test_posterior_mean_output_is_the_mean(clip_sample):
    """Clipping touches x̂_0 alone: else μ̃ prediction samples from a mean that the network did not say."""
    scheduler = DDPMScheduler(prediction_type="posterior_mean", clip_sample=clip_sample)
    x_t, output = randn(2, 3), 2 * randn(2, 3, seed=1)
    for t in (0, 1, 500, 999):
        predicted = scheduler.p_mean_variance(output, t, x_t)
        assert torch.equal(predicted.mean, output)
        assert (predicted.pred_original_sample.abs().max() <= 1) == clip_sample
    # in a strided chain the mean is that of the unclipped x̂_0 which the output stands for
    x_0 = scheduler.predict_original_sample(output, 500, x_t)
    strided = scheduler.p_mean_variance(output, 500, x_t, 200)
    torch.testing.assert_close(strided.mean, scheduler.q_posterior_mean_variance(x_0, x_t, 500, 200).mean)


def test_outputs_with_the_wrong_channels_are_refused():
    """Else a learned variance's half is added to an image by broadcasting, or sliced at random."""
    x = randn(1, 2, 2, 2)
    with pytest.raises(ValueError, match="4 channels"):
        DDPMScheduler().p_mean_variance(torch.cat([x, x], dim=1), 5, x)
    with pytest.raises(ValueError, match="4 output channels"):
        DDPMScheduler(variance_type="learned_range").step(x, 5, x)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_moments_are_differentiable(prediction_type, variance_type):
    """Against finite differences: else the bound trains with a wrong gradient, or guidance with none."""
    scheduler = DDPMScheduler(num_train_timesteps=10, beta_end=0.3, clip_sample=False)
    scheduler = DDPMScheduler.from_config(
        scheduler.config, prediction_type=prediction_type, variance_type=variance_type
    )
    t, s = torch.tensor([9, 5]), torch.tensor([8, 2])
    output = output_for(scheduler, randn(2, 2)).requires_grad_()
    x_t = randn(2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *inputs: tuple(scheduler.p_mean_variance(inputs[0], t, inputs[1], s)), (output, x_t)
    )


# step


def each_step(scheduler):
    timesteps = scheduler.timesteps.tolist()
    return list(zip(timesteps, [*timesteps[1:], -1]))


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("timesteps", [[999, 600, 599, 30], [2, 1, 0], [500], None], ids=str)
@pytest.mark.parametrize("variance_type", FIXED + LEARNED)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_is_the_mean_plus_deviation_times_noise(prediction_type, variance_type, timesteps, clip_sample):
    """Else sampling follows another p than the likelihood evaluates."""
    scheduler = DDPMScheduler(
        num_train_timesteps=1000 if timesteps else 4,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample=clip_sample,
    )
    if timesteps is not None:  # else the full chain, without set_timesteps
        scheduler.set_timesteps(timesteps=timesteps)
    x_t = randn(2, 3, 2, 2, seed=1)
    output = output_for(scheduler, randn(2, 3, 2, 2))
    noise = randn(2, 3, 2, 2, seed=5)
    for t, s in each_step(scheduler):
        moments = scheduler.p_mean_variance(output, t, x_t, s)
        step = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(5))
        deviation = moments.variance.sqrt() if s >= 0 else torch.zeros(())
        torch.testing.assert_close(step.prev_sample, moments.mean + deviation * noise, rtol=1e-12, atol=1e-12)
        assert (deviation > 0).all() == (s >= 0)
        torch.testing.assert_close(step.pred_original_sample, moments.pred_original_sample, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("timesteps", [[999, 500, 30], [700], [3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("variance_type", FIXED + LEARNED)
def test_the_last_step_adds_no_noise_whatever_its_timestep(variance_type, timesteps):
    """Stock's fixed_large leaves noise in the image if the chain does not end at 0; the last mean is x̂_0 itself."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(timesteps=timesteps)
    x_t = randn(2, 3, 2, 2, seed=1)
    last = scheduler.step(output_for(scheduler, randn(2, 3, 2, 2)), timesteps[-1], x_t)
    torch.testing.assert_close(last.prev_sample, last.pred_original_sample)


@pytest.mark.parametrize("variance_type", FIXED)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "jsd"])
def test_no_variance_type_gives_nan(schedule, variance_type):
    """`fixed_large_log` sampled nan in stock: every step of the full chain must be finite."""
    scheduler = DDPMScheduler(
        num_train_timesteps=100, beta_schedule=schedule, variance_type=variance_type, prediction_type="v_prediction"
    )
    x = randn(1, 2, 2, 2, dtype=torch.float32)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.isfinite(x).all()


def test_step_outside_the_chain_names_the_timestep():
    """Else a pipeline that forgot set_timesteps samples from tables of another chain."""
    scheduler, x = DDPMScheduler(), randn(1, 2)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep 555 is not in the chain"):
        scheduler.step(x, 555, x)
    with pytest.raises(ValueError, match="timestep 555 is not in the chain"):
        scheduler._get_variance(555)


def test_step_accepts_a_timestep_as_int_or_tensor():
    """Else a loop over `scheduler.timesteps` and one over its list sample differently."""
    scheduler, x = DDPMScheduler(), randn(1, 2)
    ways = [scheduler.step(x, t, x, torch.Generator().manual_seed(0)).prev_sample for t in (7, torch.tensor(7))]
    assert torch.equal(*ways)


# ᾱ_T = 0


@pytest.mark.parametrize(
    "config", [{"beta_schedule": "jsd"}, {"rescale_betas_zero_snr": True}], ids=["jsd", "rescaled"]
)
def test_check_invertible(config):
    """Epsilon prediction divides by √ᾱ = 0 there; the pair must be refused with the way out, and nothing else."""
    scheduler = DDPMScheduler(**config)
    with pytest.raises(ValueError, match=r"timestep 999.*v_prediction"):
        scheduler.check_invertible(scheduler.timesteps)
    scheduler.check_invertible(range(999))
    DDPMScheduler().check_invertible(range(1000))
    for prediction_type in ("sample", "v_prediction", "posterior_mean"):
        DDPMScheduler(**config, prediction_type=prediction_type).check_invertible(range(1000))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("s", [998, 500, 0, -1])
def test_zero_terminal_snr_is_exact_at_the_last_timestep(s, prediction_type):
    """At ᾱ=0, x_T tells nothing of x_0: p's mean is √ᾱ_s x̂_0 and its variance that of q(x_s|x_0)."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    x_0, noise = images(2, 3), randn(2, 3)
    x_t = scheduler.add_noise(x_0, noise, 999)
    assert torch.equal(x_t, noise)
    predicted = scheduler.p_mean_variance(scheduler.training_target(x_0, noise, 999), 999, x_t, s)
    torch.testing.assert_close(predicted.pred_original_sample, x_0)
    a_s = alpha_bar(scheduler, s)
    torch.testing.assert_close(predicted.mean, math.sqrt(a_s) * x_0)
    assert predicted.variance.item() == pytest.approx(1 - a_s, rel=1e-10)
