"""Resuming where something of the run is gone, or another run lies: nothing is lost, and nothing is made up."""

import contextlib
import errno
import json
import shutil
from unittest import mock

import pytest
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

import train_text2image
from ddpm_hf.common.ownership import claim_files, listed
from ddpm_hf.training.output import TrainingOutput
from tests.support.fixtures_text import write_captioned
from tests.support.runs import attempt, contents, train


@pytest.fixture
def finished(shop, tmp_path):
    """A finished run of two steps, with a checkpoint after each."""
    train(shop, tmp_path / "run", num_epochs=None, max_train_steps=2, checkpointing_steps=1)
    return tmp_path / "run"


def test_a_model_outlives_its_checkpoints(finished, shop, tmp_path):
    """Else `latest`, in a folder whose checkpoints were removed to save space, trains over the finished model."""
    for path in finished.glob("checkpoint-*"):
        shutil.rmtree(path)
    before = contents(finished)
    run = attempt(shop, finished, num_epochs=None, max_train_steps=2, resume_from_checkpoint="latest")
    assert run.code == 2
    assert "the checkpoints of the run in" in run.err
    assert contents(finished) == before
    start = {"model_config_name_or_path": None, "pretrained_model_name_or_path": finished}
    assert f"--pretrained_model_name_or_path {finished}" in run.err
    train(shop, tmp_path / "new", num_epochs=None, max_train_steps=1, **start)
    train(shop, finished, num_epochs=None, max_train_steps=2, overwrite_output_dir=True)


def test_a_checkpoint_that_was_never_written_is_not_missed(shop, tmp_path):
    """Else a run whose disk was full at its first checkpoint cannot be started again by the same line."""
    flags = {"num_epochs": None, "max_train_steps": 3, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch("ddpm_hf.training.checkpointing.save_tensors", full):
        run = attempt(shop, tmp_path / "run", **flags)
    assert run.code == 1  # the last one must be written
    assert not [name for name in listed(tmp_path / "run") if name.startswith("checkpoint-")]
    train(shop, tmp_path / "run", **flags)


def test_a_model_outlives_another_runs_checkpoint(finished, shop, tmp_path):
    """Else a run that goes on from another folder's checkpoint replaces the model in the one that it writes to."""
    shutil.copytree(finished, tmp_path / "other")
    before = contents(tmp_path / "other")
    flags = {"num_epochs": None, "max_train_steps": 3, "resume_from_checkpoint": finished / "checkpoint-1"}
    run = attempt(shop, tmp_path / "other", **flags)
    assert run.code == 2
    assert "is of another run" in run.err
    assert contents(tmp_path / "other") == before
    latest = {**flags, "resume_from_checkpoint": "latest"}
    assert "with --resume_from_checkpoint latest" in run.err
    train(shop, tmp_path / "other", **latest)
    train(shop, tmp_path / "new", **flags)
    train(shop, finished, **flags)  # its own


def test_a_run_from_another_checkpoint_that_was_stopped_begins_again(finished, shop, tmp_path):
    """Else a job that is started again by the same line is refused where it had saved a model before a checkpoint."""
    flags = {"num_epochs": None, "max_train_steps": 4, "checkpointing_steps": 100, "save_model_epochs": 1}
    flags["resume_from_checkpoint"] = finished / "checkpoint-1"
    save = TrainingOutput.save_model

    def save_and_end(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    with mock.patch.object(TrainingOutput, "save_model", save_and_end), contextlib.suppress(KeyboardInterrupt):
        attempt(shop, tmp_path / "new", **flags)
    assert (tmp_path / "new/model_index.json").is_file()
    train(shop, tmp_path / "new", **flags)


def test_a_warm_up_longer_than_the_training_is_named(shop, tmp_path):
    """Else a flag that was given is cut without a word."""
    run = attempt(shop, tmp_path / "run", num_epochs=None, max_train_steps=1, lr_warmup_steps=7)
    assert "the warm-up of --lr_warmup_steps 7 takes all 1 steps" in run.err
    default = attempt(shop, tmp_path / "default", num_epochs=None, max_train_steps=1)
    assert "warm-up" not in default.err


def test_a_card_says_the_learning_rate_that_was_used(shop, tmp_path):
    """Else it says the base rate of --scale_lr, which nothing was trained with."""
    flags = {"scale_lr": True, "learning_rate": 1e-3, "train_batch_size": 4, "lr_scheduler": "constant"}
    run = train(shop, tmp_path / "run", num_epochs=None, max_train_steps=1, **flags)
    assert run.records()[-1]["lr"] == pytest.approx(4e-3)
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["learning_rate"] == pytest.approx(4e-3)


TEXT = {
    "model_config_name_or_path": "{shop}/unet", "vae_widths": "8,16",
    "vae_train_steps": 2, "resolution": 16, "seed": 3, "train_batch_size": 4, "eval_batch_size": 1,
    "max_train_steps": 2, "checkpointing_steps": 1, "num_inference_steps": 1, "cpu_threads": 1, "logger": "none",
    "validation_prompts": "a",
}  # fmt: skip


@pytest.mark.slow
def test_a_text_model_goes_on_with_the_tokenizer_and_the_latents_that_it_learned(shop, tmp_path):
    """Else captions that were edited give a tokenizer with other ids, and a folder that is gone other latents."""
    data = shutil.copytree(shop / "pictures", tmp_path / "captioned")

    def train_text(folder, **flags):
        return attempt(shop, folder, TEXT, train_text2image.main, train_data_dir=data, **flags)

    run = train_text(tmp_path / "run")
    assert run.code == 0, run.err
    ids = CLIPTokenizer.from_pretrained(tmp_path / "run/tokenizer").get_vocab()
    weights = "diffusion_pytorch_model.safetensors"
    vae = (tmp_path / "run/vae" / weights).read_bytes()

    shutil.rmtree(data)
    write_captioned(data, captions=["quick brown foxes", "lazy dogs and jumps"])
    elsewhere = tmp_path / "elsewhere"
    flags = {"max_train_steps": 3, "resume_from_checkpoint": tmp_path / "run/checkpoint-2"}
    run = train_text(elsewhere, **flags)
    assert run.code == 0, run.err
    assert CLIPTokenizer.from_pretrained(elsewhere / "tokenizer").get_vocab() == ids
    assert contents(elsewhere / "tokenizer") == contents(tmp_path / "run/tokenizer")
    assert (elsewhere / "vae" / weights).read_bytes() == vae

    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "alone/checkpoint-2")
    flags["resume_from_checkpoint"] = tmp_path / "alone/checkpoint-2"
    for name in ("autoencoder", "tokenizer"):
        run = train_text(tmp_path / "new", **flags)
        assert run.code == 2
        assert name in run.err
        shutil.copytree(tmp_path / "run" / name, tmp_path / "alone" / name)
    assert train_text(tmp_path / "new", **flags).code == 0

    other = tmp_path / "other"  # with an autoencoder of its own
    AutoencoderKL.from_pretrained(tmp_path / "run/vae").save_pretrained(other / "autoencoder")
    model = AutoencoderKL.from_pretrained(other / "autoencoder")
    model.decoder.conv_out.bias.data += 1
    model.save_pretrained(other / "autoencoder")
    claim_files(other / "autoencoder", ["config.json", "diffusion_pytorch_model.safetensors"])
    run = train_text(other, **flags)
    assert run.code == 2
    assert "is another autoencoder than that of" in run.err
