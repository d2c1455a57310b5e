"""Nothing of a user's is removed or replaced, and an earlier model is there until the new one has a checkpoint."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image

import train_text2image
import train_unconditional
from ddpm_hf import portable
from ddpm_hf.cli import pictures
from ddpm_hf.common.checkpoints import discard, seal
from ddpm_hf.common.errors import UsageError
from ddpm_hf.common.layout import COMPONENTS, EARLIER, LAYOUT, layout, matching
from ddpm_hf.common.ownership import MANIFEST, claim_files, listed, run_files
from ddpm_hf.evaluation.results import record_result
from ddpm_hf.models.saving import save_half_precision
from ddpm_hf.publishing import hub as publishing
from ddpm_hf.publishing.card.illustrations import write_pictures
from ddpm_hf.publishing.folder import PUBLISHED
from ddpm_hf.publishing.spaces import Model, write_space
from ddpm_hf.training import checkpointing, earlier_run
from ddpm_hf.training.checkpointing import rotate
from ddpm_hf.training.earlier_run import set_aside, settle
from tests.support.fixtures_unconditional import BASE, fill, random_pixels, run_script, words, write_images, write_unet

QUICK = {**BASE, "max_train_steps": 2, "eval_batch_size": 2, "save_images_epochs": 100}


def content(folder: Path) -> dict[str, bytes]:
    """All files in a folder, but for the manifest of a version that had none."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


def put(folder: Path, *names: str, text: str = "mine") -> None:
    """Write a user's files; a name that ends with a slash is a folder."""
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Images, and tiny models."""
    shop = tmp_path_factory.mktemp("shop")
    write_images(shop / "photos", random_pixels(4))
    write_unet(shop / "tiny")
    write_unet(shop / "five", in_channels=5, out_channels=5)
    return shop


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """The output folder of a run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(shop, folder, {"checkpointing_steps": 1}).code == 0
    return folder


@pytest.fixture
def earlier(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def train(shop: Path, folder: Path, flags: dict | None = None):
    """A quick run of the script in this process."""
    return run_script(words(fill({**QUICK, **(flags or {}), "output_dir": str(folder)}, shop)), folder)


OVER = {"overwrite_output_dir": True}


# A user's files


PROJECT = (
    "samples/a.png", "samples/step-by-step.png", "config.json", "README.md", "assets/logo.svg", "logs/diary.txt",
    "vae/notes.txt", "unet/notes.txt", "checkpoint-notes/n.txt", "checkpoint-notes.partial/n.txt", "main.py",
    "my_ddpm_hf.py", ".draft.partial",
)  # fmt: skip


@pytest.mark.parametrize("flags", [{}, OVER])
def test_a_project_is_no_run(flags, shop, tmp_path):
    """Else training in a project's folder deletes the project."""
    put(tmp_path, *PROJECT)
    before = content(tmp_path)
    run = train(shop, tmp_path, flags)
    assert run.code == 2
    assert "README.md" in run.error()
    assert "move them, or name another folder" in run.error()
    assert content(tmp_path) == before


def test_the_way_out_of_a_project_works_and_leaves_it_alone(shop, tmp_path):
    """Else what the error advises fails, or a run, a resumed run or its replacement takes files of the user's."""
    put(tmp_path, *PROJECT)
    (tmp_path / "README.md").unlink()
    before = content(tmp_path)
    steps = ({"checkpointing_steps": 1, "checkpoints_total_limit": 1}, {"resume_from_checkpoint": "latest"}, OVER)
    for flags in steps:
        assert train(shop, tmp_path, flags).code == 0
        after = content(tmp_path)
        assert {name: after[name] for name in before} == before
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path).unet, UNet2DModel)


@pytest.mark.parametrize(
    "name",
    ["README.md", "unet/config.json", "run.json", "metrics.jsonl", "samples/step-000001.png", "checkpoint-5/model.bin",
     "evaluation.json", "assets/loss.png", "unet", "samples", "training_config.json", "pipeline_ddpm_hf.py",
     "model_index.json", "scheduler/scheduler_config.json", EARLIER],
)  # fmt: skip
@pytest.mark.parametrize("flags", [{}, OVER, {"resume_from_checkpoint": "latest"}])
def test_files_that_training_would_replace_are_named_before_it_starts(name, flags, shop, tmp_path):
    """Else a user's file is overwritten without a word."""
    put(tmp_path, name)
    run = train(shop, tmp_path, flags)
    assert run.code == 2
    assert name.split("/")[0] in run.error()
    assert "move them, or name another folder" in run.error()
    assert content(tmp_path) == {name: b"mine"}


def test_every_kind_of_file_that_a_run_writes_is_in_the_table(trained):
    """Else a file is written that nobody checked for, or is removed by nobody."""
    written = {name for name in content(trained) if not name.startswith("checkpoint-")} - {MANIFEST}
    assert written == {name for name in listed(trained) if not name.endswith("/")}
    table = {name for entry in layout("unet", "scheduler") for name in matching(trained, entry.pattern)}
    assert written <= table
    code = [path.name for path in Path(portable.__file__).parent.glob("*_ddpm_hf.py")]
    assert all(
        any(name in matching(Path(portable.__file__).parent, entry.pattern) for entry in LAYOUT) for name in code
    )
    assert all("\\" not in name for name in listed(trained))


def test_files_within_an_earlier_run_stay(shop, earlier):
    """Else notes beside or within checkpoints go with them."""
    put(earlier, "notes.txt", "unet/notes.txt", "samples/mine.png", "checkpoint-notes/n.txt")
    before = content(earlier)
    put(earlier, "checkpoint-1/notes.txt")
    refused = train(shop, earlier, OVER)
    assert refused.code == 2
    assert "checkpoint-1/notes.txt" in refused.error()
    (earlier / "checkpoint-1" / "notes.txt").unlink()
    assert train(shop, earlier, OVER).code == 0
    kept = content(earlier)
    for name in ("notes.txt", "unet/notes.txt", "samples/mine.png", "checkpoint-notes/n.txt"):
        assert kept[name] == before[name]
    assert not (earlier / EARLIER).exists()


def test_what_a_person_wrote_into_the_card_outlives_the_run(shop, earlier):
    """Else training anew deletes a text that somebody wrote."""
    card = earlier / "README.md"
    card.write_text(card.read_text() + "\nBirds of my garden.\n")
    assert train(shop, earlier, OVER).code == 0
    assert "Birds of my garden." in card.read_text()


@pytest.mark.parametrize("how", ["trained on", "named as a dataset"])
def test_training_data_that_an_earlier_run_wrote_stays(how, shop, earlier):
    """Else training on a run's own samples deletes them."""
    put(earlier, "samples/x")
    (earlier / "samples" / "x").unlink()
    shutil.copy(shop / "photos" / "0.png", earlier / "samples" / "step-000001.png")
    claim_files(earlier, ["samples/step-000001.png"])
    before = content(earlier)
    name = "train_data_dir" if how == "trained on" else "dataset_name"
    run = train(shop, earlier, {**OVER, "train_data_dir": None, name: str(earlier / "samples")})
    assert run.code == 2
    assert "training data" in run.error()
    assert content(earlier) == before


# Runs of a version without manifests


@pytest.fixture
def legacy(earlier):
    """A run's folder as that version left it."""
    (earlier / MANIFEST).unlink()
    return earlier


def test_a_run_without_manifest_is_recognised(legacy, trained):
    """Else nobody can go on with, or replace, a run of the version before."""
    put(legacy, "notes.txt", "unet/notes.txt", "samples/a.png", "assets/logo.svg", "vae/config.json")
    assert sorted(run_files(legacy)) == sorted(run_files(trained))


def test_a_run_without_manifest_goes_on(legacy, shop):
    """Else an update costs the training that is under way."""
    again = train(shop, legacy, {"resume_from_checkpoint": "latest", "max_train_steps": 3})
    assert again.code == 0, again.err
    assert "checkpoint-3/" in listed(legacy)
    assert "checkpoint-1/" in listed(legacy)


def test_a_run_without_manifest_is_replaced_but_for_what_is_not_its_own(legacy, shop):
    """Else files of a user go with it."""
    put(legacy, "unet/notes.txt", "logs/diary.txt")
    assert train(shop, legacy, OVER).code == 0
    assert (legacy / "unet" / "notes.txt").read_text() == (legacy / "logs" / "diary.txt").read_text() == "mine"
    assert not (legacy / "checkpoint-1").exists()


def test_a_user_card_in_a_run_without_manifest_is_refused(legacy, shop):
    """Else an unmarked README.md is taken for the run's."""
    (legacy / "README.md").write_text("# my project")
    run = train(shop, legacy, OVER)
    assert run.code == 2
    assert "README.md" in run.error()
    assert (legacy / "README.md").read_text() == "# my project"


# Checkpoints


def sealed(folder: Path, step: int) -> Path:
    """A complete checkpoint."""
    partial = folder / f"checkpoint-{step}.partial"
    partial.mkdir(parents=True)
    (partial / "weights.bin").write_text("w")
    seal(partial, folder / f"checkpoint-{step}", {"step": step})
    return folder / f"checkpoint-{step}"


def test_rotation_counts_and_removes_our_checkpoints_alone(tmp_path):
    """Else --checkpoints_total_limit deletes checkpoints of Diffusers' script, or a user's notes."""
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    put(tmp_path, "checkpoint-2/notes/n.txt", "checkpoint-7/model.safetensors", "checkpoint-notes/n.txt")
    put(tmp_path, "checkpoint-notes.superseded/n.txt")
    assert [path.name for path in rotate(tmp_path, 1)] == ["checkpoint-1", "checkpoint-2"]
    assert set(content(tmp_path)) == {
        "checkpoint-2/notes/n.txt", "checkpoint-3/manifest.json", "checkpoint-3/weights.bin",
        "checkpoint-7/model.safetensors", "checkpoint-notes/n.txt", "checkpoint-notes.superseded/n.txt",
    }  # fmt: skip


def test_a_checkpoint_that_is_a_link_loses_the_link_alone(tmp_path):
    """Else what lies on another disk goes, or nothing can be removed."""
    elsewhere = sealed(tmp_path / "disk", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(elsewhere, target_is_directory=True)
    discard(tmp_path / "run" / "checkpoint-1")
    assert not os.path.lexists(tmp_path / "run" / "checkpoint-1")
    assert len(content(elsewhere)) == 2


def test_nothing_behind_a_link_is_removed(shop, earlier, tmp_path):
    """Else --overwrite_output_dir follows a link out of the folder."""
    shutil.move(earlier / "unet", tmp_path / "elsewhere")
    (earlier / "unet").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = content(tmp_path / "elsewhere")
    run = train(shop, earlier, OVER)
    assert run.code == 2
    assert "unet/" in run.error()
    assert content(tmp_path / "elsewhere") == before


def test_a_folder_that_is_a_link_is_an_output_folder_like_any(shop, earlier, tmp_path):
    """Else runs on another disk cannot be replaced."""
    (tmp_path / "link").symlink_to(earlier, target_is_directory=True)
    assert train(shop, tmp_path / "link", OVER).code == 0
    assert (tmp_path / "link").is_symlink()
    assert not (earlier / "checkpoint-1").exists()


@pytest.mark.parametrize(
    "manifest", ["[]", "{", '{"files": {"run": {"../../x": null}}}', '{"files": {"run": {"/etc/x": null}}}']
)
def test_a_malformed_manifest_is_refused(manifest, shop, tmp_path):
    """Else a manifest that came with a download names files outside the folder."""
    put(tmp_path, MANIFEST, text=manifest)
    run = train(shop, tmp_path, OVER)
    assert run.code == 2
    assert MANIFEST in run.error()


# Replacing a run, cut off at any moment


class Cut(BaseException):
    """The process was killed."""


def cut_off(action, number: int) -> bool:
    """Whether `action` ended before its `number`-th operation on files, at which the process would be killed."""
    seen = [0]

    def counting(call):
        def counted(*args, **more):
            seen[0] += 1
            if seen[0] == number:
                raise Cut
            return call(*args, **more)

        return counted

    with (
        mock.patch.object(os, "replace", counting(os.replace)),
        mock.patch.object(os, "unlink", counting(os.unlink)),
        mock.patch.object(os, "rmdir", counting(os.rmdir)),
        mock.patch.object(os, "mkdir", counting(os.mkdir)),
    ):
        try:
            action()
        except Cut:
            return False
    return True


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
    before = content(tmp_path / "run")
    for first in range(1, 100):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"again-{first}")
        done = cut_off(lambda folder=folder: begin_new(folder), first)
        for second in (1 + first % 5, 3 + first % 7):  # bringing back is killed too
            cut_off(lambda folder=folder: settle(folder, training=True), second)
        settle(folder)
        assert {n: c for n, c in content(folder).items() if not n.endswith(".partial")} == before
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
        assert set(content(folder)) == {
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
        before = content(tmp_path / "run")
        settle(tmp_path / "run")
        assert content(tmp_path / "run") == before
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
    "out of memory": ({}, ("compute_loss", torch.OutOfMemoryError("CUDA out of memory")), 2),
    "a broken first batch": ({}, ("rehearse", UsageError("broken")), 2),
    "Ctrl-C before the first step": ({}, ("training_loop", KeyboardInterrupt()), 130),
    "a full disk": ({}, ("save_settings", OSError(28, "No space left on device")), 1),
    "an error of ours": ({}, ("describe_run", AssertionError("a bug")), None),
}


@pytest.mark.parametrize("name", EARLY)
def test_whatever_fails_early_leaves_the_earlier_model(name, shop, trained, earlier):
    """Else a missing package, a mistake or a bug costs the model that was there."""
    flags, patch, code = EARLY[name]
    with mock.patch.object(train_unconditional, patch[0], fail(patch[1])) if patch else mock.MagicMock():
        if code is None:
            with pytest.raises(AssertionError, match="a bug"):
                train(shop, earlier, {**OVER, **flags})
        else:
            assert train(shop, earlier, {**OVER, **flags}).code == code
    assert content(earlier) == content(trained)
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
        run = train(shop, earlier, {**OVER, "max_train_steps": 4, "seed": 5})
    assert "the earlier run is back" in run.err or "is there again" in run.err
    assert content(earlier) == content(trained)


def test_sigterm_before_the_loop_gives_the_earlier_run_back(shop, trained, earlier):
    """Else a job that is ended as it starts has removed the model that it was to replace."""
    terminate = mock.Mock(side_effect=lambda config: os.kill(os.getpid(), signal.SIGTERM))
    with mock.patch.object(train_unconditional, "save_settings", terminate):
        assert train(shop, earlier, OVER).code == 143
    assert content(earlier) == content(trained)


def test_a_run_that_stops_after_its_first_checkpoint_goes_on_from_it(shop, earlier):
    """Else the earlier run comes back over one that has begun."""
    with at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT)):
        run = train(shop, earlier, {**OVER, "max_train_steps": 4, "checkpointing_steps": 2, "seed": 5})
    assert "--resume_from_checkpoint latest" in run.err
    assert not (earlier / EARLIER).exists()
    assert not (earlier / "checkpoint-1").exists()
    again = train(shop, earlier, {"max_train_steps": 4, "resume_from_checkpoint": "latest", "seed": 5})
    assert again.code == 0
    assert [record["step"] for record in again.records()] == [1, 2, 3, 4]


def test_a_start_after_a_kill_begins_with_the_earlier_run(shop, trained, earlier):
    """Else the next start takes half a new run for a run, and the earlier one stays hidden."""
    set_aside(earlier, run_files(earlier))
    record = json.loads((earlier / EARLIER / MANIFEST).read_text())
    (earlier / EARLIER / MANIFEST).write_text(json.dumps({**record, "by": {**record["by"], "started": 0}}))
    claim_files(earlier, ["metrics.jsonl"])
    run = train(shop, earlier)
    assert run.code == 2
    assert "holds an earlier run" in run.error()
    assert content(earlier) == content(trained)


# Text to image


def text(shop: Path, folder: Path, data: Path, **flags):
    """A quick run of the script in this process."""
    more = {
        "train_data_dir": data, "output_dir": folder, "resolution": 16, "vae_widths": "8,16", "logger": "none",
        "vae_train_steps": 2, "max_train_steps": 2, "train_batch_size": 2, "cpu_threads": 1, "seed": 0, **OVER,
    }  # fmt: skip
    with mock.patch.object(train_unconditional, "main", train_text2image.main):
        return run_script(words({**more, **flags}), folder)


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
    assert content(earlier) == content(trained)


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
    assert content(earlier) == content(trained)


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
    run = train(shop, earlier, {"dry_run": True, **flags})
    assert run.code == 2
    assert says in run.error()
    assert content(earlier) == content(trained)


def test_a_dry_run_says_what_becomes_of_the_folder(shop, trained, earlier, tmp_path):
    """Else nobody knows which checkpoint `latest` is, or that a run will be replaced."""
    says = {
        "goes on from .*checkpoint-2, step 2": {"resume_from_checkpoint": "latest", "max_train_steps": 4},
        "replaces the earlier run": OVER,
    }
    for words_of_it, flags in says.items():
        run = train(shop, earlier, {"dry_run": True, **flags})
        assert run.code == 0, run.err
        assert re.search(words_of_it, run.out)
    assert content(earlier) == content(trained)
    assert "from the beginning" in train(shop, tmp_path / "new", {"dry_run": True}).out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", ["the token", "the user", "the name"])
def test_a_dry_run_asks_the_hub(wrong, shop, tmp_path, monkeypatch):
    """Else a wrong token is found when training has ended."""
    from huggingface_hub import HfApi

    monkeypatch.setattr(publishing, "open_repository", fail(AssertionError("it creates a repository")))
    whoami = fail(ValueError("Invalid user token.")) if wrong == "the token" else lambda self: {"name": "me"}
    monkeypatch.setattr(HfApi, "whoami", whoami)
    name = {"the token": "me/x", "the user": "you/x", "the name": "me/x y"}[wrong]
    run = train(shop, tmp_path / "run", {"dry_run": True, "push_to_hub": True, "hub_model_id": name})
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
    assert train(shop, tmp_path / "with", flags).code == 0
    again = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    with mock.patch.object(train_unconditional, "rehearse", lambda c, a, s, p, batches, loss: batches):
        assert train(shop, tmp_path / "without", flags).code == 0
        shutil.copytree(tmp_path / "without", tmp_path / "resumed")
        assert train(shop, tmp_path / "without", {**flags, **again}).code == 0
    assert train(shop, tmp_path / "resumed", {**flags, **again}).code == 0
    for name in ("checkpoint-2", "checkpoint-3"):
        left, right = (content(tmp_path / f / name) for f in ("without", "resumed"))
        compared = [n for n in left if n.endswith((".safetensors", ".bin"))]
        assert len(compared) >= 4
        assert {n: left[n] for n in compared} == {n: right[n] for n in compared}
    one, two = (content(tmp_path / f / "checkpoint-2" / "unet") for f in ("with", "without"))
    assert one == two


# What other programs write


def picture(value: int):
    """A PIL image."""
    return Image.fromarray(np.full((8, 8), value, np.uint8))


def write(out: Path, *values: int, grid_only: bool = False) -> None:
    """What `ddpm-hf sample` does with its images."""
    pictures.check_out(out)
    pictures.write_pictures([picture(value) for value in values], [], out, singles=not grid_only)


def test_the_images_of_two_calls_never_mix(tmp_path):
    """Else a folder holds images of two models, and no one can tell which."""
    put(tmp_path, "notes.txt", "photo.png")
    write(tmp_path, 1, 2, 3)
    write(tmp_path, 4)
    assert set(content(tmp_path)) == {"notes.txt", "photo.png", "0000.png", "grid.png", MANIFEST}
    assert np.asarray(Image.open(tmp_path / "0000.png")).max() == 4
    write(tmp_path, 5, grid_only=True)
    assert set(content(tmp_path)) == {"notes.txt", "photo.png", "grid.png", MANIFEST}


@pytest.mark.parametrize("name", ["0000.png", "0007.png", "grid.png", "chain.gif", "12345.png"])
def test_images_of_somebody_else_are_refused(name, tmp_path):
    """Else `ddpm-hf sample --out photos` replaces photos, or mixes its own with them."""
    put(tmp_path, name)
    with pytest.raises(UsageError, match=re.escape(name)):
        write(tmp_path, 1)
    assert content(tmp_path) == {name: b"mine"}


def test_an_image_that_was_edited_is_refused(tmp_path):
    """Else an afternoon of retouching goes with the next call."""
    write(tmp_path, 1, 2)
    put(tmp_path, "0001.png", text="retouched")
    with pytest.raises(UsageError, match=r"0001\.png"):
        write(tmp_path, 3)
    assert (tmp_path / "0001.png").read_text() == "retouched"


def test_images_that_a_kill_left_are_ours(tmp_path):
    """Else a call that was interrupted blocks the folder."""
    for number in range(1, 12):
        cut_off(lambda: write(tmp_path, 1, 2), number)
        write(tmp_path, 3)
        assert {name for name in content(tmp_path) if not name.startswith(".")} == {"0000.png", "grid.png", MANIFEST}


def test_samples_in_a_run_s_folder_are_not_the_run_s(shop, earlier):
    """Else two programs take each other's files."""
    write(earlier, 1)
    assert train(shop, earlier, OVER).code == 0
    assert (earlier / "0000.png").is_file()
    write(earlier, 2, grid_only=True)
    assert not (earlier / "0000.png").exists()
    assert isinstance(DDPMPipeline.from_pretrained(earlier).unet, UNet2DModel)


def test_an_app_is_written_anew_but_not_over_edits(tmp_path):
    """Else `push-space --out` refuses its own app, or takes what its owner changed."""
    app, model = tmp_path / "app", Model(str(tmp_path))
    write_space(app, model)
    put(app, "notes.txt")
    write_space(app, model)
    assert (app / "notes.txt").read_text() == "mine"
    put(app, "app.py")
    with pytest.raises(UsageError, match=r"app\.py"):
        write_space(app, model)
    assert (app / "app.py").read_text() == "mine"


def test_pushing_keeps_what_a_user_put_there(earlier):
    """Else `ddpm-hf push` replaces pictures, results or weights of a user's."""
    (earlier / MANIFEST).unlink()
    for path in earlier.glob("checkpoint-*"):
        shutil.rmtree(path)
    for name in ("training_config.json", "timings.jsonl"):
        (earlier / name).unlink()
    put(earlier, "assets/loss.png", "evaluation.json", "unet/diffusion_pytorch_model.fp16.safetensors")
    write_pictures(earlier)
    with pytest.raises(UsageError, match="fp16"):
        save_half_precision(DDPMPipeline.from_pretrained(earlier), earlier)
    with pytest.raises(ValueError, match=r"evaluation\.json"):
        record_result(earlier, "FID", 1.0, 10, "photos")
    for name in ("assets/loss.png", "evaluation.json", "unet/diffusion_pytorch_model.fp16.safetensors"):
        assert (earlier / name).read_text() == "mine"


def test_scraps_of_other_programs_stay(tmp_path):
    """Else a download that is under way in the same folder goes."""
    put(
        tmp_path,
        ".film.mp4.partial",
        "data/.x.a1b2c3d4.partial",
        "checkpoint-notes.partial/n",
        ".metrics.jsonl.a1b2c3d4.partial",
    )
    earlier_run.remove_unfinished(tmp_path)
    assert set(content(tmp_path)) == {".film.mp4.partial", "data/.x.a1b2c3d4.partial", "checkpoint-notes.partial/n"}


def test_the_table_is_what_is_published():
    """Else the upload and the manifest know different files."""
    assert set(PUBLISHED) == {e.pattern for e in LAYOUT if e.published} - {"README.md"} | {"LICENSE*"}
    assert set(COMPONENTS) == {e.pattern.split("/")[0] for e in LAYOUT if e.pattern.endswith("/merges.txt")}
    assert checkpointing.SETTINGS in {entry.pattern for entry in LAYOUT}
