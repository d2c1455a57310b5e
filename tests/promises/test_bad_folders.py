"""Output folders and checkpoints that cannot be used, and losses that are not finite."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import train_unconditional
from tests.support.bad_input import STEADY, WEIGHTS, try_out
from tests.support.runs import Run


def resumed(shop, folder: Path, wanted="latest", **flags) -> Run:
    """Going on with the run in a folder."""
    return try_out(
        {"max_train_steps": 4, **STEADY, "resume_from_checkpoint": wanted, **flags}, shop, folder
    )  # fmt: skip


def damage(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_folder_in_use_is_not_touched(shop, steady, folder):
    # Breaks if a second run mixes its files with those of the first, or does not say how to go on.
    run = try_out({}, shop, folder)
    assert run.code == 2
    assert len(run.err.splitlines()) == 1
    for fragment in (folder, "--resume_from_checkpoint latest", "--overwrite_output_dir"):
        assert str(fragment) in run.error()
    assert run.files() == steady.files()


def test_a_folder_with_other_files_can_be_used(shop, tmp_path):
    # Breaks if a folder that holds only the user's notes counts as an earlier run.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert try_out({"max_train_steps": 1}, shop, tmp_path / "run").code == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["file.txt", "file.txt/run"])
def test_an_output_folder_that_cannot_be(place, shop, tmp_path):
    # Breaks if an output path that is a file, or lies under one, crashes.
    (tmp_path / "file.txt").write_text("mine")
    run = try_out({}, shop, tmp_path / place)
    assert run.code == 2
    assert "Traceback" not in run.err
    assert str(tmp_path / place) in run.error()
    assert (tmp_path / "file.txt").read_text() == "mine"


# Checkpoints


def refused_resume(run: Run, steady: Run, *fragments) -> None:
    """A run that could not be resumed: said in one line, and everything still there."""
    assert run.code == 2
    assert "Traceback" not in run.err
    for fragment in fragments:
        assert str(fragment) in run.error()
    assert run.files() == steady.files()
    assert (run.folder / "metrics.jsonl").read_text() == (steady.folder / "metrics.jsonl").read_text()


def test_a_checkpoint_that_is_not_there(shop, steady, folder):
    # Breaks if a typo in a checkpoint's name trains from the beginning, or the names are not shown.
    run = resumed(shop, folder, "checkpoint-7")
    refused_resume(run, steady, "checkpoint-7", "checkpoint-1, checkpoint-2, checkpoint-3")


@pytest.mark.parametrize("name", [WEIGHTS, "optimizer.bin", "manifest.json"])
def test_a_damaged_checkpoint_is_refused(name, shop, steady, folder):
    # Breaks if half a file is loaded, or ends in a traceback.
    damage(folder / "checkpoint-3" / name)
    refused_resume(resumed(shop, folder, "checkpoint-3"), steady, "checkpoint-3", name.rpartition("/")[2])


@pytest.mark.every(3)
@pytest.mark.parametrize("how", ["damaged", "incomplete", "partial"])
def test_latest_passes_over_a_damaged_checkpoint_and_says_so(how, shop, folder, tmp_path):
    # Breaks if a run that was killed while saving cannot go on, or goes on from half a checkpoint.
    newest = folder / "checkpoint-3"
    if how == "damaged":
        damage(newest / WEIGHTS)
    elif how == "incomplete":
        (newest / "manifest.json").unlink()
    else:
        newest.rename(folder / "checkpoint-3.partial")
    run = resumed(shop, folder)
    assert run.code == 0
    assert "checkpoint-2" in next(line for line in run.err.splitlines() if line.startswith("resuming"))
    said = [line for line in run.err.splitlines() if line.startswith("passing over") and "checkpoint-3" in line]
    assert len(said) == (how != "partial")  # a name that no finished checkpoint has needs no word
    assert [record["step"] for record in run.records()] == [1, 2, 3, 4]
    whole = try_out({"max_train_steps": 4, **STEADY}, shop, tmp_path / "whole")
    for name, value in load_file(whole.folder / WEIGHTS).items():
        assert torch.equal(load_file(run.folder / WEIGHTS)[name], value)


def test_no_whole_checkpoint_is_said(shop, steady, folder):
    # Breaks if `latest` starts over, silently, in a folder whose checkpoints are all damaged.
    for number in (1, 2, 3):
        damage(folder / f"checkpoint-{number}" / WEIGHTS)
    refused_resume(resumed(shop, folder), steady, "no complete checkpoint", "--overwrite_output_dir")


OTHERS = {
    "other widths": ({"model_config_name_or_path": "{shop}/wide"}, ("block_out_channels", "[8, 16]", "[16, 16]")),
    "other outputs": ({"variance_type": "learned_range"}, ("out_channels", "3", "6")),
    "other seed": ({"seed": 5}, ("--seed 5", "seed 0")),
    "no EMA": ({"use_ema": True}, ("--use_ema True", "trained with False", "leave the flag out")),
    "no sampler": ({"timestep_sampler": "loss_second_moment"}, ("--timestep_sampler", "trained with uniform")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_run(name, shop, steady, folder):
    # Breaks if a checkpoint that does not fit is half loaded, or the message does not say what differs.
    flags, fragments = OTHERS[name]
    model = name in ("other widths", "other outputs")
    refused_resume(resumed(shop, folder, **flags), steady, *["checkpoint-3"] * model, *fragments)


def test_what_else_differs_is_said(shop, folder):
    # Breaks if a run goes on under other conditions without a word, or a harmless difference stops it.
    run = resumed(shop, folder, train_batch_size=2)
    assert run.code == 0
    assert any(line.startswith("warning: global_batch was 4 and is 2") for line in run.err.splitlines())


# Losses that are not finite


def poisoned(bad_steps):
    """compute_loss, with NaN at some steps (from 0)."""
    compute_loss = train_unconditional.compute_loss

    def compute(model, batch, keys, **more):
        result = compute_loss(model, batch, keys, **more)
        return result._replace(losses=result.losses * (math.nan if bad_steps(keys.step) else 1))

    return mock.patch.object(train_unconditional, "compute_loss", compute)


def test_nan_for_ever_stops_with_the_last_good_weights(shop, steady, tmp_path):
    # Breaks if a NaN reaches the weights or the EMA, or a diverged run burns hours.
    with poisoned(lambda step: step >= 3):
        run = try_out(
            {"num_epochs": 20, "max_nonfinite_steps": 4, **STEADY}, shop, tmp_path / "run"
        )  # fmt: skip
    assert run.code == 2
    assert "Traceback" not in run.err
    for fragment in ("4 steps in a row", "7", "not finite", "--learning_rate", str(run.folder)):
        assert fragment in run.err
    assert run.err.count("step skipped") == 4
    good = try_out({"max_train_steps": 3, **STEADY}, shop, tmp_path / "good")
    weights = load_file(sorted(run.folder.glob("checkpoint-*"))[-1] / WEIGHTS)
    for name, value in load_file(good.folder / "checkpoint-3" / WEIGHTS).items():
        assert torch.equal(weights[name], value)
    assert all(math.isfinite(value) for record in run.records() for value in record.values())
    assert run.error()


def test_a_nan_now_and_then_is_skipped(shop, tmp_path):
    # Breaks if a single bad batch stops a run, or its NaN is counted into a mean.
    with poisoned(lambda step: step in (1, 3)):
        run = try_out({"num_epochs": 3, "max_nonfinite_steps": 2, "use_ema": True}, shop, tmp_path / "run")
    assert run.code == 0
    assert run.err.count("step skipped") == 2
    assert [record["step"] for record in run.records()] == [1, 3, 5, 6]
    assert all(math.isfinite(value) for record in run.records() for value in record.values())
    assert all(bool(value.isfinite().all()) for value in load_file(run.folder / WEIGHTS).values())


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # pictures of NaN
def test_a_learning_rate_that_diverges(shop, tmp_path):
    # Breaks if what a user sees of a far too high learning rate is anything but one line with the way out.
    run = try_out({"learning_rate": 1e30, "num_epochs": 20, "max_nonfinite_steps": 3}, shop, tmp_path / "run")
    assert run.code == 2
    assert "--learning_rate" in run.error()
