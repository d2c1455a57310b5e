"""Restoration: exact observations are met, posteriors of a Gaussian are right, and what does not fit is refused."""

import itertools
import math
import re
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMRestorationPipeline, DDPMScheduler
from ddpm_hf.portable import pipeline_restoration_ddpm_hf
from ddpm_hf.portable.linear_ddpm_hf import FunctionOperator
from ddpm_hf.portable.operators_ddpm_hf import OPERATORS
from ddpm_hf.portable.restoration_ddpm_hf import (
    METHODS,
    OVERRELAXED,
    Options,
    Problem,
    estimate_sigma,
    plan_chain,
    renoised_given_y,
    tiled,
)
from tests.support.fixtures_pipeline import (
    GaussianNetwork,
    calls_of,
    finished,
    randn,
    tiny_pipeline,
    tiny_unet,
    tiny_vae,
)

T = 50


def restorer(channels=1, **config):
    """A restoration pipeline of an untrained network."""
    pipeline = tiny_pipeline(channels, num_train_timesteps=T, beta_schedule="cosine", **config)
    return finished(DDPMRestorationPipeline.from_pipe(pipeline))


def make(name, shape):
    options = {"mask": randn(*shape[1:]) > 0} if name == "mask" else {}
    return OPERATORS[name](shape, **options)


def restore(pipeline, operator, y, sigma_y=0.0, method="ddnm", steps=4, solutions=1, **more):
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **more}
    return pipeline(y, operator, sigma_y, method, steps, solutions, **options)


# Exact observations

KINDS = [
    {"prediction_type": "epsilon", "variance_type": "fixed_small"},
    {"prediction_type": "sample", "variance_type": "learned_range"},
    {"prediction_type": "v_prediction", "variance_type": "fixed_large"},
    {"prediction_type": "posterior_mean", "variance_type": "learned"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("eta", [0.0, 0.85, 1.0])
@pytest.mark.parametrize("name", OPERATORS)
def test_ddnm_meets_an_exact_observation(name, eta):
    """Else the known pixels of a restored image are not those that were given."""
    pipeline = restorer(3)
    operator = make(name, (3, 8, 8))
    y = operator.forward(randn(2, 3, 8, 8).clamp(-1, 1))
    output = restore(pipeline, operator, y, solutions=2, eta=eta)
    assert output.images.shape == (4, 3, 8, 8)
    assert float(output.residuals.max()) < 1e-5
    error = (operator.forward(output.images) - y.repeat_interleave(2, 0)).square().flatten(1).mean(1).sqrt()
    assert float(error.max()) < 1e-5


@pytest.mark.every(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", KINDS, ids=lambda one: "-".join(map(str, one.values())))
def test_every_method_meets_an_exact_observation_with_every_kind_of_model(method, config):
    """Else a kind of model, or a method, ends elsewhere than where y says."""
    pipeline, operator = restorer(1, **config), OPERATORS["average-pooling"]((1, 8, 8))
    y = operator.forward(randn(1, 1, 8, 8).clamp(-1, 1))
    assert float(restore(pipeline, operator, y, method=method, steps=3).residuals.max()) < 1e-5
    noisy = restore(pipeline, operator, y, 0.2, method, steps=3)
    assert bool(torch.isfinite(noisy.images).all())


# Posteriors of a Gaussian, whose pixels are independent


def gaussian(mean, variance, steps=200):
    scheduler = DDPMScheduler(steps, beta_schedule="cosine", clip_sample=False)
    network = GaussianNetwork(dict(scheduler.config), mean, variance)
    return finished(DDPMRestorationPipeline.from_pipe(finished(DDPMPipeline(network, scheduler))))


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["pigdm", "mmps", "gibbs"])
@pytest.mark.parametrize("name", ["half", "gaussian-blur"])
def test_the_posterior_of_a_gaussian_is_exact(method, name):
    """Else solutions are too sure or too unsure of themselves; x ~ N(m, v I) and y = A x + n has a closed form."""
    mean, variance, sigma = 0.2, 0.25, 0.3
    operator = OPERATORS[name]((1, 8, 8))
    y = operator.observe(mean + math.sqrt(variance) * randn(1, 1, 8, 8), sigma, torch.Generator().manual_seed(1))
    solutions = restore(gaussian(mean, variance), operator, y, sigma, method, steps=60, solutions=256).images
    prior = torch.full((1, 1, 8, 8), mean)
    exact = prior + operator.regularized_inverse(operator.observed(y - operator.forward(prior)), sigma**2 / variance)
    probes = torch.eye(64).reshape(64, 1, 8, 8)
    covariance = operator.reweight(probes, lambda s: variance * sigma**2 / (variance * s * s + sigma**2))
    expected = covariance.reshape(64, 64).diag().reshape(8, 8)
    error = (solutions.mean(0) - exact[0]).square().mean().sqrt() / math.sqrt(variance)
    assert float(error) < 0.09  # 256 solutions alone leave 0.06
    assert abs(float(solutions.var(0).mean() / expected.mean()) - 1) < 0.1


def test_noisy_ddnm_takes_no_more_noise_than_y_has():
    """Else the noise of y is in the image, or y is ignored."""
    sigma = 0.3
    operator = OPERATORS["identity"]((1, 8, 8))
    x = 0.5 * randn(1, 1, 8, 8)
    y = operator.observe(x, sigma, torch.Generator().manual_seed(1))
    solutions = restore(gaussian(0.0, 0.25), operator, y, sigma, steps=50, solutions=128).images
    shrunk = y * 0.25 / (0.25 + sigma**2)
    assert float((solutions.mean(0) - shrunk).square().mean().sqrt()) < 0.1


# The chain


def test_time_travel_and_start_take_the_steps_that_they_say():
    """Else the cost is another one than documented, or the chain skips a step."""
    pipeline, operator = restorer(), OPERATORS["half"]((1, 8, 8))
    y = operator.forward(randn(1, 1, 8, 8))
    with calls_of(pipeline.unet, lambda inputs, more: int(inputs[1])) as seen:
        restore(pipeline, operator, y, steps=5, method="pigdm")
        restore(pipeline, operator, y, steps=5, start=0.5)
        restore(pipeline, operator, y, steps=4, time_travel=(2, 3))
        restore(pipeline, operator, y, steps=12)
    angles = torch.arccos(pipeline.scheduler.exact_tables.alphas_cumprod.sqrt())
    assert (seen[0], seen[4], seen[5], seen[9]) == (49, 0, 24, 0)
    for few in (seen[:5], seen[5:10]):  # even in arccos √ᾱ, but for whole timesteps
        assert float(angles[few].diff().std()) < 0.6 * float(angles.diff().mean())
    assert seen[10:12] * 3 + seen[16:18] == seen[10:18]
    assert len(seen) == 18 + 12
    few, seen = seen[18:], seen[:18]
    assert few[0] == T - 1
    assert float(torch.tan(angles[few[1]])) <= 2.1  # ρ: no steps are lost where x̂_0 hardly varies
    assert float(angles[few[1:]].diff().std()) < 0.6 * float(angles.diff().mean())
    plan = plan_chain(list(range(9, -1, -1)), 3, 2)
    assert all(up == following[0] for (_, _, up), following in itertools.pairwise(plan))


def test_rounds_end_where_y_has_the_noise_that_the_chain_has():
    """Else y counts for too little to the end, or the rounds cost other steps than they say."""
    pipeline, operator, sigma = restorer(), OPERATORS["average-pooling"]((1, 8, 8)), 0.3
    y = operator.forward(randn(1, 1, 8, 8))
    with calls_of(pipeline.unet, lambda inputs, more: int(inputs[1])) as seen:
        restore(pipeline, operator, y, sigma, "gibbs", steps=40)
    assert len(seen) == 40 == len(pipeline.scheduler.timesteps)
    starts = [seen[0], *(after for before, after in itertools.pairwise(seen) if after > before)]
    assert len(starts) == 8  # of 5 steps each
    assert starts[0] == T - 1
    alphas = pipeline.scheduler.exact_tables.alphas_cumprod
    rho = ((1 - alphas) / alphas).sqrt()
    assert float(rho[starts[-1]]) <= sigma / 0.5 < float(rho[starts[-1] + 1])
    last = torch.arctan(rho[seen[-5:]])
    assert float((last / last[0] - torch.arange(1, 0, -0.2)).abs().max()) < 0.06  # even, with the step to x_0


def test_the_way_up_samples_what_the_joint_distribution_of_x_and_y_says():
    """Else the rounds sample another posterior: x_u = x_0 + ρ ε, and y = A x_u + the rest of its noise."""
    sigma, rho = 0.5, 0.4
    operator = OPERATORS["gaussian-blur"]((1, 4, 4), sigma=0.7)
    problem = Problem(operator, 0.3 * randn(1, 1, 4, 4), sigma, DDPMScheduler(T), Options(1.0), lambda x: x)
    matrix = operator.forward(torch.eye(16).reshape(16, 1, 4, 4)).flatten(1).mT
    x_start = randn(1, 1, 4, 4)
    rest = sigma**2 * torch.eye(16) - rho**2 * matrix @ matrix.mT
    precision = torch.eye(16) / rho**2 + matrix.mT @ torch.linalg.solve(rest, matrix)
    mean = torch.linalg.solve(
        precision, x_start.flatten() / rho**2 + matrix.mT @ torch.linalg.solve(rest, problem.y.flatten())
    )
    alpha_bar, nothing = 1 / (1 + rho**2), torch.zeros(1, 1, 4, 4)

    def up(noise, before):
        way = (math.sqrt(alpha_bar) * before.reshape(-1, 1, 4, 4), alpha_bar)
        further = alpha_bar * (1 + 1e-7)  # the same level, but for what makes it a way down
        return renoised_given_y(problem, x_start, further, noise, way).flatten(1) / math.sqrt(alpha_bar)

    still = up(nothing, mean)
    torch.testing.assert_close(still[0], mean, atol=1e-4, rtol=1e-4)
    spread, shift = up(torch.eye(16).reshape(16, 1, 4, 4), mean) - still, randn(16)
    kept = 1 - OVERRELAXED**2
    torch.testing.assert_close(spread.mT @ spread, kept * torch.linalg.inv(precision), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(up(nothing, mean + shift)[0] - mean, -OVERRELAXED * shift, atol=1e-4, rtol=1e-3)


def test_a_start_is_the_noised_pseudo_inverse():
    """Else starting within the chain forgets y, and needs all steps again."""
    pipeline, operator = restorer(), OPERATORS["average-pooling"]((1, 8, 8))
    y = operator.forward(randn(1, 1, 8, 8))
    with calls_of(pipeline.unet, lambda inputs, more: inputs[0].clone()) as seen:
        restore(pipeline, operator, y, steps=2, start=0.5)
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[0], pipeline.scheduler.add_noise(operator.pseudo_inverse(y), noise, 24))


@pytest.mark.every(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["half", "average-pooling", "compressed-sensing", "motion-blur", "functions"])
def test_solutions_depend_on_their_generator_alone(method, name):
    """Else a batch size changes the pictures: what a method estimates, it estimates of each sample."""
    if (method, name) == ("gibbs", "functions"):
        pytest.skip("gibbs requires an SVD, which functions have not")
    sigma, shape = (0.0 if method == "repaint" or (method == "ddnm" and name == "functions") else 0.1), (1, 8, 8)
    rows = lambda x: x[:, 0, ::2].flatten(1)  # noqa: E731  # [N, 32]: not of an image's shape
    operator = FunctionOperator(shape, rows) if name == "functions" else OPERATORS[name](shape)
    pipeline = restorer()
    y = operator.forward(randn(2, *shape))
    options = {"method": method, "sigma_y": sigma, "steps": 3, "time_travel": (1, 1)}
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    together = restore(pipeline, operator, y, solutions=2, generator=seeds, **options).images
    alone = restore(pipeline, operator, y[1:], generator=[torch.Generator().manual_seed(3)], **options).images
    torch.testing.assert_close(together[3:], alone, atol=1e-4, rtol=0)


def test_tiles_of_a_pixelwise_model_are_the_model_itself():
    """Else seams show, or a pixel of a larger image is denoised at another place."""
    x = randn(2, 3, 20, 13)
    tiles = tiled(lambda x, t: x * x + t, (8, 8))
    torch.testing.assert_close(tiles(x, 3.0), x * x + 3.0)


def test_larger_images_are_restored_in_tiles():
    """Else only images of the model's size can be restored."""
    pipeline = restorer(3)
    operator = OPERATORS["bicubic"]((3, 20, 12), factor=2)
    y = operator.forward(randn(1, 3, 20, 12).clamp(-1, 1))
    output = restore(pipeline, operator, y, method="pigdm")
    assert output.images.shape == (1, 3, 20, 12)
    assert float(output.residuals.max()) < 1e-5


def test_the_noise_of_an_observation_is_estimated():
    """Else a user who does not know sigma_y has to guess, or gets a silent zero."""
    flat = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    assert abs(estimate_sigma(flat + 0.1 * randn(1, 1, 64, 64)) / 0.1 - 1) < 0.1
    shown = (torch.arange(64) < 32).expand(1, 1, 64, 64)
    hidden = torch.where(shown, flat + 0.1 * randn(1, 1, 64, 64), 0.0)
    assert abs(estimate_sigma(hidden, shown) / 0.1 - 1) < 0.1
    pipeline, operator = restorer(), OPERATORS["identity"]((1, 8, 8))
    assert restore(pipeline, operator, 0.1 * randn(1, 1, 8, 8), None).sigma_y == pytest.approx(0.1, rel=0.5)


# Models


def test_a_model_of_stock_restores(tmp_path):
    """Else only our own folders can be used."""
    stock = finished(diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(num_train_timesteps=T)))
    stock.save_pretrained(tmp_path)
    operator = OPERATORS["half"]((1, 8, 8))
    y = operator.forward(randn(1, 1, 8, 8))
    first = restore(finished(DDPMRestorationPipeline.from_pipe(stock)), operator, y).images
    loaded = finished(DDPMRestorationPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(restore(loaded, operator, y).images, first)
    with pytest.raises(ValueError, match="save the pipeline that it was made from"):
        loaded.save_pretrained(tmp_path / "again")


def test_another_sampler_in_the_pipeline_changes_nothing():
    """Else a pipeline that was used with DDIM restores by another diffusion, or has lost its learned variance."""
    pipeline = tiny_pipeline(1, num_train_timesteps=T, variance_type="learned_range")
    operator = OPERATORS["half"]((1, 8, 8))
    y = operator.forward(randn(1, 1, 8, 8))
    first = restore(finished(DDPMRestorationPipeline.from_pipe(pipeline)), operator, y).images
    finished(pipeline, "DDIMScheduler")
    torch.testing.assert_close(
        restore(finished(DDPMRestorationPipeline.from_pipe(pipeline)), operator, y).images, first
    )
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler


def test_classes_are_those_of_the_model():
    """Else a model by class restores every image as one class."""
    names = {0: "cat", 1: "dog"}
    by_class = ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler(T), names, None, [1])
    pipeline, operator = finished(DDPMRestorationPipeline.from_pipe(by_class)), OPERATORS["half"]((1, 8, 8))
    y = operator.forward(randn(2, 1, 8, 8))
    with calls_of(pipeline.unet, lambda inputs, more: more["class_labels"].tolist()) as seen:
        for labels in (None, "dog", [1, 0]):
            restore(pipeline, operator, y, steps=1, solutions=2, class_labels=labels)
    assert seen == [[2] * 4, [1] * 4, [1, 1, 0, 0]]
    with mock.patch.object(pipeline_restoration_ddpm_hf.logger, "warning") as warned:
        restore(pipeline, operator, y, steps=1, class_labels="dog")
        assert not warned.called
        restore(pipeline, operator, y, steps=1, class_labels="cat")
    assert "['cat']" in warned.call_args[0][0]


def test_classes_are_given_as_elsewhere():
    """Else ids that numpy or torch made end in a traceback."""
    names = {0: "cat", 1: "dog"}
    by_class = ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler(T), names)
    pipeline = DDPMRestorationPipeline.from_pipe(by_class)
    for labels, expected in (
        (np.int64(1), [1, 1]), (torch.tensor(1), [1, 1]), (torch.tensor([0, 1]), [0, 1]), ([None, "dog"], [2, 1]),
        (np.array([1, 0]), [1, 0]), (None, [2, 2]),
    ):  # fmt: skip
        assert pipeline.class_ids(labels, 2).tolist() == expected
    for wrong in (1.9, torch.tensor([0.7, 1.2]), True):
        with pytest.raises(ValueError, match="must be an id"):
            pipeline.class_ids(wrong, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_the_networks_alone(method, dtype):
    """Else A x differs from an exact y by the rounding of the operator's products, or bfloat16 ends in a traceback."""
    pipeline = restorer().to(dtype=dtype)
    for name in ("gaussian-blur", "motion-blur", "compressed-sensing"):
        operator = OPERATORS[name]((1, 8, 8))
        y = operator.forward(randn(1, 1, 8, 8).clamp(-1, 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            output = restore(pipeline, operator, y, method=method)
        assert output.images.dtype == torch.float32
        assert float(output.residuals.max()) < 1e-5


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.noise_needs_svd])
def test_what_no_image_explains_disturbs_nothing(method):
    """Else pixels that an operator of two functions hides, given all the same, make every image NaN."""
    shown = (torch.arange(64).reshape(1, 1, 8, 8) % 3 > 0).float()
    x = randn(1, 1, 8, 8).clamp(-1, 1)
    hide = lambda x: x * shown  # noqa: E731
    whole, hidden = (restore(restorer(), (hide, hide), y, method=method).images for y in (x, x * shown))
    torch.testing.assert_close(whole, hidden, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole * shown, x * shown, atol=1e-5, rtol=0)


def test_a_model_of_latents_restores_by_dps_alone():
    """Else a method that requires a linear observation runs on latents and means nothing."""
    pipeline = tiny_pipeline(4, tiny_vae(), num_train_timesteps=T)
    pipeline, operator = finished(DDPMRestorationPipeline.from_pipe(pipeline)), OPERATORS["box"]((3, 16, 16))
    y = operator.forward(randn(1, 3, 16, 16).clamp(-1, 1))
    output = restore(pipeline, operator, y, 0.1, "dps", steps=2, output_type="pt")
    assert output.images.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="latents, use dps"):
        restore(pipeline, operator, y)


def test_pil_images_are_observations():
    """Else a picture has to be turned into a tensor by hand."""
    pipeline, operator = restorer(3), OPERATORS["gray"]((3, 8, 8))
    picture = Image.linear_gradient("L").resize((8, 8))
    output = restore(pipeline, operator, picture, output_type="pil")
    assert output.images[0].mode == "RGB"
    difference = torch.tensor(list(output.images[0].convert("L").getdata())) - torch.tensor(list(picture.getdata()))
    assert int(difference.abs().max()) <= 2 or float(output.residuals.max()) < 1e-5


def test_pictures_of_16_bits_are_not_clipped():
    """Else all that is brighter than 255 of 65,535 is white."""
    deep = Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16))
    expected = torch.arange(64.0).reshape(1, 1, 8, 8) * 1000 / 65535 * 2 - 1
    pipeline = restorer()
    for read in (pipeline.read_observation(deep, OPERATORS["identity"]((1, 8, 8))), pipeline.encode(deep)):
        torch.testing.assert_close(read, expected, atol=1 / 255, rtol=0)
    torch.testing.assert_close(pipeline.encode([deep, deep]), expected.expand(2, -1, -1, -1), atol=1 / 255, rtol=0)
    shallow = Image.linear_gradient("L").resize((8, 8))
    for mode in ("I", "F"):  # PIL's own conversion keeps values of 0 to 255
        torch.testing.assert_close(pipeline.encode(shallow.convert(mode)), pipeline.encode(shallow))


HALF = OPERATORS["half"]((1, 8, 8))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sigma_y": -0.1}, "sigma_y=-0.1"),
        ({"sigma_y": math.nan}, "sigma_y=nan"),
        ({"method": "ddrm"}, "'ddrm'"),
        ({"observation": torch.zeros(1, 1, 8, 9)}, "(1, 1, 8, 9)"),
        ({"observation": torch.full((1, 1, 8, 8), math.nan)}, "NaN"),
        ({"observation": "photo.png"}, "PIL images"),
        ({"operator": OPERATORS["half"]((3, 8, 8))}, "3 channels"),
        ({"operator": OPERATORS["half"]((1, 4, 8))}, "4x8"),
        ({"operator": (lambda x: x[..., 1:], lambda y: torch.nn.functional.pad(y, (1, 0))),
          "observation": torch.zeros(1, 1, 8, 7), "sigma_y": 0.1}, "pigdm"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": T, "start": 0.5}, "num_inference_steps=50"),
        ({"num_solutions": 0}, "num_solutions=0"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"weight": 0.0, "method": "dps"}, "weight=0.0"),
        ({"iterations": 0, "method": "mmps"}, "iterations=0"),
        ({"weight": 2.0}, "weight=2.0 is for the methods diffpir and dps"),
        ({"iterations": 2}, "iterations=2 is for the methods mmps and gibbs"),
        ({"eta": 0.5, "method": "gibbs"}, "eta=0.5 is for the methods"),
        ({"start": 0.0}, "start=0.0"),
        ({"time_travel": (0, 2)}, "time_travel=0"),
        ({"time_travel": (2, 2), "method": "gibbs"}, "time_travel=(2, 2)"),
        ({"class_labels": [1]}, "no classes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(options, named):
    """Else a call fails within the chain, or restores something else."""
    with pytest.raises(ValueError, match=re.escape(named)):
        restorer()(**{"observation": torch.zeros(1, 1, 8, 8), "operator": HALF, "num_inference_steps": 2, **options})


def test_rounds_begin_where_x_t_says_something():
    """Else a model of zero terminal SNR divides by zero on the way up from x_0 to x_T."""
    pipeline = restorer(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    images = restore(pipeline, HALF, torch.zeros(1, 1, 8, 8), 0.1, "gibbs", steps=20).images
    assert torch.isfinite(images).all()


def test_models_that_read_an_image_are_refused():
    """Else a cascade restores with its first stage alone."""
    for attribute in ("conditioning", "conditionings"):
        pipeline = tiny_pipeline(1)
        setattr(pipeline, attribute, {})
        with pytest.raises(ValueError, match="reads an image too"):
            DDPMRestorationPipeline.from_pipe(pipeline)
