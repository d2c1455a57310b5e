"""`ddpm_hf.load` picks the pipeline that a folder is for."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers.utils import logging as diffusers_logging

import ddpm_hf
from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, TextToImageDDPMPipeline
from tests.support.fixtures_pipeline import generators, tiny_unet
from tests.support.fixtures_text import tiny_text_pipeline

OURS = {cls.__name__: cls for cls in (DDPMPipeline, ClassConditionalDDPMPipeline, TextToImageDDPMPipeline)}


def test_load_picks_the_class(tmp_path):
    # Breaks if a user must know which pipeline a folder holds.
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "plain")
    by_class = ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler(), {0: "cat", 1: "dog"})
    by_class.save_pretrained(tmp_path / "classes")
    assert type(ddpm_hf.load(tmp_path / "plain")) is DDPMPipeline
    assert ddpm_hf.load(tmp_path / "classes").labels == {"cat": 0, "dog": 1}
    with pytest.raises(ValueError, match="not a checkpoint-N folder"):
        ddpm_hf.load(tmp_path / "plain", ema=False)


def test_load_takes_a_checkpoint_with_and_without_ema(tmp_path):
    # Breaks if a checkpoint's other weights are taken, or its classes and diffusion are lost.
    checkpoint = tmp_path / "checkpoint-5"
    raw, averaged = (tiny_unet(seed=seed, num_class_embeds=3) for seed in (0, 1))
    raw.save_pretrained(checkpoint / "unet")
    state = {"settings": {"ddpm_num_steps": 50}, "classes": ["cat", "dog"], "step": 5, "files": {}}
    (checkpoint / "manifest.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="without --use_ema"):
        ddpm_hf.load(checkpoint, ema=True)
    assert torch.equal(ddpm_hf.load(checkpoint).unet.conv_in.weight, raw.conv_in.weight)
    averaged.save_pretrained(checkpoint / "unet_ema")
    for ema, unet in ((None, averaged), (True, averaged), (False, raw)):
        pipeline = ddpm_hf.load(checkpoint, ema=ema)
        assert torch.equal(pipeline.unet.conv_in.weight, unet.conv_in.weight)
        assert pipeline.labels == {"cat": 0, "dog": 1}
        assert len(pipeline.scheduler) == 50


def class_conditional(**scheduler):
    """An untrained model of two classes and the null class."""
    unet = tiny_unet(num_class_embeds=3)
    return ClassConditionalDDPMPipeline(unet, DDPMScheduler(**scheduler), {0: "cat", 1: "dog"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved pipeline of each kind: the name of its class -> folder. The last is one that stock would misread."""
    root = tmp_path_factory.mktemp("kinds")
    saved = {
        "DDPMPipeline": DDPMPipeline(tiny_unet(), DDPMScheduler()),
        "ClassConditionalDDPMPipeline": class_conditional(),
        "TextToImageDDPMPipeline": tiny_text_pipeline(),
        "posterior_mean": DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="posterior_mean")),
    }
    for name, pipeline in saved.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in saved}


@pytest.fixture
def warnings_of_diffusers(caplog):
    """What Diffusers warns of."""
    diffusers_logging.enable_propagation()
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()
    yield caplog
    diffusers_logging.set_verbosity(verbosity)
    diffusers_logging.disable_propagation()


@pytest.mark.parametrize("wrong", OURS)
@pytest.mark.parametrize("right", OURS)
def test_a_folder_loaded_by_another_class_names_its_own(right, wrong, folders, warnings_of_diffusers):
    # Breaks if a user learns only in the middle of a call, in Diffusers' words, that the class is the wrong one.
    if right == wrong:
        assert type(OURS[wrong].from_pretrained(folders[right])) is OURS[wrong]
        assert warnings_of_diffusers.text == ""
        return
    with pytest.raises(ValueError, match=rf"for {right}, not {wrong}.*ddpm_hf\.{right}\.from_pretrained") as caught:
        OURS[wrong].from_pretrained(folders[right])
    assert "\n" not in str(caught.value)
    assert type(ddpm_hf.load(folders[right])) is OURS[right]  # the way out


def test_stocks_pipeline_of_another_sampler_is_loaded_as_the_error_says(tmp_path):
    # Breaks if the way out, ddpm_hf.load, knows fewer classes than the error that names it.
    folder = tmp_path / "ddim"
    diffusers.DDIMPipeline(tiny_unet(), diffusers.DDIMScheduler()).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"for DDPMPipeline, not TextToImageDDPMPipeline.*ddpm_hf\.load\("):
        TextToImageDDPMPipeline.from_pretrained(folder)
    pipeline = ddpm_hf.load(folder)
    assert type(pipeline) is DDPMPipeline
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler


@pytest.mark.parametrize("name", [[], [["DDPMPipeline"]], {}, 3, None])
def test_a_class_name_that_is_none_is_said_to_be(name, folders, tmp_path):
    # Breaks if a malformed file is answered with Python's words about hashes.
    shutil.copytree(folders["DDPMPipeline"], tmp_path / "bad")
    path = tmp_path / "bad" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))
    with pytest.raises(ValueError, match="_class_name"):
        DDPMPipeline.from_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"cannot be loaded: it is a .*must be one of DDPMPipeline"):
        ddpm_hf.load(tmp_path / "bad")


def test_a_folder_has_no_revisions(folders):
    # Breaks if whatever lies in the folder is loaded for the revision that was asked for.
    with pytest.raises(ValueError, match=r"revision='v1'.*is a folder"):
        ddpm_hf.load(folders["DDPMPipeline"], revision="v1")


def test_a_users_subclass_loads_what_its_base_does(folders):
    # Breaks if only our own names are known.
    class Mine(DDPMPipeline):
        pass

    assert type(Mine.from_pretrained(folders["posterior_mean"])) is Mine
    with pytest.raises(ValueError, match="is for ClassConditionalDDPMPipeline, not DDPMPipeline"):
        Mine.from_pretrained(folders["ClassConditionalDDPMPipeline"])


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"],
          "scheduler": ["diffusers", "DDIMScheduler"], "vqvae": ["diffusers", "VQModel"]}, "has no vqvae"),
        ({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
          "scheduler": ["diffusers", "DDIMScheduler"], "image_encoder": [None, None]}, "requires unet"),
    ],
)  # fmt: skip
def test_a_pipeline_of_other_parts_is_named(index, why, tmp_path):
    # Breaks if latents of another autoencoder are shown as images.
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"is for {index['_class_name']}, not DDPMPipeline, which {why}"):
        DDPMPipeline.from_pretrained(tmp_path)


def test_a_pipeline_of_the_same_parts_loads(folders, tmp_path):
    # Breaks if only the classes that we know by name load.
    shutil.copytree(folders["DDPMPipeline"], tmp_path / "other")
    path = tmp_path / "other" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "ScoreSdeVePipeline"}))
    assert type(DDPMPipeline.from_pretrained(tmp_path / "other")) is DDPMPipeline


def test_a_model_by_class_is_not_made_an_unconditional_one():
    # Breaks if the error comes from within the UNet, at the first step.
    with pytest.raises(ValueError, match="for ClassConditionalDDPMPipeline, not DDPMPipeline"):
        DDPMPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler())


@pytest.mark.parametrize("cls", [diffusers.DDPMPipeline, diffusers.DiffusionPipeline])
def test_stock_says_itself_that_a_model_by_class_has_its_own_class(cls, folders):
    # Breaks what docs/publishing.md says: whichever class of stock's is named, it asks for trust in the folder's own.
    with pytest.raises(ValueError, match=r"pipeline_class_conditional_ddpm_hf.py[\s\S]*trust_remote_code=True"):
        cls.from_pretrained(folders["ClassConditionalDDPMPipeline"])


def test_numpy_is_stocks_word_for_np_by_class():
    # Breaks if code written for stock's DDPMPipeline stops at output_type.
    pipeline = class_conditional()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2}
    first, second = (
        pipeline(["dog"], generator=generators(0), output_type=kind, **options).images for kind in ("np", "numpy")
    )
    assert first.shape == (1, 8, 8, 1)
    assert (first == second).all()
