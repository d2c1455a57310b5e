"""Every flag is accepted, is read, and alone changes something that can be seen; and which setting wins over which."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from PIL import Image

import train_unconditional
from ddpm_hf.models.presets import MODEL_PRESETS
from ddpm_hf.publishing import hub as publishing
from ddpm_hf.publishing import publisher
from ddpm_hf.training.setup.settings import public_settings, save_settings
from tests.support.fixtures_unconditional import (
    BASE,
    Run,
    encoded,
    fill,
    image_rows,
    parse,
    quiet,
    random_pixels,
    run_script,
    words,
    write_images,
    write_rows,
    write_unet,
)

PEER_DEFAULTS = {
    "dataset_name": None, "dataset_config_name": None, "model_config_name_or_path": None, "train_data_dir": None,
    "cache_dir": None, "hub_token": None, "hub_model_id": None, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "output_dir": "ddpm-model-64", "resolution": None, "train_batch_size": 16,
    "eval_batch_size": 16, "dataloader_num_workers": 0, "num_epochs": 100, "save_images_epochs": 10,
    "save_model_epochs": 10,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 500,
    "adam_beta1": 0.95, "adam_beta2": 0.999, "adam_weight_decay": 1e-6, "adam_epsilon": 1e-8, "ema_inv_gamma": 1.0,
    "ema_power": 0.75, "ema_max_decay": 0.9999, "logger": "tensorboard", "logging_dir": "logs", "local_rank": -1,
    "mixed_precision": "no", "prediction_type": "epsilon", "ddpm_num_steps": 1000, "ddpm_num_inference_steps": 1000,
    "ddpm_beta_schedule": "linear", "checkpointing_steps": 500,
    "overwrite_output_dir": False, "center_crop": False, "random_flip": False, "use_ema": False, "push_to_hub": False,
    "hub_private_repo": False, "enable_xformers_memory_efficient_attention": False, "preserve_input_precision": False,
}  # fmt: skip


# Command lines of Diffusers' scripts; its resolution of 64 is that of its own model, which test_sizes shows


def test_the_peers_flags_are_all_here():
    # Breaks if the list above, which the other tests go by, lost a flag.
    assert len(PEER_DEFAULTS) == 45


@pytest.mark.parametrize("flag", PEER_DEFAULTS)
def test_a_peers_flag_has_its_default_and_its_meaning(flag):
    # Breaks if a peer's command line fails here, or trains with another value where it says nothing.
    default = PEER_DEFAULTS[flag]
    named = ["--train_data_dir", "photos"] * (flag not in ("train_data_dir", "dataset_name"))
    if flag != "train_data_dir":
        assert getattr(parse(["--dataset_name" if flag == "train_data_dir" else "--train_data_dir", "x"]), flag) == (
            default
        )
    if default is False:
        assert getattr(parse([*named, f"--{flag}"]), flag) is True
        return
    choices = {"logger": "wandb", "mixed_precision": "fp16"}
    value = choices.get(flag, "7" if default is None or isinstance(default, str) else type(default)(0.5 + default))
    for spelling in (f"--{flag}", f"--{flag.replace('_', '-')}"):
        got = getattr(parse([*named, spelling, str(value)]), flag)
        assert str(got) == str(value)
        assert default is None or type(got) is type(default)


ALIASES = {
    "report_to": ("logger", "none"),
    "num_train_epochs": ("num_epochs", "3"),
    "dataset_image_column_name": ("image_column", "img"),
    "dataset_class_label_column_name": ("label_column", "fine_label"),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_both_spellings_work(alias, tmp_path):
    # Breaks if a flag of another of Diffusers' scripts is unknown here, on the command line or in a config file.
    name, value = ALIASES[alias]
    file = tmp_path / "run.yaml"
    file.write_text(f"{alias}: {value}\ntrain_data_dir: x\n")
    for argv in ([f"--{alias}", value], [f"--{name}", value], ["--config", str(file)]):
        assert str(getattr(parse(["--train_data_dir", "x", *argv]), name)) == value


# Each flag alone


class Seen(NamedTuple):
    """What a run did: what it left on disk and said, and what it handed on."""

    run: Run
    batches: list[dict]  # as compute_loss got them
    calls: list[tuple[str, Any]]  # what the spies saw

    def spied(self, name: str) -> list:
        return [what for who, what in self.calls if who == name]

    def line(self, name: str) -> str:
        """A line of --dry_run."""
        return next(line for line in self.run.out.splitlines() if line.split()[0] == name)

    def distinct_images(self) -> int:
        return len({image.numpy().tobytes() for batch in self.batches for image in batch["images"]})


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Datasets and models for all the runs of this file, by name."""
    root = tmp_path_factory.mktemp("shop")
    pixels = random_pixels(8)
    files = [encoded(one) for one in pixels]
    write_rows(root / "photos", files)
    write_rows(root / "few", files[:4])
    write_rows(root / "broken", [*files[:5], b"junk"])
    write_rows(root / "labelled", files, label=[0, 0, 0, 0, 0, 0, 0, 1])
    write_rows(root / "deep", [encoded(np.full((8, 8), 1000 + 100 * (n % 2), np.uint16)) for n in range(4)])
    two = image_rows([encoded(np.full((8, 8), 10, np.uint8))] * 4, "a")
    two = two.add_column("b", [{"bytes": encoded(np.full((8, 8), 20, np.uint8)), "path": None}] * 4)
    with quiet():
        two.cast_column("b", datasets.Image()).save_to_disk(str(root / "two"))
        splits = {"train": image_rows(files), "small": image_rows(files[:4])}
        datasets.DatasetDict(splits).save_to_disk(str(root / "splits"))
    write_images(root / "folder", pixels)
    write_unet(root / "tiny")
    write_unet(root / "wide", block_out_channels=[16, 16])
    return root


def observe(flags: dict, folder: Path) -> Seen:
    """Run the script with spies where it hands things on; an upload goes nowhere."""
    batches, calls = [], []

    def spying(name, target, result=None):
        def spy(*args, **kwargs):
            got = target(*args, **kwargs) if result is None else result(*args, **kwargs)
            calls.append((name, (args, kwargs, got)))
            return got

        return spy

    compute_loss = train_unconditional.compute_loss

    def watched_loss(model, batch, *args, **kwargs):
        batches.append(batch)
        calls.append(("precision", AcceleratorState().mixed_precision))
        calls.append(("threads", torch.get_num_threads()))
        calls.append(("tf32", torch.backends.cuda.matmul.allow_tf32))
        calls.append(("checkpointing", model.is_gradient_checkpointing))
        return compute_loss(model, batch, *args, **kwargs)

    spies = {
        "create": (publishing, "open_repository", lambda name, *a: name),
        "tags": (publishing, "check_tag", lambda *a: 0),
        "upload": (publishing, "push_files", lambda *a, **k: SimpleNamespace(address="https://hub/it")),
        "save": (publisher, "save_pipeline", None),
        "loader": (torch.utils.data.DataLoader, "__init__", None),
        "compile": (torch, "compile", lambda model, **k: model),
        "xformers": (UNet2DModel, "enable_xformers_memory_efficient_attention", lambda *a, **k: 0),
    }
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def unwatched_rehearsal(*args):
        seen = len(batches), len(calls)
        rehearsed = rehearse(*args)
        del batches[seen[0] :], calls[seen[1] :]
        return rehearsed

    rehearse = train_unconditional.rehearse
    with (
        mock.patch.object(train_unconditional, "compute_loss", watched_loss),
        mock.patch.object(train_unconditional, "rehearse", unwatched_rehearsal),
    ):
        patches = [
            mock.patch.object(place, name, spying(key, getattr(place, name), result))
            for key, (place, name, result) in spies.items()
        ]
        for patch in patches:
            patch.start()
        try:
            run = run_script(words({**flags, "output_dir": folder}), folder)
        finally:
            for patch in patches:
                patch.stop()
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    return Seen(run, batches, calls)


# What is looked at


def steps(seen):
    return seen.run.records()[-1]["step"]


def rates(seen):
    return [record["lr"] for record in seen.run.records()]


def weights(seen):
    return hashlib.sha256((seen.run.folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def checkpoints(seen):
    return sorted(path.name for path in seen.run.folder.glob("checkpoint-*"))


def grids(seen):
    return sorted(path.name for path in seen.run.folder.glob("samples/step-*.png"))


def last_grid(seen):
    return Image.open(seen.run.folder / "samples" / grids(seen)[-1])


def logs(seen):
    return sorted({str(Path(name).parent) for name in seen.run.files() if "tfevents" in name})


def scheduler(key):
    return lambda seen: seen.run.json("scheduler/scheduler_config.json")[key]


def adam(key):
    def read(seen):
        path = seen.run.folder / checkpoints(seen)[-1] / "optimizer.bin"
        return torch.load(path, weights_only=True)["param_groups"][0][key]

    return read


def asked_of_the_hub(key):
    return lambda seen: [kwargs.get(key) for _, kwargs, _ in seen.spied("upload")]


def has(name):
    return lambda seen: any(name in file for file in seen.run.files())


def labels(seen):
    return sorted(torch.cat([batch["labels"] for batch in seen.batches[:2]]).tolist())


class Row(NamedTuple):
    """A flag, given alone on top of BASE and `more`, and what it changes from what to what."""

    flag: str
    value: Any
    see: Any
    before: Any = None  # what is seen without, or a predicate; None: anything
    after: Any = None
    more: dict = {}


DRY = {"dry_run": True}
EMA = {"use_ema": True}
PUSH = {"push_to_hub": True}
BOUND = {"variance_type": "learned_range", "objective": "hybrid"}
CLASSES = {"train_data_dir": "{shop}/labelled", "label_column": "label"}
CONSTANT = {"lr_scheduler": "constant"}
ANY_UNET = {**DRY, "model_config_name_or_path": None, "resolution": 32}
ROWS = [
    Row("dataset_name", "{shop}/few", lambda s: s.line("data"), lambda line: "embedded digits" in line,
        lambda line: "few: 4 images" in line, {**DRY, "train_data_dir": None}),
    Row("train_data_dir", "{shop}/few", lambda s: s.line("data"), lambda line: "embedded digits" in line,
        lambda line: "few: 4 images" in line, {**DRY, "train_data_dir": None}),
    Row("dataset_split", "small", lambda s: len(s.batches), 4, 2, {"train_data_dir": "{shop}/splits"}),
    Row("streaming", True, lambda s: s.line("data"), lambda line: "8 images" in line,
        lambda line: "a stream" in line, {**DRY, "max_train_steps": 2}),
    Row("image_column", "b", lambda s: s.batches[0]["images"].unique().tolist(), [10], [20],
        {"train_data_dir": "{shop}/two"}),
    Row("label_column", "label", lambda s: s.run.json("model_index.json").get("id2label"), None,
        {"0": "0", "1": "1"}, {"train_data_dir": "{shop}/labelled"}),
    Row("class_dropout", 0, lambda s: s.run.json("unet/config.json")["num_class_embeds"], 3, 2, CLASSES),
    Row("class_balanced", True, labels, [0] * 7 + [1], [0] * 4 + [1] * 4, CLASSES),
    Row("resolution", "16x8", lambda s: s.batches[0]["images"].shape[-2:], (8, 8), (16, 8)),
    Row("channels", 1, lambda s: s.line("images").split()[1], "3", "1",
        {**ANY_UNET, "model_preset": "small-32"}),
    Row("center_crop", True, Seen.distinct_images, lambda count: count > 8, 8),
    Row("image_interpolation_mode", "nearest", lambda s: s.batches[0]["images"].float().std().item(), None,
        lambda spread: spread > 0, {"resolution": "32"}),
    Row("max_train_samples", 3, lambda s: s.line("data").split(": ")[1].split(",")[0], None, "3 images", DRY),
    Row("random_flip", True, Seen.distinct_images, 8, lambda count: 8 < count <= 16, {"center_crop": True}),
    Row("preserve_input_precision", True, lambda s: s.batches[0]["images"].unique().numel(), 1, 2,
        {"train_data_dir": "{shop}/deep"}),
    Row("pixel_range", (0, 2000), lambda s: s.batches[0]["images"].unique().numel(), 1, 2,
        {"train_data_dir": "{shop}/deep"}),
    Row("cache_dataset", "never", lambda s: s.line("images").endswith("not kept decoded"), False, True, DRY),
    Row("skip_broken_images", True, lambda s: s.run.code, 2, 0, {"train_data_dir": "{shop}/broken"}),
    Row("validation_split", 0.25, lambda s: s.run.code or "validation_loss" in s.run.records()[-1], 2, True,
        {"validation_steps": 2}),
    Row("validation_steps", 3, lambda s: [r["step"] for r in s.run.records() if "validation_loss" in r], [], [3, 4],
        {"validation_split": 0.25}),
    Row("model_config_name_or_path", "{shop}/wide", lambda s: s.line("model"),
        lambda line: "113,673,219 parameters" in line, lambda line: "wide" in line, ANY_UNET),
    Row("model_preset", "small-32", lambda s: s.line("model"), lambda line: "113,673,219 parameters" in line,
        lambda line: "small-32" in line, ANY_UNET),
    Row("ddpm_num_steps", 50, scheduler("num_train_timesteps"), 1000, 50),
    Row("ddpm_num_inference_steps", 3, lambda s: last_grid(s).tobytes()),
    Row("ddpm_beta_schedule", "scaled_linear", scheduler("beta_schedule"), "linear", "scaled_linear"),
    Row("rescale_betas_zero_snr", True, scheduler("rescale_betas_zero_snr"), False, True,
        {"prediction_type": "v_prediction"}),
    Row("prediction_type", "v_prediction", scheduler("prediction_type"), "epsilon", "v_prediction"),
    Row("prediction_type", "sample", weights),
    Row("variance_type", "fixed_large", scheduler("variance_type"), "fixed_small", "fixed_large"),
    Row("objective", "hybrid", weights, more={"variance_type": "learned_range"}),
    Row("loss_type", "l1", weights),
    Row("snr_gamma", 5, weights),
    Row("vlb_weight", 1, weights, more=BOUND),
    Row("timestep_sampler", "loss_second_moment", has("timestep_sampler.safetensors"), False, True),
    Row("seed", 1, weights),
    Row("cpu_threads", 2, lambda s: s.spied("threads")[0], 1, 2),
    Row("train_batch_size", 2, steps, 4, 8),
    Row("eval_batch_size", 4, lambda s: last_grid(s).size, (68, 68), (134, 134)),
    Row("gradient_accumulation_steps", 2, steps, 4, 2),
    Row("dataloader_num_workers", 1, lambda s: s.spied("loader")[0][1]["num_workers"], 0, 1,
        {"cache_dataset": "never"}),
    Row("num_epochs", 3, steps, 4, 6),
    Row("max_train_steps", 3, steps, 4, 3),
    Row("max_train_hours", 1e-9, checkpoints, ["checkpoint-4"], ["checkpoint-1"]),
    Row("learning_rate", 5e-4, rates, [1e-4] * 4, [5e-4] * 4, CONSTANT),
    Row("scale_lr", True, rates, [1e-4] * 4, [4e-4] * 4, CONSTANT),
    Row("lr_scheduler", "linear", lambda s: [round(rate * 1e6) for rate in rates(s)],
        lambda seen: seen[1] == 50 != 75 != seen[0], [75, 50, 25, 0]),
    Row("lr_warmup_steps", 4, lambda s: [round(rate * 1e6) for rate in rates(s)], [100] * 4, [25, 50, 75, 100],
        {"lr_scheduler": "constant_with_warmup"}),
    Row("adam_beta1", 0.5, adam("betas"), (0.95, 0.999), (0.5, 0.999)),
    Row("adam_beta2", 0.5, adam("betas"), (0.95, 0.999), (0.95, 0.5)),
    Row("adam_weight_decay", 0.5, adam("weight_decay"), 1e-6, 0.5),
    Row("adam_epsilon", 0.5, adam("eps"), 1e-8, 0.5),
    Row("max_grad_norm", 1e-9, weights),
    Row("max_nonfinite_steps", 3, lambda s: s.run.err.count("step skipped"), 1, 3,
        {"learning_rate": 1e30, "max_nonfinite_steps": 1, "num_epochs": 9}),
    Row("use_ema", True, has("unet_ema/"), False, True),
    Row("use_ema", True, weights),
    Row("ema_inv_gamma", 3, weights, more=EMA),
    Row("ema_power", 0.25, weights, more=EMA),
    Row("ema_max_decay", 0.1, weights, more=EMA),
    Row("ema_min_decay", 0.9, weights, more=EMA),
    Row("mixed_precision", "bf16", lambda s: s.spied("precision")[0], "no", "bf16"),
    Row("mixed_precision", "bf16", weights),
    Row("allow_tf32", True, lambda s: s.spied("tf32")[0], False, True),
    Row("compile", True, lambda s: len(s.spied("compile")), 0, 1),
    Row("gradient_checkpointing", True, lambda s: s.spied("checkpointing")[0], False, True),
    Row("enable_xformers_memory_efficient_attention", True, lambda s: len(s.spied("xformers")), 0, 1),
    Row("checkpointing_steps", 3, checkpoints, ["checkpoint-4"], ["checkpoint-3", "checkpoint-4"]),
    Row("checkpoints_total_limit", 2, lambda s: checkpoints(s), [f"checkpoint-{n}" for n in (1, 2, 3, 4)],
        ["checkpoint-3", "checkpoint-4"], {"checkpointing_steps": 1}),
    Row("save_images_epochs", 1, grids, ["step-000002.png", "step-000006.png"],
        ["step-000002.png", "step-000004.png", "step-000006.png"], {"num_epochs": 3}),
    Row("save_images_epochs", 0, grids, ["step-000002.png", "step-000004.png"], []),
    Row("save_images_steps", 3, grids, ["step-000002.png", "step-000004.png"], ["step-000003.png", "step-000004.png"]),
    Row("save_model_epochs", 1, lambda s: len(s.spied("save")), more={"num_epochs": 4}),
    Row("logging_steps", 3, lambda s: [record["step"] for record in s.run.records()], [1, 2, 3, 4], [3, 4]),
    Row("logger", "tensorboard", logs, [], lambda places: places and all(p.startswith("logs") for p in places)),
    Row("logging_dir", "curves", logs, lambda places: all(p.startswith("logs") for p in places),
        lambda places: places and all(p.startswith("curves") for p in places), {"logger": "tensorboard"}),
    Row("tracker_project_name", "mine", logs, lambda places: "logs/train_unconditional" in places,
        lambda places: "logs/mine" in places, {"logger": "tensorboard"}),
    Row("push_to_hub", True, lambda s: len(s.spied("upload")), 0, 1),
    Row("hub_model_id", "me/photos", lambda s: (s.spied("create")[0][0][0], s.spied("upload")[0][0][2]),
        lambda names: names[1] != "me/photos", ("me/photos", "me/photos"), PUSH),
    Row("hub_token", "hf_secret", lambda s: (s.spied("create")[0][0][1], s.spied("upload")[0][0][3]),
        (None, None), ("hf_secret", "hf_secret"), PUSH),
    Row("hub_private_repo", True, lambda s: s.spied("create")[0][0][2], False, True, PUSH),
    Row("hub_revision", "v1", lambda s: [len(s.spied("tags")), *asked_of_the_hub("tag")(s)], [0, None], [1, "v1"],
        PUSH),
    Row("hub_license", "mit", asked_of_the_hub("license"), [None], ["mit"], PUSH),
]  # fmt: skip

# Flags whose effect takes more than a run with and without, each with a test of its own below, or in test_averaging,
# test_latent_training, test_pretrained and test_publishing
APART = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank", "cache_dir", "dataset_config_name",
    "dry_run", "config", "foreach_ema", "offload_ema", "use_8bit_adam",
    "vae_name_or_path", "cache_latents", "hub_strategy", "save_variants",
    "pretrained_model_name_or_path", "revision", "variant", "subfolder",
}  # fmt: skip


def test_every_flag_is_seen_to_work():
    # Breaks if a flag is declared that nobody shows to be read.
    declared = {field.name for field in dataclasses.fields(train_unconditional.UnconditionalConfig)}
    assert declared == {row.flag for row in ROWS} | APART


@pytest.fixture(scope="module")
def seen_of(shop, tmp_path_factory):
    """What is seen with flags on top of BASE; a run that was made before is not made again."""
    folders = tmp_path_factory.mktemp("runs")

    @functools.cache
    def seen(flags: tuple) -> Seen:
        return observe(fill(dict(flags), shop), folders / str(seen.cache_info().misses))

    return lambda flags: seen(tuple({**BASE, **flags}.items()))


def fits(got, want) -> bool:
    """Whether a value is what the table says, or satisfies it."""
    return want(got) if callable(want) else got == want


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # pictures of NaN
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.flag}-{row.value}".replace("{shop}/", ""))
def test_a_flag_alone_changes_what_is_seen(row, seen_of):
    # Breaks if a flag is accepted and ignored, or does something else than it says.
    without, given = seen_of(row.more), seen_of({**row.more, row.flag: row.value})
    assert given.run.code in (0, without.run.code), given.run.err
    before, after = row.see(without), row.see(given)
    assert before != after
    assert fits(before, row.before) or row.before is None, before
    assert fits(after, row.after) or row.after is None, after


def test_a_run_is_a_function_of_its_flags(seen_of, shop, tmp_path):
    # Breaks if two runs of one command line differ: then "changes alone" above would mean nothing.
    again = observe(fill(BASE, shop), tmp_path / "again")
    assert weights(again) == weights(seen_of({}))
    assert last_grid(again).tobytes() == last_grid(seen_of({})).tobytes()
    assert again.run.records() == seen_of({}).run.records()


# Flags that need more than one run, or another surrounding


@pytest.fixture
def base(shop):
    """BASE with its paths filled in."""
    return fill(BASE, shop)


def test_output_dir(base, tmp_path, monkeypatch):
    # Breaks if results land elsewhere than --output_dir, or than the default of Diffusers' script where there is none.
    monkeypatch.chdir(tmp_path)
    for folder, flags in (("ddpm-model-64", []), ("deep/er", ["--output_dir", "deep/er"])):
        run = run_script([*words(base), *flags], tmp_path / folder)
        assert run.code == 0
        assert (tmp_path / folder / "model_index.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"ddpm-model-64", "deep"}


def test_overwrite_output_dir(base, tmp_path):
    # Breaks if an earlier run is overwritten unasked, survives although asked, or takes a user's own files with it.
    folder = tmp_path / "run"
    (tmp_path / "beside.txt").write_text("mine")
    assert observe({**base, "checkpointing_steps": 1, "num_epochs": 3, "logger": "tensorboard"}, folder).run.code == 0
    (folder / "notes.txt").write_text("mine")
    before = sorted(path.name for path in folder.iterdir())
    assert observe(base, folder).run.code == 2
    assert sorted(path.name for path in folder.iterdir()) == before
    seen = observe({**base, "overwrite_output_dir": True}, folder)
    assert seen.run.code == 0
    assert checkpoints(seen) == ["checkpoint-4"]
    assert grids(seen) == ["step-000002.png", "step-000004.png"]
    assert [record["step"] for record in seen.run.records()] == [1, 2, 3, 4]
    assert not logs(seen)
    assert (folder / "notes.txt").read_text() == (tmp_path / "beside.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["..", "../beside", "."])
def test_overwriting_stays_within_the_output_folder(place, base, tmp_path):
    # Breaks if --overwrite_output_dir with a --logging_dir that leads out of the folder removes what is there.
    (tmp_path / "beside").mkdir()
    for file in ("beside/keep.txt", "keep.txt"):
        (tmp_path / file).write_text("mine")
    flags = {**base, "overwrite_output_dir": True, "logging_dir": place}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    observe(flags, tmp_path / "run")
    for file in ("beside/keep.txt", "keep.txt", "run/notes.txt"):
        assert (tmp_path / file).is_file(), f"--logging_dir {place} removed {file}"


def test_an_absolute_logging_dir(base, tmp_path):
    # Breaks if logs outside of the output folder crash the run, or are removed by --overwrite_output_dir.
    elsewhere = tmp_path / "curves"
    for more in ({}, {"overwrite_output_dir": True}):
        flags = {**base, "logger": "tensorboard", "logging_dir": elsewhere, **more}
        assert observe(flags, tmp_path / "run").run.code == 0
    assert len({path.name for path in elsewhere.rglob("events*")}) >= 2


def test_resume_from_checkpoint(base, tmp_path):
    # Breaks if a resumed run starts over, or ends elsewhere than one that never stopped.
    flags = {**base, "checkpointing_steps": 1, "use_ema": True}
    whole = observe(flags, tmp_path / "whole")
    for number, checkpoint in enumerate(("latest", "checkpoint-3", tmp_path / "again-2" / "checkpoint-3")):
        folder = tmp_path / f"again-{number}"
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "checkpoint-4")
        again = observe({**flags, "resume_from_checkpoint": checkpoint}, folder)
        assert again.run.code == 0, again.run.err
        assert "checkpoint-3" in again.run.err
        assert len(again.batches) == 1
        assert weights(again) == weights(whole)
        assert again.run.records() == whole.run.records()


def test_resuming_latest_without_a_checkpoint_begins(base, tmp_path):
    # Breaks if a command line that is started again and again fails the first time.
    seen = observe({**base, "resume_from_checkpoint": "latest"}, tmp_path / "run")
    assert seen.run.code == 0
    assert len(seen.batches) == 4


def test_local_rank_by_itself_changes_nothing(base, tmp_path):
    # Breaks if a peer's command line with --local_rank, and no launcher around it, ends in a traceback.
    seen = observe({**base, "local_rank": 0}, tmp_path / "run")
    assert seen.run.code == 0
    assert len(seen.batches) == 4


@pytest.mark.parametrize(("environment", "wanted"), [({}, "1"), ({"LOCAL_RANK": "0"}, "0")])
def test_local_rank_is_what_an_old_launcher_says(environment, wanted, base, tmp_path):
    # Breaks if an old launcher, which says the rank by a flag, has all processes use one device.
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    found = []

    def started(*args, **kwargs):
        found.append(os.environ.get("LOCAL_RANK"))
        raise train_unconditional.UsageError("enough seen")

    with (
        mock.patch.dict(os.environ, {**launcher, **environment}),
        mock.patch("ddpm_hf.training.setup.accelerator.Accelerator", started),
    ):
        run = run_script(words({**base, "local_rank": 1, "output_dir": tmp_path / "run"}), tmp_path / "run")
    assert "enough seen" in run.err
    assert found == [wanted]


def test_cache_dir(base, tmp_path, shop, monkeypatch):
    # Breaks if datasets fill the home folder although --cache_dir names another place.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    (tmp_path / "data").mkdir()
    image_rows([encoded(one) for one in random_pixels(4)]).to_parquet(str(tmp_path / "data" / "a.parquet"))
    for name, flags in (("home", {}), ("mine", {"cache_dir": tmp_path / "mine"})):
        seen = observe({**base, **DRY, **flags, "train_data_dir": tmp_path / "data"}, tmp_path / "run")
        assert seen.run.code == 0
        assert list((tmp_path / name).rglob("*.arrow"))
        shutil.rmtree(tmp_path / name)
    assert not (tmp_path / "home").exists()


def test_a_dataset_on_the_hub_is_asked_for_as_the_flags_say(base, tmp_path, monkeypatch):
    # Breaks if configuration, split, token or streaming do not reach the Hub.
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return image_rows([encoded(one) for one in random_pixels(4)], "img")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    flags = {
        **base, **DRY, "train_data_dir": None, "dataset_name": "someone/pictures", "dataset_config_name": "large",
        "dataset_split": "test", "hub_token": "hf_secret", "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    assert observe(flags, tmp_path / "run").run.code == 0
    (args, kwargs) = asked[0]
    assert args == ("someone/pictures", "large")
    assert (kwargs["split"], kwargs["token"], kwargs["cache_dir"]) == ("test", "hf_secret", str(tmp_path / "cache"))


def test_dataset_config_name_of_a_local_dataset(base, tmp_path):
    # Breaks if --dataset_config_name is read for the Hub alone, and all configurations of a folder are mixed.
    folder = tmp_path / "data"
    folder.mkdir()
    with quiet():
        for name, count in (("small", 4), ("large", 8)):
            rows = image_rows([encoded(one) for one in random_pixels(count)])
            rows.to_parquet(str(folder / f"{name}.parquet"))
    configs = [{"config_name": name, "data_files": f"{name}.parquet"} for name in ("small", "large")]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    for name, count in (("small", 4), ("large", 8)):
        flags = {**base, **DRY, "train_data_dir": None, "dataset_name": folder, "dataset_config_name": name}
        seen = observe({**flags, "cache_dir": tmp_path / "cache"}, tmp_path / "run")
        assert f"{count} images" in seen.line("data")


def test_dry_run_says_all_and_writes_nothing(base, tmp_path):
    # Breaks if --dry_run trains, leaves files behind, or hides what a run would cost.
    seen = observe({**base, **DRY, "use_ema": True, "train_batch_size": 3}, tmp_path / "run")
    assert seen.run.code == 0
    assert not (tmp_path / "run").exists()
    assert len(seen.batches) <= 3  # the steps that are measured
    assert re.search(r"s a step, \d+ s for 6 steps", seen.line("time"))
    assert int(seen.line("peak").split()[1].replace(",", "")) > 0
    parameters = sum(one.numel() for one in UNet2DModel.from_config(json_of(base)).parameters())
    assert "photos: 8 images, column 'image'" in seen.line("data")
    assert f"{parameters:,} parameters" in seen.line("model")
    assert seen.line("steps").split()[1] == "6"
    assert "(3 an epoch)" in seen.line("steps")
    assert f"{5 * parameters * 4 / 2**20:,.0f} MiB" in seen.line("memory")
    assert str(tmp_path / "run") in seen.line("output")
    assert "linear, T=1000, epsilon, fixed_small" in seen.line("diffusion")


def json_of(base: dict) -> dict:
    """The UNet config that BASE names."""
    return json.loads((Path(base["model_config_name_or_path"]) / "config.json").read_text())


def test_dry_run_leaves_an_earlier_run_alone(base, tmp_path):
    # Breaks if looking at what --overwrite_output_dir would do already does it.
    observe(base, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in Run(0, "", "", tmp_path / "run").files()}
    seen = observe({**base, **DRY, "overwrite_output_dir": True}, tmp_path / "run")
    assert seen.run.code == 0
    assert {name: (tmp_path / "run" / name).read_bytes() for name in seen.run.files()} == before


# Layers


def write_config(folder: Path, kind: str, **values) -> str:
    """A --config file."""
    path = folder / f"run.{kind}"
    path.write_text(json.dumps(values) if kind == "json" else yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("kind", ["yaml", "yml", "json"])
def test_the_stronger_layer_wins(kind, tmp_path):
    # Breaks if a setting that the user gave is overruled by a preset or a recipe, or a file beats the command line.
    preset = ["--model_preset", "ddpm-cifar10"]
    file = ["--config", write_config(tmp_path, kind, learning_rate=3e-4)]
    line = ["--learning_rate", "4e-4"]
    named = ["--train_data_dir", "x"]
    recipe = MODEL_PRESETS["ddpm-cifar10"].recipe["learning_rate"]
    assert parse(named).learning_rate == 1e-4  # the default
    embedded = parse([]).learning_rate
    assert embedded not in (1e-4, recipe)
    assert parse(preset).learning_rate == recipe  # over the embedded recipe
    assert parse(named + preset).learning_rate == recipe
    assert parse(preset + file).learning_rate == parse(named + file).learning_rate == 3e-4
    for order in (preset + file + line, line + file + preset, file + line + named):
        assert parse(order).learning_rate == 4e-4


def test_a_preset_named_in_a_file_brings_its_recipe(tmp_path):
    # Breaks if `model_preset: ddpm-cifar10` in a file means another training than --model_preset ddpm-cifar10.
    file = write_config(tmp_path, "yaml", model_preset="ddpm-cifar10", train_data_dir="x")
    line = ["--model_preset", "ddpm-cifar10", "--train_data_dir", "x"]
    assert public_settings(parse(["--config", file])) == {**public_settings(parse(line)), "config": file}


def test_a_switch_can_be_turned_off(tmp_path):
    # Breaks if what a recipe or a file switches on cannot be switched off by whoever is stronger.
    assert parse([]).use_ema
    off, on = (write_config(tmp_path, kind, use_ema=value) for kind, value in (("yaml", False), ("json", True)))
    assert not parse(["--config", off]).use_ema
    assert not parse(["--use_ema", "False"]).use_ema
    assert not parse(["--config", on, "--use_ema", "false"]).use_ema
    assert parse(["--config", off, "--use_ema"]).use_ema


def test_yaml_reads_as_people_write_it(tmp_path):
    # Breaks if YAML's own reading of a word (no is False, 1e-4 a string) turns a setting into an error.
    file = tmp_path / "run.yaml"
    file.write_text(
        "# a run\ntrain_data_dir: x\nmixed_precision: no\nlearning_rate: 1e-4\nresolution: 64\nuse_ema: yes\n"
        "center_crop: off\nhub_model_id: null\noutput_dir: 2024\n"
    )
    config = parse(["--config", str(file)])
    assert config.mixed_precision == "no"
    assert config.learning_rate == 1e-4
    assert config.resolution == "64"
    assert config.use_ema is True
    assert config.center_crop is False
    assert config.hub_model_id is None
    assert config.output_dir == "2024"


def test_an_empty_config_changes_nothing(tmp_path):
    # Breaks if a file of comments is an error, or a key that is null sets something.
    for text in ("", "# nothing\n", "learning_rate:\nseed: null\n"):
        (tmp_path / "run.yaml").write_text(text)
        config = parse(["--config", str(tmp_path / "run.yaml"), "--train_data_dir", "x"])
        assert config == dataclasses.replace(parse(["--train_data_dir", "x"]), config=str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(("key", "meant"), [("learning_rat", "learning_rate"), ("num_epoch", "num_epochs")])
def test_an_unknown_key_is_refused_and_the_nearest_named(key, meant, tmp_path, capsys):
    # Breaks if a typo in a config file silently trains with the default.
    file = write_config(tmp_path, "yaml", **{key: 1})
    with pytest.raises(SystemExit) as end:
        parse(["--config", file])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert repr(key) in error
    assert repr(meant) in error
    assert file in error


# What a run writes about itself


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--train_data_dir", "x"],
        ["--model_preset", "iddpm-imagenet64", "--train_data_dir", "x", "--max_grad_norm", "0"],
        ["--dataset_name", "a/b", "--resolution", "64x96", "--center_crop", "--use_ema", "--snr_gamma", "5"],
        ["--model_preset", "ddpm-cifar10", "--random_flip", "False", "--seed", "5", "--learning_rate", "1.5e-5"],
        ["--label_column", "label", "--class_dropout", "0", "--mixed_precision", "no", "--use_ema", "false"],
        ["--train_data_dir", "a folder/with 'quotes' and - dashes", "--output_dir", "-o", "--hub_model_id", "me/it"],
    ],
    ids=lambda argv: " ".join(argv[:2]) or "nothing",
)
def test_training_config_reads_back(argv, tmp_path):
    # Breaks if repeating a run by its training_config.json trains with other settings.
    argv = [word if word != "-o" else f"{tmp_path}/-o" for word in argv]
    config = parse(argv)
    written = dataclasses.replace(config, output_dir=str(tmp_path))
    save_settings(written)
    again = parse(["--config", str(tmp_path / "training_config.json")])
    assert public_settings(dataclasses.replace(again, config=None)) == public_settings(written)


def test_a_run_can_be_repeated_from_what_it_wrote(seen_of, tmp_path):
    # Breaks if training_config.json lacks something that decided the run, such as the seed that was drawn.
    first = seen_of({"seed": None})
    config = first.run.folder / "training_config.json"
    assert json.loads(config.read_text())["seed"] is not None
    again = observe({"config": config}, tmp_path / "again")
    assert again.run.code == 0
    assert weights(again) == weights(first)


def test_the_token_is_written_nowhere(base, tmp_path, monkeypatch):
    # Breaks if a secret ends up in a file that is uploaded, logged or shown.
    token = "hf_thisIsSecret0123456789"
    flags = {**base, "logger": "tensorboard", "push_to_hub": True, "hub_token": token, "use_ema": True}
    seen = observe(flags, tmp_path / "run")
    assert seen.spied("upload")
    texts = [(tmp_path / "run" / name).read_bytes() for name in seen.run.files()]
    assert len(texts) > 10
    assert not any(token.encode() in text for text in texts)
    assert token not in seen.run.out + seen.run.err + observe({**flags, **DRY}, tmp_path / "dry").run.out


def test_what_the_peer_leaves_on_disk_is_here(seen_of):
    # Breaks if a folder lacks what Diffusers' users load: the pipeline, and the model under checkpoint-N/unet.
    seen = seen_of({"use_ema": True, "checkpointing_steps": 3})
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (seen.run.folder / name).is_file()
    for subfolder in ("unet", "checkpoint-3/unet", "checkpoint-3/unet_ema"):
        UNet2DModel.from_pretrained(seen.run.folder, subfolder=subfolder)


def test_the_script_as_a_command(base, tmp_path):
    # Breaks if the script works when imported alone, and not as the command that users type.
    argv = words({**base, "output_dir": "run", "num_epochs": 1})
    end = subprocess.run(
        [sys.executable, train_unconditional.__file__, *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert end.returncode == 0, end.stderr
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_accelerate_is_told_the_tracker(base, tmp_path):
    # Breaks if settings that the tracker should show do not reach it, or the token does.
    told = []
    with mock.patch.object(Accelerator, "init_trackers", lambda self, name, config: told.append((name, config))):
        observe({**base, "logger": "tensorboard", "hub_token": "hf_secret"}, tmp_path / "run")
    ((name, settings),) = told
    assert name == "train_unconditional"
    assert settings["learning_rate"] == 1e-4
    assert "hf_secret" not in str(settings)
