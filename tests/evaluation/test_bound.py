"""The bound of a set of images, from all network calls or a few, where each of its terms is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_hf import DDPMScheduler
from ddpm_hf.common.errors import DataError
from ddpm_hf.common.image_sets import ImageSet
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.evaluation.bound import BoundBatch, measure_bound
from ddpm_hf.evaluation.model_bound import ModelBound
from ddpm_hf.evaluation.ranks import Ranks
from ddpm_hf.evaluation.strata import expected_terms, plan_calls
from ddpm_hf.objectives.bound import prior_bpd, vb_terms_bpd
from ddpm_hf.portable.scheduling_ddpm_hf import PREDICTION_TYPES, VARIANCE_TYPES
from tests.support.gaussian_data import ExactNetwork, GaussianData, within

V = 0.3  # the variance of the Gaussian data


def setting(T=200, n=400, beta_end=0.1):
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_end=beta_end, variance_type="learned")
    data = GaussianData(scheduler, V)
    return scheduler, ExactNetwork(scheduler, data), data.draw(n, 1, 2, 4), data


def batches(images, size=None, **conditions):
    size = size or len(images)
    return [
        BoundBatch(first, images[first : first + size], {k: v[first : first + size] for k, v in conditions.items()})
        for first in range(0, len(images), size)
    ]


def random_network(channels):
    """A network that is wrong, and whose output is within the range where x̂_0 is clipped."""

    def network(x_t, t, class_labels=None):
        t = t.reshape(-1, 1, 1, 1) + (0 if class_labels is None else class_labels.reshape(-1, 1, 1, 1))
        return SimpleNamespace(sample=torch.cat([torch.sin(3 * x_t + t)] * (channels // x_t.shape[1]), dim=1))

    return network


def test_all_terms_are_those_of_the_closed_form():
    """Else a term, its place or its sum is wrong: here each image's expected terms are known."""
    scheduler, network, x_0, data = setting(T=40, n=2000)
    bound = measure_bound(network, scheduler, batches(x_0, 500), latent=True)
    expected = network.expected_terms(scheduler, x_0)  # [N, T]
    assert bound.calls == 40
    assert bound.estimation_error is None
    assert within(torch.from_numpy(bound.total - bound.prior) - expected.sum(dim=1), 0.0)
    assert within(torch.from_numpy(bound.decoder) - expected[:, 0], 0.0)
    np.testing.assert_allclose(bound.terms, expected.mean(dim=0), rtol=0.1, atol=2e-3)
    np.testing.assert_allclose(bound.prior, prior_bpd(scheduler, x_0))
    assert within(torch.from_numpy(bound.total), data.expected_bpd())
    summary = bound.summary()
    assert summary["low"] < data.expected_bpd() < summary["high"]
    assert summary["value"] == pytest.approx(summary["prior"] + summary["steps"] + summary["decoder"])
    assert bound.unit == "bits/latent dim"


@pytest.mark.parametrize("calls", [4, 7, 50])
def test_a_few_calls_estimate_the_bound_with_the_error_that_they_say(calls):
    """Else the estimate is biased, or its standard error is wrong: 100 sets of images, each with a known answer."""
    scheduler, network, x_0, _ = setting(T=1000, n=2000, beta_end=0.02)
    bound = measure_bound(network, scheduler, batches(x_0), calls=calls, latent=True)
    expected = network.expected_terms(scheduler, x_0).sum(dim=1).numpy()
    errors = bound.total - bound.prior - expected  # [N]
    sets = errors.reshape(100, -1).mean(axis=1)
    standard_errors = np.sqrt(bound.variance.reshape(100, -1).sum(axis=1)) / 20
    assert (np.abs(sets) <= 2 * standard_errors).sum() >= 90
    assert abs(errors.mean()) <= 4 * bound.estimation_error
    assert bound.estimation_error == pytest.approx(errors.std() / np.sqrt(len(errors)), rel=0.1)
    assert bound.visits.sum() == calls * len(x_0)
    assert bound.shares.sum() == pytest.approx((bound.total - bound.prior).mean(), rel=1e-12)


@pytest.mark.parametrize("calls", [4, 5, 20, 49])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_strata_cover_every_term_once(variance_type, calls):
    """Else the estimate is biased: over all uniform numbers, the weighted terms of a plan sum to the terms."""
    scheduler = DDPMScheduler(num_train_timesteps=100, variance_type=variance_type)
    chain = [*range(0, 100, 2), 99]
    plan = plan_calls(scheduler, chain, calls)
    assert plan.calls == calls
    terms, uniforms = np.random.default_rng(0).uniform(1, 2, len(chain)), (np.arange(20_000) + 0.5) / 20_000
    parts = np.zeros(len(plan.sizes))
    for call, group in enumerate(plan.groups):
        at, factor = plan.sample(call, uniforms)
        parts[group] += (terms[at] * factor).mean() / plan.sizes[group]
    assert parts.sum() == pytest.approx(terms.sum(), rel=1e-3)
    assert parts[0] == pytest.approx(terms[0])


def test_the_expected_terms_are_those_of_gaussian_data(monkeypatch):
    """Else strata are long where the bits are, and the error is larger than it need be."""
    scheduler, network, x_0, _ = setting(T=100)
    monkeypatch.setattr("ddpm_hf.evaluation.strata.DATA_VARIANCES", np.array([V]))
    exact = network.expected_terms(scheduler, x_0).mean(dim=0).numpy()
    np.testing.assert_allclose(expected_terms(scheduler, list(range(100))), exact[1:], rtol=1e-2)


@pytest.mark.parametrize("calls", [None, 100])
def test_enough_calls_are_the_full_sum(calls):
    """Else a likelihood at as many calls as timesteps is an estimate."""
    scheduler, network, x_0, _ = setting(T=100, n=4)
    bound = measure_bound(network, scheduler, batches(x_0), calls=calls)
    assert (bound.visits == 4).all()
    assert bound.estimation_error is None


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_kind_of_output_is_measured(prediction_type, variance_type):
    """Each term is that of `vb_terms_bpd` at the x_t of its own noise, in a strided chain, with the labels given."""
    scheduler = DDPMScheduler(num_train_timesteps=20, prediction_type=prediction_type, variance_type=variance_type)
    levels = torch.randint(256, (3, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    x_0, labels, chain = levels.double() / 127.5 - 1, torch.tensor([3, 1, 2]), [0, 4, 11, 19]
    network = random_network(4 if variance_type.startswith("learned") else 2)
    given = [BoundBatch(7, x_0, {"class_labels": labels})]
    bound = measure_bound(network, scheduler, given, timesteps=chain[::-1], seed=5)
    total = prior_bpd(scheduler, x_0)
    for call, (t, s) in enumerate(zip(chain, [-1, *chain[:-1]])):
        noise = StepKeys(5, call, 7, 3).normal_like(x_0, "likelihood_noise")
        x_t = scheduler.add_noise(x_0, noise, t)
        terms = vb_terms_bpd(scheduler, network(x_t, torch.tensor(t), labels).sample, x_0, x_t, t, s)
        total = total + terms.bits_per_dim
        assert bound.x_start_mse[call] == pytest.approx(((terms.pred_original_sample - x_0) ** 2).mean().item())
    np.testing.assert_allclose(bound.total, total, rtol=1e-12)
    assert bound.unit == "bits/dim"


@pytest.mark.parametrize("calls", [None, 10])
def test_the_processes_share_the_images_and_not_the_figures(calls):
    """Else two ranks report other figures than one, or the batch size decides them."""
    scheduler, network, x_0, _ = setting(T=30, n=10)
    whole = batches(x_0, 3)
    alone = measure_bound(network, scheduler, whole, calls=calls)
    lists = []
    for rank in (0, 1):
        measure_bound(
            network, scheduler, whole[rank::2], calls=calls, gather=lambda parts: lists.append(parts) or [parts]
        )
    together = measure_bound(network, scheduler, [], calls=calls, gather=lambda parts: lists)
    for name, value in vars(alone).items():
        np.testing.assert_array_equal(getattr(together, name), value)
    at_once = measure_bound(network, scheduler, batches(x_0), calls=calls)
    np.testing.assert_allclose(at_once.total, alone.total, rtol=1e-12)
    assert together.table() == alone.table()
    other = measure_bound(network, scheduler, whole, calls=calls, seed=1)
    assert (other.total != alone.total).all()


def test_the_networks_precision_is_kept_to_the_network():
    """Else a network in float32 is called with float64, or the terms are rounded."""
    scheduler, exact, x_0, _ = setting(T=20, n=5)

    class Single:
        dtype = torch.float32

        def __call__(self, x_t, t):
            assert x_t.dtype == torch.float32
            return SimpleNamespace(sample=exact(x_t.double(), t).sample.float())

    totals = [measure_bound(network, scheduler, batches(x_0)).total for network in (exact, Single())]
    np.testing.assert_allclose(*totals, rtol=1e-4)


def test_what_cannot_be_measured_is_refused():
    """One line that names the value: else a likelihood is nan, or of other images."""
    scheduler, network, x_0, _ = setting(T=20, n=5)
    for calls in (0, 3):
        with pytest.raises(ValueError, match=f"{calls} network calls"):
            measure_bound(network, scheduler, batches(x_0), calls=calls)
    with pytest.raises(ValueError, match="timesteps must be different"):
        measure_bound(network, scheduler, batches(x_0), timesteps=[0, 0])
    with pytest.raises(DataError, match="no images"):
        measure_bound(network, scheduler, [])
    x_0[3, 0, 1, 1] = torch.nan
    with pytest.raises(DataError, match=r"image 13 is not finite at t=0"):
        measure_bound(network, scheduler, [BoundBatch(10, x_0)])


def test_some_images_of_a_sorted_dataset_are_of_all_classes():
    """Else the likelihood of 500 images is that of one class, and its interval says otherwise."""
    pixels = np.repeat(np.arange(0, 250, 10, dtype=np.uint8), 4 * 16).reshape(100, 1, 4, 4)  # 25 classes of 4
    labels, seen = np.repeat(np.arange(25), 4), []
    images = ImageSet("sorted", "", (1, 4, 4), 100, lambda indices: pixels[list(indices)], labels)

    def conditions_of(indices):
        seen.extend(indices)
        return {"class_labels": torch.from_numpy(labels[list(indices)])}

    pipeline = SimpleNamespace(
        unet=random_network(1), scheduler=DDPMScheduler(num_train_timesteps=10), device=torch.device("cpu")
    )
    bound = ModelBound(pipeline, images, 50, conditions_of, batch_size=8).measure(Ranks())
    assert len(bound.total) == 50
    assert sorted(set(labels[seen])) == list(range(25))
