"""Runs in which something fails, and what is checked of them."""

import contextlib
import math
from pathlib import Path
from unittest import mock

import torch

import train_unconditional
from ddpm_hf.training.checkpointing import read_manifest
from tests.support.runs import Run

SIX_STEPS = {"num_epochs": 3, "checkpointing_steps": 1, "use_ema": True}


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


# Data that fails half-way

FILES = {"num_epochs": 3, "use_ema": True, "cache_dataset": "never"}  # checkpoints at the end alone


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
