"""A run that is replaced is there until the new one has a checkpoint."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

import train_text2image
import train_unconditional
from ddpm_hf.common.errors import UsageError
from ddpm_hf.common.layout import EARLIER
from ddpm_hf.common.ownership import MANIFEST, claim_files, run_files
from ddpm_hf.publishing import hub as publishing
from ddpm_hf.training import earlier_run
from ddpm_hf.training.earlier_run import set_aside, settle
from ddpm_hf.training.setup import claiming
from tests.support.ownership import OVER, QUICK, cut_off, put, sealed
from tests.support.pictures import random_pixels, write_images, write_unet
from tests.support.runs import attempt, contents, run_script, train, words


def a_run(folder: Path) -> None:
    """The files of a run, with one that its manifest does not list."""
    claim_files(folder.mkdir() or folder, ["metrics.jsonl", "samples/step-1.png", "checkpoint-2/", "README.md"])
    put(folder, "metrics.jsonl", "samples/step-1.png", "README.md", text="old")
    sealed(folder, 2)
    put(folder, "samples/a.png")


def begin_new(folder: Path) -> None:
    """Set the run aside, and write some files of a new one."""
    set_aside(folder, run_files(folder))
    claim_files(folder, ["metrics.jsonl", "timings.jsonl", "samples/step-9.png"])
    put(folder, "metrics.jsonl", "timings.jsonl", "samples/step-9.png", text="new")


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_run_that_is_replaced_comes_back_whenever_the_new_one_is_killed(with_manifest, tmp_path):
    """Else there is a moment at which a kill costs the earlier model."""
    a_run(tmp_path / "run")
    if not with_manifest:
        (tmp_path / "run" / MANIFEST).unlink()
        (tmp_path / "run" / "README.md").write_text("<!-- ddpm_hf -->")
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "epoch": 1}\n')
    before = contents(tmp_path / "run")
    for first in range(1, 100):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"again-{first}")
        done = cut_off(lambda folder=folder: begin_new(folder), first)
        for second in (1 + first % 5, 3 + first % 7):  # bringing back is killed too
            cut_off(lambda folder=folder: settle(folder, training=True), second)
        settle(folder)
        assert {n: c for n, c in contents(folder).items() if not n.endswith(".partial")} == before
        if done:
            break
    assert first > 10


def test_a_run_that_is_replaced_goes_with_the_first_checkpoint_even_if_that_is_cut_off(tmp_path):
    """Else both runs' files mix, or an old one comes back over the new."""
    a_run(tmp_path / "run")
    begin_new(tmp_path / "run")
    claim_files(tmp_path / "run", ["checkpoint-1/"])
    sealed(tmp_path / "run", 1)
    for number in range(1, 30):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"again-{number}")
        done = cut_off(lambda folder=folder: settle(folder), number)
        settle(folder)
        earlier_run.remove_unfinished(folder)
        assert set(contents(folder)) == {
            MANIFEST, "README.md", "metrics.jsonl", "timings.jsonl", "samples/step-9.png", "samples/a.png",
            "checkpoint-1/manifest.json", "checkpoint-1/weights.bin",
        }  # fmt: skip
        if done:
            break
    assert number > 3


def test_a_run_is_not_taken_from_a_process_that_trains(tmp_path):
    """Else `ddpm-hf sample`, or a second start, pulls the files from under a run."""
    a_run(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        import psutil

        process = {**earlier_run.this_process(), "pid": other.pid, "started": psutil.Process(other.pid).create_time()}
        with mock.patch.object(earlier_run, "this_process", return_value=process):
            begin_new(tmp_path / "run")
        before = contents(tmp_path / "run")
        settle(tmp_path / "run")
        assert contents(tmp_path / "run") == before
        with pytest.raises(UsageError, match=f"process {other.pid} trains there"):
            settle(tmp_path / "run", training=True)
        other.communicate(b"\n")
    settle(tmp_path / "run")
    assert not (tmp_path / "run" / "timings.jsonl").exists()


# The earlier model is there until the new run has a checkpoint


def fail(error):
    """A function that raises."""

    def failing(*args, **more):
        raise error

    return failing


EARLY = {
    "bitsandbytes is missing": ({"use_8bit_adam": True}, None, 2),
    "xFormers is missing": ({"enable_xformers_memory_efficient_attention": True}, None, 2),
    "the tracker does not start": ({"logger": "tensorboard", "logging_dir": "/proc/x"}, None, 2),
    "a UNet of other channels": ({"model_config_name_or_path": "{shop}/five"}, None, 2),
    "best without a split": ({"hub_strategy": "best", "validation_steps": 500}, None, 2),
    "no data": ({"train_data_dir": "{shop}/nothing"}, None, 2),
    "out of memory": ({}, (train_unconditional, "compute_loss", torch.OutOfMemoryError("CUDA out of memory")), 2),
    "a broken first batch": ({}, (train_unconditional, "rehearse", UsageError("broken")), 2),
    "Ctrl-C before the first step": ({}, (train_unconditional, "training_loop", KeyboardInterrupt()), 130),
    "a full disk": ({}, (claiming, "save_settings", OSError(28, "No space left on device")), 1),
    "an error of ours": ({}, (train_unconditional, "Publisher", AssertionError("a bug")), None),
}


@pytest.mark.parametrize("name", EARLY)
def test_whatever_fails_early_leaves_the_earlier_model(name, shop, trained, earlier):
    """Else a missing package, a mistake or a bug costs the model that was there."""
    flags, patch, code = EARLY[name]
    with mock.patch.object(*patch[:2], fail(patch[2])) if patch else mock.MagicMock():
        if code is None:
            with pytest.raises(AssertionError, match="a bug"):
                attempt(shop, earlier, QUICK, **OVER, **flags)
        else:
            assert attempt(shop, earlier, QUICK, **OVER, **flags).code == code
    assert contents(earlier) == contents(trained)
    assert isinstance(DDPMPipeline.from_pretrained(earlier).unet, UNet2DModel)


def at_step(number: int, action):
    """compute_loss that does something at a step."""
    compute = train_unconditional.compute_loss

    def acting(model, batch, keys, **more):
        if keys.step == number:
            action()
        return compute(model, batch, keys, **more)

    return mock.patch.object(train_unconditional, "compute_loss", acting)


@pytest.mark.parametrize(
    "action",
    [lambda: os.kill(os.getpid(), signal.SIGINT), lambda: os.kill(os.getpid(), signal.SIGTERM), fail(OSError(5, "x"))],
    ids=["Ctrl-C", "SIGTERM", "a disk"],
)
def test_a_run_that_stops_before_its_first_checkpoint_gives_the_earlier_one_back(action, shop, trained, earlier):
    """Else a stop after a minute leaves neither model."""
    with at_step(1, action):
        run = attempt(shop, earlier, QUICK, **OVER, max_train_steps=4, seed=5)
    assert "the earlier run is back" in run.err or "is there again" in run.err
    assert contents(earlier) == contents(trained)


def test_sigterm_before_the_loop_gives_the_earlier_run_back(shop, trained, earlier):
    """Else a job that is ended as it starts has removed the model that it was to replace."""
    terminate = mock.Mock(side_effect=lambda config: os.kill(os.getpid(), signal.SIGTERM))
    with mock.patch.object(claiming, "save_settings", terminate):
        assert attempt(shop, earlier, QUICK, **OVER).code == 143
    assert contents(earlier) == contents(trained)


def test_a_run_that_stops_after_its_first_checkpoint_goes_on_from_it(shop, earlier):
    """Else the earlier run comes back over one that has begun."""
    with at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT)):
        run = attempt(shop, earlier, QUICK, **OVER, max_train_steps=4, checkpointing_steps=2, seed=5)
    assert "--resume_from_checkpoint latest" in run.err
    assert not (earlier / EARLIER).exists()
    assert not (earlier / "checkpoint-1").exists()
    again = train(shop, earlier, QUICK, max_train_steps=4, resume_from_checkpoint="latest", seed=5)
    assert [record["step"] for record in again.records()] == [1, 2, 3, 4]


def test_a_start_after_a_kill_begins_with_the_earlier_run(shop, trained, earlier):
    """Else the next start takes half a new run for a run, and the earlier one stays hidden."""
    set_aside(earlier, run_files(earlier))
    record = json.loads((earlier / EARLIER / MANIFEST).read_text())
    (earlier / EARLIER / MANIFEST).write_text(json.dumps({**record, "by": {**record["by"], "started": 0}}))
    claim_files(earlier, ["metrics.jsonl"])
    run = attempt(shop, earlier, QUICK)
    assert run.code == 2
    assert "holds an earlier run" in run.error()
    assert contents(earlier) == contents(trained)


# Text to image


def text(shop: Path, folder: Path, data: Path, **flags):
    """A quick run of the script in this process."""
    more = {
        "train_data_dir": data, "output_dir": folder, "resolution": 16, "vae_widths": "8,16", "logger": "none",
        "vae_train_steps": 2, "max_train_steps": 2, "train_batch_size": 2, "cpu_threads": 1, "seed": 0, **OVER,
    }  # fmt: skip
    return run_script(words({**more, **flags}), folder, train_text2image.main)


def captioned(folder: Path, captions: list, height: int = 16, width: int = 16) -> Path:
    """Images with captions."""
    write_images(folder, random_pixels(len(captions), height, width))
    lines = [f"{number}.png,{caption}" for number, caption in enumerate(captions)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    return folder


@pytest.mark.parametrize(
    ("captions", "size", "flags", "says"),
    [
        ([1, 2, 3], (16, 16), {}, "captions are strings"),
        (["a", "b", "c"], (16, 16), {"enable_xformers_memory_efficient_attention": True}, "xFormers"),
        (["a", "b", "c"], (16, 40), {"center_crop": "false"}, "--center_crop"),
        (["a", "b", "c"], (16, 40), {"center_crop": "false", "cache_dataset": "never"}, "--center_crop"),
        (["a", "b", "c"], (16, 16), {"use_8bit_adam": True}, "bitsandbytes"),
    ],
)
def test_all_is_checked_before_an_autoencoder_is_trained(
    captions, size, flags, says, shop, trained, earlier, tmp_path
):
    """Else the mistake is said when the autoencoder has trained, and the model that was there has gone."""
    data = captioned(tmp_path / "data", captions, *size)
    with mock.patch.object(train_text2image, "train_autoencoder", fail(AssertionError("it trains"))):
        run = text(shop, earlier, data, **flags)
    assert run.code == 2
    assert says in run.error()
    assert contents(earlier) == contents(trained)


def test_an_autoencoder_that_stops_gives_the_earlier_run_back(shop, trained, earlier, tmp_path):
    """Else a stop within the first of two trainings costs the model that was there."""
    data = captioned(tmp_path / "data", ["a", "b", "c"])
    from ddpm_hf.latents import training as autoencoder

    compute = autoencoder.compute_loss

    def stopping(model, batch, keys, **more):
        if keys.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(model, batch, keys, **more)

    with mock.patch.object(autoencoder, "compute_loss", stopping):
        run = text(shop, earlier, data, vae_train_steps=4)
    assert "the earlier run is back" in run.err
    assert contents(earlier) == contents(trained)


# Dry runs


DRY = {
    "an occupied folder": ({}, "holds an earlier run"),
    "a missing extra": ({**OVER, "use_8bit_adam": True}, "bitsandbytes"),
    "best without a split": ({**OVER, "hub_strategy": "best", "validation_steps": 500}, "--validation_split"),
    "the first batch": ({**OVER, "model_config_name_or_path": "{shop}/five"}, "channels"),
    "no such checkpoint": ({"resume_from_checkpoint": "checkpoint-9"}, "no such checkpoint"),
}


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_finds_what_a_run_would(name, shop, trained, earlier):
    """Else a dry run says that all is well, and the run then fails."""
    flags, says = DRY[name]
    run = attempt(shop, earlier, QUICK, dry_run=True, **flags)
    assert run.code == 2
    assert says in run.error()
    assert contents(earlier) == contents(trained)


def test_a_dry_run_says_what_becomes_of_the_folder(shop, trained, earlier, tmp_path):
    """Else nobody knows which checkpoint `latest` is, or that a run will be replaced."""
    says = {
        "goes on from .*checkpoint-2, step 2": {"resume_from_checkpoint": "latest", "max_train_steps": 4},
        "replaces the earlier run": OVER,
    }
    for words_of_it, flags in says.items():
        run = train(shop, earlier, QUICK, dry_run=True, **flags)
        assert re.search(words_of_it, run.out)
    assert contents(earlier) == contents(trained)
    assert "from the beginning" in attempt(shop, tmp_path / "new", QUICK, dry_run=True).out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", ["the token", "the user", "the name"])
def test_a_dry_run_asks_the_hub(wrong, shop, tmp_path, monkeypatch):
    """Else a wrong token is found when training has ended."""
    from huggingface_hub import HfApi

    monkeypatch.setattr(publishing, "open_repository", fail(AssertionError("it creates a repository")))
    whoami = fail(ValueError("Invalid user token.")) if wrong == "the token" else lambda self: {"name": "me"}
    monkeypatch.setattr(HfApi, "whoami", whoami)
    name = {"the token": "me/x", "the user": "you/x", "the name": "me/x y"}[wrong]
    run = attempt(shop, tmp_path / "run", QUICK, dry_run=True, push_to_hub=True, hub_model_id=name)
    assert run.code == 2
    assert name in run.error()


# The first batch


def test_the_rehearsal_changes_nothing(shop, tmp_path):
    """Else a run is another one for having been checked, or learns twice from its first batch."""
    flags = {
        "objective": "vlb", "variance_type": "learned_range", "timestep_sampler": "loss_second_moment",
        "use_ema": True, "ddpm_num_steps": 5, "ddpm_num_inference_steps": 1, "ddpm_beta_schedule": "cosine",
        "checkpointing_steps": 1,
    }  # fmt: skip
    write_unet(tmp_path / "dropout", dropout=0.2)
    flags["model_config_name_or_path"] = str(tmp_path / "dropout")
    train(shop, tmp_path / "with", QUICK, **flags)
    again = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    with mock.patch.object(train_unconditional, "rehearse", lambda run, state, plan, batches, loss: batches):
        train(shop, tmp_path / "without", QUICK, **flags)
        shutil.copytree(tmp_path / "without", tmp_path / "resumed")
        train(shop, tmp_path / "without", QUICK, **flags, **again)
    train(shop, tmp_path / "resumed", QUICK, **flags, **again)
    for name in ("checkpoint-2", "checkpoint-3"):
        left, right = (contents(tmp_path / f / name) for f in ("without", "resumed"))
        compared = [n for n in left if n.endswith((".safetensors", ".bin"))]
        assert len(compared) >= 4
        assert {n: left[n] for n in compared} == {n: right[n] for n in compared}
    one, two = (contents(tmp_path / f / "checkpoint-2" / "unet") for f in ("with", "without"))
    assert one == two
