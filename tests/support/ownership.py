"""An output folder with files of a user's, and runs into it."""

import os
from pathlib import Path
from unittest import mock

from ddpm_hf.training.complete_checkpoints import seal
from tests.support.runs import BASE

QUICK = {**BASE, "max_train_steps": 2, "eval_batch_size": 2, "save_images_epochs": 100}


def put(folder: Path, *names: str, text: str = "mine") -> None:
    """Write a user's files; a name that ends with a slash is a folder."""
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


OVER = {"overwrite_output_dir": True}


# Checkpoints


def sealed(folder: Path, step: int) -> Path:
    """A complete checkpoint."""
    partial = folder / f"checkpoint-{step}.partial"
    partial.mkdir(parents=True)
    (partial / "weights.bin").write_text("w")
    seal(partial, folder / f"checkpoint-{step}", {"step": step})
    return folder / f"checkpoint-{step}"


# Replacing a run, cut off at any moment


class Cut(BaseException):
    """The process was killed."""


def cut_off(action, number: int) -> bool:
    """Whether `action` ended before its `number`-th operation on files, at which the process would be killed."""
    seen = [0]

    def counting(call):
        def counted(*args, **more):
            seen[0] += 1
            if seen[0] == number:
                raise Cut
            return call(*args, **more)

        return counted

    with (
        mock.patch.object(os, "replace", counting(os.replace)),
        mock.patch.object(os, "unlink", counting(os.unlink)),
        mock.patch.object(os, "rmdir", counting(os.rmdir)),
        mock.patch.object(os, "mkdir", counting(os.mkdir)),
    ):
        try:
            action()
        except Cut:
            return False
    return True
