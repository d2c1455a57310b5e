"""Systems other than Linux with CUDA, emulated: macOS, Windows, Apple GPUs, terminals without UTF-8."""

import io
import json
import math
import os
import platform
import subprocess
import sys

import accelerate
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from ddpm_hf.common import machine
from ddpm_hf.training import checkpointing
from ddpm_hf.training.meter import Losses, Meter
from tests.support import ROOT
from tests.support.pictures import write_images, write_unet
from tests.support.runs import BASE, fill, run_script, words


def test_cores_are_counted_where_the_system_tells_no_affinity(monkeypatch):
    """macOS and Windows have no os.sched_getaffinity: else no training starts there."""
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.usable_cores() == os.cpu_count()


@pytest.mark.parametrize("words", [["train_unconditional.py"], ["-m", "ddpm_hf", "train-text2image"]])
def test_output_that_nobody_reads_to_its_end_is_no_error(words):
    """Else `--help | head` ends with a traceback and an exit code that says nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        command = [sys.executable, *words, "--help"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


PAGE_FAULTS = """
import resource, sys, torch
from ddpm_hf.common.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(2 << 20) for _ in range(8)]  # freed together, as a step's activations are
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = faults()
keep_freed_memory()
faults()
print(by_default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_allocation():
    """Else a training step on a CPU pays a page fault for every 4 KiB that it allocates."""
    run = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True)
    by_default, kept = map(int, run.stdout.split())
    assert kept < 1000 < by_default


@pytest.fixture
def windows_files(monkeypatch):
    """Folders that cannot be opened by os.open, and os.fsync only of what may be written to."""
    opened, flush, read_only = os.open, os.fsync, set()

    def open_file(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        handle = opened(path, flags, *args, **kwargs)
        (read_only.discard if flags & (os.O_WRONLY | os.O_RDWR) else read_only.add)(handle)
        return handle

    def fsync(handle):
        if handle in read_only:
            raise OSError(9, "Bad file descriptor")
        flush(handle)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)


def test_a_checkpoint_is_sealed_on_windows(windows_files, tmp_path):
    """Else no weights are ever saved there."""
    partial, final = tmp_path / "checkpoint-3.partial", tmp_path / "checkpoint-3"
    (partial / "unet").mkdir(parents=True)
    (partial / "unet" / "config.json").write_text("{}")
    checkpointing.seal(partial, final, {"step": 3})
    manifest = json.loads((final / checkpointing.MANIFEST).read_text(encoding="utf-8"))
    assert list(manifest["files"]) == ["unet/config.json"]
    manifest["files"] = {name.replace("/", "\\"): digest for name, digest in manifest["files"].items()}
    (final / checkpointing.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert checkpointing.read_manifest(final)["step"] == 3  # written by an earlier version on Windows


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_without_the_letter_shows_its_code(encoding, monkeypatch):
    """Else --help and error lines end in UnicodeEncodeError where the terminal is not UTF-8."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    machine.accept_any_text()
    for stream in (sys.stdout, sys.stderr):
        print("ᾱ of 漢字", file=stream, flush=True)
        assert stream.buffer.getvalue().startswith(b"\\u1fb1 of \\u6f22")


# Apple GPUs


DEVICE = torch.device("cpu", 0)  # stands for an Apple GPU


class NoFloat64(TorchFunctionMode):
    """Refuses to create or move a float64 tensor on the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        on_device = kwargs.get("device") == DEVICE or any(isinstance(a, torch.device) and a == DEVICE for a in args)
        if on_device and isinstance(output, torch.Tensor) and output.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return output


@pytest.fixture
def apple_gpu(monkeypatch):
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: DEVICE))
    with NoFloat64():
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    for name in ("cat", "dog"):
        write_images(folder / "photos" / name, np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
    write_unet(folder / "tiny")
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        {"snr_gamma": 5},
        {"label_column": "label"},
        {"objective": "vlb", "timestep_sampler": "loss_second_moment", "variance_type": "learned_range"},
    ],
    ids=["simple", "by class", "vlb"],
)
def test_training_needs_no_float64_on_the_device(flags, apple_gpu, shop, tmp_path):
    """Apple GPUs have none: else training stops with a TypeError at its first step."""
    held_out = {"validation_split": 0.25, "validation_steps": 1, "use_ema": True, "max_train_steps": 2}
    run = run_script(
        words({**fill(BASE, shop), **held_out, **flags, "output_dir": tmp_path / "run"}), tmp_path / "run"
    )
    assert run.code == 0, run.err
    assert all(math.isfinite(line["validation_loss"]) for line in run.records())


class OneProcess:
    """Accelerate's engine of a single process."""

    num_processes, process_index, is_main_process = 1, 0, True

    def gather(self, tensor):
        return tensor


def test_the_meter_loses_nothing_to_float32():
    """Sums of a long interval: a plain float32 sum of 200,000 losses is off by far more than float64's would be."""
    meter, losses = Meter(("low", "high"), torch.device("cpu")), torch.rand(200, 1000) + 0.5
    groups = torch.arange(1000) % 2
    for batch in losses:
        meter.add(Losses(batch, groups=groups), 1000)
        restored = Meter(meter.groups, meter.device)
        restored.restore(json.loads(json.dumps(meter.gathered(OneProcess()))), OneProcess())
        meter = restored  # a checkpoint after each batch changes nothing
    means = meter.means(OneProcess())
    assert means["loss"] == pytest.approx(losses.double().mean().item(), rel=2e-7)
    assert means["low"] == pytest.approx(losses[:, ::2].double().mean().item(), rel=2e-7)
