"""Progressive coding: the rate at each step and at the end, the distortion, the table and the picture."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from ddpm_hf import DDPMScheduler
from ddpm_hf.evaluation.bound import measure_bound
from ddpm_hf.evaluation.coding import progressive_coding
from tests.support.gaussian_data import ExactNetwork, GaussianData


def measured(calls=None, latent=False, T=50, n=300):
    from tests.evaluation.test_bound import batches

    scheduler = DDPMScheduler(num_train_timesteps=T, beta_end=0.3, variance_type="learned")
    data = GaussianData(scheduler, 0.1)
    network = ExactNetwork(scheduler, data)
    return measure_bound(network, scheduler, batches(data.draw(n, 1, 2, 2)), calls=calls, latent=latent), data


def test_the_end_is_the_likelihood_and_each_point_is_what_was_received():
    """Else the rate is not that of the bound, or it belongs to another x_t than the distortion."""
    bound, data = measured(latent=True, n=1000)
    coding = progressive_coding(bound)
    assert coding.rate[-1] == pytest.approx(bound.bits_per_dim, rel=1e-12)
    assert coding.distortion[-1] == 0
    assert coding.timesteps.tolist() == [*range(49, -1, -1), -1]
    assert coding.steps.tolist() == list(range(51))
    assert coding.rate[0] == pytest.approx(bound.prior.mean())
    for point, t in enumerate(coding.timesteps[:-1]):
        received = bound.prior.mean() + sum(bound.terms[i] for i in range(50) if i > t)
        assert coding.rate[point] == pytest.approx(received)
        assert coding.distortion[point] == pytest.approx(data.reverse_variance(t, -1) ** 0.5, rel=0.05)
    assert (np.diff(coding.rate[:-1]) > 0).all()


@pytest.mark.parametrize("calls", [None, 12])
def test_a_table_as_the_papers(calls):
    """On 0..255, the most complete image first, the end being the bound also where it is estimated."""
    bound, _ = measured(calls)
    coding = progressive_coding(bound)
    assert coding.rate[-1] == pytest.approx(bound.bits_per_dim, rel=1e-12)
    assert len(coding.rate) == 1 + (bound.visits > 0).sum()
    np.testing.assert_allclose(coding.distortion[-2], 127.5 * np.sqrt(bound.x_start_mse[0]))
    rows = coding.rows(6)
    assert [row["steps"] for row in rows][:2] == [50, 49]
    assert rows[0]["t"] == -1
    assert len(rows) == 7
    assert [row["steps"] for row in rows] == sorted((row["steps"] for row in rows), reverse=True)
    lines = coding.table(6).splitlines()
    assert len(lines) == 9
    assert lines[0] == "| reverse steps | rate (bits/dim) | distortion (RMSE, 0..255) |"
    assert lines[2] == f"| the image itself | {bound.bits_per_dim:.5f} | 0.00000 |"
    points = json.loads(json.dumps(coding.as_dict()))["points"]
    assert points[-1] == {"t": -1, "steps": 50, "rate": pytest.approx(bound.bits_per_dim), "distortion": 0.0}


def test_a_picture_as_the_papers():
    """Else there is no plot, or one of something else."""
    coding = progressive_coding(measured(latent=True)[0])
    figure = coding.figure()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert np.asarray(Image.open(buffer).convert("L")).std() > 5
    curves = [axes.lines[0].get_xydata().T for axes in figure.axes]
    np.testing.assert_allclose(curves[2], [coding.rate, coding.distortion])
    assert figure.axes[2].get_xlabel() == "rate (bits/latent dim)"
    assert figure.axes[0].get_ylabel() == "distortion (RMSE, latent units)"
