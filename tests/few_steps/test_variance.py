"""The optimal reverse variance, where it is known: Gaussian data and the network that is exact for them."""

import json
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.common.errors import DataError, UsageError
from ddpm_hf.evaluation.bound import BoundBatch, measure_bound
from ddpm_hf.few_steps.variance import (
    check_fittable,
    fit_variances,
    log_snr,
    measure_moments,
    measured_timesteps,
    rounded,
)
from ddpm_hf.portable.scheduling_ddpm_hf import X_START_VARIANCES
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.gaussian_data import GaussianData, within

T, V = 60, 0.3
CHAINS = [list(range(T)), [*range(0, T - 1, 6), T - 1], [0, 2, 40, T - 1], [0, T - 1]]


def setting(**config):
    scheduler = DDPMScheduler(T, beta_end=0.25, **config)
    data = GaussianData(scheduler, V)

    def network(x_t, t):
        factors = torch.tensor([data.epsilon(1.0, int(one)) for one in t], dtype=x_t.dtype)
        return SimpleNamespace(sample=factors.reshape(-1, 1, 1, 1) * x_t)

    return scheduler, data, network


def exact_variances(data):
    """Var[x_0 | x_t], by Bayes' rule."""
    return [V * (1 - data.alpha_bar(t)) / data.marginal(t) for t in range(T)]


@pytest.mark.every(2)
@pytest.mark.parametrize("estimate", ["error", "norm"])
def test_both_estimates_find_the_variance_of_x_0(estimate):
    """Else the fit is biased: both formulas agree for the network that is exact."""
    scheduler, data, network = setting(clip_sample=False)
    batches = [BoundBatch(at, data.draw(2000, 1, 4, 4, seed=at)) for at in (0, 2000)]
    moments = measure_moments(network, scheduler, batches)
    assert moments.images == 4000
    found, exact = fit_variances(scheduler, moments, estimate).variances, np.array(exact_variances(data))
    if estimate == "error":
        np.testing.assert_allclose(found, exact, rtol=0.03)
    else:  # from a difference: its error grows as the image drowns, where the bound holds it
        low = scheduler.exact_tables.alphas_cumprod.numpy() > 0.3
        np.testing.assert_allclose(found[low], exact[low], rtol=0.1)
        assert (found <= moments.x_start_norm).all()


def test_few_timesteps_give_all_variances():
    """Else fewer network calls cost accuracy: what is measured at a few timesteps is the curve of all, as it says."""
    scheduler = DDPMScheduler(1000, clip_sample=False)
    data = GaussianData(scheduler, V)
    scales = torch.tensor([data.epsilon(1.0, t) for t in range(1000)])

    def network(x_t, t):
        return SimpleNamespace(sample=scales[t].reshape(-1, 1, 1, 1).to(x_t.dtype) * x_t)

    nodes = measured_timesteps(scheduler, 40)
    assert (nodes[0], nodes[-1], len(set(nodes)), sorted(nodes)) == (0, 999, 40, nodes)
    gaps = np.diff(log_snr(scheduler)[nodes][10:])
    assert gaps.min() > 1.3 * gaps.max()  # both are negative: as even as whole timesteps allow
    batches = [BoundBatch(0, data.draw(400, 1, 4, 4)), BoundBatch(400, data.draw(400, 1, 4, 4, seed=1))]
    moments = measure_moments(network, scheduler, batches, timesteps=nodes)
    fit = fit_variances(scheduler, moments)
    exact = np.array([V * (1 - data.alpha_bar(t)) / data.marginal(t) for t in range(1000)])
    assert fit.standard_error == pytest.approx((2 / (800 * 16)) ** 0.5, rel=0.1)  # of the variance of Gaussians
    assert np.sqrt(np.mean((fit.variances / exact - 1) ** 2)) < 2 * fit.standard_error
    even = np.linspace(0, 999, 40).round().astype(int)  # evenly in t they miss where most bits are
    assert np.abs(np.interp(np.arange(1000), even, exact[even]) / exact - 1).max() > 0.2
    exactly = moments._replace(x_start_error=exact[nodes])
    between = fit_variances(scheduler, exactly)
    assert np.median(np.abs(between.variances / exact - 1)) < between.interpolation_error < 0.02
    everywhere = measure_moments(network, scheduler, [BoundBatch(0, batches[0].images[:4])])
    assert fit_variances(scheduler, everywhere).interpolation_error is None
    np.testing.assert_array_equal(fit_variances(scheduler, everywhere).variances, everywhere.x_start_error)
    with pytest.raises(UsageError, match="--timesteps 2"):
        measured_timesteps(scheduler, 2)
    assert measured_timesteps(DDPMScheduler(2), 2) == [0, 1]


def test_clipping_counts_in_the_error():
    """Else the variance is not that of the mean that sampling takes."""
    scheduler, _, _ = setting()
    batches = [BoundBatch(0, torch.ones(4, 1, 2, 2, dtype=torch.float64))]
    moments = measure_moments(lambda x_t, t: SimpleNamespace(sample=-100 + 0 * x_t), scheduler, batches)
    np.testing.assert_allclose(moments.x_start_error, 0, atol=1e-12)  # x̂_0 is far above 1


@pytest.mark.parametrize("chain", CHAINS, ids=len)
def test_each_step_has_the_true_variance_whatever_its_length(chain):
    """Else the formula holds for one spacing alone: the reverse process of Gaussian data is known for each (t, s)."""
    scheduler, data, network = setting(clip_sample=False)
    scheduler.use_x_start_variances(exact_variances(data))
    x_t = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    scheduler.set_timesteps(timesteps=chain[::-1])
    for t, s in zip(chain, [-1, *chain[:-1]]):
        output = network(x_t, torch.full((3,), t)).sample
        moments = scheduler.p_mean_variance(output, t, x_t, s)
        np.testing.assert_allclose(moments.variance.flatten(), data.reverse_variance(t, s), rtol=1e-9)
        np.testing.assert_allclose(moments.log_variance.exp(), moments.variance, rtol=1e-12)
        np.testing.assert_allclose(moments.mean, data.reverse_mean(x_t, t, s), rtol=1e-9, atol=1e-12)
        assert scheduler._get_variance(t).item() == pytest.approx(data.reverse_variance(t, s), rel=1e-9)


@pytest.mark.parametrize("chain", CHAINS, ids=len)
def test_the_bound_is_tight_in_any_number_of_steps(chain):
    """With the true variance each step is the true reverse process: the bound is the entropy, even in two steps."""
    scheduler, data, network = setting(clip_sample=False)
    batches = [BoundBatch(0, data.draw(3000, 1, 2, 2))]
    expected = data.expected_bpd()
    totals = {}
    for name in ("fixed_small", "fixed_large", "fitted"):
        measured = DDPMScheduler.from_config(scheduler.config, variance_type=name.replace("fitted", "fixed_small"))
        if name == "fitted":
            measured.use_x_start_variances(exact_variances(data))
        totals[name] = torch.from_numpy(measure_bound(network, measured, batches, timesteps=chain, latent=True).total)
    assert within(totals["fitted"], expected)
    for name in ("fixed_small", "fixed_large"):
        assert totals[name].mean() > expected + (0.05 if len(chain) < T else 0)


def test_samples_have_the_variance_of_the_data():
    """Else sampling does not use the fitted variance: in four steps fixed_small is too narrow."""
    scheduler, data, network = setting(clip_sample=False)
    deviations = {}
    for name, table in (("fixed", None), ("fitted", exact_variances(data))):
        scheduler.use_x_start_variances(table)
        scheduler.set_timesteps(timesteps=CHAINS[2][::-1])
        x = math.sqrt(data.marginal(T - 1)) * torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(network(x, torch.full((20000,), t)).sample, t, x, generator).prev_sample
        deviations[name] = x.std().item()
    # all but the last step, which adds no noise
    expected = math.sqrt(data.marginal(0)) * data.reverse_mean(1.0, 0, -1)
    assert deviations["fitted"] == pytest.approx(expected, rel=0.02)
    assert deviations["fixed"] < 0.8 * expected


@pytest.mark.parametrize("clip_sample", [True, False])
def test_the_last_noise_is_a_grey_level(clip_sample):
    """Else what the last noisy step adds stays in the image as grain; latents have no grey levels."""
    scheduler, _, _ = setting(clip_sample=clip_sample)
    scheduler.use_x_start_variances([0.5] * T)
    scheduler.set_timesteps(3)
    zero, noise = torch.zeros(1, 1, 200, 200), {}
    for t in scheduler.timesteps.tolist():
        noise[t] = scheduler.step(zero, t, zero, torch.Generator().manual_seed(0)).prev_sample.abs().mean().item()
    first, second, last = noise.values()
    assert last == 0
    assert first > 0.1
    assert second == pytest.approx(2 / 255, rel=0.02) if clip_sample else second > 0.1


# In a config


def test_the_table_stays_with_the_model(tmp_path, caplog):
    """Else a fit is lost by saving or by a change of samplers, or Diffusers complains of it."""
    scheduler, data, _ = setting()
    scheduler.use_x_start_variances(rounded(exact_variances(data)))
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert len(saved[X_START_VARIANCES]) == T
    assert saved["variance_type"] == "fixed_small"
    with caplog.at_level("WARNING"):
        stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
        assert type(stock) is diffusers.DDPMPipeline
        stock.set_progress_bar_config(disable=True)
        assert stock(1, torch.Generator().manual_seed(0), 3, "np").images.shape == (1, 8, 8, 1)
    assert X_START_VARIANCES not in caplog.text
    ours = DDPMPipeline.from_pretrained(tmp_path)
    for sampler in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        ours.scheduler = getattr(diffusers, sampler).from_config(ours.scheduler.config)
    ours.scheduler = DDPMScheduler.from_config(ours.scheduler.config)
    torch.testing.assert_close(ours.scheduler.x_start_variances, scheduler.x_start_variances)
    assert ours.scheduler.variance_type == scheduler.variance_type == "fitted"
    ours.scheduler.use_x_start_variances(None)
    again = DDPMScheduler.from_config(ours.scheduler.config)
    assert (again.x_start_variances, again.variance_type) == (None, "fixed_small")


def test_another_diffusion_has_no_fit():
    """Else the variances of one schedule are taken for another's."""
    scheduler, data, _ = setting()
    scheduler.use_x_start_variances(exact_variances(data))
    for change in ({"num_train_timesteps": 20}, {"beta_end": 0.1}, {"beta_schedule": "cosine"}):
        assert DDPMScheduler.from_config(scheduler.config, **change).x_start_variances is None
    assert DDPMScheduler.from_config(scheduler.config, timestep_spacing="trailing").x_start_variances is not None


def test_a_learned_variance_stays():
    """Else a model's own variance is ignored."""
    scheduler = DDPMScheduler(T, variance_type="learned_range")
    scheduler.use_x_start_variances([0.1] * T)
    assert scheduler.variance_type == "learned_range"


@pytest.mark.parametrize("table", [[0.1] * (T - 1), [-0.1] * T, [math.nan] * T, ["a"] * T, 3.0])
def test_tables_that_fit_no_model_are_refused(table):
    """Else sampling yields NaN, or a wrong variance."""
    scheduler, _, _ = setting()
    with pytest.raises(ValueError, match=X_START_VARIANCES):
        scheduler.use_x_start_variances(table)
    assert scheduler.variance_type == "fixed_small"


def test_what_cannot_be_fitted_is_refused():
    """Else a fit replaces what was learned, or holds NaN."""
    for config in ({"variance_type": "learned"}, {"prediction_type": "posterior_mean"}):
        with pytest.raises(UsageError):
            check_fittable(DDPMScheduler(T, **config))
    scheduler, _, network = setting()
    with pytest.raises(DataError, match="0 images"):
        measure_moments(network, scheduler, [])
    batch = BoundBatch(0, torch.zeros(2, 1, 1, 1))
    with pytest.raises(DataError, match="t=0"):
        measure_moments(lambda x_t, t: SimpleNamespace(sample=math.nan * x_t), scheduler, [batch])
