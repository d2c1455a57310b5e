"""`ddpm-hf` with a model that reads an image: sample, restore, push, and the commands that refuse it."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMImageToImagePipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.models.saving import save_pipeline
from ddpm_hf.portable.conditioning_ddpm_hf import Conditioning
from ddpm_hf.portable.networks_ddpm_hf import build_unet
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_pipeline import tiny_unet, tiny_unet_config
from tests.support.pictures import random_pixels, write_images

SR = Conditioning("super-resolution", 2, "bicubic", "bicubic", noise=0.5)
PAINT = Conditioning("inpaint", masks=("box",))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Models and pictures."""
    root = tmp_path_factory.mktemp("shop")
    scheduler = DDPMScheduler(20, beta_schedule="cosine")

    def save(name, conditioning, classes=None):
        unet = tiny_unet(3 + conditioning.extra_channels(3), 3, num_class_embeds=classes)
        names = classes and {0: "cat", 1: "dog"}
        DDPMImageToImagePipeline(unet, scheduler, conditioning.config(), names).save_pretrained(root / name)

    save("x2", SR)
    save("x2-by-class", SR, 3)
    save("paint", PAINT)
    DDPMPipeline(tiny_unet(3), scheduler).save_pretrained(root / "plain")
    upsampler = build_unet(tiny_unet_config(3, 6, condition_channels=3, num_class_embeds=2))
    learned = DDPMScheduler(20, variance_type="learned_range")
    DDPMImageToImagePipeline(upsampler, learned, None, {0: "cat", 1: "dog"}).save_pretrained(root / "openai")
    write_images(root / "small", random_pixels(3, 4, 4))
    write_images(root / "full", random_pixels(2, 8, 8))
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 5:] = 255
    write_images(root / "masks", np.stack([mask]))
    return root


@pytest.fixture
def call(shop, tmp_path, run, monkeypatch):
    """Runs a command with few steps: (code, out, err), and its folder."""

    def of(words, more=("--steps", 2)):
        monkeypatch.chdir(shop)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it is asked again and again
        words = words.split()
        out = ["--out", tmp_path / "out"] if words[0] in ("sample", "restore") else []
        return run(*words, *more, *out), tmp_path / "out"

    return of


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_folder_of_images_is_sampled_in_turn(call, shop):
    """Else an image gets another's output."""
    result, out = call("sample x2 --image small")
    assert result[0] == 0, result[2]
    for number in range(3):  # colours are those of the inputs, by which they are told apart
        made, given = pixels(out / f"000{number}.png"), pixels(shop / f"small/{number}.png")
        assert np.abs(made.mean((0, 1)) - given.mean((0, 1))).max() < 1
    result, out = call("sample x2 --image small/1.png --conditioning-noise 0.3")
    assert result[0] == 0, result[2]
    assert len(list(out.glob("000?.png"))) == 4


def test_classes_and_masks_are_read(call, shop):
    """Else the class or the mask is ignored."""
    made = {}
    for label in ("cat", "dog"):
        result, out = call(f"sample x2-by-class --image small/0.png --class {label} --guidance-scale 2")
        assert result[0] == 0, result[2]
        made[label] = pixels(out / "0000.png")
    assert (made["cat"] != made["dog"]).any()
    result, out = call("sample paint --image full --mask masks/0.png")
    assert result[0] == 0, result[2]
    for number in range(2):
        assert (pixels(out / f"000{number}.png")[:, :5] == pixels(shop / f"full/{number}.png")[:, :5]).all()


def test_a_converted_upsampler_is_sampled_and_pushed(call, shop):
    """Else OpenAI's upsamplers work from Python alone."""
    result, out = call("sample openai --image small --class dog")
    assert result[0] == 0, result[2]
    for number in range(3):
        made, given = pixels(out / f"000{number}.png"), pixels(shop / f"small/{number}.png")
        assert np.abs(made.mean((0, 1)) - given.mean((0, 1))).max() < 1
    result, _ = call("sample openai --image small/0.png")
    assert_one_line(result, "this model always has a class: give --class, one of cat, dog")
    result, _ = call("push openai user/openai --dry-run", ())
    assert result[0] == 0, result[2]
    for word in ("unet/networks_ddpm_hf.py", 'class_labels="cat"', "trust_remote_code=True"):
        assert word in result[1]


def test_restore_measures_a_trained_model(call):
    """Else trained and zero-shot models cannot be compared by one command."""
    result, out = call("restore x2 --task super-resolution --image full --degrade --num-solutions 2")
    assert result[0] == 0, result[2]
    rows = json.loads((out / "restored.json").read_text())["images"]
    assert [row["image"] for row in rows] == ["0", "1"]
    exact = [row["residual"] for row in rows]
    result, out = call("restore x2 --task super-resolution --image full --degrade --sigma-y 0.05 --num-solutions 2")
    noisy = [row["residual"] for row in json.loads((out / "restored.json").read_text())["images"]]
    assert max(exact) < 0.5 * min(noisy)  # what is exact is kept
    assert all("psnr" in row for row in rows)
    assert (out / "comparison.png").is_file()
    result, out = call("restore x2 --image full --degrade --num-solutions 2")  # the task is the model's own
    assert result[0] == 0, result[2]
    report = json.loads((out / "restored.json").read_text())
    assert report["settings"]["task"] == "super-resolution"
    assert [row["residual"] for row in report["images"]] == exact
    result, out = call("restore paint --task inpaint --mask left --image full --degrade --num-solutions 1")
    assert result[0] == 0, result[2]
    assert json.loads((out / "restored.json").read_text())["images"][0]["residual"] < 1e-5


REFUSED = {
    "sample x2": "this model (super-resolution) reads an image: give one",
    "sample x2 --image full/0.png": "8x8 pixels, and the model reads 4x4",
    "sample x2 --image small/0.png --prompt red": "--prompt is not for a model that reads an image",
    "sample x2 --image small/0.png --mask masks/0.png": "this model's task is super-resolution",
    "sample x2 --image small/0.png --conditioning-noise 0.7": "trained with conditioning noise up to 0.5",
    "sample x2 --image small/0.png --class cat": "no classes",
    "sample x2 --image small/0.png --guidance-scale 2": "--guidance-scale requires a model by class",
    "sample x2-by-class --image small --class cat --class dog": "2 times --class for 3 images",
    "sample x2 --image nowhere.png": "there is no such file",
    "sample paint --image full/0.png": "give --mask",
    "sample paint --image full/0.png --mask small/0.png": "a mask of shape",
    "sample plain --image small/0.png": "`ddpm-hf restore` restores",
    "restore plain --image full": "plain was not trained for one task: give --task, one of inpaint",
    "restore paint --image full": "--task inpaint requires --mask",
    "restore x2 --mask left --image small": "--mask left is for --task inpaint",
    "restore x2 --task deblur --image small": "this model was trained for super-resolution",
    "restore x2 --task super-resolution --factor 4 --image small": "--factor 4: this model was trained for 2",
    "restore x2 --task super-resolution --image full": "resize it with --fit",
    "restore x2 --task super-resolution --image small --method dps": "--method is for models that were not trained",
    "restore x2 --task super-resolution --image small --sigma-y 1": "trained with conditioning noise up to 0.5",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_one_line(words, call):
    """Else a user reads a traceback."""
    result, out = call(words)
    assert result[0] == 2
    assert_one_line(result, REFUSED[words])
    assert not out.exists()


@pytest.mark.parametrize(
    "command", ["evaluate x2 --dataset full", "fit-timesteps x2 --calls 5", "push-space x2 --dry-run"]
)
def test_commands_that_sample_from_noise_refuse_it(command, call):
    """Else the network is called without what it reads."""
    result, _ = call(command, ())
    assert result[0] == 2
    assert "reads an image" in result[2] or "reads one" in result[2]


def test_push_shows_the_card_and_info_the_kind(call):
    """Else a published model does not say what it is given."""
    result, _ = call("push x2 user/x2 --dry-run", ())
    assert result[0] == 0, result[2]
    for word in ('pipeline(Image.open("input.png")', "pipeline_tag: image-to-image", "--image input.png",
                 "conditioning_ddpm_hf.py", "image_to_image_ddpm_hf.py"):  # fmt: skip
        assert word in result[1]
    result, _ = call("info x2", ())
    assert "image to image (DDPMImageToImagePipeline)" in result[1]
    assert "super-resolution, factor 2" in result[1]
    assert "8×8, 3 channels" in result[1]
    assert torch.is_grad_enabled()


@pytest.fixture(scope="module")
def parts(shop):
    """Models of a cascade."""
    DDPMPipeline(tiny_unet(3, size=4), DDPMScheduler(20)).save_pretrained(shop / "four")
    return shop


def test_a_cascade_is_sampled_saved_and_pushed(parts, call, tmp_path):
    """Else its models are sampled by a program of the user's."""
    result, out = call(f"sample --cascade four x2 --num-images 2 --save-model {tmp_path / 'chain'}")
    assert result[0] == 0, result[2]
    first = pixels(out / "0000.png")
    assert first.shape == (8, 8, 3)
    result, out = call(f"sample {tmp_path / 'chain'} --num-images 2")
    assert result[0] == 0, result[2]
    assert (pixels(out / "0000.png") == first).all()
    result, out = call(f"sample {tmp_path / 'chain'} --num-images 2 --conditioning-noise 0.4")
    assert (pixels(out / "0000.png") != first).any()
    result, _ = call(f"push {tmp_path / 'chain'} user/chain --dry-run", ())
    assert result[0] == 0, result[2]
    for word in (
        "unet_2/diffusion_pytorch_model.safetensors",
        "scheduler_2/scheduler_config.json",
        "DDPMCascadePipeline",
    ):
        assert word in result[1]
    result, _ = call(f"info {tmp_path / 'chain'}", ())
    assert "a cascade (DDPMCascadePipeline)" in result[1]
    assert "8×8, 3 channels" in result[1]
    result, _ = call(f"sample --cascade four x2 --num-images 1 --save-model {tmp_path / 'chain'}")  # a cascade of ours
    assert result[0] == 0, result[2]


def test_the_saved_cascade_is_the_one_that_was_sampled(parts, call, tmp_path):
    """Else the folder samples with another level of noise, or cannot be sampled by its models' own schedulers."""
    learned = DDPMScheduler(20, variance_type="learned_range")
    DDPMPipeline(tiny_unet(3, 6, size=4), learned).save_pretrained(parts / "four-learned")
    words = "--num-images 1 --sampler dpm++ --steps 3"
    result, out = call(
        f"sample --cascade four-learned x2 {words} --conditioning-noise 0.4 --save-model {tmp_path / 'chain'}"
    )
    assert result[0] == 0, result[2]
    first = pixels(out / "0000.png")
    result, out = call(f"sample {tmp_path / 'chain'} {words}")
    assert (pixels(out / "0000.png") == first).all()
    result, out = call(f"sample {tmp_path / 'chain'} --num-images 1")
    assert result[0] == 0, result[2]


def test_stages_of_other_lengths_take_all_their_steps(parts, call):
    """Else a cascade needs --steps, and the message does not say so."""
    DDPMPipeline(tiny_unet(3, size=4), DDPMScheduler(50)).save_pretrained(parts / "four-longer")
    result, _ = call("sample --cascade four-longer x2 --num-images 1", ())
    assert result[0] == 0, result[2]
    result, _ = call("sample --cascade four-longer x2 --num-images 1", ("--steps", 30))
    assert_one_line(result, "--steps 30", "20 timesteps")


def test_a_cascade_replaces_no_other_model_and_is_saved_last(parts, call, tmp_path):
    """Else one of its own models is lost, or a refused command leaves a folder."""
    save_pipeline(DDPMPipeline.from_pretrained(parts / "four"), tmp_path / "mine")
    before = (tmp_path / "mine/model_index.json").read_bytes()
    result, _ = call(f"sample --cascade {tmp_path / 'mine'} x2 --num-images 1 --save-model {tmp_path / 'mine'}")
    assert_one_line(result, "holds another model, which stays")
    assert (tmp_path / "mine/model_index.json").read_bytes() == before
    result, _ = call(f"sample --cascade four x2 --class nope --save-model {tmp_path / 'new'}")
    assert result[0] == 2
    assert not (tmp_path / "new").exists()


CASCADES = {
    "sample four x2": "give one, or --cascade",
    "sample --cascade four": "two or three models",
    "sample --cascade four four": "must be of super-resolution",
    "sample --cascade plain x2": "reads images of 4x4, and the one before makes 8x8",
    "sample --cascade four x2 --conditioning-noise 0.7": "up to 0.5",
    "sample four --save-model chain": "--save-model chain is for --cascade",
    "sample --cascade four x2 --classifier nowhere": "nowhere",
    "sample --cascade four x2 --save-model four": "holds a model_index.json that this command did not write",
}


@pytest.mark.parametrize("words", CASCADES)
def test_a_cascade_that_does_not_fit_is_one_line(words, parts, call):
    """Else a user reads a traceback."""
    result, out = call(words)
    assert_one_line(result, CASCADES[words])
    assert not out.exists()
