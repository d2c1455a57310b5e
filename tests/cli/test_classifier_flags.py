"""Every flag of `ddpm-hf train-classifier` changes what is seen of a run; flags of other programs are refused."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from ddpm_hf.cli import classifier_training as classifier
from ddpm_hf.cli.classifier_flags import CLASSIFIER, NO_CLASSIFIER, parse_classifier_flags
from ddpm_hf.data import batches as data_batches
from ddpm_hf.models.flags import AttentionFlags
from ddpm_hf.publishing.flags import PublishingFlags
from ddpm_hf.training.flags import GridFlags
from ddpm_hf.training.setup import begin
from tests.support.classifier import train_classifier
from tests.support.flag_rows import Row, Seen, adam, checkpoints, digest, fits, flags_of, logs, remembered, steps
from tests.support.pictures import encoded, image_rows, quiet, random_pixels, write_images, write_rows, write_unet
from tests.support.runs import defaults, fill, run_script, words

# A run of four steps, of which the second ends an epoch
BASE = {
    "train_data_dir": "{shop}/photos", "model_config_name_or_path": "{shop}/tiny", "resolution": 8, "seed": 0,
    "train_batch_size": 4, "eval_batch_size": 2, "num_epochs": 2, "ddpm_num_steps": 20, "cpu_threads": 1,
    "logger": "none", "logging_steps": 1, "lr_scheduler": "constant",
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Datasets with labels, and UNets, by name."""
    root = tmp_path_factory.mktemp("shop")
    pixels = random_pixels(8)
    files, kinds = [encoded(one) for one in pixels], [0, 1] * 4
    for name, part in zip(("cat", "dog"), (pixels[:4], pixels[4:])):
        write_images(root / "photos" / name, part)
    write_rows(root / "few", files[:4], label=kinds[:4], kind=[5, 6, 7, 5])
    write_rows(root / "broken", [*files[:5], b"junk"], label=kinds[:6])
    write_rows(root / "deep", [encoded(np.full((8, 8), 1000 + n, np.uint16)) for n in range(4)], label=kinds[:4])
    two = image_rows([encoded(np.full((8, 8), 10, np.uint8))] * 4, "a", label=kinds[:4])
    two = two.add_column("b", [{"bytes": encoded(np.full((8, 8), 20, np.uint8)), "path": None}] * 4)
    with quiet():
        two.cast_column("b", datasets.Image()).save_to_disk(str(root / "two"))
        splits = {name: image_rows(files[:n], label=kinds[:n]) for name, n in (("train", 8), ("small", 4))}
        datasets.DatasetDict(splits).save_to_disk(str(root / "splits"))
    write_unet(root / "tiny")
    write_unet(root / "gray", in_channels=1, out_channels=1)
    return root


def observe(flags: dict, folder: Path) -> Seen:
    """Run the command with spies where it hands things on; the rehearsal's batch is not watched."""
    batches, calls = [], []
    compute_loss, rehearse, save_model = classifier.compute_loss, classifier.rehearse, classifier.save_model
    loader, keys = torch.utils.data.DataLoader.__init__, data_batches.StepKeys

    def watched_loss(model, batch, *args, **kwargs):
        batches.append(batch)
        now = {
            "precision": AcceleratorState().mixed_precision, "threads": torch.get_num_threads(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "checkpointing": model.down_blocks[0].gradient_checkpointing,
        }  # fmt: skip
        calls.extend(now.items())
        return compute_loss(model, batch, *args, **kwargs)

    def unwatched_rehearsal(*args):
        seen = len(batches), len(calls)
        rehearsed = rehearse(*args)
        del batches[seen[0] :], calls[seen[1] :]
        return rehearsed

    def saved(*args, **kwargs):
        calls.append(("save", args))
        return save_model(*args, **kwargs)

    def made_loader(self, *args, **kwargs):
        calls.append(("workers", kwargs["num_workers"]))
        loader(self, *args, **kwargs)

    def keys_of_held_out(*args, **kwargs):
        calls.append(("held out", args[-1]))
        return keys(*args, **kwargs)

    def compile_nothing(model):
        calls.append(("compile", model))
        return model

    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with (
        mock.patch.object(classifier, "compute_loss", watched_loss),
        mock.patch.object(classifier, "rehearse", unwatched_rehearsal),
        mock.patch.object(classifier, "save_model", saved),
        mock.patch.object(begin, "compiled", compile_nothing),
        mock.patch.object(data_batches, "StepKeys", keys_of_held_out),
        mock.patch.object(torch.utils.data.DataLoader, "__init__", made_loader),
    ):
        run = run_script(words({**flags, "output_dir": folder}), folder, train_classifier)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    return Seen(run, batches, calls)


# What is looked at


def rates(seen):
    return [round(record["lr"] * 1e6) for record in seen.run.records()]


def data(seen):
    return seen.line("data")


def shapes(seen):
    return tuple(seen.batches[0]["images"].shape[1:])


def values(seen):
    return seen.batches[0]["images"].unique().tolist()


def spied(name):
    return lambda seen: seen.spied(name)[0]


def betas(seen):
    return seen.run.json("config.json")["trained_betas"]


def ema(key):
    return lambda seen: seen.run.json(f"{checkpoints(seen)[-1]}/classifier_ema/config.json")[key]


weights = digest()
DRY = {"dry_run": True}
HELD_OUT = {"validation_split": 0.25, "validation_steps": 2}
EMA = {"more": {"use_ema": True}, "group": "ema"}
ADAM, MACHINE, SAVING = {"group": "adam"}, {"group": "machine"}, {"more": {"num_epochs": 3}, "group": "saving"}
TRACKED = {"more": {"logger": "tensorboard"}, "group": "tracked"}
ROWS = [
    Row("dataset_name", "{shop}/few", data, lambda line: "photos: 8 images" in line,
        lambda line: "few: 4 images" in line, DRY, also={"train_data_dir": None}),
    Row("train_data_dir", "{shop}/few", data, lambda line: "photos: 8 images" in line,
        lambda line: "few: 4 images" in line, DRY),
    Row("dataset_split", "small", data, lambda line: "8 images" in line, lambda line: "4 images" in line,
        {**DRY, "train_data_dir": "{shop}/splits"}),
    Row("streaming", True, data, lambda line: "8 images" in line, lambda line: "a stream" in line,
        {**DRY, "max_train_steps": 2}),
    Row("max_train_samples", 3, data, lambda line: "8 images" in line, lambda line: "3 images" in line, DRY),
    Row("label_column", "kind", data, lambda line: "2 classes in 'label'" in line,
        lambda line: "3 classes in 'kind'" in line, {**DRY, "train_data_dir": "{shop}/few"}),
    Row("image_column", "b", values, [10], [20], {**DRY, "train_data_dir": "{shop}/two"}),
    Row("skip_broken_images", True, lambda s: s.run.code, 2, 0, {**DRY, "train_data_dir": "{shop}/broken"}),
    Row("preserve_input_precision", True, lambda s: len(values(s)), 1, 4, {**DRY, "train_data_dir": "{shop}/deep"}),
    Row("pixel_range", (998, 1004), lambda s: len(values(s)), 1, 4, {**DRY, "train_data_dir": "{shop}/deep"}),
    Row("cache_dataset", "never", spied("workers"), 0, 1, {**DRY, "dataloader_num_workers": 1}),
    Row("dataloader_num_workers", 1, spied("workers"), 0, 1, {**DRY, "cache_dataset": "never"}),
    Row("resolution", "16x8", shapes, (3, 8, 8), (3, 16, 8), DRY),
    Row("channels", 1, shapes, (3, 16, 16), (1, 16, 16),
        {**DRY, "model_config_name_or_path": None, "model_preset": "small-16", "resolution": 16}),
    Row("center_crop", True, Seen.distinct_images, lambda count: count > 8, 8),
    Row("random_flip", True, Seen.distinct_images, 8, lambda count: 8 < count <= 16, {"center_crop": True}),
    Row("image_interpolation_mode", "nearest", lambda s: s.batches[0]["images"].numpy().tobytes(),
        more={**DRY, "resolution": 16}),
    Row("validation_split", 0.25, lambda s: s.run.code or "accuracy_noised" in s.run.records()[-1], 2, True,
        {"validation_steps": 2}),
    Row("validation_steps", 1, lambda s: ["accuracy_clean" in record for record in s.run.records()],
        [False, True, True], [True] * 3, {**HELD_OUT, "num_epochs": 1, "train_batch_size": 2}),
    Row("eval_batch_size", 1, lambda s: set(s.spied("held out")), {2}, {1}, HELD_OUT),
    Row("model_config_name_or_path", "{shop}/gray", shapes, (3, 8, 8), (1, 8, 8), DRY),
    Row("model_preset", "small-16", lambda s: s.line("model"), lambda line: "tiny" in line,
        lambda line: "small-16" in line, DRY, also={"model_config_name_or_path": None, "resolution": 16}),
    Row("ddpm_num_steps", 50, lambda s: s.run.json("config.json")["num_train_timesteps"], 20, 50, group="schedule"),
    Row("ddpm_beta_schedule", "cosine", lambda s: betas(s)[-1] > 0.9, False, True, group="schedule"),
    Row("rescale_betas_zero_snr", True, lambda s: betas(s)[-1] == 1, False, True),
    Row("seed", 1, weights),
    Row("train_batch_size", 2, steps, 4, 8),
    Row("gradient_accumulation_steps", 2, steps, 4, 2),
    Row("num_epochs", 1, steps, 4, 2),
    Row("max_train_steps", 3, steps, 4, 3),
    Row("max_train_hours", 1e-9, checkpoints, ["checkpoint-4"], ["checkpoint-1"]),
    Row("learning_rate", 5e-4, rates, [100] * 4, [500] * 4, group="adam"),
    Row("adam_beta1", 0.5, lambda s: adam("betas")(s)[0], 0.95, 0.5, **ADAM),
    Row("adam_beta2", 0.6, lambda s: adam("betas")(s)[1], 0.999, 0.6, **ADAM),
    Row("adam_weight_decay", 0.5, adam("weight_decay"), 1e-6, 0.5, **ADAM),
    Row("adam_epsilon", 0.5, adam("eps"), 1e-8, 0.5, **ADAM),
    Row("scale_lr", True, rates, [100] * 4, [400] * 4),
    Row("lr_scheduler", "linear", rates, [100] * 4, [75, 50, 25, 0], {"lr_warmup_steps": 0}),
    Row("lr_warmup_steps", 2, rates, [25, 50, 75, 100], [50, 100, 100, 100],
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}),
    Row("max_grad_norm", 1e-9, weights),
    Row("max_nonfinite_steps", 3, lambda s: s.run.err.count("step skipped"), 1, 3,
        {"learning_rate": 1e30, "max_nonfinite_steps": 1, "num_epochs": 9}),
    Row("use_ema", True, weights),
    Row("ema_inv_gamma", 3, ema("inv_gamma"), 1, 3, **EMA),
    Row("ema_power", 0.25, ema("power"), 0.75, 0.25, **EMA),
    Row("ema_max_decay", 0.6, ema("decay"), 0.9999, 0.6, **EMA),
    Row("ema_min_decay", 0.5, ema("min_decay"), 0, 0.5, **EMA),
    Row("cpu_threads", 2, spied("threads"), 1, 2, {"max_train_steps": 1}),
    Row("mixed_precision", "bf16", spied("precision"), "no", "bf16", **MACHINE),
    Row("allow_tf32", True, spied("tf32"), False, True, **MACHINE),
    Row("acceleration", "none", lambda s: "attention by size" in s.run.err, True, False, **MACHINE),
    Row("compile", True, lambda s: len(s.spied("compile")), 0, 1, **MACHINE),
    Row("gradient_checkpointing", True, spied("checkpointing"), False, True, **MACHINE),
    Row("checkpointing_steps", 1, checkpoints, ["checkpoint-6"], ["checkpoint-5", "checkpoint-6"], **SAVING),
    Row("checkpoints_total_limit", 2, checkpoints, ["checkpoint-6"], ["checkpoint-5", "checkpoint-6"], **SAVING),
    Row("save_model_epochs", 1, lambda s: len(s.spied("save")), 3, 4, **SAVING),
    Row("logging_steps", 4, lambda s: [record["step"] for record in s.run.records()], [1, 2, 3, 4, 5, 6], [4, 6],
        **SAVING),
    Row("logger", "tensorboard", logs, [], lambda places: places and all(p.startswith("logs") for p in places)),
    Row("logging_dir", "curves", logs, lambda places: all(p.startswith("logs") for p in places),
        lambda places: places and all(p.startswith("curves") for p in places), **TRACKED),
    Row("tracker_project_name", "mine", lambda s: {Path(place).parts[1] for place in logs(s)}, {"train_classifier"},
        {"mine"}, **TRACKED),
]  # fmt: skip

# Flags that one run does not show, and the tests that do
APART = {
    "output_dir": "test_results_go_to_the_output_folder",
    "dry_run": "test_a_dry_run_writes_nothing",
    "overwrite_output_dir": "test_an_earlier_run_is_replaced_on_request",
    "resume_from_checkpoint": "test_resuming_is_never_having_stopped",
    "config": "test_a_file_sets_flags",
    "dataset_config_name": "test_a_dataset_on_the_hub_is_asked_for_as_the_flags_say",
    "hub_token": "test_a_dataset_on_the_hub_is_asked_for_as_the_flags_say",
    "cache_dir": "test_a_dataset_on_the_hub_is_asked_for_as_the_flags_say",
    # by code that all programs share
    "foreach_ema": "test_averaging.py",
    "offload_ema": "test_averaging.py",
    "use_8bit_adam": "test_averaging.py",
    "optimizer": "test_optimizers.py",
    "ema_snapshot_steps": "test_classifier.py",
    "local_rank": "test_flags.py",
}  # fmt: skip


def test_every_flag_is_seen_to_work():
    """Else a flag is declared that nobody shows to be read."""
    declared = set(defaults(CLASSIFIER).values())
    assert declared == {row.flag for row in ROWS} | APART.keys()
    here = Path(__file__)
    tests = here.read_text() + (here.parent / "test_classifier.py").read_text()
    for where in APART.values():
        assert f"def {where}(" in tests or any(here.parents[1].glob(f"*/{where}"))


@pytest.fixture(scope="module")
def seen_of(shop, tmp_path_factory):
    """What is seen with flags on top of BASE; a run that was made before is not made again."""
    watched = remembered(lambda flags, folder: observe(fill(flags, shop), folder), tmp_path_factory.mktemp("runs"))
    return lambda flags: watched({**BASE, **flags})


@pytest.mark.every(3)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.flag}-{row.value}".replace("{shop}/", ""))
def test_a_flag_changes_what_is_seen(row, seen_of):
    """Else a flag is accepted and ignored, or does something else than it says."""
    without, given = seen_of(row.more), seen_of(flags_of(row, ROWS))
    assert given.run.code in (0, without.run.code), given.run.err
    before, after = row.see(without), row.see(given)
    assert before != after
    assert fits(before, row.before), before
    assert fits(after, row.after), after


def test_results_go_to_the_output_folder(shop, tmp_path, monkeypatch):
    """Else results land elsewhere than --output_dir says, or leave files beside it."""
    monkeypatch.chdir(tmp_path)
    seen = observe({**fill(BASE, shop), "max_train_steps": 1}, Path("deep/er"))
    assert seen.run.code == 0, seen.run.err
    assert (tmp_path / "deep/er" / WEIGHTS).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_an_earlier_run_is_replaced_on_request(shop, tmp_path):
    """Else an earlier classifier is overwritten unasked, or survives although asked."""
    flags = {**fill(BASE, shop), "max_train_steps": 1}
    first = observe(flags, tmp_path / "run")
    before = weights(first)
    refused = observe({**flags, "seed": 1}, tmp_path / "run")
    assert (refused.run.code, weights(first)) == (2, before)
    again = observe({**flags, "seed": 1, "overwrite_output_dir": True}, tmp_path / "run")
    assert again.run.code == 0, again.run.err
    assert weights(again) != before


def test_a_file_sets_flags(shop, tmp_path):
    """Else --config is read for the training scripts alone."""
    file = tmp_path / "run.yaml"
    file.write_text("max_train_samples: 3\n")
    assert "3 images" in data(observe({**fill(BASE, shop), **DRY, "config": file}, tmp_path / "run"))


def test_a_run_of_an_earlier_version_goes_on_with_its_settings(shop, tmp_path):
    """Else flags that the program had once hide the settings of a run, which goes on with the defaults."""
    folder = tmp_path / "run"
    flags = {**fill(BASE, shop), "learning_rate": 3e-3, "max_train_steps": 2, "checkpointing_steps": 2}
    assert observe(flags, folder).run.code == 0
    for file in (folder / "training_config.json", folder / "checkpoint-2" / "manifest.json"):
        saved = json.loads(file.read_text())
        saved.get("settings", saved).update(save_variants="none", hub_strategy="end", push_to_hub=False)
        file.write_text(json.dumps(saved))
    config = parse_classifier_flags(["--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
    assert (config.learning_rate, config.train_batch_size) == (3e-3, 4)


def test_a_dataset_on_the_hub_is_asked_for_as_the_flags_say(shop, tmp_path, monkeypatch):
    """Else configuration, token or cache do not reach the Hub."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["split"], kwargs["token"], kwargs["cache_dir"]))
        return image_rows([encoded(one) for one in random_pixels(4)], label=[0, 1, 0, 1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    flags = {
        **fill(BASE, shop), **DRY, "train_data_dir": None, "dataset_name": "someone/pictures",
        "dataset_config_name": "large", "hub_token": "hf_secret", "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    seen = observe(flags, tmp_path / "run")
    assert seen.run.code == 0, seen.run.err
    assert asked == [(("someone/pictures", "large"), "train", "hf_secret", str(tmp_path / "cache"))]
    assert "hf_secret" not in seen.run.out + seen.run.err


# Flags of other programs

REMOVED = {field.name for kind in (GridFlags, AttentionFlags, PublishingFlags) for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("how", ["flag", "file"])
@pytest.mark.parametrize("flag", sorted(NO_CLASSIFIER))
def test_a_flag_without_meaning_is_refused_with_the_reason(flag, how, shop, tmp_path):
    """Else a classifier is said to be published, or saved in half precision, and is not."""
    argv = words({**fill(BASE, shop), "output_dir": tmp_path / "run"})
    (tmp_path / "run.yaml").write_text(f"{flag}: 1\n")
    more = [f"--{flag.replace('_', '-')}", "1"] if how == "flag" else ["--config", str(tmp_path / "run.yaml")]
    run = run_script([*argv, *more], tmp_path / "run", train_classifier)
    assert run.code == 2
    (line,) = run.err.splitlines()
    assert line.startswith("ddpm-hf train-classifier: error: ")
    assert flag in line.replace("-", "_")
    assert NO_CLASSIFIER[flag] in line
    assert "did you mean" not in line
    assert not run.folder.exists()


def test_the_reasons_are_of_flags_that_there_are():
    """Else a removed flag has no reason, or one that is read has."""
    assert NO_CLASSIFIER.keys() >= REMOVED
    assert not NO_CLASSIFIER.keys() & defaults(CLASSIFIER).values().keys()
