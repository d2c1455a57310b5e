"""The text-to-image pipeline: Stable Diffusion's images from the same folder, both ways, and what only ours can."""

import functools
import json
import math
import os
import subprocess
import sys
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from ddpm_hf.portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline, tokenize
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler
from tests.support.fixtures_pipeline import generators, randn, tiny_vae
from tests.support.fixtures_text import CAPTIONS, WIDTH, stable_diffusion_scheduler, stock_pipeline, tiny_text_pipeline

RED, BLUE = CAPTIONS[0], CAPTIONS[2]
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
# a scheduler's class and config, what stock samples as ours does
V = {"prediction_type": "v_prediction"}
MODELS = {
    "plain": ("DDPMScheduler", {}),
    "v_prediction": ("DDPMScheduler", V),
    "sample": ("DDPMScheduler", {"prediction_type": "sample"}),
    "sigmoid": ("DDPMScheduler", {"beta_schedule": "sigmoid", **V}),  # which stock gets as trained_betas
    "zero_snr": ("DDPMScheduler", ZERO_SNR),
    "gray": ("DDPMScheduler", V),
    "ddim": ("DDIMScheduler", V),
    "ddim-zero_snr": ("DDIMScheduler", ZERO_SNR),
    "pndm": ("PNDMScheduler", V),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-v_prediction": ("DPMSolverMultistepScheduler", V),
    "euler": ("EulerDiscreteScheduler", V),
    "unipc": ("UniPCMultistepScheduler", V),
}
CALLS = {
    "scale 1": {"guidance_scale": 1.0},
    "scale 3": {"guidance_scale": 3.0},
    "scale 7.5": {},
    "negative": {"negative_prompt": ["a white square", "no square"], "guidance_scale": 3.0},
    "several": {"num_images_per_prompt": 2, "guidance_scale": 3.0},
    "rescaled": {"guidance_rescale": 0.7},
    "size": {"height": 24, "width": 32, "guidance_scale": 3.0},
}


def make_scheduler(name):
    cls, config = MODELS[name]
    if cls == "DDPMScheduler":
        return stable_diffusion_scheduler(**config)
    own = {"skip_prk_steps": True} if cls == "PNDMScheduler" else {}
    return getattr(diffusers, cls).from_config(stable_diffusion_scheduler(**config).config, **own)


def make_pipeline(name):
    vae = tiny_vae(scaling_factor=0.5, in_channels=1, out_channels=1) if name == "gray" else None
    return tiny_text_pipeline(make_scheduler(name), vae)


def draw(pipeline, call, **options):
    options = {"num_inference_steps": 5, "output_type": "np", **CALLS[call], **options}
    return pipeline([RED, BLUE], generator=torch.Generator().manual_seed(0), **options).images


def latents(pipeline, prompt=RED, *seeds, **options):
    """x_0 for one generator a seed."""
    options = {"num_inference_steps": 5, "output_type": "latent", "guidance_scale": 3.0, **options}
    return pipeline(prompt, generator=generators(*(seeds or (0,))), **options).images


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each model, by name."""
    root = tmp_path_factory.mktemp("saved")
    for name in MODELS:
        make_pipeline(name).save_pretrained(root / name)
    tiny_text_pipeline(stable_diffusion_scheduler(prediction_type="posterior_mean")).save_pretrained(root / "mean")
    make_stock(PNDMScheduler(skip_prk_steps=True, steps_offset=1)).save_pretrained(root / "stock")
    TextToImageDDPMPipeline.from_pretrained(root / "stock").save_pretrained(root / "again")
    return root


# Without the package, in a fresh process

STRANGER = '''
import json, os, sys, tempfile, warnings
from pathlib import Path

sys.modules["ddpm_hf"] = None  # as where it is not installed
root, out, calls, prompts = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
results = {}
try:
    import ddpm_hf
except ImportError:
    results["package"] = "absent"

import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging

logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def attempt(label, cls, name, calls, **options):
    """Load and draw with every warning an error, and keep what whoever writes to standard error wrote there."""
    record = results[label] = {}
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "__array__ implementation")  # torch's and numpy's own affair
                pipeline = cls.from_pretrained(root / name, **options)
                pipeline.set_progress_bar_config(disable=True)
                record["class"] = f"{type(pipeline).__module__}.{type(pipeline).__name__}"
                images = {}
                for call, arguments in calls.items():
                    generator = torch.Generator().manual_seed(0)
                    shared = {"num_inference_steps": 5, "output_type": "np", "generator": generator}
                    images[call] = pipeline(prompts, **shared, **arguments).images
            np.savez(out / f"{label}.npz", **images)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            file.seek(0)
            record["stderr"] = file.read().decode()


for folder in sorted(root.iterdir()):
    attempt(folder.name, DiffusionPipeline, folder.name, calls)
attempt("by its class", StableDiffusionPipeline, "plain", {})
attempt("trusted", DiffusionPipeline, "mean", calls, trust_remote_code=True)
(out / "results.json").write_text(json.dumps(results))
'''


@pytest.fixture(scope="module")
def stranger(saved, tmp_path_factory):
    """What a process without this package makes of the folders: the records, and where its images lie."""
    home = tmp_path_factory.mktemp("stranger")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(saved), str(home), json.dumps(CALLS), json.dumps([RED, BLUE])]
    subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *arguments], cwd=home, env=environment, check=True, timeout=300
    )
    return read(home / "results.json"), home


def test_the_stranger_is_one(stranger):
    """Else the tests below show nothing."""
    assert stranger[0]["package"] == "absent"


@pytest.mark.parametrize("name", [*MODELS, "stock", "again", "by its class"])
def test_stock_loads_and_draws_without_a_warning(name, stranger):
    """Else whoever has only Diffusers is told that something is wrong with the model, or cannot load it."""
    record = stranger[0][name]
    assert "error" not in record, record["error"]
    assert record["stderr"] == ""
    assert record["class"].startswith("diffusers.pipelines.stable_diffusion.")


@functools.cache
def loaded(folder):
    """The folder's pipeline, loaded once."""
    pipeline = TextToImageDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", [*MODELS, "again"])
def test_stock_draws_our_images(name, call, saved, stranger):
    """Else a prompt shows one thing here, and another where the model was published."""
    own = draw(loaded(saved / name), call)
    assert own.std() > 0.02  # the images show something
    np.testing.assert_allclose(np.load(stranger[1] / f"{name}.npz")[call], own, atol=1e-3)


def test_what_stock_does_not_know_is_refused_without_trust(saved, stranger):
    """Else stock takes a posterior's mean for a noise, and draws something else without a word."""
    assert read(saved / "mean" / "model_index.json")["_class_name"] == [
        "pipeline_text2image_ddpm_hf",
        "TextToImageDDPMPipeline",
    ]
    assert "trust_remote_code" in stranger[0]["mean"]["error"]


@pytest.mark.parametrize("call", CALLS)
def test_our_code_runs_from_the_folder(call, saved, stranger):
    """Else the files beside the weights are not enough to run them."""
    record = stranger[0]["trusted"]
    assert "error" not in record, record["error"]
    assert record["class"].endswith("pipeline_text2image_ddpm_hf.TextToImageDDPMPipeline")
    own = TextToImageDDPMPipeline.from_pretrained(saved / "mean")
    own.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(np.load(stranger[1] / "trusted.npz")[call], draw(own, call), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_index_names_what_loads_anywhere(name, saved):
    """Else the Hub refuses a component of a foreign library, or stock warns of one that it does not know."""
    index = read(saved / name / "model_index.json")
    assert index.pop("_diffusers_version") == diffusers.__version__
    assert index == {
        "_class_name": "StableDiffusionPipeline",
        "_guidance_scale": 7.5,
        "requires_safety_checker": False,
        "scheduler": ["diffusers", MODELS[name][0]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


# where stock's pipeline samples something else, or nothing: scheduler, vae, unet
STOCK_WRONG = {
    "learned": ({"variance_type": "learned"}, {}, {"out_channels": 8}),
    "learned_range": ({"variance_type": "learned_range"}, {}, {"out_channels": 8}),
    "fixed_large": ({"variance_type": "fixed_large", **V}, {}, {}),  # whose last step ends at t=1
    "fixed_large, trailing": ({"variance_type": "fixed_large", "timestep_spacing": "trailing", **V}, {}, {}),
    "fixed_large_log": ({"variance_type": "fixed_large_log"}, {}, {}),
    "shifted latents": ({}, {"shift_factor": 0.3}, {}),
    "12 pixels": ({}, {}, {"size": 6}),
}


@pytest.mark.parametrize("name", STOCK_WRONG)
def test_a_folder_never_pretends_to_be_stocks(name, tmp_path):
    """Else a folder that names stock's class draws other images there, or fails with stock's defaults."""
    scheduler, vae, unet = STOCK_WRONG[name]
    scheduler, vae = stable_diffusion_scheduler(**scheduler), tiny_vae(scaling_factor=0.5, **vae)
    ours = tiny_text_pipeline(scheduler, vae, **unet)
    ours.save_pretrained(tmp_path)
    if read(tmp_path / "model_index.json")["_class_name"] == "StableDiffusionPipeline":
        stock = StableDiffusionPipeline.from_pretrained(tmp_path)
        stock.set_progress_bar_config(disable=True)
        for call in ("scale 3", "rescaled"):
            np.testing.assert_allclose(draw(stock, call), draw(ours, call), atol=1e-3)


# From stock


def make_stock(scheduler):
    return stock_pipeline(tiny_text_pipeline(), scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        PNDMScheduler(skip_prk_steps=True),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        DDIMScheduler(),
        diffusers.DDPMScheduler(),
        diffusers.DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
        diffusers.EulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.get('steps_offset')}",
)
@pytest.mark.filterwarnings("ignore")
def test_a_stock_folder_loads_and_draws_the_same(scheduler, tmp_path):
    """Else a checkpoint of Stable Diffusion is another model here."""
    stock = make_stock(scheduler)
    stock.save_pretrained(tmp_path / "stock")
    ours = TextToImageDDPMPipeline.from_pretrained(tmp_path / "stock")
    ours.set_progress_bar_config(disable=True)
    wanted = DDPMScheduler if isinstance(scheduler, diffusers.DDPMScheduler) else type(scheduler)
    assert type(ours.scheduler) is wanted
    np.testing.assert_allclose(draw(ours, "scale 3"), draw(stock, "scale 3"), atol=1e-3)

    ours.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler).__name__ == type(scheduler).__name__
    np.testing.assert_allclose(draw(again, "scale 3"), draw(stock, "scale 3"), atol=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(), PNDMScheduler(skip_prk_steps=True), DDPMScheduler(), diffusers.DDPMScheduler()],
    ids=lambda scheduler: type(scheduler).__module__,
)
def test_a_scheduler_is_mended_but_not_changed_in_place(scheduler):
    """Else whoever else uses the scheduler object samples with other settings from then on."""
    before = dict(scheduler.config)
    ours = tiny_text_pipeline(scheduler)
    assert dict(scheduler.config) == before
    assert ours.scheduler.config.steps_offset == 1
    assert ours.scheduler.config.get("clip_sample", False) is False


def test_a_right_scheduler_is_kept_itself():
    """Else a sampler's own state and settings are lost on the way into the pipeline."""
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", steps_offset=1)
    assert tiny_text_pipeline(scheduler).scheduler is scheduler


def test_what_a_checkpoint_holds_besides_is_kept(tmp_path):
    """Else a checkpoint's feature extractor is gone once the model has been trained on."""
    from transformers import CLIPImageProcessor

    pipeline = tiny_text_pipeline()
    extractor = CLIPImageProcessor()
    TextToImageDDPMPipeline(
        **{name: part for name, part in pipeline.components.items() if part is not None}, feature_extractor=extractor
    ).save_pretrained(tmp_path)
    assert read(tmp_path / "model_index.json")["feature_extractor"] == ["transformers", type(extractor).__name__]
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.feature_extractor) is type(extractor)


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


class Inputs:
    """The batch sizes that a model is called with, while the context lasts."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(lambda module, inputs: self.seen.append(len(inputs[0])))
        return self.seen

    def __exit__(self, *exception):
        self.handle.remove()


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 4), (3.0, 8), (0.0, 8), (0.5, 8)])
def test_guidance_is_one_pass_of_twice_the_batch_and_scale_1_none(scale, batch):
    """Else sampling takes twice the time where nothing is guided, or twice the passes where it is."""
    pipeline = tiny_text_pipeline()
    with Inputs(pipeline.unet) as passes, Inputs(pipeline.text_encoder):
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
    with Inputs(pipeline.unet) as passes:
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
    with Inputs(pipeline.unet) as passes, pytest.raises(ValueError) as refused:  # noqa: PT011
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
