"""What fails while training: each fault is made to happen, and costs one line and no training that was saved."""

import contextlib
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
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
from ddpm_hf.training.checkpointing import read_manifest
from ddpm_hf.training.flags import TrainingConfig
from ddpm_hf.training.setup.accelerator import fit_engine
from ddpm_hf.training.stopping import Stop
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.fixtures_unconditional import (
    BASE,
    Run,
    encoded,
    fill,
    image_rows,
    random_pixels,
    run_script,
    words,
    write_images,
    write_rows,
    write_unet,
)

SIX_STEPS = {"num_epochs": 3, "checkpointing_steps": 1, "use_ema": True}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Eight pictures as a dataset, and a UNet."""
    root = tmp_path_factory.mktemp("shop")
    write_rows(root / "photos", [encoded(one) for one in random_pixels(8)])
    write_unet(root / "tiny")
    return root


def train(shop: Path, folder: Path, **flags) -> Run:
    """The script with flags on top of BASE."""
    return run_script(words(fill({**BASE, "output_dir": folder, **flags}, shop)), folder)


@pytest.fixture(scope="module")
def whole(shop, tmp_path_factory):
    """A run of six steps that nothing went wrong with."""
    run = train(shop, tmp_path_factory.mktemp("whole") / "run", **SIX_STEPS)
    assert run.code == 0, run.err
    return run


def checkpoints(run: Run) -> list[int]:
    """The steps whose checkpoints are there, each of them whole; and nothing half-written is."""
    for path in run.folder.rglob("*"):
        assert not path.name.endswith(".partial")
        assert not path.name.startswith(".")
    return sorted(read_manifest(path)["step"] for path in run.folder.glob("checkpoint-*"))


def check_one_line(run: Run, code: int, *fragments) -> None:
    """The run ended with a code and one line that has all the fragments."""
    assert run.code == code, run.err
    assert "Traceback" not in run.err
    for fragment in fragments:
        assert str(fragment) in run.error()


def warnings(run: Run) -> list[str]:
    """The warnings of a run."""
    assert "Traceback" not in run.err
    return [line for line in run.err.splitlines() if line.startswith("warning: ")]


def same_checkpoint(ours: Path, theirs: Path) -> bool:
    """Whether two checkpoints hold the same, to the bit; but for the state of generators that nothing draws from."""
    manifests = [read_manifest(path) for path in (ours, theirs)]
    for manifest in manifests:
        manifest["files"] = {name: one for name, one in manifest["files"].items() if "random_states" not in name}
        manifest.pop("sessions", None)  # which tell times
        manifest.pop("settings", None)  # where a run was started with other flags or another folder of data
    return manifests[0] == manifests[1]


def check_same_run(ours: Run, theirs: Run) -> None:
    """Two finished runs hold the same model, figures and pictures."""
    assert same_checkpoint(ours.folder / "checkpoint-6", theirs.folder / "checkpoint-6")
    for name in ("metrics.jsonl", "unet/diffusion_pytorch_model.safetensors"):
        assert (ours.folder / name).read_bytes() == (theirs.folder / name).read_bytes()
    pictures = [{path.name: path.read_bytes() for path in run.folder.glob("samples/*")} for run in (ours, theirs)]
    assert pictures[0] == pictures[1]


@contextlib.contextmanager
def at_step(step: int, action, place=train_unconditional, name="compute_loss"):
    """Do something when a step (from 1) computes its loss, once."""
    compute_loss = getattr(place, name)
    done = []

    def compute(model, batch, keys, **more):
        if keys.step == step - 1 and not keys.validation and not done:
            done.append(action())
        return compute_loss(model, batch, keys, **more)

    with mock.patch.object(place, name, compute):
        yield


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


@pytest.mark.parametrize("room", [0, 30_000])
def test_a_checkpoint_that_finds_no_room_is_left_out(room, shop, whole, tmp_path):
    """Else a full disk ends a run that could have gone on, or takes the last good checkpoint with it."""
    with without_room(output, "save_checkpoint", of_steps(3, 4), room):
        run = train(
            shop, tmp_path / "run", **SIX_STEPS | {"num_epochs": None}, max_train_steps=5, checkpoints_total_limit=1
        )
        assert run.code == 0
    assert [line.split(" (")[0] for line in warnings(run)] == [
        f"warning: checkpoint-{step} cannot be written" for step in (3, 4)
    ]
    assert checkpoints(run) == [5]
    with without_room(output, "save_checkpoint", of_steps(3, 4), room):
        run = train(shop, tmp_path / "again", **SIX_STEPS)
    assert checkpoints(run) == [1, 2, 5, 6]
    check_same_run(run, whole)


def test_a_last_checkpoint_that_finds_no_room_is_an_error(shop, whole, tmp_path):
    """Else a run claims to be complete and cannot be gone on with, or the older checkpoint is lost too."""
    flags = {**SIX_STEPS, "checkpoints_total_limit": 1}
    with without_room(output, "save_checkpoint", of_steps(6)):
        run = train(shop, tmp_path / "run", **flags)
    check_one_line(run, 1, "checkpoint-6 cannot be written", "checkpoint-5", "--resume_from_checkpoint latest")
    assert checkpoints(run) == [5]
    check_same_run(train(shop, run.folder, **flags, resume_from_checkpoint="latest"), whole)


def test_a_stop_that_cannot_save_is_an_error(shop, tmp_path):
    """Else a queue takes a preempted job for one that has saved its state."""
    with (
        without_room(output, "save_checkpoint", of_steps(3)),
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    ):
        run = train(shop, tmp_path / "run", num_epochs=3, checkpointing_steps=2)
    check_one_line(run, 1, "checkpoint-3 cannot be written", "checkpoint-2 is whole")
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
        run = train(shop, disk / "run", **SIX_STEPS, save_images_epochs=9, save_model_epochs=9)
        check_one_line(run, 1, "No space left on device", "--resume_from_checkpoint latest")
        assert checkpoints(run) == [1, 2]
        assert len(warnings(run)) >= 3  # each checkpoint that was tried meanwhile
        shutil.copytree(run.folder, tmp_path / "moved")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    moved = train(shop, tmp_path / "moved", **SIX_STEPS, resume_from_checkpoint="latest", save_images_epochs=9)
    assert moved.code == 0
    assert same_checkpoint(moved.folder / "checkpoint-6", whole.folder / "checkpoint-6")


def test_a_pipeline_that_finds_no_room(shop, whole, tmp_path):
    """Else a save in between ends the run, or the last one is lost without a word."""
    calls = []
    flags = {**SIX_STEPS, "save_model_epochs": 1}
    first = without_room(publisher, "save_pipeline", lambda *_: calls.append(0) or len(calls) == 1)
    with first:
        run = train(shop, tmp_path / "run", **flags)
    assert run.code == 0
    assert "the model of step 2 cannot be written" in warnings(run)[0]
    check_same_run(run, train(shop, tmp_path / "clean", **flags))
    with without_room(publisher, "save_pipeline"):
        run = train(shop, tmp_path / "never", **SIX_STEPS)
    check_one_line(run, 1, "the model of step 6 cannot be written", "checkpoint-5 is whole")
    assert not (run.folder / "model_index.json").exists()
    check_same_run(train(shop, run.folder, **SIX_STEPS, resume_from_checkpoint="latest"), whole)


def test_metrics_that_find_no_room_end_the_run(shop, whole, tmp_path):
    """Else figures are lost, and the run is no longer the one that was never interrupted."""
    of_step = lambda path, record: path.name == "metrics.jsonl" and record["step"] == 4  # noqa: E731
    with without_room(output, "append_jsonl", of_step, room=100):
        run = train(shop, tmp_path / "run", **SIX_STEPS)
    check_one_line(run, 1, "metrics.jsonl cannot be written", "checkpoint-3 is whole")
    assert checkpoints(run) == [1, 2, 3]
    check_same_run(train(shop, run.folder, **SIX_STEPS, resume_from_checkpoint="latest"), whole)


def test_timings_and_pictures_that_find_no_room_are_left_out(shop, whole, tmp_path):
    """Else a picture that cannot be written ends a run of days, or each step says it again."""
    with (
        without_room(output, "append_jsonl", lambda path, record: path.name == "timings.jsonl"),
        without_room(train_unconditional, "draw_samples"),
    ):
        run = train(shop, tmp_path / "run", **SIX_STEPS)
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
        run = train(shop, tmp_path / "run", **flags)
    check_one_line(run, 1, "File too large")
    assert not list((run.folder / "cache").rglob("part-*"))
    assert not list((run.folder / "cache").rglob(".writing-*"))
    assert train(shop, run.folder, **flags, resume_from_checkpoint="latest").code == 0


def test_an_output_folder_that_goes_away(shop, tmp_path):
    """Else a run whose disk was unmounted fills another one in its place, or ends in a traceback."""
    folder = tmp_path / "run"
    with at_step(3, lambda: folder.rename(tmp_path / "gone")):
        run = train(shop, folder, **SIX_STEPS)
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
        run = train(shop, tmp_path / "run", **SIX_STEPS, logger="tensorboard")
    assert run.code == 0
    assert logged == [1, 2]
    (line,) = warnings(run)
    assert "tensorboard fails" in line
    check_same_run(run, whole)


def test_a_tracker_that_cannot_close_is_a_warning(shop, tmp_path):
    """Else a run that is complete, and published, counts as failed."""
    with mock.patch.object(TensorBoardTracker, "finish", mock.Mock(side_effect=ConnectionError("no\nnetwork"))):
        run = train(shop, tmp_path / "run", logger="tensorboard")
    assert run.code == 0
    assert ["no network" in line for line in warnings(run)] == [True]


def test_a_tracker_that_does_not_start_is_said_before_training(shop, tmp_path):
    """Else days of training run without the curves that were asked for, or end in a tracker's traceback."""
    (tmp_path / "file").write_text("in the way")
    run = train(shop, tmp_path / "run", logger="tensorboard", logging_dir=tmp_path / "file" / "logs")
    check_one_line(run, 2, "--logger tensorboard does not start", "--logger none")
    with mock.patch.object(accelerate.Accelerator, "init_trackers", mock.Mock(side_effect=Exception("not logged in"))):
        run = train(shop, tmp_path / "other", logger="tensorboard")
    check_one_line(run, 2, "not logged in")
    assert not (run.folder / "metrics.jsonl").exists()


# Data that fails half-way

FILES = {"num_epochs": 3, "use_ema": True, "cache_dataset": "never"}  # checkpoints at the end alone


@pytest.fixture
def files(tmp_path):
    """A folder of eight pictures."""
    return write_images(tmp_path / "files", random_pixels(8))


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
    clean = train(shop, tmp_path / "clean", **flags)
    spoil = {"vanishes": lambda: bad.unlink(), "is damaged": lambda: bad.write_bytes(good[:60])}[fault]
    bad = files / "5.png"
    good = bad.read_bytes()
    with at_step(2, spoil):
        run = train(shop, tmp_path / "run", **flags)
    check_one_line(run, 2, "5.png", "--skip_broken_images")
    (saved,) = checkpoints(run)
    assert saved >= 2
    bad.write_bytes(good)
    check_same_run(train(shop, run.folder, **flags, resume_from_checkpoint="latest"), clean)
    with at_step(2, spoil):
        run = train(shop, tmp_path / "skipping", **flags, skip_broken_images=True)
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
    assert clean.code == 0, clean.err
    with at_step(2, up.unlink):
        run = train(shop, tmp_path / "run", **flags)
    check_one_line(run, 2, "of me/stream", "the source is down", "ConnectionError")
    (saved,) = checkpoints(run)
    assert 2 <= saved < 6
    up.touch()
    check_same_run(train(shop, run.folder, **flags, resume_from_checkpoint="latest"), clean)


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
        run = train(shop, tmp_path / "run", **FILES)
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
        run = train(shop, tmp_path / "run", **flags)
    check_one_line(run, 1, "--dataloader_num_workers", "is whole")
    assert set(checkpoints(run)) <= {1, 2, 3}
    check_same_run(train(shop, run.folder, **flags, resume_from_checkpoint="latest"), whole)


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
        run = train(shop, tmp_path / "run", num_epochs=3, checkpointing_steps=2)
    check_one_line(
        run, 2, "out of memory", "--train_batch_size", "--gradient_accumulation_steps", "--gradient_checkpointing",
        "--mixed_precision bf16", "checkpoint-2 is whole",
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
        run = train(shop, tmp_path / "run", **SIX_STEPS)
    assert run.code == 0
    assert all("--eval_batch_size" in line for line in warnings(run))
    assert same_checkpoint(run.folder / "checkpoint-6", whole.folder / "checkpoint-6")


def test_an_error_that_is_not_understood_keeps_its_traceback(shop, tmp_path):
    """Else a bug is reported as if it were a full disk."""
    with at_step(3, lambda: {}["no such key"]), pytest.raises(KeyError):
        train(shop, tmp_path / "run", num_epochs=3)


# Engines


def engine(kind, **plugins):
    """An Accelerator, as far as it is looked at, that runs an engine."""
    state = SimpleNamespace(**plugins)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=False, state=state)


def test_engines_that_cut_weights_for_good_are_refused():
    """Else a run of days ends with shards that no pipeline can be made of."""
    config = TrainingConfig(train_batch_size=7, max_grad_norm=0.5)
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        fit_engine(engine(DistributedType.FSDP), config)
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={})
    with pytest.raises(UsageError, match="stage 3"):
        fit_engine(engine(DistributedType.DEEPSPEED, deepspeed_plugin=plugin), config)
    plugin.zero_stage = 2
    fit_engine(engine(DistributedType.DEEPSPEED, deepspeed_plugin=plugin), config)
    ours = {"train_micro_batch_size_per_gpu": 7, "gradient_clipping": 0.5, "gradient_accumulation_steps": 1}
    assert plugin.deepspeed_config == ours


# Ends that were asked for


def test_the_time_limit_saves_and_ends_and_the_run_goes_on(shop, whole, tmp_path):
    """Else a queue's limit kills the run before it has saved, or stopping changes what is learned."""
    flags = {**SIX_STEPS, "checkpointing_steps": 6, "max_train_hours": 1e-9}
    for step in range(1, 6):
        run = train(shop, tmp_path / "run", **flags, resume_from_checkpoint="latest")
        assert run.code == 0
        assert f"stopped at step {step} by the time limit of --max_train_hours" in run.err
        assert "--resume_from_checkpoint latest" in run.err
        assert checkpoints(run) == list(range(1, step + 1))
    run = train(shop, run.folder, **flags, resume_from_checkpoint="latest")
    assert "stopped" not in run.err
    check_same_run(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_pictures_are_drawn_is_not_kept_waiting(number, shop, whole, tmp_path):
    """Else a long grid eats the seconds that a preempted job is given, or the picture is missing for ever."""
    forward = UNet2DModel.forward
    calls = []

    def sampling(self, *args, **kwargs):
        if not self.training:
            calls.append(0)
            if len(calls) == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # as launchers do, who pass on what the terminal has sent already
        return forward(self, *args, **kwargs)

    flags = {**SIX_STEPS, "checkpointing_steps": 6, "ddpm_num_inference_steps": 30}
    clean = train(shop, tmp_path / "clean", **flags)
    with mock.patch.object(UNet2DModel, "forward", sampling):
        run = train(shop, tmp_path / "run", **flags)
    assert run.code == 0
    assert len(calls) == 2
    assert f"stopped at step 2 by {number.name}" in run.err
    assert checkpoints(run) == [2]
    assert not list(run.folder.glob("samples/*"))
    check_same_run(train(shop, run.folder, **flags, resume_from_checkpoint="latest"), clean)


def test_a_second_interrupt_ends_at_once():
    """Else a user who does not want to wait for the checkpoint must look for another terminal."""
    with Stop(None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.asked_at -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_before_training_is_one_line(shop, tmp_path, monkeypatch):
    """Else Ctrl-C while data is read shows a traceback."""
    monkeypatch.setattr(train_unconditional, "open_images", mock.Mock(side_effect=KeyboardInterrupt))
    run = train(shop, tmp_path / "run")
    assert run.code == 130
    assert run.err == "train_unconditional.py: interrupted\n"


# Losses that are not finite


@contextlib.contextmanager
def poisoned(bad, value=math.nan, added=False):
    """compute_loss, whose losses are not finite for some (step from 1, row)."""
    compute_loss = train_unconditional.compute_loss

    def compute(model, batch, keys, **more):
        result = compute_loss(model, batch, keys, **more)
        hit = torch.tensor([bad(keys.step + 1, row) for row in batch["index"].tolist()])
        wrong = torch.full_like(result.losses, value)
        losses = (
            result.losses + torch.where(hit, wrong, 0.0) if added else torch.where(hit, wrong, 1.0) * result.losses
        )
        return result._replace(losses=losses)

    with mock.patch.object(train_unconditional, "compute_loss", compute):
        yield


NOT_FINITE = {
    "NaN": {},
    "infinity that the gradient does not see": {"value": math.inf, "added": True},
    "bf16": {"mixed_precision": "bf16"},
    "a part of an accumulated batch": {"gradient_accumulation_steps": 2, "train_batch_size": 2},
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_sample_that_is_not_finite_is_named_and_its_steps_leave_no_trace(case, shop, files, tmp_path):
    """Else one bad image poisons weights, averages or figures, or nobody finds it among thousands."""
    flags = {"train_data_dir": files, "cache_dir": tmp_path / "cache", "use_ema": True, "checkpointing_steps": 1}
    flags |= {"num_epochs": 2, "logging_steps": 2, "lr_scheduler": "constant"}
    how = dict(NOT_FINITE[case])
    poison = {name: how.pop(name) for name in ("value", "added") if name in how}
    with poisoned(lambda step, row: row == 6, **poison):
        run = train(shop, tmp_path / "run", **flags, **how)
    assert run.code == 0
    lines = [line for line in warnings(run) if "step skipped" in line]
    assert len(lines) == 2  # once an epoch
    assert all("6.png;" in line and ".png," not in line for line in lines)
    for record in run.records():
        assert all(math.isfinite(value) for value in record.values())
    for path in run.folder.glob("checkpoint-*"):
        assert torch.tensor(read_manifest(path)["meter"]).isfinite().all()  # sums and their compensation
        assert UNet2DModel.from_pretrained(path, subfolder="unet_ema").conv_in.weight.isfinite().all()


@pytest.mark.parametrize(("sampler", "every"), [("uniform", 1), ("loss_second_moment", 4)])
def test_a_run_that_diverges_keeps_the_checkpoint_from_before(sampler, every, shop, tmp_path):
    """Else the checkpoint to go on from is one of the bad steps', was rotated away, or differs from a good run's."""
    flags = {
        "objective": "vlb", "variance_type": "learned_range", "timestep_sampler": sampler, "use_ema": True,
        "max_train_steps": 8, "lr_warmup_steps": 5, "logging_steps": 2,
    }  # fmt: skip
    with poisoned(lambda step, row: step > 3 and row % 2 == 1):
        limits = {"max_nonfinite_steps": 4, "checkpoints_total_limit": 1}
        run = train(shop, tmp_path / "run", **flags, **limits, checkpointing_steps=every)
    check_one_line(
        run, 2, "4 steps in a row up to 7", "1 of ", "7 of ", "checkpoint-3", str(run.folder), "--learning_rate"
    )
    assert "0 of" not in run.error()
    assert checkpoints(run) == [3]
    good = train(shop, tmp_path / "good", **flags, checkpointing_steps=3)
    assert same_checkpoint(run.folder / "checkpoint-3", good.folder / "checkpoint-3")
    again = train(shop, run.folder, **flags, checkpointing_steps=8, resume_from_checkpoint="latest")
    assert same_checkpoint(again.folder / "checkpoint-8", good.folder / "checkpoint-8")


def test_a_stop_among_bad_steps_goes_back_before_them(shop, tmp_path):
    """Else the run that goes on is not the one that was never stopped."""
    flags = {"num_epochs": 3, "use_ema": True, "lr_warmup_steps": 5}
    with poisoned(lambda step, row: step in (3, 4)):
        clean = train(shop, tmp_path / "clean", **flags)
        with at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            run = train(shop, tmp_path / "run", **flags)
        assert "stopped at step 2 by SIGTERM" in run.err
        assert checkpoints(run) == [2]
        check_same_run(train(shop, run.folder, **flags, resume_from_checkpoint="latest"), clean)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # pictures of NaN
def test_a_run_that_is_bad_from_the_first_step_says_so(shop, tmp_path):
    """Else the message names a checkpoint that is not there."""
    with poisoned(lambda step, row: True):
        run = train(shop, tmp_path / "run", num_epochs=9, max_nonfinite_steps=3, checkpointing_steps=1)
    check_one_line(run, 2, "3 steps in a row up to 3", "no step before was good")
    assert checkpoints(run) == []
