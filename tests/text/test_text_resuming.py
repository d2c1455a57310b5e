"""A run of train_text2image.py that was stopped goes on as if never stopped, and its checkpoints are pipelines."""

import json
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch

import ddpm_hf
import train_text2image
from ddpm_hf.common.ownership import MANIFEST
from ddpm_hf.latents import training as autoencoder
from ddpm_hf.training.checkpointing import read_manifest
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_text import run_text_script
from tests.support.runs import assert_same_run, read, same, weights
from tests.support.text_runs import EMA, text_command, train_text

RESUMED = {
    "from scratch": ("scratch", {}),
    "cached latents": ("checkpoint", {"cache_latents": True, "caption_dropout": 0.3, **EMA}),
    "text encoder": ("checkpoint", {"train_text_encoder": True, **EMA}),
    "accumulation and flips": (
        "checkpoint",
        {
            "train_data_dir": "{shop}/large",
            "gradient_accumulation_steps": 2,
            "train_batch_size": 3,
            "random_flip": True,
        },
    ),
    "caption dropout": ("checkpoint", {"caption_dropout": 0.5, "train_data_dir": "{shop}/seven"}),
    "offset, perturbation and dream": (
        "checkpoint",
        {"noise_offset": 0.1, "input_perturbation": 0.1, "dream_training": True, "random_flip": True},
    ),
    "streaming": ("checkpoint", {"streaming": True, "caption_dropout": 0.3}),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("case", RESUMED)
def test_resuming_is_never_having_stopped(case, trained, shop, tmp_path):
    """Else an interrupted run is another run: other weights, other averages, other metrics."""
    start, flags = RESUMED[case]
    whole, resumed = trained(start, checkpointing_steps=4, **flags), tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    shutil.copy(whole / "metrics.jsonl", resumed)  # with lines that were logged after the checkpoint
    if start == "scratch":
        for name in ("autoencoder", "tokenizer"):
            shutil.copytree(whole / name, resumed / name)
    run = train_text(start, shop, resumed, resume_from_checkpoint="latest", checkpointing_steps=4, **flags)
    assert "not an exact continuation" not in run.err
    assert_same_run(resumed, whole)


def stop_in_the_autoencoder(shop, folder, after=3, **flags):
    """A run from scratch whose process is told to end in the autoencoder's training."""
    compute_loss, seen = autoencoder.compute_loss, []

    def stopped(*args, **kwargs):
        seen.append(1)
        if len(seen) == 1 + after:  # the first is the rehearsal's
            signal.raise_signal(signal.SIGTERM)
        return compute_loss(*args, **kwargs)

    with mock.patch.object(autoencoder, "compute_loss", stopped):
        return train_text("scratch", shop, folder, **flags)


def test_a_run_stopped_in_its_autoencoder_goes_on(trained, shop, tmp_path):
    """Else a job that its queue ends in the first stage starts over, or trains another autoencoder."""
    whole = trained("scratch", checkpointing_steps=4)
    run = stop_in_the_autoencoder(shop, tmp_path / "run", checkpointing_steps=4)
    assert "--resume_from_checkpoint latest" in run.err
    assert {path.name for path in run.folder.iterdir()} == {"autoencoder", "training_config.json", MANIFEST}
    assert (run.folder / "autoencoder" / "checkpoint-3").is_dir()
    train_text("scratch", shop, run.folder, checkpointing_steps=4, resume_from_checkpoint="latest")
    assert (run.folder / "autoencoder" / "metrics.jsonl").read_bytes() == (
        whole / "autoencoder" / "metrics.jsonl"
    ).read_bytes()
    assert_same_run(run.folder, whole)


@pytest.mark.parametrize("only", [None, "autoencoder"])
def test_other_channels_than_the_autoencoders_are_refused(only, trained, shop, tmp_path):
    """Else a resumed run ends in a traceback, and its recorded settings are those that failed."""
    whole, folder = trained("scratch", checkpointing_steps=4), tmp_path / "run"
    if only is None:
        shutil.copytree(whole, folder)
    else:  # stopped before the UNet's first checkpoint
        shutil.copytree(whole / only, folder / only)
        shutil.copy(whole / "training_config.json", folder)
    settings = (folder / "training_config.json").read_bytes()
    for more in ({}, {"dry_run": True}):
        flags = {"resume_from_checkpoint": "latest", "channels": 4, **more}
        run = run_text_script(text_command("scratch", shop, folder, checkpointing_steps=4, **flags), folder)
        assert run.code == 2
        assert "--channels 4: the autoencoder in " in run.error()
        assert (folder / "training_config.json").read_bytes() == settings


def test_the_time_limit_counts_the_autoencoder(shop, tmp_path):
    """Else a queue's limit kills the run in its first stage, and it starts over each time."""
    run = train_text("scratch", shop, tmp_path / "run", max_train_hours=1e-9)
    assert "stopped at step 1 by the time limit of --max_train_hours" in run.err
    assert {path.name for path in run.folder.iterdir()} == {"autoencoder", "training_config.json", MANIFEST}
    assert read_manifest(run.folder / "autoencoder" / "checkpoint-1")["step"] == 1


def test_a_seed_that_was_drawn_survives_a_stop_in_the_autoencoder(shop, tmp_path):
    """Else a run without --seed goes on with another one, and is no run that anyone can repeat."""
    folder = tmp_path / "run"
    stop_in_the_autoencoder(shop, folder, seed=None)
    drawn = read_manifest(folder / "autoencoder" / "checkpoint-3")["seed"]
    train_text("scratch", shop, folder, seed=None, resume_from_checkpoint="latest", max_train_steps=1)
    assert read_manifest(folder / "autoencoder" / "checkpoint-4")["seed"] == drawn
    assert read_manifest(folder / "checkpoint-1")["seed"] == drawn


def test_a_checkpoint_of_another_kind_is_not_resumed(trained, shop, tmp_path):
    """Else a run goes on with the weights of another model, or loses an average."""
    whole = trained("checkpoint", checkpointing_steps=4, train_text_encoder=True, **EMA)
    for flags, fragment in (
        ({"train_text_encoder": True, "use_ema": "False"}, "--use_ema False"),
        ({"train_text_encoder": "False"}, "--train_text_encoder False"),
        ({"pretrained_model_name_or_path": None, "model_config_name_or_path": "{shop}/broad",
          "text_encoder_name_or_path": "{shop}/stable", "vae_name_or_path": "{shop}/vae"}, "block_out_channels"),
    ):  # fmt: skip
        folder = tmp_path / str(len(flags))
        shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4")
        if "pretrained_model_name_or_path" in flags:  # as of a version that kept no settings
            manifest = folder / "checkpoint-4" / "manifest.json"
            manifest.write_text(json.dumps({**read(manifest), "settings": {}}))
        flags = {"resume_from_checkpoint": "latest", "use_ema": True, **flags}
        run = run_text_script(text_command("checkpoint", shop, folder, **flags), folder)
        assert run.code == 2, fragment
        assert fragment in run.error()


# Pipelines of checkpoints

PROMPT = "a red square"


def pixels_of(pipeline):
    """A sample of a prompt, as an array."""
    pipeline.set_progress_bar_config(disable=True)
    seeds = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, num_inference_steps=2, generator=seeds, output_type="np").images


@pytest.mark.parametrize(("start", "flags"), [("scratch", {"checkpointing_steps": 4}), ("checkpoint", {})])
def test_the_last_checkpoint_samples_as_the_pipeline(start, flags, trained):
    """Else a checkpoint's pipeline has other weights, another sampler or another autoencoder than its run's."""
    folder = trained(start, **flags)
    pipeline = ddpm_hf.load(folder / "checkpoint-6")
    assert type(pipeline) is ddpm_hf.TextToImageDDPMPipeline
    np.testing.assert_allclose(pixels_of(pipeline), pixels_of(ddpm_hf.load(folder)), atol=1e-5)


def test_a_checkpoint_of_a_stopped_run_has_what_it_started_from(trained, tmp_path):
    """Else a run that is not finished cannot be looked at; here nothing but the checkpoint is left of it."""
    folder = trained("checkpoint")
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    moved = ddpm_hf.load(tmp_path / "checkpoint-6")
    assert moved.config.guidance_scale == ddpm_hf.load(folder).config.guidance_scale
    np.testing.assert_allclose(pixels_of(moved), pixels_of(ddpm_hf.load(folder)), atol=1e-5)
    manifest = tmp_path / "checkpoint-6" / "manifest.json"
    state = read(manifest)
    del state["settings"]["guidance_scale"]  # as of a version that did not record it: the checkpoint's
    manifest.write_text(json.dumps(state))
    start = ddpm_hf.load(state["settings"]["pretrained_model_name_or_path"])
    assert ddpm_hf.load(tmp_path / "checkpoint-6").config.guidance_scale == start.config.guidance_scale


def test_a_stopped_run_from_scratch_is_sampled_and_says_what_is_missing(shop, tmp_path, run):
    """Else the tokenizer, which only a finished run saved, is gone, and an error speaks of files within Diffusers."""
    with mock.patch.object(train_text2image.Publisher, "save", side_effect=OSError("the disk is full")):
        done = run_text_script(
            text_command("scratch", shop, tmp_path / "run", checkpointing_steps=4), tmp_path / "run"
        )
    assert done.code != 0
    checkpoint = tmp_path / "run/checkpoint-4"
    assert not (tmp_path / "run/model_index.json").exists()
    averaged, raw = (ddpm_hf.load(checkpoint, ema=ema) for ema in (True, False))
    for part, pipeline in (("_ema", averaged), ("", raw)):
        assert same(dict(pipeline.unet.state_dict()), weights(checkpoint, f"unet{part}"))
        encoder = dict(pipeline.text_encoder.state_dict())
        assert all(
            torch.equal(encoder[name], value) for name, value in weights(checkpoint, f"text_encoder{part}").items()
        )
    assert averaged.tokenizer.model_max_length == averaged.text_encoder.config.max_position_embeddings
    assert same(dict(averaged.vae.state_dict()), weights(tmp_path / "run/autoencoder", "."))
    options = ["--prompt", PROMPT, "--num-images", "1", "--steps", "2", "--out", tmp_path / "out", "--no-ema"]
    code, _, err = run("sample", checkpoint, *options)
    assert code == 0, err
    shutil.rmtree(tmp_path / "run/tokenizer")
    result = run("sample", checkpoint, *options)
    assert_one_line(result, "no tokenizer", "ddpm-hf train-text2image --output_dir", "--resume_from_checkpoint latest")
    (checkpoint / "manifest.json").unlink()  # as of another program
    assert_one_line(run("sample", checkpoint, *options), "TextToImageDDPMPipeline.from_pretrained(BASE, unet=")


def test_a_run_without_averages_has_none_to_load(trained):
    """Else --ema of a run without them is passed over in silence."""
    with pytest.raises(ValueError, match=r"no averaged \(EMA\) weights"):
        ddpm_hf.load(trained("checkpoint") / "checkpoint-6", ema=True)
