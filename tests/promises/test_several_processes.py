"""Two processes: what they share out, that they stop together, and that nobody waits for one that is gone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf.common.checkpoints import list_checkpoints
from ddpm_hf.training.checkpointing import read_manifest
from tests.support.fixtures_ranks import ROOT, errors, launch
from tests.support.runs import BASE, command, records, run_script

pytestmark = pytest.mark.slow

# 20 images less 3 held out, a batch of 4 by each of two ranks: in the third batch the second rank has none
FLAGS = {
    **BASE, "train_data_dir": "{shop}/twenty", "cache_dataset": "never", "checkpointing_steps": 1, "use_ema": True,
    "max_train_steps": 6, "validation_split": 0.15, "validation_steps": 2, "eval_batch_size": 2,
    "adam_epsilon": 1e-2,
}  # fmt: skip


def train(happening, shop, folder, **more):
    """Train by two ranks: (exit code, stderr)."""
    folder.mkdir(exist_ok=True)
    return launch(happening, command(shop, folder / "run", FLAGS, **more), folder)


@pytest.fixture(scope="module")
def clean(shop, tmp_path_factory):
    """A run of two ranks that nothing went wrong with."""
    folder = tmp_path_factory.mktemp("clean")
    code, err = train("nothing", shop, folder)
    assert code == 0, err
    return folder


def notes(folder: Path, name: str) -> list[list[dict]]:
    """What each rank wrote down."""
    files = [folder / f"{name}-{rank}.jsonl" for rank in (0, 1)]
    return [[json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [] for path in files]


def steps(folder: Path) -> list[int]:
    """Of the checkpoints, all of them whole."""
    return [read_manifest(path)["step"] for path in list_checkpoints(folder / "run")]


def check_goes_on(shop, folder: Path, clean: Path) -> None:
    """A run that ended early goes on by two ranks and ends as the one that did not."""
    code, err = train("nothing", shop, folder, resume_from_checkpoint="latest")
    assert code == 0, err
    assert records(folder / "run") == records(clean / "run")
    ours, theirs = (read_manifest(one / "run" / "checkpoint-6") for one in (folder, clean))
    for name, digest in theirs["files"].items():
        assert ours["files"][name] == digest or "random_states" in name
    assert ours["meter"] == theirs["meter"]


def test_validation_and_sampling_are_shared_out(shop, clean, tmp_path):
    """Else each rank does all of the work, or some of it is not done at all."""
    held_out, drawn = notes(clean, "held out"), notes(clean, "drawn")
    assert [sum(call["n"] for call in rank) for rank in held_out] == [3 * 2, 3 * 1]  # three times 3 images
    assert [[call["n"] for call in rank] for rank in drawn] == [[1, 1], [1, 1]]  # of 2 images at steps 3 and 6
    one = run_script(command(shop, tmp_path / "run", FLAGS, train_batch_size=8), tmp_path / "run")
    assert one.code == 0, one.err
    for ours, theirs in zip(records(clean / "run"), records(tmp_path / "run"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert sum("validation_loss" in record for record in records(clean / "run")) == 3
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (clean / "run", one.folder)]
    assert [name for name in names[0] if "random_states_1" not in name] == names[1]


def test_a_rank_that_is_killed_ends_the_others(shop, clean, tmp_path):
    """Else a machine that dies keeps the others waiting, and paid for, for ever."""
    code, err = train("killed", shop, tmp_path)
    assert code != 0
    for line in errors(err):  # the launcher may be faster than the news
        assert "lost contact" in line
    assert f'File "{ROOT}/ddpm_hf' not in err  # torchrun itself, in .venv, shows a traceback
    assert steps(tmp_path) == [1, 2]
    check_goes_on(shop, tmp_path, clean)


def test_a_rank_that_alone_cannot_read_ends_all_and_saves(shop, clean, tmp_path):
    """Else the other ranks wait for its gradient, or hours of steps are lost for one bad image."""
    code, err = train("data", shop, tmp_path)
    assert code != 0
    (line,) = errors(err)
    assert "cat.png" in line
    assert f'File "{ROOT}/ddpm_hf' not in err  # torchrun itself, in .venv, shows a traceback
    assert steps(tmp_path) == [1, 2, 3]
    check_goes_on(shop, tmp_path, clean)


def test_a_signal_to_one_rank_stops_all(shop, clean, tmp_path):
    """Else the ranks stop at different steps, and the others wait in one that never ends."""
    code, err = train("terminated", shop, tmp_path, checkpointing_steps=6)
    assert code == 0, err
    assert err.count("stopped at step 3 by SIGTERM") == 1
    assert steps(tmp_path) == [3]
    check_goes_on(shop, tmp_path, clean)


def test_a_rank_whose_disk_is_full_leaves_that_checkpoint_out(shop, clean, tmp_path):
    """Else the main process waits for the other's part, or takes a checkpoint without it for whole."""
    code, err = train("disk", shop, tmp_path)
    assert code == 0, err
    assert err.count("warning: checkpoint-3 cannot be written") == 1
    assert steps(tmp_path) == [1, 2, 4, 5, 6]
    assert records(tmp_path / "run") == records(clean / "run")


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(shop, tmp_path):
    """Else the ranks' weights part, or the sample that did it cannot be named."""
    code, err = train("nan", shop, tmp_path, validation_split=0.0, validation_steps=None)
    assert code == 0, err
    (row,) = (note["row"] for note in notes(tmp_path, "nan")[1])
    assert err.count("step skipped") == 1
    assert f"step 3: loss or gradient is not finite: of {row} of {shop}/twenty; step skipped" in err
    before, after = (load_file(path) for path in sorted(tmp_path.glob("run/checkpoint-[24]/unet/*.safetensors")))
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert steps(tmp_path) == [1, 2, 4, 5, 6]


def test_losses_that_stay_bad_on_one_rank_end_all_with_the_checkpoint_from_before(shop, clean, tmp_path):
    """Else one rank gives up and the others wait, or the weights to go on from are not there."""
    code, err = train("nan for ever", shop, tmp_path, max_nonfinite_steps=3, checkpointing_steps=6)
    assert code != 0
    (line,) = errors(err)
    assert f" of {shop}/twenty" in line
    assert steps(tmp_path) == [2]
    shutil.rmtree(tmp_path / "run" / "samples", ignore_errors=True)
    check_goes_on(shop, tmp_path, clean)


def test_shards_train_as_whole_weights_do(shop, clean, tmp_path):
    """Else what FSDP 2 averages, draws, saves or resumes is a shard of the model, or another one."""
    code, err = train("sharded", shop, tmp_path)
    assert code == 0, err
    for ours, theirs in zip(records(tmp_path / "run"), records(clean / "run"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name in ("checkpoint-6/unet", "checkpoint-6/unet_ema", "unet"):
        ours, theirs = (load_file(next((one / "run" / name).glob("*.safetensors"))) for one in (tmp_path, clean))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5)
    assert [[call["n"] for call in rank] for rank in notes(tmp_path, "drawn")] == [[1, 1], [1, 1]]
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    before = records(tmp_path / "run")
    code, err = train("sharded", shop, tmp_path, resume_from_checkpoint="latest")
    assert code == 0, err
    assert records(tmp_path / "run") == before
