"""train_text2image.py: what it leaves on disk, resumed as uninterrupted, each flag read, and the loss as stock's."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_dream_and_update_latents
from PIL import Image
from safetensors.torch import load_file

import ddpm_hf
import train_text2image
from ddpm_hf.common.errors import UsageError
from ddpm_hf.common.ownership import MANIFEST
from ddpm_hf.common.pictures import image_grid
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.data import DataFlags
from ddpm_hf.latents import training as autoencoder
from ddpm_hf.latents.table import TensorTable
from ddpm_hf.portable.pipeline_text2image_ddpm_hf import tokenize
from ddpm_hf.text.captions import encode_captions
from ddpm_hf.training.checkpointing import read_manifest
from ddpm_hf.training.flags import PipelineConfig
from ddpm_hf.training.run import Run as TrainingRun
from ddpm_hf.training.setup.settings import public_settings, save_settings
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.fixtures_text import (
    CAPTIONS,
    WIDTH,
    parse_text,
    run_text_script,
    stable_diffusion_scheduler,
    stock_pipeline,
    tiny_text_encoder,
    tiny_text_pipeline,
    tiny_text_unet,
    write_captioned,
    write_text_unet,
)
from tests.support.fixtures_unconditional import Run, fill, random_pixels, words

SCRIPT = Path(train_text2image.__file__)
DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Captioned pictures, checkpoints and models to train with, by name."""
    root = tmp_path_factory.mktemp("shop")
    write_captioned(root / "pictures")
    write_captioned(root / "seven", count=7)
    write_captioned(root / "few", count=3)
    write_captioned(root / "large", height=22, width=20)
    write_captioned(root / "described", captions=["a cat", "a dog"], column="description")
    write_captioned(root / "uncaptioned", column="title")
    write_text_unet(root / "unet")
    write_text_unet(root / "wide", block_out_channels=[16, 16])
    write_text_unet(root / "narrow", cross_attention_dim=WIDTH)
    write_text_unet(root / "broad", cross_attention_dim=WIDTH, block_out_channels=[16, 16])
    write_text_unet(root / "rgb", in_channels=3, out_channels=3)
    write_text_unet(root / "plain", _class_name="UNet2DModel")
    tiny_vae(scaling_factor=0.5).save_pretrained(root / "vae")
    pipeline = tiny_text_pipeline()
    sampler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False, **DIFFUSION)
    stock_pipeline(pipeline, sampler).save_pretrained(root / "stable")
    raw = tiny_text_unet(seed=1)
    (root / "no-model").mkdir()
    raw.save_pretrained(root / "raw")
    return root


SMALL = {
    "train_data_dir": "{shop}/pictures", "resolution": 16, "seed": 3, "train_batch_size": 4, "eval_batch_size": 2,
    "max_train_steps": 6, "learning_rate": 1e-3, "lr_warmup_steps": 2, "num_inference_steps": 2, "cpu_threads": 1,
    "logger": "none", "logging_steps": 1, "validation_prompts": "a red square",
}  # fmt: skip
SCRATCH = {
    **SMALL, "model_config_name_or_path": "{shop}/unet", "vae_widths": "8,16", "vae_train_steps": 4,
}  # fmt: skip
CHECKPOINT = {**SMALL, "pretrained_model_name_or_path": "{shop}/stable"}
START = {"scratch": SCRATCH, "checkpoint": CHECKPOINT}


def command(start, shop, output_dir, **flags):
    """The command line of a small run, from scratch or from a checkpoint."""
    return words({**fill({**START[start], **flags}, shop), "output_dir": output_dir})


def train(start, shop, output_dir, **flags):
    """Run the script to its end."""
    run = run_text_script(command(start, shop, output_dir, **flags), output_dir)
    assert run.code == 0, run.err
    return run


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """A run's folder by how it starts and its flags; none is made twice."""
    root = tmp_path_factory.mktemp("trained")

    @functools.cache
    def made(start: str, flags: tuple) -> Path:
        return train(start, shop, root / str(made.cache_info().misses), **dict(flags)).folder

    return lambda start, **flags: made(start, tuple(flags.items()))


def weights(folder, name="unet"):
    """The tensors of a saved model, Diffusers' or transformers'."""
    (path,) = (folder / name).glob("*.safetensors")
    return load_file(path)


def same(ours, theirs):
    """Whether two dicts of tensors are equal to the bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def last_checkpoint(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def optimizer_state(checkpoint):
    """Adam's moments, as one flat dict of tensors."""
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    return {f"{index}.{name}": value for index, one in state.items() for name, value in one.items()}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in records(folder)]


def read(path):
    return json.loads(path.read_text())


def assert_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **tolerance, msg=f"{name}: {{}}".format)


# What is on disk


def test_from_scratch_all_of_a_pipeline_lies_there(trained):
    """Else a part of the model is missing, or of another's width, and nobody can use it."""
    folder = trained("scratch", checkpointing_steps=4)
    index = read(folder / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
        assert (folder / part).is_dir()
        assert part in index
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    pictures = {f"{kind}-{step:06d}.png" for kind in ("step", "chain") for step in (2, 6)}
    assert {path.name for path in (folder / "samples").iterdir()} == pictures
    assert list((folder / "autoencoder" / "samples").iterdir())
    assert len(records(folder)) == 6
    assert len(records(folder / "autoencoder")) == 4
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]


@pytest.mark.parametrize("start", START)
def test_stock_loads_the_result_and_draws_our_images(start, trained):
    """Else what was trained here can only be used here."""
    folder = trained(start)
    drawn = []
    for cls in (StableDiffusionPipeline, train_text2image.TextToImageDDPMPipeline):
        pipeline = cls.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
        drawn.append(pipeline(CAPTIONS[:2], generator=torch.Generator().manual_seed(0), **options).images)
    assert drawn[0].shape == (2, 16, 16, 3)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-3)


@pytest.mark.parametrize(("start", "ema"), [("scratch", True), ("checkpoint", False)])
def test_a_checkpoint_loads_by_its_subfolder(start, ema, trained):
    """Else a run's checkpoints are of no use to code written for Diffusers' script."""
    folder = trained(start, checkpointing_steps=4) if start == "scratch" else trained(start)
    loaded = UNet2DConditionModel.from_pretrained(folder, subfolder="checkpoint-6/unet")
    assert same(dict(loaded.state_dict()), weights(folder / "checkpoint-6"))
    saved = weights(folder / "checkpoint-6", "unet_ema" if ema else "unet")
    assert same(weights(folder), saved)  # the pipeline's own is the average, where there is one
    assert (folder / "checkpoint-6" / "unet_ema").is_dir() == ema


def test_the_autoencoder_is_scaled_to_unit_variance_and_frozen(trained, shop):
    """Else the diffusion starts from latents of another variance than its noise, or ruins them as it trains."""
    folder = trained("scratch", checkpointing_steps=4)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    assert same(weights(folder, "vae"), weights(folder / "autoencoder", "."))
    pixels = torch.from_numpy(random_pixels(8, 16, 16)).permute(0, 3, 1, 2) / 127.5 - 1
    posterior = vae.encode(pixels).latent_dist
    deviation = (posterior.mean.var() + posterior.var.mean()).detach() ** 0.5
    assert float(deviation) * vae.config.scaling_factor == pytest.approx(1, abs=0.1)


def test_the_model_card_shows_how_to_ask_for_an_image(trained):
    """Else a stranger who follows the card's code draws nothing, and the Hub lists the model where nobody looks."""
    card = (trained("scratch", checkpointing_steps=4) / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    calls = {line for line in card.splitlines() if line.startswith("image = pipeline(")}
    assert len(calls) == 1  # for each way to load it
    assert calls.pop().startswith('image = pipeline("')


def test_captions_are_the_default_prompts_also_of_cached_latents(shop, tmp_path):
    """Else the first run that a user starts on a folder of captioned pictures dies after its autoencoder."""
    for start, flags in (("checkpoint", {}), ("checkpoint", {"cache_latents": True}), ("scratch", {})):
        folder = tmp_path / f"{start}-{len(flags)}"
        run = train(start, shop, folder, validation_prompts=None, eval_batch_size=16, max_train_steps=2, **flags)
        (grid,) = (run.folder / "samples").glob("step-*")
        assert Image.open(grid).height == 2 + 8 * 66  # a row for each of eight captions


def test_a_grid_shows_the_prompts_row_by_row(trained, shop):
    """Else a picture in the grid is of another prompt than its row's."""
    from ddpm_hf.common.randomness import keyed_seed

    folder = trained("checkpoint")
    pipeline = train_text2image.TextToImageDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    own = [torch.Generator().manual_seed(keyed_seed(3, "sample", 0, index)) for index in range(2)]
    images = pipeline(["a red square"] * 2, num_inference_steps=2, generator=own).images
    shown = np.asarray(Image.open(folder / "samples" / "step-000006.png")).astype(int)
    assert np.abs(shown - np.asarray(image_grid(images, 2, scale=4, legend=["a red square"]))).max() <= 2


def test_overwriting_leaves_nothing_of_the_earlier_run(shop, tmp_path):
    """Else the autoencoder's log, or a component, is a mixture of two runs."""
    first = train("scratch", shop, tmp_path / "run", seed=1)
    (first.folder / "notes.txt").write_text("mine")
    train("scratch", shop, tmp_path / "run", overwrite_output_dir=True, max_train_steps=2, checkpointing_steps=2)
    assert len(records(first.folder / "autoencoder")) == 4
    assert {path.name for path in first.folder.glob("checkpoint-*")} == {"checkpoint-2"}
    assert {path.name for path in (first.folder / "autoencoder").glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
    }
    assert (first.folder / "notes.txt").read_text() == "mine"


# From a checkpoint


def test_what_is_not_trained_stays_as_it_was(trained, shop):
    """Else training on changes the latents or the words, and the checkpoint's sampler is lost."""
    folder = trained("checkpoint")
    for part in ("vae", "text_encoder"):
        assert same(weights(folder, part), weights(shop / "stable", part))
    assert not same(weights(folder), weights(shop / "stable"))
    config, before = (read(one / "scheduler" / "scheduler_config.json") for one in (folder, shop / "stable"))
    assert config["_class_name"] == "PNDMScheduler"
    assert before.items() <= config.items()
    tokens = [read(one / "tokenizer" / "tokenizer.json")["model"] for one in (folder, shop / "stable")]
    assert tokens[0] == tokens[1]
    assert not (last_checkpoint(folder) / "text_encoder").exists()


def test_the_text_encoder_is_trained_along(trained, shop):
    """Else --train_text_encoder trains half of what it says, or saves the raw weights where an average was kept."""
    folder = trained("checkpoint", train_text_encoder=True, use_ema=True, ema_max_decay=0.5, checkpointing_steps=4)
    assert same(weights(folder, "vae"), weights(shop / "stable", "vae"))
    checkpoint = last_checkpoint(folder)
    raw, average = weights(checkpoint, "text_encoder"), weights(checkpoint, "text_encoder_ema")
    before = weights(shop / "stable", "text_encoder")
    assert not same(raw, before)
    assert not same(raw, average)
    assert same(weights(folder, "text_encoder"), average)
    assert same(weights(folder), weights(checkpoint, "unet_ema"))
    assert read(checkpoint / "text_encoder_ema" / "ema.json")["optimization_step"] == 6


def test_zero_terminal_snr_takes_a_sampler_that_can(trained):
    """Else a model of zero terminal SNR is saved with a sampler that divides by zero, or never starts from noise."""
    folder = trained("checkpoint", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    config = read(folder / "scheduler" / "scheduler_config.json")
    assert config["_class_name"] == "DDPMScheduler"
    assert config["rescale_betas_zero_snr"]
    assert config["timestep_spacing"] == "trailing"
    assert config["prediction_type"] == "v_prediction"
    assert not config["clip_sample"]
    assert {name: config[name] for name in DIFFUSION} == DIFFUSION


@pytest.mark.parametrize("cached", [False, True])
def test_grays_are_trained_where_the_autoencoder_has_them(cached, shop, tmp_path):
    """Else an autoencoder of gray images, such as the digits', crashes on the colours that it is given."""
    tiny_vae(scaling_factor=0.5, in_channels=1, out_channels=1).save_pretrained(tmp_path / "gray")
    flags = {"vae_name_or_path": tmp_path / "gray", "max_train_steps": 1, "cache_latents": cached}
    run = train("scratch", shop, tmp_path / "run", **flags)
    assert Image.open(run.folder / "samples" / "step-000001.png").mode == "L"


def test_a_chain_shorter_than_the_grids_steps_is_drawn_whole(shop, tmp_path):
    """Else a model of few timesteps dies at its first grid, or its card's code fails."""
    flags = {"ddpm_num_steps": 10, "num_inference_steps": 50, "max_train_steps": 1, "vae_name_or_path": "{shop}/vae"}
    folder = train("scratch", shop, tmp_path / "run", **flags).folder
    calls = {line for line in (folder / "README.md").read_text().splitlines() if "image = pipeline(" in line}
    pipeline = train_text2image.TextToImageDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for call in calls:
        exec(call, {"pipeline": pipeline})
    assert any("num_inference_steps=" in call for call in calls)


def test_a_stream_trains_a_new_unet_where_the_rest_is_given(shop, tmp_path):
    """Else the recipe from scratch, which caches latents, forbids a stream to a user who asked for no cache."""
    parts = {"text_encoder_name_or_path": "{shop}/stable", "vae_name_or_path": "{shop}/vae"}
    flags = {"model_config_name_or_path": "{shop}/narrow", "streaming": True, "max_train_steps": 2}
    assert len(train("scratch", shop, tmp_path / "run", **flags, **parts).records()) == 2


def test_a_text_encoder_of_ones_own_is_taken_frozen(shop, tmp_path):
    """Else a CLIP text encoder named for a model from scratch is trained, or replaced by a new one."""
    run = train(
        "scratch",
        shop,
        tmp_path / "run",
        text_encoder_name_or_path="{shop}/stable",
        vae_name_or_path="{shop}/vae",
        model_config_name_or_path="{shop}/narrow",
        max_train_steps=2,
    )
    assert same(weights(run.folder, "text_encoder"), weights(shop / "stable", "text_encoder"))
    assert same(weights(run.folder, "vae"), weights(shop / "vae", "."))
    assert not (run.folder / "autoencoder").exists()


# Resuming


def assert_same_run(ours, theirs):
    """Two output folders that hold the same run, bit for bit."""
    for part in ("unet", "text_encoder", "vae"):
        assert same(weights(ours, part), weights(theirs, part)), part
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    checkpoints = last_checkpoint(ours), last_checkpoint(theirs)
    assert checkpoints[0].name == checkpoints[1].name
    tensors = [sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors")) for one in checkpoints]
    assert tensors[0] == tensors[1]
    for name in tensors[0]:
        assert same(load_file(checkpoints[0] / name), load_file(checkpoints[1] / name)), name
    assert same(*map(optimizer_state, checkpoints))


EMA = {"use_ema": True, "ema_max_decay": 0.8}
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
    run = train(start, shop, resumed, resume_from_checkpoint="latest", checkpointing_steps=4, **flags)
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
        return train("scratch", shop, folder, **flags)


def test_a_run_stopped_in_its_autoencoder_goes_on(trained, shop, tmp_path):
    """Else a job that its queue ends in the first stage starts over, or trains another autoencoder."""
    whole = trained("scratch", checkpointing_steps=4)
    run = stop_in_the_autoencoder(shop, tmp_path / "run", checkpointing_steps=4)
    assert "--resume_from_checkpoint latest" in run.err
    assert {path.name for path in run.folder.iterdir()} == {"autoencoder", "training_config.json", MANIFEST}
    assert (run.folder / "autoencoder" / "checkpoint-3").is_dir()
    train("scratch", shop, run.folder, checkpointing_steps=4, resume_from_checkpoint="latest")
    assert (run.folder / "autoencoder" / "metrics.jsonl").read_bytes() == (
        whole / "autoencoder" / "metrics.jsonl"
    ).read_bytes()
    assert_same_run(run.folder, whole)


def test_the_time_limit_counts_the_autoencoder(shop, tmp_path):
    """Else a queue's limit kills the run in its first stage, and it starts over each time."""
    run = train("scratch", shop, tmp_path / "run", max_train_hours=1e-9)
    assert "stopped at step 1 by the time limit of --max_train_hours" in run.err
    assert {path.name for path in run.folder.iterdir()} == {"autoencoder", "training_config.json", MANIFEST}
    assert read_manifest(run.folder / "autoencoder" / "checkpoint-1")["step"] == 1


def test_a_seed_that_was_drawn_survives_a_stop_in_the_autoencoder(shop, tmp_path):
    """Else a run without --seed goes on with another one, and is no run that anyone can repeat."""
    folder = tmp_path / "run"
    stop_in_the_autoencoder(shop, folder, seed=None)
    drawn = read_manifest(folder / "autoencoder" / "checkpoint-3")["seed"]
    train("scratch", shop, folder, seed=None, resume_from_checkpoint="latest", max_train_steps=1)
    assert read_manifest(folder / "autoencoder" / "checkpoint-4")["seed"] == drawn
    assert read_manifest(folder / "checkpoint-1")["seed"] == drawn


# What must not matter


@pytest.mark.parametrize(
    ("start", "flags"),
    [
        ("checkpoint", {"random_flip": True, "caption_dropout": 0.4}),
        ("checkpoint", {"train_data_dir": "{shop}/large", "center_crop": True, "train_text_encoder": True}),
    ],
)
def test_cached_latents_train_as_computed_ones(start, flags, trained):
    """Else the cache holds another image's latent, or another caption's embedding, or no flips."""
    each, once = (trained(start, logging_steps=1, cache_latents=cached, **flags) for cached in (False, True))
    assert losses(once) == pytest.approx(losses(each), rel=1e-4)
    assert_close(weights(once), weights(each), rtol=0, atol=1e-3)


def test_a_cache_is_used_again_and_never_for_another_model(trained, shop, tmp_path):
    """Else every run encodes all images anew, or trains on the latents of another autoencoder."""
    flags = {"cache_latents": True, "center_crop": True, "cache_dir": tmp_path / "cache", "max_train_steps": 1}
    first = train("checkpoint", shop, tmp_path / "first", **flags)
    assert not (first.folder / "cache").exists()
    tables = {path.name for path in (tmp_path / "cache" / "ddpm_hf").iterdir()}
    assert len(tables) == 2
    with mock.patch.object(AutoencoderKL, "encode", autospec=True, side_effect=AutoencoderKL.encode) as encode:
        again = train("checkpoint", shop, tmp_path / "again", **flags)
    assert encode.call_count == 1  # the rehearsal's batch
    assert losses(again.folder) == losses(first.folder)
    train("scratch", shop, tmp_path / "other", vae_name_or_path="{shop}/vae", **flags)
    assert {path.name for path in (tmp_path / "cache" / "ddpm_hf").iterdir()} == tables  # the same autoencoder
    train("checkpoint", shop, tmp_path / "flips", random_flip=True, **flags)
    train("scratch", shop, tmp_path / "new", **flags)
    assert len(list((tmp_path / "cache" / "ddpm_hf").iterdir())) == 3


def test_gradient_checkpointing_changes_no_number(trained):
    """Else saving memory trains another model."""
    flags = {"train_text_encoder": True}
    plain, spared = (trained("checkpoint", **flags, gradient_checkpointing=on) for on in (False, True))
    assert losses(spared) == pytest.approx(losses(plain), rel=1e-5)
    assert_close(weights(spared), weights(plain), rtol=0, atol=1e-4)


def test_compiling_trains_the_compiled_model(shop, tmp_path):
    """Else --compile is accepted and the model runs as it is, or what is saved is the wrapper."""
    made = []

    class Compiled(torch.nn.Module):
        """What torch.compile returns: another module around the model, which it runs."""

        def __init__(self, model, **options):
            super().__init__()
            self._orig_mod, self.options, self.calls = model, options, 0
            made.append(self)

        def forward(self, *args, **kwargs):
            self.calls += self.training
            return self._orig_mod(*args, **kwargs)

    runs = [tmp_path / "plain", tmp_path / "compiled"]
    train("checkpoint", shop, runs[0], max_train_steps=2)
    with mock.patch.object(torch, "compile", Compiled):
        train("checkpoint", shop, tmp_path / "dry", max_train_steps=2, dry_run=True, compile=True)
        assert not made  # compiling takes minutes
        train("checkpoint", shop, runs[1], max_train_steps=2, compile=True)
    (one,) = made
    assert isinstance(one._orig_mod, train_text2image.TextConditioned)
    assert one.calls == 3  # the rehearsal's and two steps'
    assert same(*map(weights, runs))
    assert same(*(weights(last_checkpoint(run)) for run in runs))


def test_looking_changes_nothing(trained):
    """Else drawing, saving or validating in between draws from the training's randomness, or leaves dropout off."""
    shared = {"validation_split": 0.25, "caption_dropout": 0.3, **EMA}
    rarely = trained("checkpoint", validation_steps=100, **shared)
    often = {"save_images_epochs": 1, "save_model_epochs": 1, "validation_steps": 1, "checkpointing_steps": 1}
    often = trained("checkpoint", **often, **shared)
    assert same(weights(often), weights(rarely))
    assert all("validation_loss" in record for record in records(often))
    for ours, theirs in zip(records(rarely), records(often), strict=True):
        assert ours.items() <= theirs.items()


@pytest.fixture(scope="module")
def two_ranks(shop, tmp_path_factory):
    """4 steps of an autoencoder and 4 of a UNet, by two ranks of 4 and by one of 8."""
    root = tmp_path_factory.mktemp("ranks")
    flags = {
        "train_data_dir": "{shop}/seven",  # of which the second rank has three
        "max_train_steps": 4,
        "eval_batch_size": 3,
        "save_images_epochs": 2,
        "adam_epsilon": 1e-2,  # Adam then magnifies no rounding
        "cache_latents": True,
        "caption_dropout": 0.3,
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*launch, str(SCRIPT), *command("scratch", shop, root / "two", **flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return root / "two", train("scratch", shop, root / "one", **flags, train_batch_size=8).folder


@pytest.mark.slow
def test_two_ranks_train_as_one_with_twice_the_batch(two_ranks):
    """Else ranks see the same images or noise, train two autoencoders, or cache each other's latents."""
    two, one = two_ranks
    assert read_manifest(two / "checkpoint-4")["processes"] == 2
    for stage in (".", "autoencoder"):
        for ours, theirs in zip(records(two / stage), records(one / stage), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
    for part in ("vae", "unet", "text_encoder"):
        assert_close(weights(two, part), weights(one, part), rtol=1e-3, atol=1e-4)
    scale = [AutoencoderKL.load_config(folder / "vae")["scaling_factor"] for folder in two_ranks]
    assert scale[0] == pytest.approx(scale[1], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_draw_the_same_grids_and_leave_whole_files(two_ranks):
    """Else an image depends on the rank that drew it, or the ranks write over one another."""
    two, one = two_ranks
    for name in sorted(path.name for path in (one / "samples").iterdir()):
        ours, theirs = (np.asarray(Image.open(run / "samples" / name)).astype(int) for run in two_ranks)
        assert np.abs(ours - theirs).max() <= 2
    assert not [path for path in two.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]


def test_a_rank_that_comes_late_computes_its_share(tmp_path):
    """Else a rank that sees what another has written already shares out the rest anew, and some is never computed."""
    keys = [bytes([number]) * 16 for number in range(8)]
    meeting = threading.Barrier(2, timeout=30)
    found = {}

    def rank(number):
        until = time.monotonic() + 0.5
        while number == 1 and not list(tmp_path.glob("part-*")) and time.monotonic() < until:
            time.sleep(0.01)
        accelerator = SimpleNamespace(
            process_index=number, num_processes=2, is_local_main_process=False, wait_for_everyone=meeting.wait
        )
        table = TensorTable(tmp_path)
        table.fill(keys, lambda places: torch.tensor(places).float()[:, None], accelerator, "")
        found[number] = set(table.row_of)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    assert found == {0: set(keys), 1: set(keys)}


# The loss


class Bench(NamedTuple):
    """What `compute_loss` is called with, outside of a run."""

    config: train_text2image.Text2ImageConfig
    components: train_text2image.Components
    model: train_text2image.TextConditioned
    batch: dict
    keys: StepKeys

    def losses(self, keys=None, **batch):
        """The losses [N] of the batch, with some of it replaced."""
        found = train_text2image.compute_loss(
            self.model,
            {**self.batch, **batch},
            keys or self.keys,
            run=TrainingRun(self.config, self.config, SimpleNamespace(device=torch.device("cpu"))),
            config=self.config,
            components=self.components,
            null_embedding=None,
        )
        return found.losses.detach()

    def drawn(self):
        """(x_0, noise, t, embeddings): what the keys stand for."""
        vae = self.components.vae
        pixels = self.batch["images"].float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        x_start = (posterior.mean + posterior.std * self.keys.normal_like(posterior.mean, "posterior")) * (
            vae.config.scaling_factor
        )
        timesteps = (self.keys.uniform("timestep") * 1000).long()
        ids = tokenize(self.components.tokenizer, self.batch["captions"])[0]
        with torch.no_grad():
            text = self.components.text_encoder(ids)[0]
        return x_start, self.keys.normal_like(x_start), timesteps, text


def bench(count=6, prediction_type="epsilon", **flags):
    """A bench around the tiny models; flags as on the command line."""
    config = parse_text(words({"pretrained_model_name_or_path": "x", "train_data_dir": "x", **flags}))
    tokenizer, text_encoder = tiny_text_encoder()
    scheduler = stable_diffusion_scheduler(prediction_type=prediction_type)
    components = train_text2image.Components(
        tiny_vae(scaling_factor=0.5), text_encoder, tokenizer, tiny_text_unet(), scheduler, {}
    )
    model = train_text2image.TextConditioned(components.unet, text_encoder if config.trains_text_encoder else None)
    images = torch.from_numpy(random_pixels(count, 16, 16)).permute(0, 3, 1, 2).contiguous()
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]
    return Bench(config, components, model, {"images": images, "captions": captions}, StepKeys(5, 2, 0, count))


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_a_few_lines_of_stock(prediction_type, along):
    """Else what is minimised is not the objective that a Stable Diffusion checkpoint was trained by."""
    one = bench(prediction_type=prediction_type, train_text_encoder=along)
    x_start, noise, timesteps, text = one.drawn()
    stock = diffusers.DDPMScheduler(prediction_type=prediction_type)
    x_t = stock.add_noise(x_start, noise, timesteps)
    with torch.no_grad():
        output = one.components.unet(x_t, timesteps, text).sample
    velocity = stock.get_velocity(x_start, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x_start}[prediction_type]
    expected = torch.nn.functional.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_dream_is_diffusers_own(power):
    """Else --dream_training moves noise and target otherwise than Diffusers' script (Zhou et al. 2023)."""
    one = bench(dream_training=True, dream_detail_preservation=power)
    x_start, noise, timesteps, text = one.drawn()
    stock = diffusers.DDPMScheduler()
    noisy, target = compute_dream_and_update_latents(
        one.components.unet,
        stock,
        timesteps,
        noise,
        stock.add_noise(x_start, noise, timesteps),
        noise.clone(),
        text,
        power,
    )
    with torch.no_grad():
        output = one.components.unet(noisy, timesteps, text).sample
    expected = ((output - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-3, atol=1e-4)
    assert (expected - bench().losses()).abs().max() > 1e-3


def test_dream_is_one_thing_whatever_is_predicted():
    """Else DREAM of a v-prediction, which Diffusers' script refuses, trains on noise that no epsilon stands for."""
    one = bench(prediction_type="v_prediction", dream_training=True)
    x_start, noise, timesteps, text = one.drawn()
    x_t = one.components.scheduler.add_noise(x_start, noise, timesteps)
    with torch.no_grad():
        v = one.components.unet(x_t, timesteps, text).sample
    alpha_bar = one.components.scheduler.alphas_cumprod[timesteps].float()[:, None, None, None]
    epsilon = alpha_bar**0.5 * v + (1 - alpha_bar) ** 0.5 * x_t
    moved = noise + (1 - alpha_bar) ** 0.5 * (noise - epsilon)
    with torch.no_grad():
        output = one.components.unet(one.components.scheduler.add_noise(x_start, moved, timesteps), timesteps, text)
    target = alpha_bar**0.5 * moved - (1 - alpha_bar) ** 0.5 * x_start
    expected = ((output.sample - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-3, atol=1e-4)


def test_offset_noise_is_shared_by_a_channel():
    """Else --noise_offset adds noise that averages out, or adds it to the target alone."""
    one = bench(noise_offset=0.3)
    x_start, noise, timesteps, text = one.drawn()
    noise = noise + 0.3 * one.keys.normal_like(x_start[:, :, :1, :1].clone(), "noise_offset")
    with torch.no_grad():
        output = one.components.unet(one.components.scheduler.add_noise(x_start, noise, timesteps), timesteps, text)
    expected = ((output.sample - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-4, atol=1e-5)


def test_a_perturbed_input_is_predicted_unperturbed():
    """Else --input_perturbation changes the target too, and is but larger noise (Ning et al. 2023)."""
    one = bench(input_perturbation=0.3)
    x_start, noise, timesteps, text = one.drawn()
    added = noise + 0.3 * one.keys.normal_like(x_start, "input_perturbation")
    with torch.no_grad():
        output = one.components.unet(one.components.scheduler.add_noise(x_start, added, timesteps), timesteps, text)
    expected = ((output.sample - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-4, atol=1e-5)


def test_min_snr_weights_are_the_peers():
    """Else --snr_gamma weighs the noise levels otherwise than a peer's run with the same flag."""
    for prediction_type, offset in (("epsilon", 0), ("v_prediction", 1)):
        plain, weighed = bench(prediction_type=prediction_type), bench(prediction_type=prediction_type, snr_gamma=5)
        timesteps = plain.drawn()[2]
        snr = diffusers.training_utils.compute_snr(diffusers.DDPMScheduler(), timesteps)
        expected = plain.losses() * snr.clamp(max=5.0) / (snr + offset)
        torch.testing.assert_close(weighed.losses(), expected, rtol=1e-3, atol=1e-6)


PERTURBED = {"noise_offset": 0.3, "input_perturbation": 0.3, "dream_training": True, "caption_dropout": 0.9}


@pytest.mark.parametrize("flag", PERTURBED)
def test_validation_is_never_perturbed(flag):
    """Else validation losses of two settings cannot be compared."""
    keys = StepKeys(5, 0, 0, 6, validation=True)
    torch.testing.assert_close(bench(**{flag: PERTURBED[flag]}).losses(keys), bench().losses(keys))
    assert not torch.allclose(bench(**{flag: PERTURBED[flag]}).losses(), bench().losses())


# Captions


def text_input(one: Bench, keys: StepKeys, null=None):
    """What the model is given to read."""
    device = SimpleNamespace(device=torch.device("cpu"))
    return train_text2image.caption_input(one.batch, keys, one.config, one.components, null, device)


@pytest.mark.parametrize("how", ["ids", "embedded", "cached"])
def test_captions_are_left_out_as_often_as_asked(how):
    """Else classifier-free guidance has another unconditional model than the flag says."""
    count, share = 2000, 0.15
    one = bench(2, caption_dropout=share, train_text_encoder=how == "ids")
    tokenizer, encoder = one.components.tokenizer, one.components.text_encoder
    one.batch["captions"] = ["a red square"] * count
    null = tokenize(tokenizer, [""])[0]
    if how != "ids":
        null = encode_captions(encoder, tokenizer, [""], torch.device("cpu")).detach()
    if how == "cached":
        embedding = encode_captions(encoder, tokenizer, ["a red square"], torch.device("cpu")).detach()
        one.batch["embeddings"] = embedding.expand(count, -1, -1)
    keys = StepKeys(7, 0, 0, count)
    found = text_input(one, keys, null)
    dropped = torch.isclose(found.float(), null.float(), atol=1e-4).flatten(1).all(dim=1)
    assert abs(float(dropped.float().mean()) - share) < 4 * (share * (1 - share) / count) ** 0.5
    assert torch.equal(dropped, keys.uniform("caption_dropout") < share)  # the same ones, whatever is cached
    held_out = text_input(one, keys._replace(validation=True), null)
    assert not torch.isclose(held_out.float(), null.float(), atol=1e-4).flatten(1).all(dim=1).any()


def test_one_of_several_captions_is_drawn_each_epoch():
    """Else all but one of an image's captions are never read."""
    from ddpm_hf.data import augmentation_uniforms, choose_caption

    several = ["one", "two", "three"]
    drawn = [choose_caption(several, augmentation_uniforms(3, epoch, 5)[3], "it") for epoch in range(60)]
    assert set(drawn) == set(several)


# Command lines of Diffusers' scripts

NAMED = {"pretrained_model_name_or_path": "x", "train_data_dir": "x"}
PEER_DEFAULTS = {
    "pretrained_model_name_or_path": None, "revision": None, "variant": None, "dataset_name": None,
    "dataset_config_name": None, "train_data_dir": None, "max_train_samples": None, "validation_prompts": None,
    "cache_dir": None, "seed": None, "max_train_steps": None, "snr_gamma": None, "non_ema_revision": None,
    "hub_token": None, "prediction_type": None, "hub_model_id": None, "mixed_precision": None,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None,
    "input_perturbation": 0, "image_column": "image", "caption_column": "text", "output_dir": "sd-model-finetuned",
    "resolution": 512, "train_batch_size": 16, "num_train_epochs": 100, "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 500, "dream_detail_preservation": 1.0,
    "dataloader_num_workers": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "logging_dir": "logs", "report_to": "tensorboard", "local_rank": -1,
    "checkpointing_steps": 500, "noise_offset": 0, "validation_epochs": 5,
    "tracker_project_name": "text2image-fine-tune", "image_interpolation_mode": "lanczos",
    "center_crop": False, "random_flip": False, "gradient_checkpointing": False, "scale_lr": False,
    "dream_training": False, "use_8bit_adam": False, "allow_tf32": False, "use_ema": False, "offload_ema": False,
    "foreach_ema": False, "push_to_hub": False, "enable_xformers_memory_efficient_attention": False,
}  # fmt: skip
OURS = {"num_train_epochs": "num_epochs", "report_to": "logger", "validation_epochs": "save_images_epochs"}
# said otherwise there, and meant alike: none is "no", no prompts are an empty list, the one image column is found, the
# size is the checkpoint's (512 for Stable Diffusion 1, which test_sizes shows)
SAID_OTHERWISE = {
    "mixed_precision": "no", "validation_prompts": [], "image_column": None, "foreach_ema": True, "resolution": None,
}  # fmt: skip


def test_the_peers_flags_are_all_here():
    """Else the list above, which the tests go by, lost a flag."""
    assert len(PEER_DEFAULTS) == 57


@pytest.mark.parametrize("flag", PEER_DEFAULTS)
def test_a_peers_flag_has_its_default_and_its_meaning(flag):
    """Else a peer's command line fails here, or trains with another value where it says nothing."""
    default, name = PEER_DEFAULTS[flag], OURS.get(flag, flag)
    named = {key: value for key, value in NAMED.items() if key != flag}
    if flag != "pretrained_model_name_or_path":
        got = getattr(parse_text(words(named)), name)
        assert got == SAID_OTHERWISE.get(flag, default) or str(got) == str(default)
    if default is False:
        assert getattr(parse_text([*words(named), f"--{flag}"]), name) is True
        return
    choices = {"report_to": "wandb", "mixed_precision": "fp16", "image_interpolation_mode": "nearest"}
    value = choices.get(flag, "7" if default is None or isinstance(default, str) else type(default)(1 + default))
    for spelling in {f"--{flag}", f"--{name.replace('_', '-')}"}:
        got = getattr(parse_text([*words(named), spelling, str(value)]), name)
        assert got == [value] if flag == "validation_prompts" else float_or_text(got) == float_or_text(value)


def float_or_text(value):
    """A number as one, however it is written."""
    try:
        return float(value)
    except ValueError:
        return value


def test_several_prompts_on_one_line():
    """Else Diffusers' `--validation_prompts "a" "b"` is an error, or one prompt."""
    config = parse_text([*words(NAMED), "--validation_prompts", "a cat", "a dog", "--seed", "1"])
    assert config.validation_prompts == ["a cat", "a dog"]


def test_without_a_checkpoint_the_recipe_is_from_scratch_and_yields_to_the_user():
    """Else a small model is trained with a large one's settings, or what the user said is overruled."""
    data = ["--train_data_dir", "x"]
    assert parse_text(data).caption_dropout == 0.1
    assert parse_text(data).trains_text_encoder
    assert parse_text([*data, "--resolution", "64", "--use_ema", "False"]).resolution == "64"
    assert not parse_text([*data, "--use_ema", "False"]).use_ema
    assert parse_text([]).vae_train_steps != parse_text(data).vae_train_steps  # the digits'


# Each flag of the script's own alone


class Seen(NamedTuple):
    """A run, and the batches that it trained on."""

    run: Run
    batches: list
    calls: list


def observe(start: str, flags: dict, shop: Path, folder: Path) -> Seen:
    """Run the script and watch its batches, and what it asks of `from_pretrained`."""
    batches, calls = [], []
    compute_loss, loaded = train_text2image.compute_loss, UNet2DConditionModel.from_pretrained.__func__
    pipeline = train_text2image.TextToImageDDPMPipeline.from_pretrained.__func__

    def watched_loss(model, batch, keys, **options):
        if not keys.validation:
            batches.append(batch)
        return compute_loss(model, batch, keys, **options)

    def load_unet(cls, name, **options):
        calls.append(("unet", str(name), options))
        if options.get("revision") == "raw":
            return loaded(cls, shop / "raw")
        return loaded(cls, name, **options)

    def load_pipeline(cls, name, **options):
        calls.append(("pipeline", str(name), options))
        return pipeline(cls, name)

    with (
        mock.patch.object(train_text2image, "compute_loss", watched_loss),
        mock.patch.object(UNet2DConditionModel, "from_pretrained", classmethod(load_unet)),
        mock.patch.object(train_text2image.TextToImageDDPMPipeline, "from_pretrained", classmethod(load_pipeline)),
    ):
        run = run_text_script(command(start, shop, folder, **flags), folder)
    return Seen(run, batches, calls)


def digest(part="unet"):
    def of(seen):
        (path,) = (seen.run.folder / part).glob("*.safetensors")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return of


def scheduler(key):
    return lambda seen: seen.run.json("scheduler/scheduler_config.json").get(key)


def last_grid(seen):
    return Image.open(max((seen.run.folder / "samples").glob("step-*")))


def has(name):
    return lambda seen: any(name in file for file in seen.run.files())


def pixels(seen):
    return [batch["images"].numpy().tobytes() for batch in seen.batches]


def rates(seen):
    return [record["lr"] for record in seen.run.records()]


def asked(what, key):
    return lambda seen: next(options.get(key) for kind, _, options in seen.calls if kind == what)


class Row(NamedTuple):
    """A flag, given alone on top of a start and `more`, and what it changes from what to what."""

    flag: str
    value: Any
    see: Any
    before: Any = None  # what is seen without, or a predicate; None: anything
    after: Any = None
    more: dict = {}
    start: str = "checkpoint"


FROM_SCRATCH = {"start": "scratch"}
LARGE = {"train_data_dir": "{shop}/large"}
READY = {"vae_name_or_path": "{shop}/vae"}
ROWS = [
    Row("pretrained_model_name_or_path", "{shop}/stable", has("autoencoder/"), None, False,
        {"model_config_name_or_path": None, "vae_widths": None}, **FROM_SCRATCH),
    Row("revision", "v2", asked("pipeline", "revision"), None, "v2"),
    Row("variant", "fp16", asked("pipeline", "variant"), None, "fp16"),
    Row("non_ema_revision", "raw", digest()),
    Row("model_config_name_or_path", "{shop}/wide", lambda s: s.run.json("unet/config.json")["block_out_channels"],
        [8, 16], [16, 16], READY, **FROM_SCRATCH),
    Row("text_encoder_name_or_path", "{shop}/stable",
        lambda s: s.run.json("text_encoder/config.json")["hidden_size"], None, WIDTH,
        {**READY, "model_config_name_or_path": "{shop}/narrow"}, **FROM_SCRATCH),
    Row("train_text_encoder", True, digest("text_encoder")),
    Row("caption_column", "description", lambda s: sorted(set(s.batches[0]["captions"])),
        None, ["a cat", "a dog"], {"train_data_dir": "{shop}/described"}),
    Row("caption_dropout", 0.9, digest()),
    Row("cache_latents", True, has("cache/latents"), False, True),
    Row("cache_latents", True, has("cache/embeddings"), False, True),
    Row("validation_prompts", "a blue square", lambda s: last_grid(s).tobytes()),
    Row("guidance_scale", 9, lambda s: last_grid(s).tobytes()),
    Row("num_inference_steps", 5, lambda s: last_grid(s).tobytes()),
    Row("prediction_type", "v_prediction", scheduler("prediction_type"), "epsilon", "v_prediction"),
    Row("prediction_type", "v_prediction", digest()),
    Row("loss_type", "l1", digest()),
    Row("snr_gamma", 5, digest()),
    Row("noise_offset", 0.1, digest()),
    Row("input_perturbation", 0.1, digest()),
    Row("dream_training", True, digest()),
    Row("dream_detail_preservation", 0.5, digest(), more={"dream_training": True}),
    Row("rescale_betas_zero_snr", True, scheduler("rescale_betas_zero_snr"), lambda on: not on, True,
        {"prediction_type": "v_prediction"}),
    Row("ddpm_num_steps", 50, scheduler("num_train_timesteps"), 1000, 50, READY, **FROM_SCRATCH),
    Row("ddpm_beta_schedule", "cosine", scheduler("beta_schedule"), "linear", "squaredcos_cap_v2", READY,
        **FROM_SCRATCH),
    Row("vae_name_or_path", "{shop}/vae", digest("vae"), **FROM_SCRATCH),
    Row("vae_train_steps", 2, lambda s: s.run.json("autoencoder/checkpoint-2/manifest.json")["step"]
        if "autoencoder/checkpoint-2/manifest.json" in s.run.files() else None, None, 2, **FROM_SCRATCH),
    Row("vae_learning_rate", 1e-2, digest("vae"), **FROM_SCRATCH),
    Row("vae_kl_weight", 1, digest("vae"), **FROM_SCRATCH),
    Row("vae_latent_channels", 3, lambda s: s.run.json("unet/config.json")["in_channels"], None, 3,
        {"model_config_name_or_path": "{shop}/rgb"}, **FROM_SCRATCH),
    Row("vae_widths", "8,16,16", lambda s: s.run.json("vae/config.json")["block_out_channels"], [8, 16],
        [8, 16, 16], **FROM_SCRATCH),
    # flags of the data and of training, where latents and captions might lose them
    Row("max_train_samples", 3, lambda s: s.run.json("checkpoint-2/manifest.json")["samples"], 8, 3),
    Row("center_crop", True, pixels, more=LARGE),
    Row("random_flip", True, pixels),
    Row("image_interpolation_mode", "nearest", pixels, more={**LARGE, "center_crop": True}),
    Row("random_flip", True, digest(), more={"cache_latents": True}),
    Row("channels", 1, lambda s: s.run.json("vae/config.json")["in_channels"], 3, 1, **FROM_SCRATCH),
    Row("scale_lr", True, rates, [1e-3] * 2, [4e-3] * 2),
    Row("use_ema", True, digest()),
    Row("validation_steps", 1, lambda s: sum("validation_loss" in r for r in s.run.records()), 0, 2,
        {"validation_split": 0.25}),
    Row("streaming", True, lambda s: s.run.json("checkpoint-2/manifest.json")["samples"], 8, None),
]  # fmt: skip


def test_every_flag_of_the_script_is_seen_to_work():
    """Else a flag is declared that nobody shows to be read."""
    declared = {field.name for field in dataclasses.fields(train_text2image.Text2ImageConfig)}
    shared = {field.name for cls in (PipelineConfig, DataFlags) for field in dataclasses.fields(cls)}
    assert declared - shared <= {row.flag for row in ROWS} | {"aspect_ratio_buckets"}  # which test_buckets shows


@pytest.fixture(scope="module")
def seen_of(shop, tmp_path_factory):
    """What is seen with flags on top of a start; a run that was made before is not made again."""
    folders = tmp_path_factory.mktemp("runs")

    @functools.cache
    def seen(start: str, flags: tuple) -> Seen:
        return observe(start, dict(flags), shop, folders / str(seen.cache_info().misses))

    # two steps, of which the second ends an epoch and is drawn
    return lambda start, flags: seen(start, tuple({"max_train_steps": 2, "lr_scheduler": "constant", **flags}.items()))


# without which the rest of the row's flags do not fit together
NEEDED = {"pretrained_model_name_or_path", "text_encoder_name_or_path", "caption_column", "vae_latent_channels"}


def fits(got, want) -> bool:
    """Whether a value is what the table says, or satisfies it."""
    return want(got) if callable(want) else got == want


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.flag}-{row.value}".replace("{shop}/", ""))
def test_a_flag_alone_changes_what_is_seen(row, seen_of):
    """Else a flag is accepted and ignored, or does something else than it says."""
    given = seen_of(row.start, {**row.more, row.flag: row.value})
    if row.flag not in NEEDED:
        without = seen_of(row.start, row.more)
        assert without.run.code == 0, without.run.err
        before = row.see(without)
        assert before != row.see(given)
        assert row.before is None or fits(before, row.before), before
    assert given.run.code == 0, given.run.err
    after = row.see(given)
    assert row.after is None or fits(after, row.after), after


def test_a_run_is_a_function_of_its_flags(seen_of, shop, tmp_path):
    """Else "changes alone" above means nothing."""
    flags = {"max_train_steps": 2, "lr_scheduler": "constant"}
    for start in START:
        again = observe(start, flags, shop, tmp_path / start)
        assert digest()(again) == digest()(seen_of(start, {}))
        assert again.run.records() == seen_of(start, {}).run.records()


@pytest.mark.parametrize("prompts", [[], ["a red square"], ["a red square", "a blue 'square'"]])
def test_a_run_can_be_repeated_from_what_it_wrote(prompts, tmp_path):
    """Else `--config training_config.json` is refused, or trains with other settings."""
    argv = words({**NAMED, "output_dir": tmp_path, "seed": 5, "caption_dropout": 0.2, "use_ema": True})
    config = parse_text([*argv, *(["--validation_prompts", *prompts] if prompts else [])])
    save_settings(config)
    again = parse_text(["--config", str(tmp_path / "training_config.json")])
    assert public_settings(dataclasses.replace(again, config=None)) == public_settings(config)


def test_several_prompts_are_as_many_rows(shop, tmp_path):
    """Else only the first of the prompts is ever drawn."""
    argv = command("checkpoint", shop, tmp_path, validation_prompts=None, max_train_steps=1, eval_batch_size=6)
    run = run_text_script([*argv, "--validation_prompts", *CAPTIONS[:3]], tmp_path)
    grid = Image.open(run.folder / "samples" / "step-000001.png")
    expected = image_grid([Image.new("RGB", (16, 16))] * 6, 2, scale=4, legend=CAPTIONS[:3])
    assert grid.size == expected.size


@pytest.mark.parametrize("start", START)
def test_a_dry_run_says_all_and_writes_nothing(start, shop, tmp_path):
    """Else looking at what would run costs a training, or hides what it would do."""
    run = train(start, shop, tmp_path / "run", dry_run=True)
    assert not run.folder.exists()
    for fragment in (
        "8 images",
        "'text'",
        "6 (2 an epoch)",
        "= 4",
        "parameters to train",
        "s a step",
        "MiB of memory",
        "seed 3",
    ):
        assert fragment in run.out
    assert ("stable" if start == "checkpoint" else "from scratch") in run.out


# Bad input: flags on top of a start, and what the one line must say


class Bad(NamedTuple):
    """Flags that are refused, and the fragments of the line that says so."""

    flags: dict
    says: tuple
    start: str = "checkpoint"


ZERO_SNR = ("zero terminal SNR", "v_prediction")
REFUSED = {
    "no captions": Bad({"train_data_dir": "{shop}/uncaptioned"}, ("'text'", "image, title", "--caption_column")),
    "no such checkpoint": Bad({"pretrained_model_name_or_path": "{shop}/nowhere"}, ("nowhere", "no Stable Diffusion")),
    "an empty checkpoint": Bad({"pretrained_model_name_or_path": "{shop}/no-model"},
                               ("no-model", "no Stable Diffusion")),
    "a checkpoint's part": Bad({"pretrained_model_name_or_path": "{shop}/vae"}, ("vae", "no Stable Diffusion")),
    "endless stream": Bad({"streaming": True, "max_train_steps": None}, ("--streaming", "--max_train_steps")),
    "stream from scratch": Bad({"streaming": True, "vae_name_or_path": "{shop}/vae"},
                               ("--streaming", "--text_encoder_name_or_path"), "scratch"),
    "stream for an autoencoder": Bad(
        {"streaming": True, "cache_latents": "False", "text_encoder_name_or_path": "{shop}/stable",
         "model_config_name_or_path": None}, ("--streaming", "--vae_name_or_path"), "scratch"),
    "cached stream": Bad({"streaming": True, "cache_latents": True}, ("--streaming", "--cache_latents")),
    "by class": Bad({"label_column": "label"}, ("--label_column", "train_unconditional.py")),
    "all dropped": Bad({"caption_dropout": 1}, ("--caption_dropout 1", "less than 1")),
    "nan dropped": Bad({"caption_dropout": "nan"}, ("--caption_dropout nan",)),
    "prediction": Bad({"prediction_type": "noise"}, ("--prediction_type must be one of epsilon", "'noise'")),
    "loss": Bad({"loss_type": "l3"}, ("'l3'", "huber")),
    "min-SNR": Bad({"snr_gamma": 0}, ("snr_gamma", "positive")),
    "offset": Bad({"noise_offset": -1}, ("--noise_offset -1",)),
    "offset nan": Bad({"noise_offset": "nan"}, ("--noise_offset nan",)),
    "endless offset": Bad({"noise_offset": "inf"}, ("--noise_offset inf",)),
    "perturbation": Bad({"input_perturbation": -0.1}, ("--input_perturbation -0.1",)),
    "dream's power": Bad({"dream_detail_preservation": -1}, ("--dream_detail_preservation -1",)),
    "scale": Bad({"guidance_scale": "nan"}, ("--guidance_scale nan",)),
    "steps of grids": Bad({"num_inference_steps": 0}, ("--num_inference_steps 0",)),
    "schedule": Bad({"ddpm_beta_schedule": "nonesuch"}, ("'nonesuch'", "cosine"), "scratch"),
    "epsilon at zero SNR": Bad({"rescale_betas_zero_snr": True}, ZERO_SNR),
    "epsilon at zero SNR from scratch": Bad({"rescale_betas_zero_snr": True}, ZERO_SNR, "scratch"),
    "a model for a checkpoint": Bad({"model_config_name_or_path": "{shop}/unet"},
                                    ("--model_config_name_or_path", "from scratch")),
    "a vae for a checkpoint": Bad({"vae_name_or_path": "{shop}/vae"}, ("--vae_name_or_path", "from scratch")),
    "no such vae": Bad({"vae_name_or_path": "{shop}/nowhere"}, ("nowhere", "no AutoencoderKL"), "scratch"),
    "no such text encoder": Bad({"text_encoder_name_or_path": "{shop}/nowhere"}, ("nowhere", "no CLIP"), "scratch"),
    "no such unet": Bad({"model_config_name_or_path": "{shop}/nowhere"}, ("nowhere", "no config"), "scratch"),
    "another kind of unet": Bad({"model_config_name_or_path": "{shop}/plain"},
                                ("plain", "UNet2DModel", "not a UNet2DConditionModel"), "scratch"),
    "a unet of another text": Bad({"model_config_name_or_path": "{shop}/narrow"}, ("cross_attention_dim", "32", "128"),
                                  "scratch"),
    "a unet of pixels": Bad({"model_config_name_or_path": "{shop}/rgb"}, ("in_channels", "3", "4"), "scratch"),
    "half a pixel of latents": Bad({"resolution": 15}, ("--resolution 15", "multiples of 2"), "scratch"),
    "half a pixel of a checkpoint's": Bad({"resolution": 15}, ("--resolution 15", "multiples of 2")),
    "half a latent": Bad({"resolution": 18, "model_config_name_or_path": None}, ("--resolution 18", "multiples"),
                         "scratch"),
    "half a latent of a ready vae": Bad(
        {"resolution": 18, "model_config_name_or_path": None, "vae_name_or_path": "{shop}/vae"},
        ("--resolution 18", "multiples"), "scratch"),
    "gray for a checkpoint of colours": Bad({"channels": 1}, ("--channels 1", "3")),
    "no vae steps": Bad({"vae_train_steps": 0}, ("--vae_train_steps 0",), "scratch"),
    "vae widths": Bad({"vae_widths": "8,x"}, ("--vae_widths 8,x", "multiples of 8"), "scratch"),
    "odd vae widths": Bad({"vae_widths": "8,12"}, ("--vae_widths 8,12", "multiples of 8"), "scratch"),
    "vae's KL": Bad({"vae_kl_weight": -1}, ("--vae_kl_weight -1",), "scratch"),
    "nothing to resume": Bad({"resume_from_checkpoint": "checkpoint-9"}, ("checkpoint-9", "none")),
    "unknown flag": Bad({"train_text_encode": True}, ("--train_text_encode", "--train_text_encoder")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_in_one_line_before_any_work(name, shop, tmp_path):
    """Else a slip costs hours of an autoencoder's training, or ends in a traceback."""
    flags, says, start = REFUSED[name]
    worked = mock.Mock(side_effect=AssertionError("work was begun"))
    with (
        mock.patch.object(autoencoder, "training_loop", worked),
        mock.patch.object(train_text2image, "training_loop", worked),
    ):
        run = run_text_script(command(start, shop, tmp_path / "run", **flags), tmp_path / "run")
    assert run.code == 2
    assert "Traceback" not in run.out + run.err
    line = run.error()
    for fragment in says:
        assert fragment in line, line
    assert not run.folder.is_dir() or not run.files()


def test_a_missing_revision_of_the_raw_weights_is_named(shop, tmp_path):
    """Else training goes on from the averaged weights, although others were asked for."""
    missing = OSError("raw is not a valid git identifier")
    with mock.patch.object(UNet2DConditionModel, "from_pretrained", side_effect=missing):
        config = parse_text(command("checkpoint", shop, tmp_path / "run", non_ema_revision="raw"))
        with (
            mock.patch.object(
                train_text2image.TextToImageDDPMPipeline, "from_pretrained", return_value=tiny_text_pipeline()
            ),
            pytest.raises(UsageError, match="raw"),
        ):
            train_text2image.load_checkpoint_components(config)


def test_latents_of_random_crops_are_not_cached(shop, tmp_path):
    """Else an image is cropped once and for all where the user asked for crops at random."""
    run = run_text_script(
        command("checkpoint", shop, tmp_path / "run", train_data_dir="{shop}/large", cache_latents=True),
        tmp_path / "run",
    )
    assert run.code == 2
    for fragment in ("--cache_latents", "--center_crop"):
        assert fragment in run.error()
    assert not (run.folder / "metrics.jsonl").exists()


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
        run = run_text_script(command("checkpoint", shop, folder, **flags), folder)
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
        done = run_text_script(command("scratch", shop, tmp_path / "run", checkpointing_steps=4), tmp_path / "run")
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
