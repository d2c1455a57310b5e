"""A run of train_unconditional.py: resumed as uninterrupted, two ranks as one, and what it leaves on disk."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
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
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import run_script, words

SCRIPT = Path(train_unconditional.__file__)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Datasets and models to train with, by name."""
    root = tmp_path_factory.mktemp("world")
    gray = {"in_channels": 1, "out_channels": 1}
    for count in (6, 17, 22):
        write_rows(root / f"images-{count}", [encoded(pixels) for pixels in random_pixels(count, 8, 8)])
    write_rows(root / "large", [encoded(pixels) for pixels in random_pixels(22, 12, 10)])
    # gray squares, one brightness an image: something that can be learnt
    squares = [np.full((8, 8), level, dtype=np.uint8) for level in range(40, 220, 12)]
    write_rows(root / "squares", [encoded(pixels) for pixels in squares])
    write_unet(root / "unet", **gray)
    write_unet(root / "unet-dropout", **gray, dropout=0.2)
    return root


def command(world, output_dir, data="images-22", unet="unet", **flags):
    """The command line of a small run."""
    settings = {
        "train_data_dir": world / data,
        "model_config_name_or_path": world / unet,
        "output_dir": output_dir,
        "resolution": 8,
        "channels": 1,
        "seed": 3,
        "train_batch_size": 4,
        "eval_batch_size": 2,
        "max_train_steps": 10,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 3,
        "ddpm_num_steps": 20,
        "ddpm_num_inference_steps": 2,
        "ddpm_beta_schedule": "cosine",
        "cpu_threads": 1,
        "logger": "none",
        "logging_steps": 3,
    }
    return words({**settings, **flags})


def train(world, output_dir, **flags):
    """Run the script to its end; the output folder."""
    run = run_script(command(world, output_dir, **flags), output_dir)
    assert run.code == 0, run.err
    return Path(output_dir)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def weights(folder, name="unet"):
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def optimizer_state(checkpoint):
    """Adam's moments, as one flat dict of tensors."""
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    return {f"{index}.{name}": value for index, one in state.items() for name, value in one.items()}


def assert_same_tensors(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], **{"rtol": 0, "atol": 0, **tolerance}, msg=f"{name}: {{}}".format
        )


def assert_same_run(ours, theirs):
    """Two output folders that hold the same run, bit for bit."""
    assert_same_tensors(weights(ours), weights(theirs))
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    checkpoints = last_checkpoint(ours), last_checkpoint(theirs)
    assert checkpoints[0].name == checkpoints[1].name
    tensors = [sorted(str(p.relative_to(one)) for p in one.rglob("*.safetensors")) for one in checkpoints]
    assert tensors[0] == tensors[1]
    for name in tensors[0]:
        assert_same_tensors(load_file(checkpoints[0] / name), load_file(checkpoints[1] / name))
    assert_same_tensors(*map(optimizer_state, checkpoints))
    assert read_manifest(checkpoints[0])["meter"] == read_manifest(checkpoints[1])["meter"]
    pictures = [{p.name: p.read_bytes() for p in (one / "samples").iterdir()} for one in (ours, theirs)]
    last = max(pictures[0])
    assert pictures[0][last] == pictures[1][last]


# Resuming

RESUMED = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4, "logging_steps": 1},  # 6 batches an epoch: steps of 4 and 2
    "dropout": {"unet": "unet-dropout", "gradient_accumulation_steps": 2},
    "importance-sampling": {
        "objective": "vlb",
        "variance_type": "learned_range",
        "timestep_sampler": "loss_second_moment",
        "ddpm_num_steps": 3,
        "train_batch_size": 12,
        "max_train_steps": 12,
        "checkpointing_steps": 7,  # after 72 losses for 3 timesteps: the sampler is past its uniform beginning
    },
    "crops-and-flips": {"data": "large", "random_flip": True, "cache_dataset": "never"},
    "workers": {"data": "large", "random_flip": True, "cache_dataset": "never", "dataloader_num_workers": 2},
    "streaming": {"data": "large", "random_flip": True, "streaming": True},
    "streaming-worker": {"data": "large", "streaming": True, "dataloader_num_workers": 1},
    "bf16": {"mixed_precision": "bf16"},
    "constant-ema": {"ema_min_decay": 0.9, "ema_max_decay": 0.9, "lr_scheduler": "linear"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_is_never_having_stopped(case, world, tmp_path):
    """Else an interrupted run is another run: other weights, other metrics, other pictures."""
    flags = {"use_ema": True, "checkpointing_steps": 4, **RESUMED[case]}
    whole, resumed = train(world, tmp_path / "whole", **flags), tmp_path / "resumed"
    name = f"checkpoint-{flags['checkpointing_steps']}"
    assert last_checkpoint(whole).name != name
    shutil.copytree(whole / name, resumed / name)
    shutil.copy(whole / "metrics.jsonl", resumed)  # with lines that were logged after the checkpoint
    train(world, resumed, resume_from_checkpoint="latest", **flags)
    assert_same_run(resumed, whole)
    if case == "importance-sampling":
        state = load_file(whole / name / "timestep_sampler.safetensors")
        assert (state["counts"] == state["history"].shape[1]).all()


def test_resuming_a_finished_run_changes_nothing(world, tmp_path):
    """Else running the same command line again trains on, or logs twice."""
    flags = {"use_ema": True}
    whole = train(world, tmp_path / "whole", **flags)
    shutil.copytree(whole, tmp_path / "again")
    train(world, tmp_path / "again", resume_from_checkpoint="latest", **flags)
    assert_same_run(tmp_path / "again", whole)


@pytest.mark.skipif("OTHER_ROUNDING" in os.environ, reason="a process of its own rounds as this machine does")
def test_a_signal_saves_and_ends_and_the_run_goes_on(world, tmp_path):
    """Else a job that its queue ends loses what it trained, or counts as failed; in a process of its own."""
    flags = {"max_train_steps": 80, "logging_steps": 1, "use_ema": True}
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command(world, stopped, **flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    log, until = stopped / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 5) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    saved = last_checkpoint(stopped)
    step = read_manifest(saved)["step"]
    assert 5 < step < 80
    assert records(stopped)[-1]["step"] == step

    whole = train(world, tmp_path / "whole", **flags)
    assert_same_run(train(world, stopped, resume_from_checkpoint="latest", **flags), whole)


# What must not matter


def test_looking_changes_nothing(world, tmp_path):
    """Else sampling, validating or saving in between draws from the training's randomness, or leaves dropout off."""
    shared = {"unet": "unet-dropout", "use_ema": True, "validation_split": 0.2, "validation_steps": 100}
    shared["max_train_steps"] = 15  # three epochs
    rarely = train(world, tmp_path / "rarely", **shared)
    often = {"save_images_epochs": 1, "save_model_epochs": 1, "validation_steps": 1, "checkpointing_steps": 1}
    often = train(world, tmp_path / "often", **{**shared, **often})
    assert_same_tensors(weights(often), weights(rarely))
    assert_same_tensors(*(weights(last_checkpoint(one)) for one in (often, rarely)))
    assert_same_tensors(*(optimizer_state(last_checkpoint(one)) for one in (often, rarely)))
    assert len(list((often / "samples").iterdir())) > len(list((rarely / "samples").iterdir()))
    by_step = {record["step"]: record for record in records(often)}
    assert all("validation_loss" in record for record in by_step.values())
    for record in records(rarely):
        assert record.items() <= by_step[record["step"]].items()


@pytest.mark.parametrize(("data", "batch"), [("images-22", 8), ("images-6", 6)])
def test_accumulated_batches_are_one_large_batch(data, batch, world, tmp_path):
    """Else the gradient of 4+4, or of an epoch's partial 4+2, is not the mean over the step's samples."""
    # a large epsilon: Adam then magnifies no rounding
    shared = {"data": data, "logging_steps": 1, "max_train_steps": 4, "adam_epsilon": 1e-2, "max_grad_norm": 0}
    parts = train(world, tmp_path / "parts", gradient_accumulation_steps=2, **shared)
    at_once = train(world, tmp_path / "at_once", train_batch_size=batch, **shared)
    assert_same_tensors(weights(parts), weights(at_once), atol=1e-6)
    assert_same_tensors(*(optimizer_state(last_checkpoint(one)) for one in (parts, at_once)), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(records(parts), records(at_once), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_learning_rate_follows_its_schedule_over_optimizer_steps(accumulation, world, tmp_path):
    """Else accumulation stretches the warm-up and the decay, and the rate never reaches its end."""
    flags = {"max_train_steps": None, "num_epochs": 3, "logging_steps": 1, "lr_warmup_steps": 4}
    found = records(train(world, tmp_path / "run", gradient_accumulation_steps=accumulation, **flags))
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
        "data": "images-17",
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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*launch, str(SCRIPT), *command(world, root / "two", **flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return root / "two", train(world, root / "one", **flags, train_batch_size=8)


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
    folder = train(world, tmp_path / "run", unet="unet-dropout", use_ema=True, ema_max_decay=0.8)
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
    folder = train(world, tmp_path / "run")
    assert_same_tensors(weights(folder), weights(last_checkpoint(folder)))
    assert not (last_checkpoint(folder) / "unet_ema").exists()


@pytest.mark.parametrize("constant", [True, False])
def test_the_average_follows_its_closed_form(constant, world, tmp_path):
    """Else the EMA flags are read wrongly, or the average is taken more or less than once a step."""
    flags = {"ema_max_decay": 0.7, "ema_min_decay": 0.7 if constant else 0.0, "ema_power": 0.5, "ema_inv_gamma": 2.0}
    folder = train(world, tmp_path / "run", use_ema=True, checkpointing_steps=1, max_train_steps=6, **flags)
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
    folder = train(world, tmp_path / "run", **flags)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-9"}
    for name in ("unet", "unet_ema"):
        loaded = UNet2DModel.from_pretrained(folder, subfolder=f"checkpoint-8/{name}")
        assert_same_tensors(dict(loaded.state_dict()), weights(folder / "checkpoint-8", name))


def test_leftovers_of_interrupted_saves_go_and_are_never_resumed(world, tmp_path):
    """Else a checkpoint that was cut off is taken for the latest, or stays for ever."""
    flags = {"checkpointing_steps": 4}
    folder = train(world, tmp_path / "run", **flags)
    whole = weights(folder)
    shutil.rmtree(folder / "checkpoint-10")
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-9.partial")
    damaged = folder / "checkpoint-9"  # renamed, and then the disk failed
    shutil.copytree(folder / "checkpoint-8", damaged)
    (damaged / "optimizer.bin").write_bytes(b"")
    run = run_script(command(world, folder, resume_from_checkpoint="latest", **flags), folder)
    assert run.code == 0
    assert "checkpoint-9" in run.err  # passed over, and said so
    assert_same_tensors(weights(folder), whole)
    assert not (folder / "checkpoint-9.partial").exists()


def test_metrics_are_reproducible_and_hold_the_quartiles(world, tmp_path):
    """Else two equal runs cannot be compared by a diff, or nobody sees at which noise levels the loss lies."""
    first, second = (train(world, tmp_path / name, logging_steps=5) for name in ("first", "second"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    quartiles = {"loss_q1", "loss_q2", "loss_q3", "loss_q4"}
    for record in records(first):
        assert set(record) == {"step", "epoch", "loss", "lr", "grad_norm"} | quartiles
        # 20 samples, the loss being their mean: it lies between the means of the quartiles
        assert min(record[name] for name in quartiles) <= record["loss"] <= max(record[name] for name in quartiles)
    timings = [json.loads(line) for line in (first / "timings.jsonl").read_text().splitlines()]
    assert [timing["step"] for timing in timings] == [5, 10]
    assert all(timing["images_per_second"] > 0 for timing in timings)


@pytest.mark.parametrize(
    ("objective", "variance_type"),
    [("simple", "fixed_small"), ("simple", "learned_range"), ("hybrid", "learned_range"), ("vlb", "learned_range"),
     ("vlb", "fixed_large")],
)  # fmt: skip
def test_the_loss_falls(objective, variance_type, world, tmp_path):
    """Else the objective's gradient does not reach the weights, or points the wrong way."""
    flags = {
        "data": "squares",
        "objective": objective,
        "variance_type": variance_type,
        "train_batch_size": 15,
        "max_train_steps": 60,
        "logging_steps": 15,
        "learning_rate": 5e-3,
    }
    found = records(train(world, tmp_path / "run", **flags))
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert all(math.isfinite(record["grad_norm"]) for record in found)
