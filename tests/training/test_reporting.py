"""What a training says: how long it takes, lines where no bar is shown, and an ending whose commands work."""

import re
import shlex
import time
from types import SimpleNamespace

import pytest
import torch

from ddpm_hf.models.presets import MODEL_PRESETS
from ddpm_hf.models.recipes import advice_on_a_cpu
from ddpm_hf.portable.sampling_ddpm_hf import downscaling
from ddpm_hf.training import reporting
from ddpm_hf.training.reporting import Progress, duration, table
from tests.support.pictures import random_pixels, write_images, write_unet
from tests.support.runs import attempt, run_script

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Images, by themselves and by class, and a UNet to train."""
    root = tmp_path_factory.mktemp("shop")
    write_images(root / "photos", random_pixels(8))
    for name in ("cat", "black dog"):
        write_images(root / "classes" / name, random_pixels(4), name + "-{}.png")
    write_unet(root / "tiny")
    return root


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def progress(total: int, device=CPU, main=True, first=0) -> Progress:
    """The progress of a training in which nothing is trained."""
    return Progress(SimpleNamespace(is_main_process=main, device=device), total, first, "get a GPU")


# How long it takes


def test_the_time_of_a_step_leaves_out_the_first_and_what_is_no_training(clock, capsys):
    # Breaks if a first step that compiles or warms up, or a grid in between, makes a user give up a fast training.
    shown = progress(1000)
    for step, seconds in enumerate([100.0, *[2.0] * 10], start=1):
        clock.seconds += seconds
        shown.done(step)
        with shown.pause():
            clock.seconds += 50
        if step < 3:
            assert capsys.readouterr().err == ""
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "2 s a step, 33 min 20 s for 1,000 steps"


@pytest.mark.parametrize(
    ("device", "seconds", "total", "warned"),
    [(CPU, 50, 10_000, True), (CPU, 50, 100, False), (GPU, 50, 10_000, False)],
)
def test_what_takes_days_on_a_cpu_is_said_with_a_way_out(device, seconds, total, warned, clock, capsys):
    # Breaks if the README's main line on a CPU runs into the night without a word, or a short run is talked down.
    shown = progress(total, device)
    for step in (1, 2):
        clock.seconds += seconds
        shown.done(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("50 s a step, ")
    assert lines[1:] == ["warning: this takes long on a CPU: get a GPU"] * warned


def test_other_processes_than_the_main_one_say_nothing(clock, capsys):
    # Breaks if a run on eight GPUs says each line eight times.
    shown = progress(1000, main=False)
    for step in range(1, 30):
        clock.seconds += 1
        shown.done(step)
        shown.figures(1, {"loss": 0.5}, 1e-4, 9.0)
    assert capsys.readouterr().err == ""


def test_the_time_left_counts_grids_and_files(clock, capsys):
    # Breaks if "left" is short by what goes into sampling, which is most of the time where grids are many.
    shown = progress(11)
    for step in range(1, 7):
        clock.seconds += 1
        shown.done(step)
        with shown.pause():
            clock.seconds += 9
    shown.figures(1, {"loss": 0.5, "validation_loss": 0.25}, 1e-4, 123.4)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "step  6/11  epoch 1  loss 0.5  held-out loss 0.25  lr 1.0e-04  123 images/s  59 s left"


FITTING = [
    (8, "small-16"), (16, "small-16"), (18, "small-16"), (28, "small-32"), (64, "small-64"), (128, "small-64"),
    ((64, 96), "small-64"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "preset"), FITTING)
def test_the_preset_that_is_suggested_fits_the_images(size, preset):
    # Breaks if a user who follows the advice is refused for a side that the preset's UNet cannot halve.
    advice = advice_on_a_cpu(None, size)
    assert f"--model_preset {preset};" in advice
    step = downscaling(MODEL_PRESETS[preset].unet["block_out_channels"])
    assert all(side % step == 0 for side in ([size] if isinstance(size, int) else size))


def test_a_preset_that_is_small_already_is_not_suggested():
    # Breaks if the advice is what the user has done.
    assert "--model_preset" not in advice_on_a_cpu("small-32", 64)


@pytest.mark.parametrize("seconds", [0, 59.4, 59.6, 3599.6, 47.99 * 3600, 1e7])
def test_a_duration_is_never_off_by_more_than_its_smaller_unit(seconds):
    # Breaks if 59.6 s is "60 s", or a remainder is rounded up into the next unit.
    units = {"s": 1, "min": 60, "h": 3600, "days": 86400}
    parts = re.findall(r"(\d+) (\w+)", duration(seconds))
    total = sum(int(number) * units[unit] for number, unit in parts)
    assert abs(total - seconds) <= units[parts[-1][1]]


# The log


def test_a_log_says_what_is_trained_each_logged_step_and_each_file(shop, tmp_path):
    # Breaks if a log file is full of carriage returns, or leaves out what a reader looks for first.
    flags = {"validation_split": 0.25, "validation_steps": 2, "checkpointing_steps": 2, "save_images_steps": 2}
    run = attempt(shop, tmp_path / "run", num_epochs=None, max_train_steps=4, use_ema=True, **flags)
    assert run.code == 0, run.err
    assert "\r" not in run.err
    lines = run.err.splitlines()
    said = {line.split()[0]: line.strip() for line in lines if re.match(r" +\w+  \S", line)}
    assert said["data"].endswith("photos: 6 images, column 'image'")
    assert said["images"].startswith("images  3 × 8 × 8")
    assert "parameters" in said["model"]
    assert said["batch"] == "batch  4 × 1 process × 1 accumulated = 4"
    assert said["steps"] == "steps  4 (2 an epoch)"
    assert "CPU" in said["device"]
    assert "float32" in said["device"]
    assert "seed 0" in said["output"]
    steps = [line for line in lines if re.match(r"step +\d", line)]
    records = run.records()
    assert [line.split("  ")[0] for line in steps if "loss" in line] == [f"step {n}/4" for n in (1, 2, 3, 4)]
    for record in records:
        line = next(line for line in steps if line.startswith(f"step {record['step']}/") and "loss" in line)
        assert f"loss {record['loss']:.4g}" in line
        assert f"lr {record['lr']:.1e}" in line
        assert ("held-out loss" in line) == ("validation_loss" in record)
    for n in (2, 4):
        assert f"step {n}/4  checkpoint-{n}" in steps
        assert f"step {n}/4  sampling pictures" in steps
        assert f"step {n}/4  pictures in {run.folder}/samples/step-00000{n}.png" in steps


def test_a_terminal_keeps_its_bar(shop, tmp_path, monkeypatch):
    # Breaks if a terminal scrolls with a line for each logged step beside the bar.
    monkeypatch.setattr(reporting, "shows_bars", lambda: True)
    run = attempt(shop, tmp_path / "run")
    assert "training: " in run.err
    assert "step 1/4" not in run.err


def ending(run) -> dict[str, str]:
    """The last lines of a run, by their names."""
    lines = [line.strip().split("  ", 1) for line in run.err.splitlines() if re.match(r" *[\w ]+?  \S", line)]
    return dict(lines)


def command_flags(line: str, program: str) -> list[str]:
    """The flags of a command that was printed."""
    assert line.startswith(f"{program} "), line
    return shlex.split(line.removeprefix(f"{program} "))


SCRIPT = "accelerate launch train_unconditional.py"


def test_the_commands_at_the_end_of_a_run_work(shop, tmp_path):
    # Breaks if a user who copies the last lines of a log is refused, or trains something else.
    flags = {"train_data_dir": "{shop}/classes", "label_column": "label"}
    run = attempt(shop, tmp_path / "a run", **flags)
    assert run.code == 0, run.err
    said = ending(run)
    assert re.match(r"4 steps in \d+ s: loss \d", said["trained"])
    assert shlex.split(said["sample"]) == ["ddpm-hf", "sample", str(run.folder), "--class", "black dog"]
    again = run_script(command_flags(said["train on"], SCRIPT), run.folder)
    assert again.code == 0, again.err
    assert again.records()[-1]["step"] == 8  # twice the epochs


def test_a_stopped_run_says_how_to_go_on_and_how_to_sample_what_there_is(shop, tmp_path):
    # Breaks if the command that goes on does not, or the checkpoint that is named is not there.
    run = attempt(shop, tmp_path / "run", max_train_hours=1e-9)
    said = ending(run)
    assert said["checkpoint"] == str(run.folder / "checkpoint-1")
    assert (run.folder / "checkpoint-1").is_dir()
    assert shlex.split(said["sample"]) == ["ddpm-hf", "sample", str(run.folder / "checkpoint-1")]
    assert run.json("run.json")["dataset"]["images"] == 8  # for the card of the checkpoint
    again = run_script([*command_flags(said["go on"], SCRIPT), "--max_train_hours", "1"], run.folder)
    assert again.code == 0, again.err
    assert again.records()[-1]["step"] == 4


def test_table_aligns_its_values():
    # Breaks if the lines at a run's start cannot be read down.
    assert {line.index("x") for line in table({"a": "x", "much longer than ten": "x"}).splitlines()} == {22}
