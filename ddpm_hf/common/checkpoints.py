"""The checkpoints in a run's folder: their names, whether they are complete, their removal, what they record."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SETTINGS = "training_config.json"  # in the folder of the checkpoints


def checkpoint_step(path: Path) -> int:
    """N of `checkpoint-N`, or -1 for another name.

    >>> checkpoint_step(Path("run/checkpoint-500")), checkpoint_step(Path("run/checkpoint-500.partial"))
    (500, -1)
    """
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder by their names, oldest first, complete or not."""
    paths = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted(paths, key=checkpoint_step)


def is_complete(folder: Path) -> bool:
    """Whether a folder has the manifest that completes a checkpoint; its files are not checked."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(manifest["files"], dict) and type(manifest["step"]) is int
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def unlisted_files(checkpoint: Path) -> list[str]:
    """The files within a complete checkpoint that are not listed in its manifest, as posix paths."""
    if checkpoint.is_symlink() or not is_complete(checkpoint):
        return []
    known = {*json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"], MANIFEST}
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
    return [name for path in paths if (name := path.relative_to(checkpoint).as_posix()) not in known]


def discard(folder: Path) -> None:
    """Remove a checkpoint or scratch folder such that a partly deleted checkpoint is never loaded, even after a kill.

    Of a link, only the link is removed; of a checkpoint with other files, only the files that its manifest lists.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    if kept := unlisted_files(folder):
        (folder / MANIFEST).unlink()
        for path in sorted(folder.rglob("*"), reverse=True):  # the content of a folder before the folder
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(folder).as_posix() not in kept:
                path.unlink()
        return
    doomed = folder if folder.name.endswith(".partial") else folder.with_name(f"{folder.name}.partial")
    if doomed != folder:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
    shutil.rmtree(doomed)


def recorded_settings(output_dir: Path, requested: str) -> dict[str, Any]:
    """The settings that the run of a checkpoint was last started with; empty if there is no such checkpoint.

    They are in the checkpoint's parent folder, and in the manifest of one that was copied without its run. `requested`
    is as for `find_checkpoint`, which also compares checksums.
    """
    named = [path for path in (output_dir / requested, Path(requested)) if os.path.isfile(path / MANIFEST)]
    for path in reversed(list_checkpoints(output_dir)) if requested == "latest" else named:
        for file, read in (
            (path.parent / SETTINGS, dict),
            (path / MANIFEST, lambda manifest: dict(manifest["settings"])),
        ):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return read(json.loads(file.read_text(encoding="utf-8")))
    return {}


def made_by_diffusers(checkpoint: Path) -> str | None:
    """What to do with a checkpoint of Diffusers' training scripts, whose optimizer is not ours; None for others."""
    ours = (checkpoint / MANIFEST).exists() or (checkpoint.parent / SETTINGS).exists()
    if ours or not (checkpoint / "unet" / "config.json").is_file():
        return None
    line = (
        f"{checkpoint} is a checkpoint of Diffusers' script, which cannot be resumed here; start from its weights with"
    )
    try:
        config = json.loads((checkpoint / "unet" / "config.json").read_text(encoding="utf-8"))
        by_text = config.get("_class_name") == "UNet2DConditionModel"
    except (ValueError, AttributeError, RecursionError):
        return None
    if by_text:
        return (
            f"{line} StableDiffusionPipeline.from_pretrained(BASE, unet=UNet2DConditionModel.from_pretrained("
            f"{str(checkpoint / 'unet')!r})).save_pretrained(START) and --pretrained_model_name_or_path START"
        )
    return f"{line} --pretrained_model_name_or_path {checkpoint} and another --output_dir"
