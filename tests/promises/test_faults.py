"""What fails while training: each fault is made to happen, and costs one line and no training that was saved."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from types import SimpleNamespace
from unittest import mock

import accelerate
import datasets
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import DistributedType
from diffusers import UNet2DModel

import train_unconditional
from ddpm_hf.common.errors import UsageError
from ddpm_hf.publishing import publisher
from ddpm_hf.training import output
from ddpm_hf.training.flags import TrainingFlags
from ddpm_hf.training.setup.accelerator import fit_engine
from tests.support.faults import (
    FILES,
    SIX_STEPS,
    at_step,
    check_one_line,
    check_same_run,
    checkpoints,
    same_checkpoint,
    warnings,
)
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.pictures import encoded, image_rows, random_pixels, write_unet
from tests.support.runs import attempt, train

# A disk that is full, or gone


@contextlib.contextmanager
def full_disk(room: int = 0):
    """No file can grow beyond some bytes: writing fails as on a full disk, for this process, root or not."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def without_room(place, name: str, when=lambda *args: True, room: int = 0):
    """A function whose calls find the disk full, when its arguments say so."""
    function = getattr(place, name)

    def call(*args, **kwargs):
        with full_disk(room) if when(*args) else contextlib.nullcontext():
            return function(*args, **kwargs)

    return mock.patch.object(place, name, call)


def of_steps(*steps: int):
    """Whether a checkpoint is of one of the steps."""
    return lambda run, state, *more: state.step in steps


@pytest.mark.every(3)
@pytest.mark.parametrize("room", [0, 30_000])
def test_a_checkpoint_that_finds_no_room_is_left_out(room, shop, whole, tmp_path):
    """Else a full disk ends a run that could have gone on, or takes the last good checkpoint with it."""
    with without_room(output, "save_checkpoint", of_steps(3, 4), room):
        run = train(
            shop, tmp_path / "run", **SIX_STEPS | {"num_epochs": None}, max_train_steps=5, checkpoints_total_limit=1
        )
    assert [line.split(" (")[0] for line in warnings(run)] == [
        f"warning: checkpoint-{step} cannot be written" for step in (3, 4)
    ]
    assert checkpoints(run) == [5]
    with without_room(output, "save_checkpoint", of_steps(3, 4), room):
        run = attempt(shop, tmp_path / "again", **SIX_STEPS)
    assert checkpoints(run) == [1, 2, 5, 6]
    check_same_run(run, whole)


def test_a_last_checkpoint_that_finds_no_room_is_an_error(shop, whole, tmp_path):
    """Else a run claims to be complete and cannot be gone on with, or the older checkpoint is lost too."""
    flags = {**SIX_STEPS, "checkpoints_total_limit": 1}
    with without_room(output, "save_checkpoint", of_steps(6)):
        run = attempt(shop, tmp_path / "run", **flags)
    check_one_line(run, 1, "checkpoint-6 cannot be written", "checkpoint-5", "--resume_from_checkpoint latest")
    assert checkpoints(run) == [5]
    check_same_run(attempt(shop, run.folder, **flags, resume_from_checkpoint="latest"), whole)


def test_a_stop_that_cannot_save_is_an_error(shop, tmp_path):
    """Else a queue takes a preempted job for one that has saved its state."""
    with (
        without_room(output, "save_checkpoint", of_steps(3)),
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    ):
        run = attempt(shop, tmp_path / "run", num_epochs=3, checkpointing_steps=2)
    check_one_line(run, 1, "checkpoint-3 cannot be written", "checkpoint-2 is complete")
    assert checkpoints(run) == [2]


def test_a_real_full_disk(shop, whole, tmp_path):
    """Else all of this holds for the stand-in of a full disk alone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    one = sum(path.stat().st_size for path in (whole.folder / "checkpoint-6").rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.7 * one)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        run = attempt(shop, disk / "run", **SIX_STEPS, save_images_epochs=9, save_model_epochs=9)
        check_one_line(run, 1, "No space left on device", "--resume_from_checkpoint latest")
        assert checkpoints(run) == [1, 2]
        assert len(warnings(run)) >= 3  # each checkpoint that was tried meanwhile
        shutil.copytree(run.folder, tmp_path / "moved")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    moved = train(shop, tmp_path / "moved", **SIX_STEPS, resume_from_checkpoint="latest", save_images_epochs=9)
    assert same_checkpoint(moved.folder / "checkpoint-6", whole.folder / "checkpoint-6")


def test_a_pipeline_that_finds_no_room(shop, whole, tmp_path):
    """Else a save in between ends the run, or the last one is lost without a word."""
    calls = []
    flags = {**SIX_STEPS, "save_model_epochs": 1}
    first = without_room(publisher, "save_pipeline", lambda *_: calls.append(0) or len(calls) == 1)
    with first:
        run = attempt(shop, tmp_path / "run", **flags)
    assert run.code == 0
    assert "the model of step 2 cannot be written" in warnings(run)[0]
    check_same_run(run, attempt(shop, tmp_path / "clean", **flags))
    with without_room(publisher, "save_pipeline"):
        run = attempt(shop, tmp_path / "never", **SIX_STEPS)
    check_one_line(run, 1, "the model of step 6 cannot be written", "checkpoint-5 is complete")
    assert not (run.folder / "model_index.json").exists()
    check_same_run(attempt(shop, run.folder, **SIX_STEPS, resume_from_checkpoint="latest"), whole)


def test_metrics_that_find_no_room_end_the_run(shop, whole, tmp_path):
    """Else figures are lost, and the run is no longer the one that was never interrupted."""
    of_step = lambda path, record: path.name == "metrics.jsonl" and record["step"] == 4  # noqa: E731
    with without_room(output, "append_jsonl", of_step, room=100):
        run = attempt(shop, tmp_path / "run", **SIX_STEPS)
    check_one_line(run, 1, "metrics.jsonl cannot be written", "checkpoint-3 is complete")
    assert checkpoints(run) == [1, 2, 3]
    check_same_run(attempt(shop, run.folder, **SIX_STEPS, resume_from_checkpoint="latest"), whole)


def test_timings_and_pictures_that_find_no_room_are_left_out(shop, whole, tmp_path):
    """Else a picture that cannot be written ends a run of days, or each step says it again."""
    with (
        without_room(output, "append_jsonl", lambda path, record: path.name == "timings.jsonl"),
        without_room(train_unconditional, "draw_grid"),
    ):
        run = attempt(shop, tmp_path / "run", **SIX_STEPS)
    assert run.code == 0
    said = [" ".join(line.split()[1:5]) for line in warnings(run)]
    assert said == ["timings.jsonl cannot be written", "no pictures of step", "no pictures of step"]
    assert not list(run.folder.glob("samples/*"))
    assert same_checkpoint(run.folder / "checkpoint-6", whole.folder / "checkpoint-6")
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_latents_that_find_no_room(shop, tmp_path):
    """Else half a table of latents is left, and taken for a whole one."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    write_unet(tmp_path / "unet", in_channels=4, out_channels=4)
    flags = {
        "vae_name_or_path": tmp_path / "vae", "cache_latents": True, "center_crop": True, "resolution": 16,
        "model_config_name_or_path": tmp_path / "unet",
    }  # fmt: skip
    from ddpm_hf.latents.table import TensorTable

    with without_room(TensorTable, "add"):
        run = attempt(shop, tmp_path / "run", **flags)
    check_one_line(run, 1, "File too large")
    assert not list((run.folder / "cache").rglob("part-*"))
    assert not list((run.folder / "cache").rglob(".writing-*"))
    train(shop, run.folder, **flags, resume_from_checkpoint="latest")


def test_an_output_folder_that_goes_away(shop, tmp_path):
    """Else a run whose disk was unmounted fills another one in its place, or ends in a traceback."""
    folder = tmp_path / "run"
    with at_step(3, lambda: folder.rename(tmp_path / "gone")):
        run = attempt(shop, folder, **SIX_STEPS)
    check_one_line(run, 1, "metrics.jsonl cannot be written", "No such file or directory", str(folder))
    assert not folder.exists()
    assert checkpoints(run._replace(folder=tmp_path / "gone")) == [1, 2]


# A tracker that fails


def test_a_tracker_that_fails_is_left_out(shop, whole, tmp_path):
    """Else a dashboard that is down ends the training, or each step says it again."""
    logged = []
    log = TensorBoardTracker.log

    def failing(self, values, step=None, **kwargs):
        logged.append(step)
        with full_disk() if step == 2 else contextlib.nullcontext():
            log(self, values, step, **kwargs)

    with mock.patch.object(TensorBoardTracker, "log", failing), mock.patch("threading.excepthook"):
        run = attempt(shop, tmp_path / "run", **SIX_STEPS, logger="tensorboard")
    assert run.code == 0
    assert logged == [1, 2]
    (line,) = warnings(run)
    assert "tensorboard fails" in line
    check_same_run(run, whole)


def test_a_tracker_that_cannot_close_is_a_warning(shop, tmp_path):
    """Else a run that is complete, and published, counts as failed."""
    with mock.patch.object(TensorBoardTracker, "finish", mock.Mock(side_effect=ConnectionError("no\nnetwork"))):
        run = attempt(shop, tmp_path / "run", logger="tensorboard")
    assert run.code == 0
    assert ["no network" in line for line in warnings(run)] == [True]


def test_a_tracker_that_does_not_start_is_said_before_training(shop, tmp_path):
    """Else days of training run without the curves that were asked for, or end in a tracker's traceback."""
    (tmp_path / "file").write_text("in the way")
    run = attempt(shop, tmp_path / "run", logger="tensorboard", logging_dir=tmp_path / "file" / "logs")
    check_one_line(run, 2, "--logger tensorboard does not start", "--logger none")
    with mock.patch.object(accelerate.Accelerator, "init_trackers", mock.Mock(side_effect=Exception("not logged in"))):
        run = attempt(shop, tmp_path / "other", logger="tensorboard")
    check_one_line(run, 2, "not logged in")
    assert not (run.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fault", "workers"),
    [
        ("vanishes", 0),
        ("is damaged", 1),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [("vanishes", 1), ("is damaged", 0)]),
    ],
)
def test_a_file_that_fails_half_way(fault, workers, shop, files, tmp_path):
    """Else the steps before it are lost, nobody learns which file it was, or the run goes on as another."""
    flags = {**FILES, "train_data_dir": files, "cache_dir": tmp_path / "cache", "dataloader_num_workers": workers}
    clean = attempt(shop, tmp_path / "clean", **flags)
    spoil = {"vanishes": lambda: bad.unlink(), "is damaged": lambda: bad.write_bytes(good[:60])}[fault]
    bad = files / "5.png"
    good = bad.read_bytes()
    with at_step(2, spoil):
        run = attempt(shop, tmp_path / "run", **flags)
    check_one_line(run, 2, "5.png", "--skip_broken_images")
    (saved,) = checkpoints(run)
    assert saved >= 2
    bad.write_bytes(good)
    check_same_run(attempt(shop, run.folder, **flags, resume_from_checkpoint="latest"), clean)
    with at_step(2, spoil):
        run = attempt(shop, tmp_path / "skipping", **flags, skip_broken_images=True)
    assert run.code == 0


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_that_fails_half_way(workers, shop, tmp_path, monkeypatch):
    """Else a network's failure loses the steps before it, or shows the traceback of another library."""
    rows = image_rows([encoded(one) for one in random_pixels(8)])
    up = tmp_path / "up"
    up.touch()

    def source():
        for number in range(8):
            if number == 6 and not up.exists():
                raise ConnectionError("the source\nis down")
            yield {"image": rows[number]["image"]}

    def load_dataset(*args, **kwargs):
        return datasets.IterableDataset.from_generator(source, features=rows.features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    flags = {
        **FILES, "train_data_dir": None, "dataset_name": "me/stream", "streaming": True, "max_train_steps": 6,
        "dataloader_num_workers": workers,
    }  # fmt: skip
    clean = train(shop, tmp_path / "clean", **flags)
    with at_step(2, up.unlink):
        run = attempt(shop, tmp_path / "run", **flags)
    check_one_line(run, 2, "of me/stream", "the source is down", "ConnectionError")
    (saved,) = checkpoints(run)
    assert 2 <= saved < 6
    up.touch()
    check_same_run(attempt(shop, run.folder, **flags, resume_from_checkpoint="latest"), clean)


def test_rows_that_fail_half_way(shop, whole, tmp_path, monkeypatch):
    """Else a dataset's file that cannot be read any more ends in the traceback of another library."""
    read = datasets.Dataset.__getitem__
    down = []

    def failing(self, key):
        if down and key == 5:
            raise OSError("read error on the disk")
        return read(self, key)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", failing)
    with at_step(2, lambda: down.append(True)):
        run = attempt(shop, tmp_path / "run", **FILES)
    check_one_line(run, 2, "row 5 of", "photos", "read error on the disk")
    (saved,) = checkpoints(run)
    assert same_checkpoint(run.folder / f"checkpoint-{saved}", whole.folder / f"checkpoint-{saved}")


def test_a_reader_that_is_killed(shop, whole, tmp_path):
    """Else a process that ran out of memory ends in a traceback, or the last checkpoint is gone with it."""
    flags = {**SIX_STEPS, "cache_dataset": "never", "dataloader_num_workers": 1}

    earlier = set(multiprocessing.active_children())

    def kill():
        (worker,) = set(multiprocessing.active_children()) - earlier
        worker.kill()
        worker.join()

    with at_step(3, kill):
        run = attempt(shop, tmp_path / "run", **flags)
    check_one_line(run, 1, "--dataloader_num_workers", "is complete")
    assert set(checkpoints(run)) <= {1, 2, 3}
    check_same_run(attempt(shop, run.folder, **flags, resume_from_checkpoint="latest"), whole)


# Memory that runs out


def demand_memory():
    """What torch raises where a CPU has no memory left."""
    torch.empty(2**60)


def raise_out_of_memory():
    """What torch raises where a GPU has none."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("action", [demand_memory, raise_out_of_memory])
def test_memory_that_runs_out(action, shop, tmp_path):
    """Else the way out is left to a search for the traceback's last line."""
    with at_step(3, action):
        run = attempt(shop, tmp_path / "run", num_epochs=3, checkpointing_steps=2)
    check_one_line(
        run, 2, "out of memory", "--train_batch_size", "--gradient_accumulation_steps", "--gradient_checkpointing",
        "--mixed_precision bf16", "checkpoint-2 is complete",
    )  # fmt: skip
    assert checkpoints(run) == [2]


def test_memory_that_runs_out_for_pictures(shop, whole, tmp_path):
    """Else a grid that is too large ends the training."""
    forward = UNet2DModel.forward

    def sampling(self, *args, **kwargs):
        if not self.training:
            demand_memory()
        return forward(self, *args, **kwargs)

    with mock.patch.object(UNet2DModel, "forward", sampling):
        run = attempt(shop, tmp_path / "run", **SIX_STEPS)
    assert run.code == 0
    assert all("--eval_batch_size" in line for line in warnings(run))
    assert same_checkpoint(run.folder / "checkpoint-6", whole.folder / "checkpoint-6")


def test_an_error_that_is_not_understood_keeps_its_traceback(shop, tmp_path):
    """Else a bug is reported as if it were a full disk."""
    with at_step(3, lambda: {}["no such key"]), pytest.raises(KeyError):
        attempt(shop, tmp_path / "run", num_epochs=3)


# Engines


def engine(kind, **plugins):
    """An Accelerator, as far as it is looked at, that runs an engine."""
    state = SimpleNamespace(**plugins)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=False, state=state)


def test_engines_that_cut_weights_for_good_are_refused():
    """Else a run of days ends with shards that no pipeline can be made of."""
    config = TrainingFlags(train_batch_size=7, max_grad_norm=0.5)
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        fit_engine(engine(DistributedType.FSDP), config)
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={})
    with pytest.raises(UsageError, match="stage 3"):
        fit_engine(engine(DistributedType.DEEPSPEED, deepspeed_plugin=plugin), config)
    plugin.zero_stage = 2
    fit_engine(engine(DistributedType.DEEPSPEED, deepspeed_plugin=plugin), config)
    ours = {"train_micro_batch_size_per_gpu": 7, "gradient_clipping": 0.5, "gradient_accumulation_steps": 1}
    assert plugin.deepspeed_config == ours
