"""Flags that need more than one run, or another surrounding; what a run writes about itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import datasets
import pytest
import yaml
from accelerate import Accelerator
from diffusers import UNet2DModel

import train_unconditional
from ddpm_hf.common.errors import UsageError
from ddpm_hf.training.setup.settings import public_settings, save_settings
from tests.support.flag_rows import checkpoints, grids, logs
from tests.support.flag_runs import DRY, json_of, observe, weights
from tests.support.pictures import encoded, image_rows, quiet, random_pixels
from tests.support.runs import Run, changed, parse, run_script, words


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
        raise UsageError("enough seen")

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


def test_dry_run_leaves_an_earlier_run_alone(base, tmp_path):
    # Breaks if looking at what --overwrite_output_dir would do already does it.
    observe(base, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in Run(0, "", "", tmp_path / "run").files()}
    seen = observe({**base, **DRY, "overwrite_output_dir": True}, tmp_path / "run")
    assert seen.run.code == 0
    assert {name: (tmp_path / "run" / name).read_bytes() for name in seen.run.files()} == before


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
    written = changed(config, output_dir=str(tmp_path))
    save_settings(written)
    again = parse(["--config", str(tmp_path / "training_config.json")])
    assert public_settings(changed(again, config=None)) == public_settings(written)


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


@pytest.mark.slow  # a run as a command is stopped in test_training, and refused in test_bad_input
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
