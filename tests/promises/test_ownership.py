"""Nothing of a user's is removed or replaced."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image

from ddpm_hf import portable
from ddpm_hf.cli import pictures
from ddpm_hf.common.checkpoints import SETTINGS, discard
from ddpm_hf.common.errors import UsageError
from ddpm_hf.common.layout import COMPONENTS, EARLIER, LAYOUT, layout, matching
from ddpm_hf.common.ownership import MANIFEST, claim_files, listed, run_files
from ddpm_hf.evaluation.results import record_result
from ddpm_hf.models.saving import save_half_precision
from ddpm_hf.publishing.card.illustrations import write_pictures
from ddpm_hf.publishing.files import PUBLISHED
from ddpm_hf.publishing.spaces import Model, write_space
from ddpm_hf.training import earlier_run
from ddpm_hf.training.checkpointing import rotate
from tests.support.ownership import OVER, QUICK, cut_off, put, sealed
from tests.support.runs import attempt, contents, train

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
    before = contents(tmp_path)
    run = attempt(shop, tmp_path, QUICK, **flags)
    assert run.code == 2
    assert "README.md" in run.error()
    assert "move them, or name another folder" in run.error()
    assert contents(tmp_path) == before


def test_the_way_out_of_a_project_works_and_leaves_it_alone(shop, tmp_path):
    """Else what the error advises fails, or a run, a resumed run or its replacement takes files of the user's."""
    put(tmp_path, *PROJECT)
    (tmp_path / "README.md").unlink()
    before = contents(tmp_path)
    steps = ({"checkpointing_steps": 1, "checkpoints_total_limit": 1}, {"resume_from_checkpoint": "latest"}, OVER)
    for flags in steps:
        train(shop, tmp_path, QUICK, **flags)
        after = contents(tmp_path)
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
    run = attempt(shop, tmp_path, QUICK, **flags)
    assert run.code == 2
    assert name.split("/")[0] in run.error()
    assert "move them, or name another folder" in run.error()
    assert contents(tmp_path) == {name: b"mine"}


def test_every_kind_of_file_that_a_run_writes_is_in_the_table(trained):
    """Else a file is written that nobody checked for, or is removed by nobody."""
    written = {name for name in contents(trained) if not name.startswith("checkpoint-")} - {MANIFEST}
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
    before = contents(earlier)
    put(earlier, "checkpoint-1/notes.txt")
    refused = attempt(shop, earlier, QUICK, **OVER)
    assert refused.code == 2
    assert "checkpoint-1/notes.txt" in refused.error()
    (earlier / "checkpoint-1" / "notes.txt").unlink()
    train(shop, earlier, QUICK, **OVER)
    kept = contents(earlier)
    for name in ("notes.txt", "unet/notes.txt", "samples/mine.png", "checkpoint-notes/n.txt"):
        assert kept[name] == before[name]
    assert not (earlier / EARLIER).exists()


def test_what_a_person_wrote_into_the_card_outlives_the_run(shop, earlier):
    """Else training anew deletes a text that somebody wrote."""
    card = earlier / "README.md"
    card.write_text(card.read_text() + "\nBirds of my garden.\n")
    train(shop, earlier, QUICK, **OVER)
    assert "Birds of my garden." in card.read_text()


@pytest.mark.parametrize("how", ["trained on", "named as a dataset"])
def test_training_data_that_an_earlier_run_wrote_stays(how, shop, earlier):
    """Else training on a run's own samples deletes them."""
    put(earlier, "samples/x")
    (earlier / "samples" / "x").unlink()
    shutil.copy(shop / "pictures" / "0.png", earlier / "samples" / "step-000001.png")
    claim_files(earlier, ["samples/step-000001.png"])
    before = contents(earlier)
    name = "train_data_dir" if how == "trained on" else "dataset_name"
    run = attempt(shop, earlier, QUICK, **{**OVER, "train_data_dir": None, name: str(earlier / "samples")})
    assert run.code == 2
    assert "training data" in run.error()
    assert contents(earlier) == before


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
    train(shop, legacy, QUICK, resume_from_checkpoint="latest", max_train_steps=3)
    assert "checkpoint-3/" in listed(legacy)
    assert "checkpoint-1/" in listed(legacy)


def test_a_run_without_manifest_is_replaced_but_for_what_is_not_its_own(legacy, shop):
    """Else files of a user go with it."""
    put(legacy, "unet/notes.txt", "logs/diary.txt")
    train(shop, legacy, QUICK, **OVER)
    assert (legacy / "unet" / "notes.txt").read_text() == (legacy / "logs" / "diary.txt").read_text() == "mine"
    assert not (legacy / "checkpoint-1").exists()


def test_a_user_card_in_a_run_without_manifest_is_refused(legacy, shop):
    """Else an unmarked README.md is taken for the run's."""
    (legacy / "README.md").write_text("# my project")
    run = attempt(shop, legacy, QUICK, **OVER)
    assert run.code == 2
    assert "README.md" in run.error()
    assert (legacy / "README.md").read_text() == "# my project"


def test_rotation_counts_and_removes_our_checkpoints_alone(tmp_path):
    """Else --checkpoints_total_limit deletes checkpoints of Diffusers' script, or a user's notes."""
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    put(tmp_path, "checkpoint-2/notes/n.txt", "checkpoint-7/model.safetensors", "checkpoint-notes/n.txt")
    put(tmp_path, "checkpoint-notes.superseded/n.txt")
    assert [path.name for path in rotate(tmp_path, 1)] == ["checkpoint-1", "checkpoint-2"]
    assert set(contents(tmp_path)) == {
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
    assert len(contents(elsewhere)) == 2


def test_nothing_behind_a_link_is_removed(shop, earlier, tmp_path):
    """Else --overwrite_output_dir follows a link out of the folder."""
    shutil.move(earlier / "unet", tmp_path / "elsewhere")
    (earlier / "unet").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = contents(tmp_path / "elsewhere")
    run = attempt(shop, earlier, QUICK, **OVER)
    assert run.code == 2
    assert "unet/" in run.error()
    assert contents(tmp_path / "elsewhere") == before


def test_a_folder_that_is_a_link_is_an_output_folder_like_any(shop, earlier, tmp_path):
    """Else runs on another disk cannot be replaced."""
    (tmp_path / "link").symlink_to(earlier, target_is_directory=True)
    train(shop, tmp_path / "link", QUICK, **OVER)
    assert (tmp_path / "link").is_symlink()
    assert not (earlier / "checkpoint-1").exists()


@pytest.mark.parametrize(
    "manifest", ["[]", "{", '{"files": {"run": {"../../x": null}}}', '{"files": {"run": {"/etc/x": null}}}']
)
def test_a_malformed_manifest_is_refused(manifest, shop, tmp_path):
    """Else a manifest that came with a download names files outside the folder."""
    put(tmp_path, MANIFEST, text=manifest)
    run = attempt(shop, tmp_path, QUICK, **OVER)
    assert run.code == 2
    assert MANIFEST in run.error()


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
    assert set(contents(tmp_path)) == {"notes.txt", "photo.png", "0000.png", "grid.png", MANIFEST}
    assert np.asarray(Image.open(tmp_path / "0000.png")).max() == 4
    write(tmp_path, 5, grid_only=True)
    assert set(contents(tmp_path)) == {"notes.txt", "photo.png", "grid.png", MANIFEST}


@pytest.mark.parametrize("name", ["0000.png", "0007.png", "grid.png", "chain.gif", "12345.png"])
def test_images_of_somebody_else_are_refused(name, tmp_path):
    """Else `ddpm-hf sample --out photos` replaces photos, or mixes its own with them."""
    put(tmp_path, name)
    with pytest.raises(UsageError, match=re.escape(name)):
        write(tmp_path, 1)
    assert contents(tmp_path) == {name: b"mine"}


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
        assert {name for name in contents(tmp_path) if not name.startswith(".")} == {"0000.png", "grid.png", MANIFEST}


def test_samples_in_a_run_s_folder_are_not_the_run_s(shop, earlier):
    """Else two programs take each other's files."""
    write(earlier, 1)
    train(shop, earlier, QUICK, **OVER)
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
    assert set(contents(tmp_path)) == {".film.mp4.partial", "data/.x.a1b2c3d4.partial", "checkpoint-notes.partial/n"}


def test_the_table_is_what_is_published():
    """Else the upload and the manifest know different files."""
    assert set(PUBLISHED) == {e.pattern for e in LAYOUT if e.published} - {"README.md"} | {
        "LICENSE",
        "LICENSE.*",
        "LICENSE-*",
    }
    assert set(COMPONENTS) == {e.pattern.split("/")[0] for e in LAYOUT if e.pattern.endswith("/merges.txt")}
    assert SETTINGS in {entry.pattern for entry in LAYOUT}
