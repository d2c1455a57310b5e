"""Stable Diffusion's images from the same folder, both ways."""

import functools
import json
import warnings

import diffusers
import numpy as np
import pytest
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

from ddpm_hf.portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler
from tests.support import warm
from tests.support.fixtures_hub import DRAWING, WITHOUT, bare_environment
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.fixtures_text import stable_diffusion_scheduler, tiny_text_pipeline
from tests.support.runs import read
from tests.support.text_pipelines import BLUE, CALLS, MODELS, RED, V, draw, make_pipeline, make_stock


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


# What is drawn: every call of one model, and two of every other, whose schedulers know nothing of prompts
DRAWN = [
    (name, call) for name in [*MODELS, "again"] for call in CALLS if name == "plain" or call in ("scale 3", "rescaled")
]

# Without the package, in a fresh process

STRANGER = (
    WITHOUT
    + DRAWING
    + """
root, out, calls, prompts = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
results = {}
try:
    import ddpm_hf
except ImportError:
    results["package"] = "absent"
assert diffusers.StableDiffusionPipeline  # imported only now, and then it warns where torchvision is missing
logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


def keep(label, cls, name, calls, **options):
    record = results[label] = {}
    with listening(record):
        warnings.filterwarnings("ignore", "__array__ implementation")  # torch's and numpy's own affair
        try:
            pipeline = cls.from_pretrained(root / name, **options)
            pipeline.set_progress_bar_config(disable=True)
            record["class"] = named(pipeline)
            images = {}
            for call, arguments in calls.items():
                shared = {"num_inference_steps": 5, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
                images[call] = pipeline(prompts, **shared, **arguments).images
            np.savez(out / f"{label}.npz", **images)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"


for folder in sorted(root.iterdir()):
    keep(folder.name, DiffusionPipeline, folder.name, calls.get(folder.name, {}))
keep("by its class", diffusers.StableDiffusionPipeline, "plain", {})
keep("trusted", DiffusionPipeline, "mean", calls["plain"], trust_remote_code=True)
(out / "results.json").write_text(json.dumps(results))
"""
)


@pytest.fixture(scope="module")
def stranger(saved, tmp_path_factory):
    """What a process without this package makes of the folders: the records, and where its images lie."""
    home = tmp_path_factory.mktemp("stranger")
    environment = bare_environment(home / "hf", HF_HUB_OFFLINE="1")
    calls = {name: {call: CALLS[call] for one, call in DRAWN if one == name} for name in {name for name, _ in DRAWN}}
    arguments = [str(saved), str(home), json.dumps(calls), json.dumps([RED, BLUE])]
    done = warm.run("-c", STRANGER, *arguments, cwd=home, env=environment, isolated=True)
    assert done.returncode == 0, done.stderr
    return read(home / "results.json"), home


def test_the_stranger_is_one(stranger):
    """Else the tests below show nothing."""
    assert stranger[0]["package"] == "absent"


@pytest.mark.parametrize("name", [*MODELS, "stock", "again", "by its class"])
def test_stock_loads_and_draws_without_a_warning(name, stranger):
    """Else whoever has only Diffusers is told that something is wrong with the model, or cannot load it."""
    record = stranger[0][name]
    assert "error" not in record, record["error"]
    assert record["said"] == ""
    assert record["class"].startswith("diffusers.pipelines.stable_diffusion.")


@functools.cache
def loaded(folder):
    """The folder's pipeline, loaded once."""
    pipeline = TextToImageDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("name", "call"), DRAWN)
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
    own = draw(loaded(saved / "mean"), call)
    np.testing.assert_allclose(np.load(stranger[1] / "trusted.npz")[call], own, atol=1e-4)


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


@pytest.mark.every(3)
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
