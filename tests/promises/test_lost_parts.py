"""Resuming where something of the run is gone, or another run lies: nothing is lost, and nothing is made up."""

import json
import shutil

import pytest
from transformers import CLIPTokenizer

from tests.support.fixtures_text import run_text_script, write_captioned, write_text_unet
from tests.support.fixtures_unconditional import (
    BASE,
    encoded,
    fill,
    random_pixels,
    run_script,
    words,
    write_rows,
    write_unet,
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Pictures, captioned ones too, and UNets."""
    root = tmp_path_factory.mktemp("shop")
    write_rows(root / "photos", [encoded(one) for one in random_pixels(8)])
    write_unet(root / "tiny")
    write_captioned(root / "pictures")
    write_text_unet(root / "unet")
    return root


def train(shop, folder, **flags):
    """The script with flags on top of BASE."""
    return run_script(words(fill({**BASE, "output_dir": folder, **flags}, shop)), folder)


def contents(folder):
    """All files of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(shop, tmp_path):
    """A finished run of two steps, with a checkpoint after each."""
    run = train(shop, tmp_path / "run", num_epochs=None, max_train_steps=2, checkpointing_steps=1)
    assert run.code == 0, run.err
    return tmp_path / "run"


def test_a_model_outlives_its_checkpoints(finished, shop):
    """Else `latest`, in a folder whose checkpoints were removed to save space, trains over the finished model."""
    for path in finished.glob("checkpoint-*"):
        shutil.rmtree(path)
    before = contents(finished)
    run = train(shop, finished, num_epochs=None, max_train_steps=2, resume_from_checkpoint="latest")
    assert run.code == 2
    assert "the checkpoints of the run in" in run.err
    assert contents(finished) == before
    way_out = train(shop, finished, num_epochs=None, max_train_steps=2, overwrite_output_dir=True)
    assert way_out.code == 0, way_out.err


def test_a_model_outlives_another_runs_checkpoint(finished, shop, tmp_path):
    """Else a run that goes on from another folder's checkpoint replaces the model in the one that it writes to."""
    shutil.copytree(finished, tmp_path / "other")
    before = contents(tmp_path / "other")
    flags = {"num_epochs": None, "max_train_steps": 3, "resume_from_checkpoint": finished / "checkpoint-1"}
    run = train(shop, tmp_path / "other", **flags)
    assert run.code == 2
    assert "is of another run" in run.err
    assert contents(tmp_path / "other") == before
    assert train(shop, tmp_path / "new", **flags).code == 0
    assert train(shop, finished, **flags).code == 0  # its own


def test_a_card_says_the_learning_rate_that_was_used(shop, tmp_path):
    """Else it says the base rate of --scale_lr, which nothing was trained with."""
    flags = {"scale_lr": True, "learning_rate": 1e-3, "train_batch_size": 4, "lr_scheduler": "constant"}
    run = train(shop, tmp_path / "run", num_epochs=None, max_train_steps=1, **flags)
    assert run.code == 0, run.err
    assert run.records()[-1]["lr"] == pytest.approx(4e-3)
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["learning_rate"] == pytest.approx(4e-3)


TEXT = {
    "train_data_dir": "{shop}/captioned", "model_config_name_or_path": "{shop}/unet", "vae_widths": "8,16",
    "vae_train_steps": 2, "resolution": 16, "seed": 3, "train_batch_size": 4, "eval_batch_size": 1,
    "max_train_steps": 2, "checkpointing_steps": 1, "num_inference_steps": 1, "cpu_threads": 1, "logger": "none",
    "validation_prompts": "a",
}  # fmt: skip


def train_text(shop, folder, **flags):
    """The text script, from scratch."""
    return run_text_script(words(fill({**TEXT, "output_dir": folder, **flags}, shop)), folder)


def test_a_text_model_goes_on_with_the_tokenizer_and_the_latents_that_it_learned(shop, tmp_path):
    """Else captions that were edited give a tokenizer with other ids, and a folder that is gone other latents."""
    shutil.copytree(shop / "pictures", shop / "captioned")
    run = train_text(shop, tmp_path / "run")
    assert run.code == 0, run.err
    ids = CLIPTokenizer.from_pretrained(tmp_path / "run/tokenizer").get_vocab()
    weights = "diffusion_pytorch_model.safetensors"
    vae = (tmp_path / "run/vae" / weights).read_bytes()

    shutil.rmtree(shop / "captioned")
    write_captioned(shop / "captioned", captions=["quick brown foxes", "lazy dogs and jumps"])
    elsewhere = tmp_path / "elsewhere"
    flags = {"max_train_steps": 3, "resume_from_checkpoint": tmp_path / "run/checkpoint-2"}
    run = train_text(shop, elsewhere, **flags)
    assert run.code == 0, run.err
    assert CLIPTokenizer.from_pretrained(elsewhere / "tokenizer").get_vocab() == ids
    assert contents(elsewhere / "tokenizer") == contents(tmp_path / "run/tokenizer")
    assert (elsewhere / "vae" / weights).read_bytes() == vae

    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "alone/checkpoint-2")
    flags["resume_from_checkpoint"] = tmp_path / "alone/checkpoint-2"
    for name in ("autoencoder", "tokenizer"):
        run = train_text(shop, tmp_path / "new", **flags)
        assert run.code == 2
        assert name in run.err
        shutil.copytree(tmp_path / "run" / name, tmp_path / "alone" / name)
    assert train_text(shop, tmp_path / "new", **flags).code == 0
