"""Runs that end early: by a time limit, by a signal, or because losses are not finite."""

import math
import os
import signal
from unittest import mock

import pytest
import torch
from diffusers import UNet2DModel

import train_unconditional
from ddpm_hf.training.checkpointing import read_manifest
from ddpm_hf.training.stopping import Stop
from tests.support.faults import (
    SIX_STEPS,
    at_step,
    check_one_line,
    check_same_run,
    checkpoints,
    poisoned,
    same_checkpoint,
    warnings,
)
from tests.support.runs import attempt, train

# Ends that were asked for


def test_the_time_limit_saves_and_ends_and_the_run_goes_on(shop, whole, tmp_path):
    """Else a queue's limit kills the run before it has saved, or stopping changes what is learned."""
    flags = {**SIX_STEPS, "checkpointing_steps": 6, "max_train_hours": 1e-9}
    for step in range(1, 6):
        run = train(shop, tmp_path / "run", **flags, resume_from_checkpoint="latest")
        assert f"stopped at step {step} by the time limit of --max_train_hours" in run.err
        assert "--resume_from_checkpoint latest" in run.err
        assert checkpoints(run) == list(range(1, step + 1))
    run = attempt(shop, run.folder, **flags, resume_from_checkpoint="latest")
    assert "stopped" not in run.err
    check_same_run(run, whole)


@pytest.mark.every(2)
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
    clean = attempt(shop, tmp_path / "clean", **flags)
    with mock.patch.object(UNet2DModel, "forward", sampling):
        run = attempt(shop, tmp_path / "run", **flags)
    assert run.code == 0
    assert len(calls) == 2
    assert f"stopped at step 2 by {number.name}" in run.err
    assert checkpoints(run) == [2]
    assert not list(run.folder.glob("samples/*"))
    check_same_run(attempt(shop, run.folder, **flags, resume_from_checkpoint="latest"), clean)


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
    run = attempt(shop, tmp_path / "run")
    assert run.code == 130
    assert run.err == "train_unconditional.py: interrupted\n"


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
        run = attempt(shop, tmp_path / "run", **flags, **how)
    assert run.code == 0
    lines = [line for line in warnings(run) if "step skipped" in line]
    assert len(lines) == 2  # once an epoch
    assert all("6.png;" in line and ".png," not in line for line in lines)
    for record in run.records():
        assert all(math.isfinite(value) for value in record.values())
    for path in run.folder.glob("checkpoint-*"):
        assert torch.tensor(read_manifest(path)["meter"]).isfinite().all()  # sums and their compensation
        assert UNet2DModel.from_pretrained(path, subfolder="unet_ema").conv_in.weight.isfinite().all()


@pytest.mark.every(2)
@pytest.mark.parametrize(("sampler", "every"), [("uniform", 1), ("loss_second_moment", 4)])
def test_a_run_that_diverges_keeps_the_checkpoint_from_before(sampler, every, shop, tmp_path):
    """Else the checkpoint to go on from is one of the bad steps', was rotated away, or differs from a good run's."""
    flags = {
        "objective": "vlb", "variance_type": "learned_range", "timestep_sampler": sampler, "use_ema": True,
        "max_train_steps": 8, "lr_warmup_steps": 5, "logging_steps": 2,
    }  # fmt: skip
    with poisoned(lambda step, row: step > 3 and row % 2 == 1):
        limits = {"max_nonfinite_steps": 4, "checkpoints_total_limit": 1}
        run = attempt(shop, tmp_path / "run", **flags, **limits, checkpointing_steps=every)
    check_one_line(
        run, 2, "4 steps in a row up to 7", "1 of ", "7 of ", "checkpoint-3", str(run.folder), "--learning_rate"
    )
    assert "0 of" not in run.error()
    assert checkpoints(run) == [3]
    good = attempt(shop, tmp_path / "good", **flags, checkpointing_steps=3)
    assert same_checkpoint(run.folder / "checkpoint-3", good.folder / "checkpoint-3")
    again = attempt(shop, run.folder, **flags, checkpointing_steps=8, resume_from_checkpoint="latest")
    assert same_checkpoint(again.folder / "checkpoint-8", good.folder / "checkpoint-8")


def test_a_stop_among_bad_steps_goes_back_before_them(shop, tmp_path):
    """Else the run that goes on is not the one that was never stopped."""
    flags = {"num_epochs": 3, "use_ema": True, "lr_warmup_steps": 5}
    with poisoned(lambda step, row: step in (3, 4)):
        clean = attempt(shop, tmp_path / "clean", **flags)
        with at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            run = attempt(shop, tmp_path / "run", **flags)
        assert "stopped at step 2 by SIGTERM" in run.err
        assert checkpoints(run) == [2]
        check_same_run(attempt(shop, run.folder, **flags, resume_from_checkpoint="latest"), clean)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # pictures of NaN
def test_a_run_that_is_bad_from_the_first_step_says_so(shop, tmp_path):
    """Else the message names a checkpoint that is not there."""
    with poisoned(lambda step, row: True):
        run = attempt(shop, tmp_path / "run", num_epochs=9, max_nonfinite_steps=3, checkpointing_steps=1)
    check_one_line(run, 2, "3 steps in a row up to 3", "no step before was good")
    assert checkpoints(run) == []
