"""A run of train_unconditional.py: resumed as uninterrupted, two ranks as one, and what it leaves on disk."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file

import train_unconditional
from ddpm_hf import DDPMPipeline
from ddpm_hf.common.pictures import image_grid
from ddpm_hf.common.randomness import keyed_seed
from ddpm_hf.training.checkpointing import read_manifest
from tests.support import warm
from tests.support.fixtures_ranks import ranks_by_themselves
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import (
    GRAY,
    assert_same_run,
    assert_same_tensors,
    attempt,
    command,
    last_checkpoint,
    optimizer_state,
    records,
    run_script,
    train,
    weights,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Datasets and models to train with, by name."""
    root = tmp_path_factory.mktemp("world")
    gray = {"in_channels": 1, "out_channels": 1}
    for name, count in (("images", 22), ("images-17", 17), ("images-6", 6)):
        write_rows(root / name, [encoded(pixels) for pixels in random_pixels(count, 8, 8)])
    write_rows(root / "large", [encoded(pixels) for pixels in random_pixels(22, 12, 10)])
    # gray squares, one brightness an image: something that can be learnt
    squares = [np.full((8, 8), level, dtype=np.uint8) for level in range(40, 220, 12)]
    write_rows(root / "squares", [encoded(pixels) for pixels in squares])
    write_unet(root / "unet", **gray)
    write_unet(root / "unet-dropout", **gray, dropout=0.2)
    return root


DROPOUT = {"model_config_name_or_path": "{shop}/unet-dropout"}
LARGE = {"train_data_dir": "{shop}/large"}

# Resuming

RESUMED = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4, "logging_steps": 1},  # 6 batches an epoch: steps of 4 and 2
    "dropout": {**DROPOUT, "gradient_accumulation_steps": 2},
    "importance-sampling": {
        "objective": "vlb",
        "variance_type": "learned_range",
        "timestep_sampler": "loss_second_moment",
        "ddpm_num_steps": 3,
        "train_batch_size": 12,
        "max_train_steps": 12,
        "checkpointing_steps": 7,  # after 72 losses for 3 timesteps: the sampler is past its uniform beginning
    },
    "crops-and-flips": {**LARGE, "random_flip": True, "cache_dataset": "never"},
    "workers": {
        **LARGE,
        "random_flip": True,
        "cache_dataset": "never",
        "dataloader_num_workers": 2,
    },
    "streaming": {**LARGE, "random_flip": True, "streaming": True},
    "streaming-worker": {**LARGE, "streaming": True, "dataloader_num_workers": 1},
    "bf16": {"mixed_precision": "bf16"},
    "constant-ema": {"ema_min_decay": 0.9, "ema_max_decay": 0.9, "lr_scheduler": "linear"},
}


@pytest.mark.every(2)
@pytest.mark.parametrize("case", RESUMED)
def test_resuming_is_never_having_stopped(case, world, tmp_path):
    """Else an interrupted run is another run: other weights, other metrics, other pictures."""
    flags = {"use_ema": True, "checkpointing_steps": 4, **RESUMED[case]}
    whole, resumed = train(world, tmp_path / "whole", GRAY, **flags).folder, tmp_path / "resumed"
    name = f"checkpoint-{flags['checkpointing_steps']}"
    assert last_checkpoint(whole).name != name
    shutil.copytree(whole / name, resumed / name)
    shutil.copy(whole / "metrics.jsonl", resumed)  # with lines that were logged after the checkpoint
    train(world, resumed, GRAY, resume_from_checkpoint="latest", **flags)
    assert_same_run(resumed, whole)
    if case == "importance-sampling":
        state = load_file(whole / name / "timestep_sampler.safetensors")
        assert (state["counts"] == state["history"].shape[1]).all()


def test_resuming_a_finished_run_changes_nothing(world, tmp_path):
    """Else running the same command line again trains on, or logs twice."""
    flags = {"use_ema": True}
    whole = train(world, tmp_path / "whole", GRAY, **flags).folder
    shutil.copytree(whole, tmp_path / "again")
    train(world, tmp_path / "again", GRAY, resume_from_checkpoint="latest", **flags)
    assert_same_run(tmp_path / "again", whole)


@pytest.mark.skipif("OTHER_ROUNDING" in os.environ, reason="a process of its own rounds as this machine does")
def test_a_signal_saves_and_ends_and_the_run_goes_on(world, tmp_path):
    """Else a job that its queue ends loses what it trained, or counts as failed; in a process of its own."""
    flags = {"max_train_steps": 80, "logging_steps": 1, "use_ema": True}
    stopped = tmp_path / "stopped"
    words = command(world, stopped, GRAY, **flags)
    process = warm.Program(train_unconditional.__file__, *words, resident=True, timeout=60)
    log, until = stopped / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 5) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    saved = last_checkpoint(stopped)
    step = read_manifest(saved)["step"]
    assert 5 < step < 80
    assert records(stopped)[-1]["step"] == step

    whole = train(world, tmp_path / "whole", GRAY, **flags).folder
    assert_same_run(train(world, stopped, GRAY, resume_from_checkpoint="latest", **flags).folder, whole)


# What must not matter


def test_looking_changes_nothing(world, tmp_path):
    """Else sampling, validating or saving in between draws from the training's randomness, or leaves dropout off."""
    shared = {
        **DROPOUT,
        "use_ema": True,
        "validation_split": 0.2,
        "validation_steps": 100,
    }
    shared["max_train_steps"] = 15  # three epochs
    rarely = train(world, tmp_path / "rarely", GRAY, **shared).folder
    often = {"save_images_epochs": 1, "save_model_epochs": 1, "validation_steps": 1, "checkpointing_steps": 1}
    often = train(world, tmp_path / "often", GRAY, **{**shared, **often}).folder
    assert_same_tensors(weights(often), weights(rarely))
    assert_same_tensors(*(weights(last_checkpoint(one)) for one in (often, rarely)))
    assert_same_tensors(*(optimizer_state(last_checkpoint(one)) for one in (often, rarely)))
    assert len(list((often / "samples").iterdir())) > len(list((rarely / "samples").iterdir()))
    by_step = {record["step"]: record for record in records(often)}
    assert all("validation_loss" in record for record in by_step.values())
    for record in records(rarely):
        assert record.items() <= by_step[record["step"]].items()


@pytest.mark.every(2)
@pytest.mark.parametrize(("data", "batch"), [("images", 8), ("images-6", 6)])
def test_accumulated_batches_are_one_large_batch(data, batch, world, tmp_path):
    """Else the gradient of 4+4, or of an epoch's partial 4+2, is not the mean over the step's samples."""
    # a large epsilon: Adam then magnifies no rounding
    shared = {
        "train_data_dir": f"{{shop}}/{data}",
        "logging_steps": 1,
        "max_train_steps": 4,
        "adam_epsilon": 1e-2,
        "max_grad_norm": 0,
    }
    parts = train(world, tmp_path / "parts", GRAY, gradient_accumulation_steps=2, **shared).folder
    at_once = train(world, tmp_path / "at_once", GRAY, train_batch_size=batch, **shared).folder
    assert_same_tensors(weights(parts), weights(at_once), atol=1e-6)
    assert_same_tensors(*(optimizer_state(last_checkpoint(one)) for one in (parts, at_once)), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(records(parts), records(at_once), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_learning_rate_follows_its_schedule_over_optimizer_steps(accumulation, world, tmp_path):
    """Else accumulation stretches the warm-up and the decay, and the rate never reaches its end."""
    flags = {"max_train_steps": None, "num_epochs": 3, "logging_steps": 1, "lr_warmup_steps": 4}
    found = records(train(world, tmp_path / "run", GRAY, gradient_accumulation_steps=accumulation, **flags).folder)
    total = 3 * math.ceil(math.ceil(22 / 4) / accumulation)
    assert [record["step"] for record in found] == list(range(1, total + 1))
    for step, record in enumerate(found, 1):
        decayed = 0.5 * (1 + math.cos(math.pi * (step - 4) / (total - 4)))
        assert record["lr"] == pytest.approx(1e-3 * (step / 4 if step < 4 else decayed), abs=1e-12)


@pytest.fixture(scope="module")
def two_ranks(world, tmp_path_factory):
    """The same 5 steps by two ranks of 4 and by one of 8; of 17 images, the second rank has none of the last batch."""
    root = tmp_path_factory.mktemp("ranks")
    flags = {
        "train_data_dir": "{shop}/images-17",
        "max_train_steps": 5,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "eval_batch_size": 3,  # one rank draws two, the other one
        "save_images_epochs": 1,
        "validation_split": 0.0,
        "use_ema": True,
        "adam_epsilon": 1e-2,
        "objective": "vlb",
        "variance_type": "learned_range",
        "timestep_sampler": "loss_second_moment",
    }
    done = ranks_by_themselves(train_unconditional.__file__, *command(world, root / "two", GRAY, **flags))
    assert done.returncode == 0, done.stderr
    return root / "two", train(world, root / "one", GRAY, **flags, train_batch_size=8).folder


def test_two_ranks_train_as_one_with_twice_the_batch(two_ranks):
    """Else ranks see the same samples or noise, or weigh a partial batch wrongly."""
    two, one = two_ranks
    for name in ("checkpoint-2", "checkpoint-5"):
        assert_same_tensors(weights(two / name), weights(one / name), rtol=1e-4, atol=1e-5)
        assert_same_tensors(weights(two / name, "unet_ema"), weights(one / name, "unet_ema"), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(records(two), records(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert read_manifest(two / "checkpoint-5")["processes"] == 2  # there were two


def test_two_ranks_remember_the_losses_of_one(two_ranks):
    """Else importance sampling learns from a sample that weighs nothing, and the ranks change what is drawn."""
    two, one = (load_file(run / "checkpoint-5" / "timestep_sampler.safetensors") for run in two_ranks)
    assert int(one["counts"].sum()) == 17 + 16  # all samples of five steps, and no other
    assert_same_tensors(two, one, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_of_two_ranks_goes_on_with_one(world, two_ranks, tmp_path):
    """Else a run is tied to the number of processes that it began with."""
    two, one = two_ranks
    shutil.copytree(two / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(two / "metrics.jsonl", tmp_path)
    settings = json.loads((one / "training_config.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**settings, "output_dir": str(tmp_path)}))
    run = run_script(["--config", str(tmp_path / "run.json"), "--resume_from_checkpoint", "latest"], tmp_path)
    assert run.code == 0, run.err
    assert "processes" in run.err  # it says what is different
    assert_same_tensors(weights(tmp_path / "checkpoint-5"), weights(one / "checkpoint-5"), rtol=1e-4, atol=1e-5)


def test_two_ranks_draw_the_same_grids(two_ranks):
    """Else an image depends on the rank that drew it, or lands in another place."""
    two, one = two_ranks
    names = sorted(path.name for path in (one / "samples").iterdir())
    assert len(names) == 4  # a grid and a chain, twice
    assert names == sorted(path.name for path in (two / "samples").iterdir())
    for name in names:
        ours, theirs = (np.asarray(Image.open(run / "samples" / name)).astype(int) for run in two_ranks)
        assert np.abs(ours - theirs).max() <= 2


def test_two_ranks_leave_whole_files(two_ranks):
    """Else the ranks write over one another, or leave halves."""
    two, one = two_ranks
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (two, one)]
    assert files[0] - files[1] == {
        f"checkpoint-{step}/random_states_1.pkl"
        for step in (2, 4, 5)  # the second rank's own
    }
    assert files[1] <= files[0]
    for name in files[0]:
        assert not Path(name).name.startswith(".")
        assert not name.endswith(".partial")
    for checkpoint in two.glob("checkpoint-*"):
        read_manifest(checkpoint)  # raises for a file that is missing or differs from its checksum


# What is on disk


def test_the_saved_model_is_the_average_and_is_what_was_drawn(world, tmp_path):
    """Else the pipeline holds the raw weights, or grids are drawn from them or with dropout on."""
    folder = train(world, tmp_path / "run", GRAY, **DROPOUT, use_ema=True, ema_max_decay=0.8).folder
    checkpoint = last_checkpoint(folder)
    assert_same_tensors(weights(folder), weights(checkpoint, "unet_ema"))
    raw = weights(checkpoint)
    assert any(not torch.equal(value, raw[name]) for name, value in weights(folder).items())

    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [keyed_seed(3, "sample", 0, index) for index in range(2)]
    own = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = image_grid(pipeline(2, own, num_inference_steps=2).images, scale=8)
    shown = Image.open(max((folder / "samples").glob("step-*")))
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(drawn)).max() <= 1


def test_without_an_average_the_weights_themselves_are_saved(world, tmp_path):
    """Else the saved pipeline is not the model that was trained."""
    folder = train(world, tmp_path / "run", GRAY).folder
    assert_same_tensors(weights(folder), weights(last_checkpoint(folder)))
    assert not (last_checkpoint(folder) / "unet_ema").exists()


@pytest.mark.parametrize("constant", [True, False])
def test_the_average_follows_its_closed_form(constant, world, tmp_path):
    """Else the EMA flags are read wrongly, or the average is taken more or less than once a step."""
    flags = {"ema_max_decay": 0.7, "ema_min_decay": 0.7 if constant else 0.0, "ema_power": 0.5, "ema_inv_gamma": 2.0}
    folder = train(
        world, tmp_path / "run", GRAY, use_ema=True, checkpointing_steps=1, max_train_steps=6, **flags
    ).folder
    for step in range(2, 7):
        decay = 0.7 if constant else min(0.7, 1 - (1 + (step - 1) / 2.0) ** -0.5)
        before, after, now = (
            weights(folder / f"checkpoint-{step - 1}", "unet_ema"),
            weights(folder / f"checkpoint-{step}", "unet_ema"),
            weights(folder / f"checkpoint-{step}"),
        )
        expected = {name: decay * before[name] + (1 - decay) * now[name] for name in now}
        assert_same_tensors(after, expected, rtol=1e-5, atol=1e-7)


def test_the_oldest_checkpoints_go_and_each_loads_by_its_subfolder(world, tmp_path):
    """Else disks fill up, the newest is the one removed, or `subfolder=` finds no model."""
    flags = {"use_ema": True, "checkpointing_steps": 2, "checkpoints_total_limit": 2, "max_train_steps": 9}
    folder = train(world, tmp_path / "run", GRAY, **flags).folder
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-9"}
    for name in ("unet", "unet_ema"):
        loaded = UNet2DModel.from_pretrained(folder, subfolder=f"checkpoint-8/{name}")
        assert_same_tensors(dict(loaded.state_dict()), weights(folder / "checkpoint-8", name))


def test_leftovers_of_interrupted_saves_go_and_are_never_resumed(world, tmp_path):
    """Else a checkpoint that was cut off is taken for the latest, or stays for ever."""
    flags = {"checkpointing_steps": 4}
    folder = train(world, tmp_path / "run", GRAY, **flags).folder
    whole = weights(folder)
    shutil.rmtree(folder / "checkpoint-10")
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-9.partial")
    damaged = folder / "checkpoint-9"  # renamed, and then the disk failed
    shutil.copytree(folder / "checkpoint-8", damaged)
    (damaged / "optimizer.bin").write_bytes(b"")
    run = attempt(world, folder, GRAY, resume_from_checkpoint="latest", **flags)
    assert run.code == 0
    assert "checkpoint-9" in run.err  # passed over, and said so
    assert_same_tensors(weights(folder), whole)
    assert not (folder / "checkpoint-9.partial").exists()


def test_metrics_are_reproducible_and_hold_the_quartiles(world, tmp_path):
    """Else two equal runs cannot be compared by a diff, or nobody sees at which noise levels the loss lies."""
    first, second = (train(world, tmp_path / name, GRAY, logging_steps=5).folder for name in ("first", "second"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    quartiles = {"loss_q1", "loss_q2", "loss_q3", "loss_q4"}
    for record in records(first):
        assert set(record) == {"step", "epoch", "loss", "lr", "grad_norm"} | quartiles
        # 20 samples, the loss being their mean: it lies between the means of the quartiles
        assert min(record[name] for name in quartiles) <= record["loss"] <= max(record[name] for name in quartiles)
    timings = [json.loads(line) for line in (first / "timings.jsonl").read_text().splitlines()]
    assert [timing["step"] for timing in timings] == [5, 10]
    assert all(timing["images_per_second"] > 0 for timing in timings)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("objective", "variance_type"),
    [("simple", "fixed_small"), ("simple", "learned_range"), ("hybrid", "learned_range"), ("vlb", "learned_range"),
     ("vlb", "fixed_large")],
)  # fmt: skip
def test_the_loss_falls(objective, variance_type, world, tmp_path):
    """Else the objective's gradient does not reach the weights, or points the wrong way."""
    flags = {
        "train_data_dir": "{shop}/squares",
        "objective": objective,
        "variance_type": variance_type,
        "train_batch_size": 15,
        "max_train_steps": 60,
        "logging_steps": 15,
        "learning_rate": 5e-3,
    }
    found = records(train(world, tmp_path / "run", GRAY, **flags).folder)
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert all(math.isfinite(record["grad_norm"]) for record in found)
