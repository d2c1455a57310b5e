"""The text-to-image pipeline: prompts, guidance, seeds, sizes, outputs, refusals."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from ddpm_hf.portable.text_encoding_ddpm_hf import tokenize
from tests.support.fixtures_pipeline import calls_of, generators, randn
from tests.support.fixtures_text import CAPTIONS, WIDTH, stable_diffusion_scheduler, stock_pipeline, tiny_text_pipeline
from tests.support.text_pipelines import BLUE, RED, draw, latents, make_pipeline

# Prompts


def test_the_prompt_decides_what_is_drawn():
    """Else the text never reaches the model, and all that compares pictures of prompts shows nothing."""
    pipeline = tiny_text_pipeline()
    assert (latents(pipeline, RED) - latents(pipeline, BLUE)).abs().max() > 0.05


def test_embedded_prompts_are_the_prompts():
    """Else a prompt that a user weighted or interpolated is treated otherwise than a text."""
    pipeline = tiny_text_pipeline()
    texts, negatives = [RED, BLUE], ["a white square", ""]
    expected = latents(pipeline, texts, 0, 1, negative_prompt=negatives)
    embedded = pipeline.encode_prompt(texts)
    given = {"prompt_embeds": embedded, "negative_prompt_embeds": pipeline.encode_prompt(negatives)}
    torch.testing.assert_close(latents(pipeline, None, 0, 1, **given), expected, rtol=0, atol=1e-4)
    given = {"prompt_embeds": embedded, "negative_prompt": negatives}
    torch.testing.assert_close(latents(pipeline, None, 0, 1, **given), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared", ["a white square", ""])
def test_one_negative_prompt_serves_all(shared):
    """Else a negative prompt given once moves the first image only."""
    pipeline = tiny_text_pipeline()
    expected = latents(pipeline, [RED, BLUE], 0, 1, negative_prompt=[shared, shared])
    given = latents(pipeline, [RED, BLUE], 0, 1, negative_prompt=shared)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
    if not shared:
        torch.testing.assert_close(latents(pipeline, [RED, BLUE], 0, 1), expected, rtol=0, atol=1e-4)


def test_long_prompts_are_cut_where_stock_cuts_them(caplog):
    """Else a long prompt crashes, or its end is read here and not by stock."""
    pipeline = tiny_text_pipeline()
    length = pipeline.tokenizer.model_max_length
    long = " ".join(CAPTIONS * 5)
    ids, _ = tokenize(pipeline.tokenizer, [long, RED])
    assert ids.shape == (2, length)
    assert ids[0, -1] == pipeline.tokenizer.eos_token_id
    diffusers_logging.set_verbosity_error()
    try:
        stock, _ = stock_pipeline(pipeline, stable_diffusion_scheduler()).encode_prompt([long, RED], "cpu", 1, False)
    finally:
        diffusers_logging.set_verbosity_warning()
    torch.testing.assert_close(pipeline.encode_prompt([long, RED]), stock, rtol=0, atol=1e-4)
    cut = " ".join(long.split()[: length + 9])
    torch.testing.assert_close(pipeline.encode_prompt([cut]), stock[:1], rtol=0, atol=1e-4)


def test_the_attention_mask_is_stocks():
    """Else a text encoder that masks what is padded also hides the end of the text, where it is read out."""
    pipeline = tiny_text_pipeline()
    pipeline.text_encoder.config.use_attention_mask = True
    stock, _ = stock_pipeline(pipeline, stable_diffusion_scheduler()).encode_prompt([RED, ""], "cpu", 1, False)
    torch.testing.assert_close(pipeline.encode_prompt([RED, ""]), stock, rtol=0, atol=1e-4)


# Guidance


def batches_of(model):
    """The batch sizes that a model is called with."""
    return calls_of(model, lambda inputs, _: len(inputs[0]))


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 4), (3.0, 8), (0.0, 8), (0.5, 8)])
def test_guidance_is_one_pass_of_twice_the_batch_and_scale_1_none(scale, batch):
    """Else sampling takes twice the time where nothing is guided, or twice the passes where it is."""
    pipeline = tiny_text_pipeline()
    with batches_of(pipeline.unet) as passes, batches_of(pipeline.text_encoder):
        latents(pipeline, [RED, BLUE], 0, 1, 2, 3, num_images_per_prompt=2, guidance_scale=scale)
    assert passes == [batch] * 5


def test_guidance_is_the_papers_formula():
    """Else another scale than the one asked for acts, or prompt and negative prompt change places."""
    pipeline = tiny_text_pipeline(stable_diffusion_scheduler(prediction_type="sample"))  # one step gives the output
    text, none, guided = (
        latents(pipeline, prompt, latents=randn(1, 4, 8, 8), num_inference_steps=1, guidance_scale=scale)
        for prompt, scale in ((RED, 1.0), ("", 1.0), (RED, 3.0))
    )
    assert (text - none).abs().max() > 0.01
    torch.testing.assert_close(guided, none + 3.0 * (text - none), rtol=0, atol=1e-4)


def test_guidance_0_is_the_empty_prompts_model():
    """Else the scale counts from the wrong end."""
    pipeline = tiny_text_pipeline()
    found, expected = (
        latents(pipeline, RED, guidance_scale=0.0),
        latents(pipeline, "", guidance_scale=1.0),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_negative_prompt_equal_to_the_prompt_guides_nowhere():
    """Else something besides the two prompts moves the image."""
    pipeline = tiny_text_pipeline()
    guided = latents(pipeline, RED, negative_prompt=RED, guidance_scale=7.5)
    torch.testing.assert_close(guided, latents(pipeline, RED, guidance_scale=1.0), rtol=0, atol=1e-3)


def test_guidance_acts_within_its_interval_alone():
    """Else an interval of timesteps is read at the wrong end, or not at all."""
    pipeline = tiny_text_pipeline()
    with batches_of(pipeline.unet) as passes:
        latents(pipeline, RED, guidance_interval=(300, 700))
    steps = pipeline.scheduler.timesteps.tolist()
    assert passes == [2 if 300 <= t <= 700 else 1 for t in steps]
    assert set(passes) == {1, 2}


# Seeds, sizes, outputs


@pytest.mark.parametrize("sampler", ["plain", "pndm", "euler"])
def test_an_image_depends_on_its_own_generator_and_prompt_alone(sampler):
    """Else an image changes with the batch it is drawn in, and cannot be drawn again."""
    pipeline = make_pipeline(sampler)
    together = latents(pipeline, [RED, BLUE, RED], 5, 6, 7)
    torch.testing.assert_close(together[1:2], latents(pipeline, BLUE, 6), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        together[[2, 0]], latents(pipeline, RED, 7, 5, num_images_per_prompt=2), rtol=0, atol=1e-3
    )
    assert (together[0] - together[2]).abs().max() > 0.1


def test_images_of_a_prompt_stand_together():
    """Else the images of several prompts come in an order that nobody expects."""
    pipeline = tiny_text_pipeline()
    found = latents(pipeline, [RED, BLUE], 0, 1, 2, 3, num_images_per_prompt=2)
    expected = latents(pipeline, [RED, RED, BLUE, BLUE], 0, 1, 2, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["plain", "euler"])
def test_given_latents_are_the_drawn_ones(name):
    """Else x_T handed in is scaled or ordered otherwise than the one the pipeline draws."""
    pipeline = make_pipeline(name)
    own = generators(0, 1)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in own])
    options = {"num_inference_steps": 5, "output_type": "latent"}
    given = pipeline([RED, BLUE], generator=own, latents=x, **options).images
    assert torch.equal(given, pipeline([RED, BLUE], generator=generators(0, 1), **options).images)


@pytest.mark.parametrize(("height", "width"), [(None, None), (24, None), (None, 32), (32, 8), (18, 22)])
def test_any_size_of_whole_latents(height, width):
    """Else other sizes than the training's come out in another shape, or crash."""
    pipeline = tiny_text_pipeline()
    options = {"num_inference_steps": 2, "height": height, "width": width, "guidance_scale": 3.0}
    image = pipeline(RED, output_type="np", **options).images
    assert image.shape == (1, height or 16, width or 16, 3)
    assert latents(pipeline, RED, **options).shape == (1, 4, (height or 16) // 2, (width or 16) // 2)


def test_a_model_of_oblong_images_draws_them(tmp_path):
    """Else height and width of the training change places."""
    pipeline = tiny_text_pipeline(size=(8, 12))
    pipeline.save_pretrained(tmp_path)
    drawn = draw(pipeline, "scale 3")
    assert drawn.shape == (2, 16, 24, 3)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(stock, "scale 3"), drawn, atol=1e-3)


@pytest.mark.parametrize(("name", "mode"), [("plain", "RGB"), ("gray", "L")])
def test_output_types_show_the_same_images(name, mode):
    """Else one of the output types is scaled, transposed or coloured wrongly."""
    pipeline = make_pipeline(name)
    kinds = ("latent", "pt", "np", "numpy", "pil")
    latent, pt, array, same, pil = (latents(pipeline, RED, 0, output_type=kind) for kind in kinds)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(pt, (decoded / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_array_equal(same, array)
    assert isinstance(pil[0], Image.Image)
    assert pil[0].mode == mode
    shown = np.asarray(pil[0]).reshape(array[0].shape)
    np.testing.assert_array_equal(shown, (array[0] * 255).round().astype(np.uint8))


def test_a_tuple_on_request():
    """Else code written for stock's return_dict=False breaks."""
    pipeline = tiny_text_pipeline()
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}
    found = pipeline(RED, generator=generators(0), return_dict=False, **options)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], latents(pipeline))


def test_no_number_of_steps_is_all_of_them():
    """Else the whole chain, which the docstring promises for None, cannot be drawn."""
    pipeline = tiny_text_pipeline(stable_diffusion_scheduler(num_train_timesteps=12))
    assert latents(pipeline, RED, num_inference_steps=None).isfinite().all()
    assert sorted(pipeline.scheduler.timesteps.tolist()) == list(range(12))


def test_stock_pipelines_positional_arguments_keep_their_places():
    """Else a call written for stock hands its number of steps to something else."""
    pipeline = tiny_text_pipeline()
    stock = stock_pipeline(pipeline, diffusers.DDPMScheduler(steps_offset=1, clip_sample=False))
    own = pipeline(RED, 16, 24, 3, generator=generators(0), output_type="np").images
    np.testing.assert_allclose(own, stock(RED, 16, 24, 3, generator=generators(0), output_type="np").images, atol=1e-3)


def test_timesteps_of_ones_own():
    """Else the steps that a user lists are not those taken."""
    pipeline = tiny_text_pipeline()
    stock = stock_pipeline(pipeline, diffusers.DDPMScheduler(steps_offset=1, clip_sample=False))
    options = {"timesteps": [900, 420, 77, 3], "output_type": "np", "guidance_scale": 3.0}
    own = pipeline(RED, generator=generators(0), **options).images
    assert pipeline.scheduler.timesteps.tolist() == options["timesteps"]
    np.testing.assert_allclose(own, stock(RED, generator=generators(0), **options).images, atol=1e-3)


def test_a_callback_sees_each_step_and_replaces_the_latents():
    """Else progress cannot be shown, or a step cannot be steered, as in stock."""
    pipeline = tiny_text_pipeline()
    seen = []

    def watch(pipe, index, timestep, inputs):
        seen.append((index, int(timestep), inputs["latents"].clone()))
        return {"latents": torch.zeros_like(inputs["latents"])} if index == 4 else inputs

    final = latents(pipeline, RED, callback_on_step_end=watch)
    assert [index for index, _, _ in seen] == list(range(5))
    assert [t for _, t, _ in seen] == pipeline.scheduler.timesteps.tolist()
    assert torch.equal(final, torch.zeros_like(final))
    torch.testing.assert_close(seen[-1][2], latents(pipeline, RED))


@pytest.mark.parametrize("name", ["plain", "euler"])
def test_frames_are_the_decoded_chain(name):
    """Else a picture of the chain shows raw latents, or moments that are not on it."""
    pipeline = make_pipeline(name)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "num_frames": 3}
    output = pipeline(RED, generator=generators(0), output_type="pt", **options)
    hidden = pipeline(RED, generator=generators(0), output_type="latent", **options)
    assert [frame.timestep for frame in output.frames] == [int(pipeline.scheduler.timesteps[n]) for n in (0, 2, 4)]
    for frame, latent in zip(output.frames, hidden.frames, strict=True):
        for shown, kept in ((frame.sample, latent.sample), (frame.prediction, latent.prediction)):
            assert shown.shape == (1, 3, 16, 16)
            torch.testing.assert_close(pipeline.decode(kept, "pt"), shown)
    torch.testing.assert_close(output.frames[-1].sample, output.images)
    torch.testing.assert_close(output.frames[-1].prediction, output.images, rtol=0, atol=1e-3)  # x̂_0 is x_0 at the end
    assert pipeline(RED, num_inference_steps=2).frames is None


def test_images_come_back_through_the_encoder():
    """Else editing starts from latents on another scale than the model's."""
    pipeline = tiny_text_pipeline()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels * 2 - 1).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(1)) * pipeline.vae.config.scaling_factor
    with torch.no_grad():
        found = pipeline.encode(pixels, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected)


def test_the_global_random_state_is_left_alone():
    """Else drawing with generators changes what a program draws next."""
    pipeline = tiny_text_pipeline()
    before = torch.get_rng_state()
    latents(pipeline)
    assert torch.equal(torch.get_rng_state(), before)


# What is refused: options, and what the message says

REFUSED = {
    "no prompt": ({"prompt": None}, ("prompt", "prompt_embeds")),
    "both prompts": ({"prompt_embeds": torch.zeros(1, 16, WIDTH)}, ("one of", "prompt_embeds")),
    "not a text": ({"prompt": 3}, ("prompt=3", "text")),
    "an empty list": ({"prompt": []}, ("prompt=[]", "text")),
    "a list of numbers": ({"prompt": [1, 2]}, ("[1, 2]", "text")),
    "half a latent": ({"height": 17}, ("height=17", "multiple of 2")),
    "negative width": ({"width": -8}, ("width=-8", "multiple of 2")),
    "too many negatives": ({"negative_prompt": ["a", "b"]}, ("2 negative prompts", "1 prompt")),
    "no images": ({"num_images_per_prompt": 0}, ("num_images_per_prompt=0", "1 or more")),
    "less than no images": ({"num_images_per_prompt": -1}, ("num_images_per_prompt=-1", "1 or more")),
    "nan scale": ({"guidance_scale": math.nan}, ("guidance_scale=nan",)),
    "endless scale": ({"guidance_scale": math.inf}, ("guidance_scale=inf",)),
    "rescale": ({"guidance_rescale": 1.5}, ("guidance_rescale=1.5", "0 to 1")),
    "interval": ({"guidance_interval": (5, 3)}, ("guidance_interval=(5, 3)", "lower")),
    "no steps": ({"num_inference_steps": 0}, ("num_inference_steps=0", "1 to 1000")),
    "output type": ({"output_type": "jpg"}, ("'jpg'", "pil")),
    "frames": ({"num_frames": -1}, ("num_frames=-1",)),
    "generators": ({"generator": generators(0, 1)}, ("2 generators", "one for each")),
    "latents' shape": ({"latents": torch.zeros(1, 4, 4, 4)}, ("(1, 4, 4, 4)", "(1, 4, 8, 8)")),
    "latents' values": ({"latents": torch.full((1, 4, 8, 8), math.nan)}, ("NaN",)),
    "callback inputs": (
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ("prompt_embeds",)},
        ("prompt_embeds", "latents"),
    ),
    "negative embeddings of another number": (
        {"negative_prompt_embeds": torch.zeros(2, 16, WIDTH)}, ("negative_prompt_embeds", "(2, 16, 32)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_is_named(name):
    """Else a slip ends in a trace from deep within, or draws something else than was asked for."""
    options, fragments = REFUSED[name]
    pipeline = tiny_text_pipeline()
    with batches_of(pipeline.unet) as passes, pytest.raises(ValueError) as refused:  # noqa: PT011
        pipeline(**{"prompt": RED, "num_inference_steps": 5, **options})
    for fragment in fragments:
        assert fragment in str(refused.value)
    assert not passes


def test_a_sampler_that_does_not_know_the_prediction_is_refused():
    """Else it takes a posterior's mean for a noise."""
    pipeline = tiny_text_pipeline(stable_diffusion_scheduler(prediction_type="posterior_mean"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="posterior_mean"):
        pipeline(RED, num_inference_steps=5)
