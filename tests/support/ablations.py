"""Ablations whose commands run in this process, on tiny data and networks."""

from pathlib import Path

import pytest
import yaml

import train_unconditional
from ddpm_hf.ablation.running import Launcher, with_output
from ddpm_hf.ablation.tasks import LOG, Task
from tests.support.evaluation import register
from tests.support.pictures import TINY_UNET, random_pixels, write_images
from tests.support.runs import run_script

PLAN = {
    "title": "Tiny",
    "flags": {
        "resolution": 8, "train_batch_size": 4, "max_train_steps": 3, "checkpointing_steps": 2, "ddpm_num_steps": 20,
        "ddpm_beta_schedule": "cosine", "lr_warmup_steps": 0, "logging_steps": 1, "cpu_threads": 1,
        "model_config_name_or_path": {name: value for name, value in TINY_UNET.items() if name != "_class_name"},
    },
    "grid": {"loss_type": ["l1", "l2"]},
    "evaluate": {
        "metrics": ["fid", "colour"], "features": ["quarters", "fourths"], "num_samples": 5, "sampler": "ddim",
        "steps": 2, "batch_size": 3,
    },
}  # fmt: skip


class Ended:
    """A process that has ended."""

    def __init__(self, code: int):
        self.code = code

    def poll(self) -> int:
        return self.code

    wait = poll

    def terminate(self) -> None:
        """It has."""


class InThisProcess(Launcher):
    """Starts commands by calling them; `before` may raise, as a kill would at that moment."""

    def __init__(self, run, before=lambda task: None, after=lambda task: None):
        self.run, self.before, self.after, self.started = run, before, after, []

    def rehearse(self, task: Task, folder: Path) -> str:
        done = run_script([*with_output(task, folder).words[1:], "--dry_run"], folder, train_unconditional.main)
        assert done.code == 0, done.err
        return done.out

    def __call__(self, task: Task, slot: int) -> Ended:
        self.before(task)
        self.started.append(task.title)
        task.folder.mkdir(parents=True, exist_ok=True)
        command, *rest = task.words
        if command == "train":
            done = run_script(rest, task.folder, train_unconditional.main)
            code, said = done.code, done.out + done.err
        else:
            code, out, err = self.run(*task.words)
            said = out + err
        (task.folder / LOG).write_text(said)
        self.after(task)
        return Ended(code)


def write_plan(path: Path, text: dict | str) -> Path:
    """A plan's file."""
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False, allow_unicode=True))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with images of two splits, in which the commands run; networks named quarters and fourths."""
    for seed, split in enumerate(("train", "test")):
        write_images(tmp_path / "photos" / split, random_pixels(8, 8, 8, seed=seed))
    register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path
