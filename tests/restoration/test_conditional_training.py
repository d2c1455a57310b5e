"""`--conditioning`: what the network reads, from scratch or from trained weights, resumed, drawn and refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMImageToImagePipeline, load
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.portable.conditioning_ddpm_hf import Conditioning
from ddpm_hf.portable.operators_ddpm_hf import OPERATORS
from ddpm_hf.restoration.training import condition_of, degraded, random_masks
from tests.support.fixtures_ranks import torchrun
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import GRAY, assert_same_run, attempt, command, train, weights

SR = Conditioning("super-resolution", 2, "bicubic", "bilinear", noise=0.5)
ON = {**GRAY, "conditioning": "super-resolution", "max_train_steps": 7, "checkpointing_steps": 4, "use_ema": True}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Gray and colour images with labels, and UNets for them."""
    root = tmp_path_factory.mktemp("shop")
    pixels = random_pixels(22, 10, 9)
    write_rows(root / "images", [encoded(one[..., 0]) for one in pixels], label=[n % 2 for n in range(22)])
    write_rows(root / "colour", [encoded(one) for one in pixels])
    write_unet(root / "unet", in_channels=1, out_channels=1, dropout=0.2)
    write_unet(root / "rgb")
    return root


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """A run of super-resolution by class that was not interrupted."""
    return train(shop, tmp_path_factory.mktemp("trained") / "run", ON, label_column="label").folder


def test_the_condition_is_the_degraded_image_noised_to_its_level():
    """Else the network is trained to read something else than it will be given."""
    x = torch.rand(5, 3, 8, 8) * 2 - 1
    keys = StepKeys(3, 2, 0, 5)
    read = condition_of(SR, x, keys)
    level = keys.uniform("conditioning_level").float() * 0.5
    assert 0 <= level.min() < level.max() < 0.5
    torch.testing.assert_close(read[:, 3:], level[:, None, None, None].expand(5, 1, 8, 8))
    small = OPERATORS["bicubic"]((3, 8, 8), factor=2).forward(x)
    s = level[:, None, None, None]
    noised = (1 - s**2).sqrt() * small + s * keys.normal_like(small, "conditioning_noise")
    enlarged = torch.nn.functional.interpolate(noised, (8, 8), mode="bilinear")
    torch.testing.assert_close(read[:, :3], enlarged)
    assert not torch.equal(read, condition_of(SR, x, keys._replace(validation=True)))
    parts = [condition_of(SR, x[i : i + 1], StepKeys(3, 2, i, 1)) for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), read)  # whatever the batch and the rank


def test_masks_are_of_their_kinds_and_of_the_keys():
    """Else inpainting learns other masks than those that the flag names, or others when it is resumed."""
    x, keys = torch.zeros(400, 1, 8, 12), StepKeys(0, 1, 0, 400)
    boxes, half = (random_masks([kind], x, keys)[:, 0] for kind in ("box", "half"))
    for hidden in ~boxes:
        rows, columns = (np.flatnonzero(hidden.any(axis)) for axis in (1, 0))
        assert hidden.sum() == len(rows) * len(columns) == np.ptp(rows + 1) * len(columns) + len(columns)
        assert 2 <= len(rows) <= 6
        assert 3 <= len(columns) <= 9
    assert {int(one.sum()) for one in half} == {48}
    assert len({one.numpy().tobytes() for one in half}) == 4
    shares = (~random_masks(["random"], x, keys)).float().mean((1, 2, 3))
    assert shares.min() < 0.25
    assert shares.max() > 0.75
    assert 0.45 < shares.mean() < 0.55
    mixed = random_masks(["box", "half"], x, keys)[:, 0]
    assert 120 < sum(torch.equal(one, other) for one, other in zip(mixed, half)) < 280
    torch.testing.assert_close(random_masks(["box"], x[7:9], StepKeys(0, 1, 7, 2))[:, 0], boxes[7:9])


def test_colour_gray_and_blur_are_made_by_the_operators():
    """Else a model restores another damage than `ddpm-hf restore` knows by that name."""
    x, keys = torch.rand(2, 3, 8, 8) * 2 - 1, StepKeys(0, 1, 0, 2)
    gray, _ = degraded(Conditioning("colorize"), x, keys)
    torch.testing.assert_close(gray, OPERATORS["gray"]((3, 8, 8)).forward(x))
    read = condition_of(Conditioning("colorize"), x, keys)
    torch.testing.assert_close(read, gray.expand(2, 3, 8, 8))
    blurred, _ = degraded(Conditioning("deblur", blur_size=2.0), x, keys)
    torch.testing.assert_close(blurred, OPERATORS["gaussian-blur"]((3, 8, 8), sigma=2.0).forward(x))


def test_a_run_saves_what_samples_and_strips_of_input_output_and_truth(trained):
    """Else the training ends and nobody can use or judge the model."""
    pipeline = load(trained)
    assert type(pipeline) is DDPMImageToImagePipeline
    assert pipeline.conditioning == Conditioning("super-resolution", 2, "bicubic", "bicubic", noise=0.5)
    assert pipeline.null_class == 2
    checkpoint = load(trained / "checkpoint-7")
    assert checkpoint.conditioning == pipeline.conditioning
    assert checkpoint.labels == pipeline.labels
    with Image.open(sorted(trained.glob("samples/step-*.png"))[-1]) as grid:  # two rows of three pictures, enlarged
        assert grid.size == (26 * 8 + 2 * 8, 2 * (64 + 8) + 8)
    card = (trained / "README.md").read_text()
    assert 'pipeline(Image.open("input.png"), class_labels=' in card
    assert "--image input.png" in card


def test_a_resumed_run_is_the_same_to_the_bit(shop, trained, tmp_path):
    """Else a run that was interrupted reads other noise, levels or images from there on."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes((trained / "metrics.jsonl").read_bytes())
    shutil.copytree(trained / "checkpoint-4", run / "checkpoint-4")
    train(shop, run, ON, label_column="label", resume_from_checkpoint="latest")
    assert_same_run(run, trained)
    other = attempt(shop, run, ON, label_column="label", resume_from_checkpoint="latest", conditioning_factor=4)
    assert other.code == 2
    assert "--conditioning_factor 4: the run to resume was trained with 2" in other.error()


def test_new_inputs_of_a_trained_model_begin_at_zero(shop, tmp_path):
    """Else what was learned without images is lost at the first step."""
    first = train(shop, tmp_path / "first", GRAY, max_train_steps=2).folder
    flags = {**ON, "pretrained_model_name_or_path": first, "model_config_name_or_path": None, "max_train_steps": 1}
    flags |= {"learning_rate": 1e-12, "use_ema": False}
    second = train(shop, tmp_path / "second", flags)
    assert "its new input channels begin at zero" in second.err
    before, after = (weights(one)["conv_in.weight"] for one in (first, second.folder))
    assert after.shape[1] == 3
    torch.testing.assert_close(after[:, :1], before, atol=1e-9, rtol=0)
    assert after[:, 1:].abs().max() < 1e-9
    third = train(
        shop, tmp_path / "third", {**flags, "pretrained_model_name_or_path": second.folder, "conditioning": None}
    )
    assert load(third.folder).conditioning == load(second.folder).conditioning  # the task is the trained model's
    torch.testing.assert_close(weights(third.folder)["conv_in.weight"], after, atol=1e-9, rtol=0)


@pytest.mark.parametrize("task", ["colorize", "inpaint", "deblur"])
def test_the_other_tasks_train_on_colour_and_streams(task, shop, tmp_path):
    """Else they are flags that end in an error."""
    flags = {**ON, "train_data_dir": "{shop}/colour", "model_config_name_or_path": "{shop}/rgb", "channels": None}
    flags |= {"conditioning": task, "max_train_steps": 2, "streaming": task == "inpaint"}
    run = train(shop, tmp_path / "run", flags)
    assert load(run.folder).conditioning.task == task
    assert f"conditioning  {task}, " in run.err


def test_a_dry_run_says_what_is_read(shop, tmp_path):
    """Else a mistake shows after the start."""
    run = train(shop, tmp_path / "run", ON, dry_run=True)
    assert "super-resolution, factor 2, filter bicubic, enlarge bicubic, noise up to 0.5" in run.out
    assert not (tmp_path / "run").exists()


REFUSED = {
    "does not divide the image's height": {"conditioning_factor": 3},
    "requires images of 3 or 4 channels": {"conditioning": "colorize"},
    "--conditioning_masks must be of box, random, half (got star)": {
        "conditioning": "inpaint", "conditioning_masks": ["star"],
    },
    "leave --vae_name_or_path out": {"vae_name_or_path": "v"},
    "--evaluation_epochs samples without images": {"evaluation_epochs": 1},
    "--conditioning_noise 1.0: must be at least 0 and less than 1": {"conditioning_noise": 1.0},
    "--conditioning_factor 1: must be 2 or more": {"conditioning_factor": 1},
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(says, shop, tmp_path):
    """Else hours pass before it fails."""
    run = attempt(shop, tmp_path / "run", ON, **REFUSED[says])
    assert run.code == 2
    assert says in run.error()
    assert not (tmp_path / "run").exists()


RANK = """
import json, sys
from pathlib import Path
import train_unconditional
train_unconditional.main(json.loads(Path(sys.argv[1]).read_text()))
"""


@pytest.mark.slow
def test_two_ranks_train_as_one_with_twice_the_batch(shop, tmp_path):
    """Else each rank reads other degraded images than one process would."""
    plain = {"model_config_name_or_path": write_unet(tmp_path / "plain", in_channels=1, out_channels=1)}
    plain |= {"adam_epsilon": 1e-2}
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "argv.json").write_text(json.dumps(command(shop, tmp_path / "two", ON, **plain)))
    done = torchrun(tmp_path / "rank.py", tmp_path / "argv.json", timeout=300)
    assert done.returncode == 0, done.stderr
    one = train(shop, tmp_path / "one", ON, **plain, train_batch_size=8).folder
    ours, theirs = weights(tmp_path / "two"), weights(one)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
