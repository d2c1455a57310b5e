"""Weightings of the simple objective: the published weights, and one meaning for every prediction type."""

import pytest
import torch

from ddpm_hf.common.errors import UsageError
from ddpm_hf.models.diffusion import make_scheduler
from ddpm_hf.objectives import LOSS_WEIGHTINGS, loss_weights, training_losses
from ddpm_hf.objectives import names as choices
from ddpm_hf.objectives.flags import ObjectiveFlags, ScheduleFlags
from ddpm_hf.objectives.gaussians import mean_flat
from ddpm_hf.objectives.losses import check_objective
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler

T = torch.tensor([0, 1, 30, 250, 500, 800, 999])
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")


def snr_of(scheduler):
    """ᾱ/(1 - ᾱ) at `T`, in float64."""
    alpha_bar = scheduler.exact_tables.alphas_cumprod[T]
    return alpha_bar / (1 - alpha_bar)


def on_x0(name, snr, gamma):
    """The weight of a squared error of x̂_0, as each paper's ε-weight times SNR."""
    return {
        "min_snr": lambda: snr * torch.minimum(torch.ones_like(snr), gamma / snr),
        "soft_min_snr": lambda: snr * (1 / snr) / (1 / snr + 1 / gamma),  # σ²/(σ² + λ), σ² = 1/SNR, λ = 1/γ
        "p2": lambda: snr * (1 + snr) ** -gamma,
        "debiased": lambda: snr / snr.sqrt(),
    }[name]()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", LOSS_WEIGHTINGS)
def test_an_error_on_x0_weighs_alike_for_every_prediction(name, prediction_type):
    """Else a weighting means another one for v-prediction, as in most programs."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    x_0, noise, delta = torch.randn(3, len(T), 2, 3, 3, generator=generator, dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, noise, T)
    # the output at which x̂_0 is x_0 + δ; it is affine in the output
    at_zero = scheduler.predict_original_sample(torch.zeros_like(x_0), T, x_t)
    slope = scheduler.predict_original_sample(torch.ones_like(x_0), T, x_t) - at_zero
    output = (x_0 + delta - at_zero) / slope
    gamma = 2.5 if LOSS_WEIGHTINGS[name].gamma is not None else None
    losses = training_losses(scheduler, output, x_0, noise, T, loss_weighting=name, snr_gamma=gamma)
    expected = on_x0(name, snr_of(scheduler), gamma) * mean_flat(delta**2)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_the_usual_gammas_and_min_snr_by_gamma_alone():
    """Else a flag without γ trains with another weighting than its paper, or --snr_gamma 5 is no longer min-SNR."""
    scheduler = DDPMScheduler()
    x_0, noise, output = torch.randn(3, len(T), 1, 2, 2, generator=torch.Generator().manual_seed(1))

    def losses(**options):
        return training_losses(scheduler, output, x_0, noise, T, **options)

    for name, usual in (("min_snr", 5), ("soft_min_snr", 5), ("p2", 1)):
        assert torch.equal(losses(loss_weighting=name), losses(loss_weighting=name, snr_gamma=usual))
    assert torch.equal(losses(loss_weighting="min_snr"), losses(snr_gamma=5))
    ratio = losses(loss_weighting="debiased") / losses()
    torch.testing.assert_close(ratio.double(), snr_of(scheduler) ** -0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", LOSS_WEIGHTINGS)
def test_no_weight_is_nan_where_nothing_of_the_image_is_left(name, prediction_type):
    """Else a batch at SNR 0 spoils the run; for epsilon the limit, which for all but debiased is 1."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    weights = loss_weights(scheduler, T, name, 1.5)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    if prediction_type == "epsilon" and name != "debiased":
        assert weights[-1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weighting": "max_snr"}, "soft_min_snr.*'max_snr'"),
        ({"loss_weighting": "debiased", "snr_gamma": 5.0}, r"debiased.*no γ.*5\.0"),
        ({"loss_weighting": "p2", "snr_gamma": 0.0}, r"snr_gamma=0\.0.*positive; 1 is"),
        ({"loss_weighting": "p2", "objective": "vlb"}, "loss_weighting.*simple"),
    ],
)
def test_what_cannot_be_weighted_is_refused_with_the_way_out(options, message):
    """Else a run trains with another loss than its flags say; the scripts answer in one line."""
    with pytest.raises(ValueError, match=message):
        check_objective(DDPMScheduler(), **{"objective": "simple", **options})
    with pytest.raises(UsageError, match=message):
        make_scheduler(ScheduleFlags(), ObjectiveFlags(**options))


def test_the_flags_choices_are_the_rows():
    """Else --help offers a weighting that does not exist."""
    assert tuple(LOSS_WEIGHTINGS) == choices.LOSS_WEIGHTINGS
