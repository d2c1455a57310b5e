"""Resuming, beyond one process and a tidy end: two ranks, another number of ranks, and what a kill leaves on disk."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from ddpm_hf.common.checkpoints import list_checkpoints
from ddpm_hf.common.layout import AUTOENCODER
from ddpm_hf.common.ownership import claim_files
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.dataset import StreamingBatches
from ddpm_hf.data.orders import keyed_permutation
from ddpm_hf.data.reading import read_dataset
from ddpm_hf.latents.autoencoder import make_autoencoder
from ddpm_hf.latents.flags import AutoencoderFlags
from ddpm_hf.latents.table import TensorTable
from ddpm_hf.latents.training import train_autoencoder
from ddpm_hf.models.saving import save_model
from ddpm_hf.training import checkpointing
from ddpm_hf.training.checkpointing import find_checkpoint, read_manifest, rotate
from ddpm_hf.training.complete_checkpoints import seal
from ddpm_hf.training.plan import KeyedBatchSampler, StepPlan
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_ranks import torchrun
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import GRAY, assert_same_run, command, train, training_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset, and a model with dropout."""
    root = tmp_path_factory.mktemp("world")
    write_rows(root / "images", [encoded(pixels) for pixels in random_pixels(22, 10, 9)])
    write_unet(root / "unet", in_channels=1, out_channels=1, dropout=0.2)
    return root


USUAL = {**GRAY, "max_train_steps": 7, "checkpointing_steps": 4, "random_flip": True, "use_ema": True}

# Two ranks, on two ranks

ON_TWO = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "streaming": {"streaming": True, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"},
    "loss-aware": {
        "objective": "vlb",
        "variance_type": "learned_range",
        "timestep_sampler": "loss_second_moment",
        "ddpm_num_steps": 3,
        "gradient_accumulation_steps": 2,
    },
}
FROM_ONE = "begun by one rank"  # with twice the batch, and no dropout, which each rank draws for itself

# Runs of the script one after another, in processes that are started and joined once
RANK = """
import json, os, shutil, sys
from pathlib import Path
import torch
from accelerate.state import AcceleratorState
import train_unconditional

torch.distributed.destroy_process_group = lambda *group: None  # there is another run to come

for copied, argv in json.loads(Path(sys.argv[1]).read_text()):
    if copied and os.environ["RANK"] == "0":
        for source, target in copied:
            (shutil.copytree if Path(source).is_dir() else shutil.copy)(source, target)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    AcceleratorState._reset_state()
    train_unconditional.main(argv)
"""


@pytest.fixture(scope="module")
def on_two(world, tmp_path_factory):
    """Folders of runs on two ranks by their case: uninterrupted, and gone on with from their checkpoint-4."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "rank.py").write_text(RANK)
    jobs = []
    for case, flags in ON_TWO.items():
        whole, resumed = root / case / "whole", root / case / "resumed"
        copied = [[str(whole / name), str(resumed / name)] for name in ("checkpoint-4", "metrics.jsonl")]
        jobs += [
            [[], command(world, whole, USUAL, **flags)],
            [copied, command(world, resumed, USUAL, resume_from_checkpoint="latest", **flags)],
        ]
    one, two = root / FROM_ONE / "whole", root / FROM_ONE / "resumed"
    plain = {"model_config_name_or_path": write_unet(root / "plain", in_channels=1, out_channels=1)}
    plain |= {"adam_epsilon": 1e-2}  # Adam then magnifies no rounding
    train(world, one, USUAL, train_batch_size=8, **plain)
    shutil.copytree(one / "checkpoint-4", two / "checkpoint-4")
    jobs.append([[], command(world, two, USUAL, resume_from_checkpoint="latest", **plain)])
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(root / "rank.py", root / "jobs.json", timeout=600)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(root=root, said=done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_TWO)
def test_two_ranks_resume_as_never_stopped(case, on_two):
    """Else a run on several processes that is interrupted is another run: other weights, metrics or moments."""
    whole, resumed = on_two.root / case / "whole", on_two.root / case / "resumed"
    assert read_manifest(resumed / "checkpoint-7")["processes"] == 2
    assert not (resumed / "checkpoint-7").samefile(whole / "checkpoint-7")
    assert_same_run(resumed, whole)


@pytest.mark.slow
def test_two_ranks_go_on_where_one_stopped(on_two):
    """Else a run is tied to the number of processes that it began with, or goes on with other images unsaid."""
    whole, resumed = on_two.root / FROM_ONE / "whole", on_two.root / FROM_ONE / "resumed"
    assert "processes was 1 and is 2: not an exact continuation" in on_two.said
    for part in ("unet", "unet_ema"):
        ours, theirs = (
            load_file(run / "checkpoint-7" / part / "diffusion_pytorch_model.safetensors") for run in (resumed, whole)
        )
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


# Another number of ranks: the same images at each step, where ranks × batch × accumulation stays

SHAPES = [(1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (4, 2, 1), (1, 2, 4)]  # ranks, batch, accumulation


@pytest.mark.parametrize("samples", [17, 22, 24])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_another_number_of_ranks_sees_the_same_images(shape, samples):
    """Else a run that goes on with other GPUs repeats some images and leaves others out."""

    def seen(world, batch, accumulation, first_step):
        plan = StepPlan(samples, batch, world, accumulation)
        own = [
            iter(KeyedBatchSampler(plan, lambda epoch: keyed_permutation(3, epoch, samples), rank, first_step))
            for rank in range(world)
        ]
        steps = []
        for step in range(first_step, 10):
            keys = []
            for number in plan.batches(step):
                for rank in range(world):
                    begin, end = plan.own_samples(number, rank)
                    keys += next(own[rank])[: end - begin]  # beyond which it stands in for nobody
            steps.append(keys)
        return steps

    whole = seen(*SHAPES[0], 0)
    assert sorted(key for step in whole[:3] for key in step) == [(0, index) for index in range(samples)]
    for stopped in (1, 4, 8):
        assert seen(*shape, stopped) == whole[stopped:]


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)], ids=str)
def test_another_number_of_ranks_reads_the_same_stream(shape, world):
    """Else a streamed run that goes on with other GPUs repeats some images and leaves others out."""
    rows = read_dataset(directory=str(world / "images"), streaming=True)

    def read(ranks, batch, first):
        streams = [
            iter(StreamingBatches(rows, ImageTransform(8, 8, 1, random_flip=True), 3, batch, rank, ranks, first))
            for rank in range(ranks)
        ]
        found = []
        for _ in range(5 - first):
            batches = [next(stream) for stream in streams]
            pixels = np.concatenate([batch["images"].numpy() for batch in batches])
            places = np.concatenate([batch["index"].numpy() for batch in batches])
            found.append({int(place): image.tobytes() for place, image in zip(places, pixels)})
        return found

    whole = read(1, 8, 0)
    assert all(len(batch) == 8 for batch in whole[:2])
    assert read(*shape, 0)[:2] == whole[:2]  # within an epoch; at its end a rank has its own share left
    assert read(*shape, 1)[0] == whole[1]


def test_a_run_that_sees_more_or_less_at_a_step_says_how_to_keep_it(world, tmp_path):
    """Else a run that goes on with other GPUs repeats images, and nobody knows why or how to mend it."""
    train(world, tmp_path, USUAL, max_train_steps=4)
    path = tmp_path / "checkpoint-4" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "processes": 2, "global_batch": 8}))  # as two ranks would have written it
    run = train(world, tmp_path, USUAL, max_train_steps=4, resume_from_checkpoint="latest")
    assert "each step saw 8 images and sees 4" in run.err
    run = train(
        world, tmp_path, USUAL, max_train_steps=4, resume_from_checkpoint="latest", gradient_accumulation_steps=2
    )
    assert "processes was 2 and is 1" in run.err
    assert "each step saw" not in run.err


@pytest.mark.every(2)
@pytest.mark.parametrize("flags", [{"cache_dataset": "never"}, {"streaming": True}], ids=str)
def test_workers_may_change(flags, world, tmp_path):
    """Else a run is tied to the machine whose cores it began with."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(world, whole, USUAL, dataloader_num_workers=1, **flags)
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    shutil.copy(whole / "metrics.jsonl", resumed)
    train(world, resumed, USUAL, dataloader_num_workers=0, resume_from_checkpoint="latest", **flags)
    assert_same_run(resumed, whole)


# What a kill leaves


def leave_scraps(folder):
    """What writes that were killed leave, and files of the user's that look alike."""
    for name in ("checkpoint-4.partial", ".saving-a1b2c3d4.partial", "cache/latents-00/.writing-a1b2c3d4.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "half").write_bytes(b"cut o")
    (folder / "samples").mkdir()
    (folder / "assets").mkdir()
    scraps = (
        ".metrics.jsonl.a1b2c3d4.partial",
        "samples/.step-000005.png.a1b2c3d4.partial",
        "assets/.loss.png.a1b2c3d4.partial",
    )
    for name in scraps:
        (folder / name).write_bytes(b"cut o")
    (folder / ".gitignore").write_text("samples\n")
    (folder / ".mine").mkdir()


def scraps(folder):
    """Names of what is unfinished or hidden."""
    return sorted(path.name for path in folder.rglob("*") if re.match(r"\.|.*\.(partial|superseded)", path.name))


def test_a_run_killed_before_its_first_checkpoint_begins_anew(world, tmp_path):
    """Else its first steps are logged twice, it is refused, or what the kill cut off stays for ever."""
    train(world, tmp_path / "whole", USUAL)
    again = tmp_path / "again"
    again.mkdir()
    leave_scraps(again)
    (again / "metrics.jsonl").write_text('{"step": 3, "epoch": 1, "loss": 0.5}\n{"step": 6, "epo')
    (again / "timings.jsonl").write_text('{"step": 3, "seconds": 1.0}\n')
    run = train(world, again, USUAL, resume_from_checkpoint="latest")
    assert "training from the beginning" in run.err
    assert_same_run(again, tmp_path / "whole")
    assert [json.loads(line)["step"] for line in (again / "timings.jsonl").read_text().splitlines()] == [3, 6, 7]
    assert scraps(again) == [".gitignore", ".mine"]


def test_later_checkpoints_do_not_count_once_an_older_one_is_resumed(world, tmp_path):
    """Else `latest` returns to the course that was left, with a hole in the metrics."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(world, whole, USUAL)
    shutil.copytree(whole, part)
    run = train(world, part, USUAL, resume_from_checkpoint="checkpoint-4", max_train_steps=6)
    assert "checkpoint-7 is of a later step" in run.err
    assert [path.name for path in list_checkpoints(part)] == ["checkpoint-4", "checkpoint-6"]
    assert scraps(part) == ["checkpoint-7.superseded"]  # nobody loses days by a mistake
    shutil.rmtree(part / "checkpoint-6")  # as if killed before it
    train(world, part, USUAL, resume_from_checkpoint="latest")
    assert_same_run(part, whole)
    assert scraps(part) == []


def test_old_checkpoints_go_where_a_kill_kept_them(world, tmp_path):
    """Else a run that is killed at its end keeps more checkpoints than it was allowed to."""
    train(world, tmp_path, USUAL)
    assert len(list_checkpoints(tmp_path)) == 2
    train(world, tmp_path, USUAL, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-7"]


class Killed(BaseException):
    """What stands for SIGKILL within this process."""


@pytest.fixture
def killed_at(monkeypatch):
    """Makes the n-th renaming or removal of a file the last thing that is done; how many there were."""
    done = SimpleNamespace(count=0, fatal=None)

    def mortal(operation):
        def guarded(*args, **kwargs):
            done.count += 1
            if done.count == done.fatal:
                raise Killed
            return operation(*args, **kwargs)

        return guarded

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    return done


@pytest.mark.parametrize("limit", [1, 2])
def test_there_is_a_complete_checkpoint_at_every_moment(limit, killed_at, tmp_path):
    """Else a kill while a checkpoint is replaced, or old ones go, costs the whole run."""

    def save(folder, step):
        partial = folder / f"checkpoint-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "unet").mkdir(parents=True)
        for name in ("optimizer.bin", "unet/weights"):
            (partial / name).write_bytes(b"tensors")
        seal(partial, folder / f"checkpoint-{step}", {"step": step})
        rotate(folder, limit)

    moments = 0
    while True:
        folder, killed_at.fatal = tmp_path / str(moments), None
        for step in (2, 4):
            save(folder, step)
        before = killed_at.count
        killed_at.fatal = before + moments + 1
        try:
            save(folder, 4)  # once more
            save(folder, 6)
            break
        except Killed:
            killed_at.fatal = None
        found = find_checkpoint(folder, "latest", pytest.fail)  # none is broken
        assert found is not None, f"nothing left after {moments} operations"
        assert found[1]["step"] >= 4
        save(folder, 8)
        assert list_checkpoints(folder)[-1].name == "checkpoint-8"
        assert len(list_checkpoints(folder)) == limit
        moments += 1
    assert moments > 8


# Power cuts: what a rename promises must be on the disk before it


@pytest.fixture
def flushed(monkeypatch):
    """What was flushed, by inode: the size that a file, or the names that a folder had then."""
    found, fsync = {}, os.fsync

    def noted(handle):
        status = os.fstat(handle)
        path = os.readlink(f"/proc/self/fd/{handle}") if os.path.isdir("/proc/self/fd") else None
        found[status.st_ino] = sorted(os.listdir(path)) if path and os.path.isdir(path) else status.st_size
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    return found


def lies_on_disk(path, flushed):
    """Whether a file, or all of a folder, has been flushed as it is now."""
    status = path.stat()
    if path.is_dir():
        inside = sorted(os.listdir(path))
        return flushed.get(status.st_ino) == inside and all(lies_on_disk(path / name, flushed) for name in inside)
    return flushed.get(status.st_ino) == status.st_size


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux what a descriptor is")
def test_a_checkpoint_is_on_disk_before_it_has_its_name(flushed, world, monkeypatch, tmp_path):
    """Else a power cut leaves a checkpoint of empty files, or one whose metrics have a hole before it."""
    replace, sealed = os.replace, []

    def checked(source, target):
        if re.fullmatch(r"checkpoint-\d+", Path(target).name):
            assert lies_on_disk(Path(source), flushed)
            logs = [tmp_path / "run" / name for name in ("metrics.jsonl", "timings.jsonl")]
            assert all(lies_on_disk(log, flushed) for log in logs)
            sealed.append(Path(target).name)
        replace(source, target)
        if sealed:
            flushed.pop((tmp_path / "run").stat().st_ino, None)

    monkeypatch.setattr(checkpointing.os, "replace", checked)
    train(world, tmp_path / "run", USUAL)
    assert sealed == ["checkpoint-4", "checkpoint-7"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux what a descriptor is")
def test_weights_are_on_disk_before_the_config_that_says_so(flushed, monkeypatch, tmp_path):
    """Else a power cut leaves an autoencoder that counts as finished, without its weights."""
    replace, moved = os.replace, []

    def checked(source, target):
        if Path(target).parent == tmp_path / "model":
            assert lies_on_disk(Path(source), flushed)
            if Path(target).name == "config.json":
                weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
                assert lies_on_disk(weights, flushed)
                assert weights.name in flushed[(tmp_path / "model").stat().st_ino]
            moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    save_model(tiny_unet(), tmp_path / "model")
    assert moved == ["diffusion_pytorch_model.safetensors", "config.json"]
    assert scraps(tmp_path) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux what a descriptor is")
def test_a_part_of_the_cache_is_on_disk_before_it_has_its_name(flushed, monkeypatch, tmp_path):
    """Else a power cut leaves latents of zeros, which are then trained on."""
    replace, parts = os.replace, []

    def checked(source, target):
        if Path(target).name.startswith("part-"):
            assert lies_on_disk(Path(source), flushed)
            parts.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    TensorTable(tmp_path / "table").add([b"a", b"b"], torch.zeros(2, 3))
    assert len(parts) == 1


def test_halves_in_a_shared_cache_go_once_nobody_can_be_writing_them(tmp_path):
    """Else each killed run leaves its half for ever, or one run removes what another is writing."""
    table = TensorTable(tmp_path)
    for name, age in (("old", 7200), ("new", 60)):
        half = tmp_path / f".writing-{name}"
        half.mkdir()
        (half / "data").write_bytes(b"cut o")
        os.utime(half, (time.time() - age,) * 2)
    main = SimpleNamespace(
        process_index=0, num_processes=1, is_local_main_process=False, wait_for_everyone=lambda: None
    )
    table.fill([b"a"], lambda places: torch.ones(1, 2), main, "")
    assert scraps(tmp_path) == [".writing-new"]
    assert len(TensorTable(tmp_path)) == 1


def test_a_saved_model_does_not_tell_where_it_was_loaded_from(tmp_path):
    """Else a run that is resumed after its autoencoder leaves another config, and paths of a machine are published."""
    save_model(tiny_unet(), tmp_path / "first")
    save_model(UNet2DModel.from_pretrained(tmp_path / "first"), tmp_path / "again")
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("first", "again")]
    assert configs[0] == configs[1]
    assert not [key for key in json.loads(configs[1]) if key == "_name_or_path"]


def test_scraps_beside_a_finished_autoencoder_go(tmp_path):
    """Else a run killed while its autoencoder was saved keeps a second copy of it."""
    folder = tmp_path / AUTOENCODER
    folder.mkdir()
    leave_scraps(folder)
    claim_files(folder, ["checkpoint-4/"])
    save_model(make_autoencoder(AutoencoderFlags(vae_widths="8,16"), 1, (8, 8), 0), folder)
    accelerator = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
    run = training_run(accelerator, output_dir=str(tmp_path), resume_from_checkpoint="latest")
    train_autoencoder(run, None, None, (8, 8))
    assert scraps(folder) == [".gitignore", ".mine"]
