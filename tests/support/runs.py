"""Runs of the training scripts in this process, what they leave behind, and whether two of them are the same."""

import contextlib
import dataclasses
import io
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file

import train_unconditional
from ddpm_hf.training.checkpointing import read_manifest
from ddpm_hf.training.flags import Flags, TrainingFlags
from ddpm_hf.training.parsing import Program, parse_flags
from ddpm_hf.training.run import Run as TrainingRun
from tests.support.pictures import quiet

# A run of four steps; {shop} holds datasets and models
BASE = {
    "train_data_dir": "{shop}/photos", "model_config_name_or_path": "{shop}/tiny", "resolution": 8,
    "train_batch_size": 4, "num_epochs": 2, "ddpm_num_inference_steps": 2, "eval_batch_size": 1, "cpu_threads": 1,
    "seed": 0, "logger": "none", "lr_warmup_steps": 0, "logging_steps": 1,
}  # fmt: skip  # fmt: skip


# A run of ten steps on gray images of 8×8; {shop} holds images and a UNet
GRAY = {
    "train_data_dir": "{shop}/images", "model_config_name_or_path": "{shop}/unet", "resolution": 8, "channels": 1,
    "seed": 3, "train_batch_size": 4, "eval_batch_size": 2, "max_train_steps": 10, "learning_rate": 1e-3,
    "lr_warmup_steps": 3, "ddpm_num_steps": 20, "ddpm_num_inference_steps": 2, "ddpm_beta_schedule": "cosine",
    "cpu_threads": 1, "logger": "none", "logging_steps": 3,
}  # fmt: skip


def fill(flags: dict, shop: Path) -> dict:
    """Flags with the place of datasets and models filled in."""
    return {name: value.format(shop=shop) if isinstance(value, str) else value for name, value in flags.items()}


class Run(NamedTuple):
    """What a run of the script left behind."""

    code: int  # 0 or the exit code
    out: str
    err: str
    folder: Path  # --output_dir

    def files(self) -> list[str]:
        """All files in the output folder, relative to it."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def json(self, name: str) -> dict:
        """A JSON file of the output folder."""
        return json.loads((self.folder / name).read_text())

    def error(self) -> str:
        """The one line that says what is wrong, at the beginning of a line of its own."""
        lines = [line for line in self.err.splitlines() if re.match(r"\S+: error: ", line)]
        assert len(lines) == 1, f"want one line of error, on a line of its own, in: {self.err!r}"
        return lines[0]


def words(flags: dict) -> list[str]:
    """Flags and values as a command line; True is a switch, None leaves a flag out, a list is several words."""
    chosen = {name: value for name, value in flags.items() if value is not None and value is not False}
    said = {
        name: value if isinstance(value, (list, tuple)) else [value] * (value is not True)
        for name, value in chosen.items()
    }
    return [word for name, values in said.items() for word in (f"--{name}", *map(str, values))]


def run_script(argv: list[str], folder: Path, main=None) -> Run:
    """`train_unconditional.main(argv)`, or another `main`, in this process; what it sets globally is put back."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    verbosity, threads = diffusers_logging.get_verbosity(), torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ),
        torch.random.fork_rng(),
        quiet(),
    ):
        try:
            (main or train_unconditional.main)(argv)
        except SystemExit as end:
            code = end.code or 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            diffusers_logging.set_verbosity(verbosity)
            torch.set_num_threads(threads)
    return Run(code, out.getvalue(), err.getvalue(), Path(folder))


def command(shop: Path, folder: Path, base: dict = BASE, **flags) -> list[str]:
    """The command line of a run, with flags on top of `base`."""
    return words(fill({**base, "output_dir": folder, **flags}, shop))


def attempt(shop: Path, folder: Path, base: dict = BASE, main=None, **flags) -> Run:
    """A run with flags on top of `base`, however it ends."""
    return run_script(command(shop, folder, base, **flags), folder, main)


def train(shop: Path, folder: Path, base: dict = BASE, main=None, **flags) -> Run:
    """A run with flags on top of `base`, which must succeed."""
    run = attempt(shop, folder, base, main, **flags)
    assert run.code == 0, run.out + run.err
    return run


def read(path: Path):
    """What a JSON file holds."""
    return json.loads(Path(path).read_text())


def records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The losses of metrics.jsonl."""
    return [record["loss"] for record in records(folder)]


def weights(folder: Path, name: str = "unet") -> dict[str, torch.Tensor]:
    """The tensors of a saved model, Diffusers' or transformers'."""
    (path,) = (folder / name).glob("*.safetensors")
    return load_file(path)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of the most steps."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def optimizer_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Adam's moments, as one flat dict of tensors."""
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    return {f"{index}.{name}": value for index, one in state.items() for name, value in one.items()}


def same(ours: dict, theirs: dict) -> bool:
    """Whether two dicts of tensors are equal to the bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_tensors(ours: dict, theirs: dict, **tolerance) -> None:
    """Two dicts of tensors are equal: to the bit, unless a tolerance is given."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], **{"rtol": 0, "atol": 0, **tolerance}, msg=f"{name}: {{}}".format
        )


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two output folders hold the same run to the bit: models, metrics, the last checkpoint and the last pictures."""
    last = last_checkpoint(ours).name
    assert last == last_checkpoint(theirs).name
    models = [
        {
            path.relative_to(one)
            for pattern in ("*", "[!c]*/*", f"{last}/**/*")
            for path in one.glob(f"{pattern}.safetensors")
        }
        for one in (ours, theirs)
    ]
    assert models[0] == models[1]
    for name in models[0]:
        assert_same_tensors(load_file(ours / name), load_file(theirs / name))
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    assert_same_tensors(optimizer_state(ours / last), optimizer_state(theirs / last))
    assert read_manifest(ours / last)["meter"] == read_manifest(theirs / last)["meter"]
    pictures = [sorted(one.glob("samples/*.png"))[-1:] for one in (ours, theirs)]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]


def parse(argv: list[str]) -> Flags:
    """The settings that a command line stands for."""
    return parse_flags(train_unconditional.PROGRAM, argv)


def changed(flags: Flags, **values: Any) -> Flags:
    """The same flags, with some of them changed."""
    names = [{field.name for field in dataclasses.fields(part)} for part in flags]
    parts = [
        dataclasses.replace(part, **{name: value for name, value in values.items() if name in known})
        for part, known in zip(flags, names)
    ]
    assert set(values) <= set.union(*names)
    return Flags(parts, flags.given, list(flags.absent))


def defaults(program: Program, **values: Any) -> Flags:
    """A program's flags as the dataclasses have them, with some of them changed."""
    return changed(Flags([kind() for kind in program.flags], absent=list(program.absent)), **values)


def training_run(accelerator: Any = None, seed: int = 0, **flags: Any) -> TrainingRun:
    """A run of a program that has no flags but those of the training."""
    training = TrainingFlags(**flags)
    return TrainingRun(training, Flags([training]), accelerator, seed=seed)
