"""Between two logged steps the host reads nothing from a GPU: what it would wait for is decided on the device.

Without a GPU, the same path runs on the CPU, where each read of a tensor's value is counted.
"""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.common.randomness import counted_normal
from ddpm_hf.training import loop
from ddpm_hf.training.loop import take_step
from ddpm_hf.training.post_hoc import read_snapshots
from ddpm_hf.training.update import DeviceUpdate, device_decides
from tests.support.faults import poisoned
from tests.support.runs import assert_same_tensors, attempt, records, train, weights

FLAGS = {"use_ema": True, "ema_snapshot_steps": 12, "max_train_steps": 12, "checkpointing_steps": 12}


class Reads(TorchDispatchMode):
    """Counts reads of tensors' values by the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def assert_alike(ours: Path, theirs: Path) -> None:
    """Two runs are the same but for rounding: rates are float32, and averages computed by other operations."""
    for one in ("unet", "checkpoint-12/unet", "checkpoint-12/unet_ema"):
        assert_same_tensors(weights(ours, one), weights(theirs, one), atol=5e-6)
    snapshots = [read_snapshots(one) for one in (ours, theirs)]
    for mine, other in zip(*snapshots, strict=True):
        assert_same_tensors(load_file(mine.path), load_file(other.path), atol=5e-6)
    for mine, other in zip(records(ours), records(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def on_the_device():
    """As if a GPU decided whether a step is taken."""
    return mock.patch("ddpm_hf.training.update.device_decides", return_value=True)


@pytest.mark.parametrize("decides", [True, False])
def test_no_value_is_read_between_two_logged_steps(decides, shop, tmp_path):
    """Of weights, losses or norms; where the host decides, it reads one number a step."""
    reads = Reads()

    def counted(*args):
        with reads, mock.patch.object(torch.Tensor, "tolist", side_effect=AssertionError("tolist waits")):
            return take_step(*args)

    with (
        mock.patch("ddpm_hf.training.update.device_decides", return_value=decides),
        mock.patch.object(loop, "take_step", counted),
    ):
        train(shop, tmp_path / "run", **FLAGS, logging_steps=6)
    assert reads.count == (0 if decides else 12)


@pytest.mark.every(2)
@pytest.mark.parametrize("logging_steps", [1, 4])
def test_the_device_trains_what_the_host_trains(logging_steps, shop, tmp_path):
    """Models, averages and figures are equal but for rounding."""
    host = train(shop, tmp_path / "host", **FLAGS, logging_steps=logging_steps)
    with on_the_device():
        device = train(shop, tmp_path / "device", **FLAGS, logging_steps=logging_steps)
    assert_alike(device.folder, host.folder)


def test_the_device_skips_a_step_that_is_not_finite(shop, tmp_path):
    """Weights, averages and figures are those of a run whose host skips it; it is named at the next logged step."""
    runs = []
    for name, decides in (("host", False), ("device", True)):
        with (
            mock.patch("ddpm_hf.training.update.device_decides", return_value=decides),
            poisoned(lambda step, row: step == 5 and row == 2),
        ):
            runs.append(train(shop, tmp_path / name, **FLAGS, logging_steps=1))
    host, device = runs
    assert_alike(device.folder, host.folder)
    assert device.err.count("step skipped") == host.err.count("step skipped") > 0


def test_steps_skipped_between_logged_steps_leave_no_trace(shop, tmp_path):
    """The host hears of them later, names the same ones, and its figures are those of a host that skips at once."""
    runs = []
    for name, decides in (("host", False), ("device", True)):
        with (
            mock.patch("ddpm_hf.training.update.device_decides", return_value=decides),
            poisoned(lambda step, row: step in (2, 3) or (step == 7 and row == 2)),
        ):
            runs.append(train(shop, tmp_path / name, **FLAGS, logging_steps=6))
    skipped = [[line for line in run.err.splitlines() if "step skipped" in line] for run in runs]
    assert skipped[0] == skipped[1]
    assert len(skipped[0]) >= 2
    for device, host in zip(records(runs[1].folder), records(runs[0].folder), strict=True):
        assert device == pytest.approx(host, rel=1e-3)  # the average's decay counts the skipped steps for a while


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_an_average_elsewhere_lets_the_host_decide(place):
    """Else --offload_ema takes in the weights once more at a step that was skipped."""
    ema = SimpleNamespace(shadow_params=[SimpleNamespace(device=torch.device(place))])
    accelerator = SimpleNamespace(scaler=None, distributed_type=DistributedType.NO)
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(defaults={"fused": True}))
    run = SimpleNamespace(device=torch.device("cuda"), accelerator=accelerator)
    assert device_decides(run, SimpleNamespace(optimizer=optimizer, averages=[(ema, None)])) == (place == "cuda")
    assert device_decides(run, SimpleNamespace(optimizer=optimizer, averages=[]))


def test_a_run_that_diverges_on_the_device_ends_with_what_came_before(shop, tmp_path):
    """Though the host learns of it late, the checkpoint is from before the first bad step."""
    with on_the_device(), poisoned(lambda step, row: step > 2):
        run = attempt(shop, tmp_path / "run", **FLAGS | {"max_nonfinite_steps": 3}, logging_steps=6)
    assert run.code == 2
    assert "3 steps in a row up to 5" in run.error()
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-2"]


SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def splitmix(seed: int, index: int) -> int:
    """SplitMix64's output by its definition, in Python's integers."""
    word = 2**64 - 1
    state = seed + index * SPLITMIX[0] & word
    state = (state ^ state >> 30) * SPLITMIX[1] & word
    state = (state ^ state >> 27) * SPLITMIX[2] & word
    return state ^ state >> 31


def test_the_noise_of_a_gpu_is_box_and_muller_of_splitmix():
    """Seeds of any sign, and a row of an odd number of elements."""
    seeds = [5, -7, 2**62, -(2**63)]
    noise = counted_normal(torch.tensor(seeds), (3, 5)).double()
    for row, seed in zip(noise, seeds):
        bits = torch.tensor([divmod(splitmix(seed % 2**64, index), 2**32) for index in range(1, 9)]).double()
        radius = (-2 * ((bits[:, 0] + 1) / 2**32).log()).sqrt()
        angle = 2 * torch.pi * bits[:, 1] / 2**32
        expected = torch.cat([radius * angle.cos(), radius * angle.sin()])[:15]
        torch.testing.assert_close(row.flatten(), expected, atol=1e-5, rtol=0)


def test_the_noise_of_a_gpu_is_normal_and_belongs_to_its_sample():
    """Moments of a normal distribution, no correlation of samples, and a row that does not see the others."""
    seeds = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    noise = counted_normal(seeds, (3, 32, 32)).double()
    count = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((noise**power).mean()) - moment) < 5 * (variance / count) ** 0.5
    correlations = torch.corrcoef(noise.flatten(1)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5.5 / 3072**0.5
    assert torch.equal(counted_normal(seeds[5:7], (3, 32, 32)).double(), noise[5:7])


def test_a_recorded_update_is_the_update(shop, tmp_path, monkeypatch):
    """What a CUDA graph replays reads the rates anew at each step; it is recorded once the tensors stay."""
    expected = train(shop, tmp_path / "host", **FLAGS)
    replays = []

    def rerun(update):
        return lambda: (replays.append(1), update())[1]

    monkeypatch.setattr("ddpm_hf.training.update.recorded", rerun)
    monkeypatch.setattr(DeviceUpdate, "_places", lambda self: (1,))
    with on_the_device():
        device = train(shop, tmp_path / "device", **FLAGS)
    assert len(replays) == FLAGS["max_train_steps"] - 1
    assert_alike(device.folder, expected.folder)
