"""Runs of train_text2image.py that the tests of text to image share: how they start, and what they leave."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_text2image
from tests.support.fixtures_text import (
    run_text_script,
)
from tests.support.runs import fill, words

SCRIPT = Path(train_text2image.__file__)


DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


SMALL = {
    "train_data_dir": "{shop}/pictures", "resolution": 16, "seed": 3, "train_batch_size": 4, "eval_batch_size": 2,
    "max_train_steps": 6, "learning_rate": 1e-3, "lr_warmup_steps": 2, "num_inference_steps": 2, "cpu_threads": 1,
    "logger": "none", "logging_steps": 1, "validation_prompts": "a red square",
}  # fmt: skip


SCRATCH = {
    **SMALL, "model_config_name_or_path": "{shop}/unet", "vae_widths": "8,16", "vae_train_steps": 4,
}  # fmt: skip


CHECKPOINT = {**SMALL, "pretrained_model_name_or_path": "{shop}/stable"}


START = {"scratch": SCRATCH, "checkpoint": CHECKPOINT}


def command(start, shop, output_dir, **flags):
    """The command line of a small run, from scratch or from a checkpoint."""
    return words({**fill({**START[start], **flags}, shop), "output_dir": output_dir})


def train(start, shop, output_dir, **flags):
    """Run the script to its end."""
    run = run_text_script(command(start, shop, output_dir, **flags), output_dir)
    assert run.code == 0, run.err
    return run


def weights(folder, name="unet"):
    """The tensors of a saved model, Diffusers' or transformers'."""
    (path,) = (folder / name).glob("*.safetensors")
    return load_file(path)


def same(ours, theirs):
    """Whether two dicts of tensors are equal to the bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def last_checkpoint(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def optimizer_state(checkpoint):
    """Adam's moments, as one flat dict of tensors."""
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    return {f"{index}.{name}": value for index, one in state.items() for name, value in one.items()}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in records(folder)]


def read(path):
    return json.loads(path.read_text())


def assert_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **tolerance, msg=f"{name}: {{}}".format)


# Resuming


def assert_same_run(ours, theirs):
    """Two output folders that hold the same run, bit for bit."""
    for part in ("unet", "text_encoder", "vae"):
        assert same(weights(ours, part), weights(theirs, part)), part
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    checkpoints = last_checkpoint(ours), last_checkpoint(theirs)
    assert checkpoints[0].name == checkpoints[1].name
    tensors = [sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors")) for one in checkpoints]
    assert tensors[0] == tensors[1]
    for name in tensors[0]:
        assert same(load_file(checkpoints[0] / name), load_file(checkpoints[1] / name)), name
    assert same(*map(optimizer_state, checkpoints))


EMA = {"use_ema": True, "ema_max_decay": 0.8}
