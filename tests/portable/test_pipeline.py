"""The unconditional pipeline: stock's images where stock can make them, and what only ours can."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler
from tests.support.fixtures_pipeline import (
    GaussianNetwork,
    calls_of,
    finished,
    generators,
    tiny_pipeline,
    tiny_unet,
    tiny_vae,
)

# samplers of Diffusers that a user swaps in, one of each family
SAMPLERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
)


def inputs_of(model):
    """The (x_t, t) that a model is called with."""
    return calls_of(model, lambda inputs, _: (inputs[0].clone(), int(inputs[1])))


def gaussian_pipeline(mean, variance, size=64, **config):
    """A pipeline whose network is exact for data drawn from N(mean, variance)."""
    scheduler = DDPMScheduler(clip_sample=False, **config)
    network = GaussianNetwork(dict(scheduler.config), mean=mean, variance=variance, sample_size=size)
    return finished(DDPMPipeline(network, scheduler))


def draw(pipeline, *seeds, **options):
    """x_0 for one generator a seed."""
    options = {"num_inference_steps": 10, "output_type": "latent", **options}
    return pipeline(len(seeds), generators(*seeds), **options).images


# Against stock


@pytest.mark.every(5)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_images_are_those_of_stock(prediction_type, beta_schedule, variance_type):
    """Else a folder that names stock's class would show other images there than here."""
    config = {"prediction_type": prediction_type, "beta_schedule": beta_schedule, "variance_type": variance_type}
    ours = tiny_pipeline(3, **config)
    stock = finished(diffusers.DDPMPipeline(ours.unet, diffusers.DDPMScheduler(**config)))
    options = {"batch_size": 2, "num_inference_steps": 20, "output_type": "np"}
    expected = stock(generator=torch.Generator().manual_seed(0), **options).images
    drawn = ours(generator=torch.Generator().manual_seed(0), **options).images
    assert np.ptp(expected) > 0.5  # the images show something
    np.testing.assert_allclose(drawn, expected, atol=1e-3)


def test_stock_pipelines_positional_arguments_keep_their_places():
    """Else a call written for stock hands its generator or its number of steps to something else."""
    pipeline = tiny_pipeline()
    stock = finished(diffusers.DDPMPipeline(pipeline.unet, diffusers.DDPMScheduler()))
    expected = stock(2, torch.Generator().manual_seed(3), 5, "np", False)[0]
    drawn = pipeline(2, torch.Generator().manual_seed(3), 5, "np", False)[0]
    np.testing.assert_allclose(drawn, expected, atol=1e-3)


def test_stock_ddpm_scheduler_is_converted_and_other_samplers_are_not():
    """Else a loaded folder keeps stock's scheduler, without our math, or a swapped sampler is lost."""
    pipeline = finished(DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")))
    assert type(pipeline.scheduler) is DDPMScheduler
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    pipeline.scheduler = diffusers.DDPMScheduler(num_train_timesteps=7)
    assert type(pipeline.scheduler) is DDPMScheduler
    assert len(pipeline.scheduler) == 7
    ddim = diffusers.DDIMScheduler()
    pipeline.scheduler = ddim
    assert pipeline.scheduler is ddim


# Seeds, latents, outputs


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_an_image_depends_on_its_own_generator_alone(variance_type):
    """Else image i of a seed changes with the batch it is drawn in, and cannot be drawn again."""
    pipeline = tiny_pipeline(variance_type=variance_type)
    together = draw(pipeline, 5, 6, 7)
    torch.testing.assert_close(together[1:2], draw(pipeline, 6), rtol=0, atol=1e-4)
    torch.testing.assert_close(together[[2, 0]], draw(pipeline, 7, 5), rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("sampler", ["DDPMScheduler", "EulerDiscreteScheduler"])
def test_given_latents_are_the_drawn_ones(sampler):
    """Else x_T handed in is scaled or ordered otherwise than the one the pipeline draws."""
    pipeline = tiny_pipeline()
    if sampler != "DDPMScheduler":
        pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    own = generators(0, 1)
    latents = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in own])
    options = {"num_inference_steps": 10, "output_type": "latent"}
    given = pipeline(2, own, latents=latents, **options).images
    assert torch.equal(given, pipeline(2, generators(0, 1), **options).images)


@pytest.mark.parametrize("sampler", [DDPMScheduler, diffusers.DDIMScheduler])
def test_a_network_need_not_say_how_many_channels_it_predicts(sampler, tmp_path):
    """Else a user's own network, whose config has what stock's pipeline reads, cannot sample or be saved."""
    pipeline = DDPMPipeline(GaussianNetwork(dict(DDPMScheduler().config)), sampler())
    pipeline.set_progress_bar_config(disable=True)
    expected = draw(pipeline, 0, 1)
    pipeline.unet._internal_dict = FrozenDict(
        {name: value for name, value in pipeline.unet.config.items() if name != "out_channels"}
    )
    pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    assert torch.equal(draw(pipeline, 0, 1), expected)
    assert pipeline.stock_class_name() == "DDPMPipeline"


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_show_the_same_images(channels, mode):
    """Else one of the output types is scaled, transposed or coloured wrongly."""
    pipeline = tiny_pipeline(channels, size=(8, 16))
    kinds = ("latent", "pt", "np", "numpy", "pil")
    latent, pt, array, same, pil = (draw(pipeline, 0, 1, output_type=kind) for kind in kinds)
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert pt.shape == (2, channels, 8, 16)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(same, array)
    for image, pixels in zip(pil, array, strict=True):
        assert (image.mode, image.size) == (mode, (16, 8))
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), (pixels * 255).round())


def test_return_dict_false_gives_the_images_in_a_tuple():
    """Else code that indexes the result, as for every pipeline of Diffusers, gets something else."""
    pipeline = tiny_pipeline()
    given = pipeline(2, generators(0, 1), 3, "latent", return_dict=False)
    assert isinstance(given, tuple)
    assert torch.equal(given[0], draw(pipeline, 0, 1, num_inference_steps=3))


def test_half_precision_pipelines_sample():
    """Else a model loaded with dtype=torch.bfloat16 fails on a float32 tensor on the way."""
    pipeline = tiny_pipeline().to(torch.bfloat16)
    drawn = draw(pipeline, 0, 1)
    assert drawn.dtype == torch.bfloat16
    assert torch.isfinite(drawn).all()


def test_rectangular_models_sample_and_encode():
    """Else height and width are taken for one another somewhere."""
    pipeline = tiny_pipeline(3, size=(8, 16))
    assert draw(pipeline, 0).shape == (1, 3, 8, 16)
    picture = Image.fromarray((np.arange(8 * 16 * 3) % 256).astype(np.uint8).reshape(8, 16, 3))
    encoded = pipeline.encode(picture)
    assert encoded.shape == (1, 3, 8, 16)
    np.testing.assert_array_equal(np.asarray(pipeline.decode(encoded)[0]), np.asarray(picture))


# The chain


def test_callback_sees_every_step_and_may_replace_the_latents():
    """Else guidance or inpainting written as a callback misses a step, or has no effect."""
    pipeline, seen = tiny_pipeline(), []

    def note(pipe, index, t, tensors):
        assert pipe is pipeline
        seen.append((index, int(t), tensors["latents"].clone()))

    options = {"num_inference_steps": 4, "output_type": "latent"}
    drawn = pipeline(1, generators(0), callback_on_step_end=note, **options).images
    assert [(index, t) for index, t, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert torch.equal(seen[-1][2], drawn)
    assert torch.equal(drawn, pipeline(1, generators(0), **options).images)  # looking changes nothing

    with inputs_of(pipeline.unet) as inputs:
        ones = {"latents": torch.ones(1, 1, 8, 8)}
        replaced = pipeline(1, generators(0), callback_on_step_end=lambda *_: ones, **options).images
    assert torch.equal(replaced, ones["latents"])
    assert all(torch.equal(x, ones["latents"]) for x, _ in inputs[1:])


def test_the_model_sees_the_timesteps_of_the_chain():
    """Else `timesteps` or `num_inference_steps` chooses another chain than the network is run over."""
    pipeline = tiny_pipeline(num_train_timesteps=20)
    for options, expected in [
        ({"num_inference_steps": None}, list(range(19, -1, -1))),
        ({"num_inference_steps": 5}, [16, 12, 8, 4, 0]),
        ({"num_inference_steps": None, "timesteps": [19, 7, 3]}, [19, 7, 3]),
    ]:
        with inputs_of(pipeline.unet) as inputs:
            draw(pipeline, 0, **options)
        assert [t for _, t in inputs] == expected


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_number_of_steps_ends(spacing):
    """Else some number of steps crashes, or leaves the image noisy or not finite."""
    pipeline = tiny_pipeline(num_train_timesteps=7, beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing)
    for steps in range(1, 8):
        with inputs_of(pipeline.unet) as inputs:
            drawn = draw(pipeline, 0, num_inference_steps=steps)
        assert len(inputs) == steps
        assert drawn.abs().max() <= 1  # the last step's mean is the clipped x̂_0


def test_frames_follow_the_chain():
    """Else the strip of a chain shows other moments than it says, or does not end in the image."""
    pipeline = tiny_pipeline(3)
    output = pipeline(2, generators(0, 1), 20, "np", num_frames=5)
    frames = output.frames
    timesteps = [frame.timestep for frame in frames]
    assert len(frames) == 5
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] == 950
    assert timesteps[-1] == 0
    np.testing.assert_array_equal(frames[-1].sample, output.images)
    # the last step adds no noise, and its mean is x̂_0 (Eq. 7 where ᾱ_s = 1)
    np.testing.assert_allclose(frames[-1].prediction, output.images, atol=1e-6)
    assert not np.allclose(frames[0].sample, frames[0].prediction)
    assert pipeline(2, generators(0, 1), 2).frames is None
    in_pil = pipeline(2, generators(0, 1), 20, num_frames=5).frames
    np.testing.assert_array_equal(np.asarray(in_pil[2].sample[1]), (frames[2].sample[1] * 255).round())
    assert len(pipeline(1, generators(0), 3, num_frames=40).frames) == 3  # no more moments than there are steps


@pytest.mark.parametrize("value", [0.25, 1.5])  # latents, and models that do not clip, leave [-1, 1]
@pytest.mark.parametrize("sampler", ["DDPMScheduler", *SAMPLERS])
def test_every_frames_prediction_is_the_data_where_the_data_is_one_image(sampler, value):
    """A point mass leaves nothing to guess: x̂_0 is it at every t; else a sampler's x_t is read on the wrong scale."""
    pipeline = gaussian_pipeline(value, 0.0, size=8)
    if sampler != "DDPMScheduler":
        pipeline.scheduler = getattr(diffusers, sampler).from_config(
            pipeline.scheduler.config, timestep_spacing="leading"
        )
    frames = pipeline(2, generators(0, 1), 10, "latent", num_frames=10).frames
    assert len(frames) >= 10
    for frame in frames:
        torch.testing.assert_close(frame.prediction, torch.full((2, 1, 8, 8), value), rtol=0, atol=2e-3)


# Exact networks: the samples are distributed as the data


def assert_gaussian(x, mean, variance, slack=0.0):
    """The mean and variance of the elements within five standard errors, and a relative slack."""
    n = x.numel()
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n) + slack * math.sqrt(variance))
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n) + slack)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
def test_ancestral_samples_are_distributed_as_the_data(prediction_type, variance_type):
    """With the exact mean and variance every step is exact; else step adds the wrong noise or the wrong mean."""
    pipeline = gaussian_pipeline(
        0.3,
        0.25,
        num_train_timesteps=60,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        variance_type=variance_type,
    )
    assert_gaussian(draw(pipeline, 0, 1, 2, 3, num_inference_steps=None), 0.3, 0.25, slack=0.002)


@pytest.mark.parametrize("steps", [None, 12])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
def test_unit_variance_data_needs_fixed_large(prediction_type, steps):
    """For N(0, 1) the reverse step's variance is β, over any stride; else `fixed_large` is not β_{t|s}."""
    pipeline = gaussian_pipeline(
        0.0,
        1.0,
        num_train_timesteps=60,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        variance_type="fixed_large",
    )
    assert_gaussian(draw(pipeline, 0, 1, 2, 3, num_inference_steps=steps), 0.0, 1.0, slack=0.002)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
def test_a_point_mass_is_reached_exactly(prediction_type):
    """For a single image the reverse step's variance is β̃, and the chain must end in the image itself."""
    pipeline = gaussian_pipeline(0.3, 0.0, size=8, prediction_type=prediction_type, num_train_timesteps=40)
    drawn = draw(pipeline, 0, 1, num_inference_steps=None)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 0.3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_swapped_samplers_have_the_models_betas(beta_schedule, sampler):
    """Else a sampler falls back to its own defaults and denoises at other noise levels than the model was trained."""
    ours = DDPMScheduler(beta_schedule=beta_schedule)
    swapped = getattr(diffusers, sampler).from_config(ours.config)
    torch.testing.assert_close(swapped.alphas_cumprod.double(), ours.exact_tables.alphas_cumprod, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_swapped_samplers_draw_the_data_with_a_learned_variance(sampler):
    """Else the variance's half of the output leaks into the other samplers' images."""
    pipeline = gaussian_pipeline(0.3, 0.25, variance_type="learned_range")
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    assert_gaussian(draw(pipeline, 0, 1, num_inference_steps=200), 0.3, 0.25, slack=0.05)


@pytest.mark.every(5)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("channels", "variance_type"), [(1, "fixed_large"), (1, "learned"), (4, "learned_range")])
def test_swapping_a_sampler_in_and_back_changes_nothing(channels, variance_type, sampler):
    """Else a try with another sampler loses part of the model's config, and the old images cannot be drawn again."""
    pipeline = tiny_pipeline(
        channels, variance_type=variance_type, beta_schedule="sigmoid", prediction_type="v_prediction"
    )
    before = draw(pipeline, 0, 1, num_inference_steps=4)
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    between = draw(pipeline, 0, 1, num_inference_steps=4)
    assert between.shape == (2, channels, 8, 8)
    assert torch.isfinite(between).all()
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(draw(pipeline, 0, 1, num_inference_steps=4), before)


# Interpolation, and a shared beginning


def picture(seed, size=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8))


def test_interpolation_starts_from_a_linear_mix_of_both_noised_images():
    """Else the ends are not the two images, or the middle is not between them."""
    pipeline, weights = tiny_pipeline(size=32), (0.0, 0.25, 1.0)
    a, b = picture(0, 32), picture(1, 32)
    with inputs_of(pipeline.unet) as inputs:
        drawn = pipeline.interpolate(a, b, 300, weights, generators(0)[0], 10, "latent").images
    x, t = inputs[0]
    assert t == 300
    torch.testing.assert_close(x[1], 0.75 * x[0] + 0.25 * x[2])
    mean = pipeline.scheduler.alphas_cumprod[300].sqrt()
    noise = [(x[k] - mean * pipeline.encode(image)[0]) / (1 - mean**2).sqrt() for k, image in ((0, a), (2, b))]
    for one in noise:  # 1024 standard normal numbers
        assert one.mean().item() == pytest.approx(0, abs=5 / 32)
        assert one.var().item() == pytest.approx(1, abs=5 * math.sqrt(2) / 32)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)
    assert not torch.allclose(drawn[1], drawn[2], atol=1e-2)


def test_interpolation_ends_are_chains_from_each_image():
    """Else the image at weight 0 depends on the other image, or at weight 1 on the first."""
    pipeline = tiny_pipeline()
    a, b = picture(0), picture(1)

    def at(first, second, *weights):
        return pipeline.interpolate(first, second, 300, weights, generators(0)[0], 10, "latent").images

    between = at(a, b, 0.0, 1.0)
    torch.testing.assert_close(between[:1], at(a, a, 0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(between[1:], at(b, b, 1.0), rtol=0, atol=1e-5)
    same = at(a, b, 0.5, 0.5)
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-5)  # the noise is shared: only weights differ


def test_interpolation_at_the_end_of_a_chain_is_one_step_of_it():
    """At t=0 no noise is added: else the chain goes on from another place than the mix."""
    pipeline = tiny_pipeline()
    with inputs_of(pipeline.unet) as inputs:
        drawn = pipeline.interpolate(picture(0), picture(1), 0, (0.0, 1.0), generators(0)[0], output_type="latent")
    (x, t), *rest = inputs
    assert (t, rest) == (0, [])
    expected = pipeline.scheduler.step(pipeline.unet(x, 0).sample, 0, x).prev_sample
    torch.testing.assert_close(drawn.images, expected.detach())


def test_interpolation_with_an_exact_network_returns_the_images_at_little_noise():
    """Else x_t of the images has another noise level than the one the chain goes on from."""
    pipeline = gaussian_pipeline(0.0, 1.0, size=8)
    a, b = picture(0), picture(1)
    given = torch.cat([pipeline.encode(image) for image in (a, b)])
    drawn = pipeline.interpolate(a, b, 3, (0.0, 1.0), generators(0)[0], output_type="latent").images
    torch.testing.assert_close(drawn, given, rtol=0, atol=0.15)  # x_3 has a noise of 0.025
    drawn = pipeline.interpolate(a, b, 900, (0.0, 1.0), generators(0)[0], output_type="latent").images
    assert (drawn - given).abs().max() > 0.5


@pytest.mark.parametrize("timestep", [0, 400, 999])
def test_one_image_from_a_shared_beginning_is_the_plain_chain(timestep):
    """Else splitting the chain at a timestep drops, repeats or reseeds a step."""
    pipeline = tiny_pipeline(variance_type="fixed_large")
    shared = pipeline.sample_from_shared(1, timestep, generators(4)[0], 10, "latent").images
    assert torch.equal(shared, pipeline(1, generators(4)[0], 10, "latent").images)


def test_images_from_a_shared_beginning_share_x_t():
    """Else the images differ in more than what is decided after the timestep."""
    pipeline = tiny_pipeline(variance_type="fixed_large")
    with inputs_of(pipeline.unet) as inputs:
        drawn = pipeline.sample_from_shared(3, 500, generators(0)[0], 10, "latent").images
    assert [t for _, t in inputs] == list(range(900, -1, -100))
    assert [len(x) for x, _ in inputs] == [1] * 4 + [3] * 6
    shared, after = inputs[4][0], inputs[5][0]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])
    assert not torch.allclose(after[0], after[1], atol=1e-2)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)
    at_the_end = pipeline.sample_from_shared(3, 0, generators(0)[0], 10, "latent").images
    torch.testing.assert_close(at_the_end, at_the_end[:1].expand(3, -1, -1, -1))  # nothing is left to decide


def test_starting_within_a_chain_is_refused_for_other_samplers():
    """A multistep sampler started in the middle has no history: silently worse images, or a crash inside."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for call in (
        lambda: pipeline.sample_from_shared(2, 500, num_inference_steps=10),
        lambda: pipeline.interpolate(picture(0), picture(1), 500),
    ):
        with pytest.raises(ValueError, match=r"DDPMScheduler\.from_config"):
            call()
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # the way out that it names
    pipeline.sample_from_shared(2, 500, num_inference_steps=10)


# Latents


def test_a_vae_decodes_the_latents():
    """Else x_0 is decoded on another scale than the autoencoder's, or cut to the latents' size."""
    vae = tiny_vae(scaling_factor=0.2, shift_factor=0.1)
    pipeline = tiny_pipeline(4, vae)
    latents, decoded, pil = (draw(pipeline, 0, 1, output_type=kind) for kind in ("latent", "pt", "pil"))
    assert latents.shape == (2, 4, 8, 8)
    assert decoded.shape == (2, 3, 16, 16)
    assert (pil[0].mode, pil[0].size) == ("RGB", (16, 16))
    expected = vae.decode(latents / 0.2 + 0.1).sample.detach()
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1))


def test_encoding_and_decoding_are_inverse_in_scale_and_shift():
    """Else latents are trained on one scale and decoded on another."""
    picture = torch.rand(1, 3, 16, 16, generator=generators(0)[0])
    plain, scaled = tiny_vae(scaling_factor=1.0), tiny_vae(scaling_factor=0.2, shift_factor=0.1)
    round_trips = []
    for vae in (plain, scaled):
        pipeline = tiny_pipeline(4, vae)
        with torch.no_grad():
            latents = pipeline.encode(picture, generators(1)[0])
            round_trips.append(pipeline.decode(latents, "pt"))
        assert latents.shape == (1, 4, 8, 8)
    torch.testing.assert_close(*round_trips)


def test_interpolation_in_latents_takes_images_of_the_decoded_size():
    """Else the autoencoder's factor is forgotten where images come in."""
    pipeline = tiny_pipeline(4, tiny_vae())
    a, b = (Image.fromarray(np.asarray(picture(seed, 16))).convert("RGB") for seed in (0, 1))
    drawn = pipeline.interpolate(a, b, 300, (0.0, 0.5, 1.0), generators(0)[0], 10).images
    assert [image.size for image in drawn] == [(16, 16)] * 3


# What is refused, and the way out


@pytest.mark.parametrize("config", [{"rescale_betas_zero_snr": True}, {"beta_schedule": "jsd"}], ids=str)
def test_zero_terminal_snr_with_epsilon_is_refused_with_the_way_out(config):
    """x̂_0 would divide by zero: else every image is NaN."""
    pipeline = tiny_pipeline(timestep_spacing="trailing", **config)
    with pytest.raises(ValueError, match="v_prediction"):
        draw(pipeline, 0)
    below = draw(pipeline, 0, num_inference_steps=None, timesteps=[998, 500, 0])  # where there is a signal left
    assert torch.isfinite(below).all()
    for prediction_type in ("v_prediction", "sample"):  # the way out that it names
        pipeline = tiny_pipeline(prediction_type=prediction_type, timestep_spacing="trailing", **config)
        with inputs_of(pipeline.unet) as inputs:
            assert torch.isfinite(draw(pipeline, 0)).all()
        assert inputs[0][1] == 999


def test_zero_terminal_snr_in_other_samplers_is_refused_where_it_gives_nan():
    """log-SNR is -inf there: else images are NaN and nobody says why."""
    pipeline = tiny_pipeline(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="DDPMScheduler or DDIMScheduler"):
        draw(pipeline, 0)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing")
    assert torch.isfinite(draw(pipeline, 0)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_posterior_mean_is_refused_by_other_samplers(sampler):
    """They would take μ̃ for ε, or crash inside; the way out that the error names must restore the images."""
    pipeline = tiny_pipeline(prediction_type="posterior_mean")
    before = draw(pipeline, 0)
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=r"DDPMScheduler\.from_config\(pipe\.scheduler\.config\)"):
        draw(pipeline, 0)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(draw(pipeline, 0), before)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": -1}, "batch_size"),
        ({"batch_size": 2, "generator": generators(0)}, "1 generators for batch_size=2"),
        ({"batch_size": 1, "generator": generators(0, 1)}, "2 generators for batch_size=1"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": -5}, "num_inference_steps"),
        ({"timesteps": [3, 9]}, "descending"),
        ({"timesteps": [1000, 0]}, "1000"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, r"\(2, 1, 8, 8\)"),
        ({"latents": torch.full((1, 1, 8, 8), float("nan"))}, "NaN"),
        ({"latents": torch.full((1, 1, 8, 8), float("inf"))}, "infinity"),
        ({"output_type": "jpeg"}, "'jpeg'.*pil"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments_are_named(arguments, named):
    """Else the user sees a traceback from inside torch, or images of something that was not asked for."""
    pipeline = tiny_pipeline()
    with inputs_of(pipeline.unet) as inputs, pytest.raises(ValueError, match=named):
        pipeline(**arguments)
    assert inputs == []  # before any work


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_than_timesteps_are_refused_for_every_sampler(sampler):
    """Else a sampler visits timesteps twice, divides by zero and draws NaN."""
    pipeline = tiny_pipeline(num_train_timesteps=20)
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="21"):
        draw(pipeline, 0, num_inference_steps=21)


@pytest.mark.every(5)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_draws_nan(sampler, spacing):
    """Where the multistep samplers visit a timestep twice they divide by zero, and NaN is shown as black."""
    pipeline = tiny_pipeline(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2")
    config = pipeline.scheduler.config
    for steps in (1, 2, 5, 9, 10, None):
        pipeline.scheduler = getattr(diffusers, sampler).from_config(config, timestep_spacing=spacing)
        try:
            drawn = draw(pipeline, 0, num_inference_steps=steps)
        except ValueError:
            continue  # refused
        assert torch.isfinite(drawn).all(), f"{steps} steps"


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_outside_the_chain_is_named(timestep):
    """Else an index error from inside, or a chain from somewhere else."""
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match=str(timestep)):
        pipeline.sample_from_shared(2, timestep, num_inference_steps=10)
    with pytest.raises(ValueError, match=str(timestep)):
        pipeline.interpolate(picture(0), picture(1), timestep, num_inference_steps=10)


def test_a_model_without_the_variance_its_scheduler_wants_is_refused():
    """Else half of the image's own channels are taken for a variance."""
    pipeline = finished(DDPMPipeline(tiny_unet(2), DDPMScheduler(variance_type="learned_range")))
    with pytest.raises(ValueError, match="out_channels=4"):
        draw(pipeline, 0)
    pipeline = finished(DDPMPipeline(tiny_unet(2, 4), DDPMScheduler()))
    with pytest.raises(ValueError, match="learned_range"):
        draw(pipeline, 0)
