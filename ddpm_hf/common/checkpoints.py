"""Complete checkpoints: folders whose manifest lists their files and checksums."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import flush, flush_tree, write_atomically

MANIFEST = "manifest.json"
SETTINGS = "training_config.json"  # in the folder of the checkpoints


def checkpoint_step(path: Path) -> int:
    """N of `checkpoint-N`, or -1 for another name.

    >>> checkpoint_step(Path("run/checkpoint-500")), checkpoint_step(Path("run/checkpoint-500.partial"))
    (500, -1)
    """
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path, complete: bool = False) -> list[Path]:
    """The checkpoints in a folder, oldest first: all by name, or only complete ones."""
    paths = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted((path for path in paths if not complete or is_complete(path)), key=checkpoint_step)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


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


def part_of_run(checkpoint: Path, what: str, *files: str) -> Path:
    """The folder of a component that a checkpoint was trained with, in the folder of its run.

    Args:
        what: the component, for the message.
        files: of the component, as paths in the folder of the run; the first that exists counts.

    Raises:
        UsageError: none of them exists.
    """
    run = checkpoint.resolve().parent
    for name in files:
        if (run / name).is_file():
            return (run / name).parent
    raise UsageError(
        f"{checkpoint}: it was trained with the {what} of its run, which is not in {run}; resume in the complete"
        " folder of the run"
    )


def seal(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Complete a checkpoint in a scratch folder: write the manifest with checksums and the run's state, flush, rename.

    An existing checkpoint of the same step stays: replacing it would leave a moment with neither.
    """
    if final.exists():
        discard(partial)
        return
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {**state, "files": {path.relative_to(partial).as_posix(): file_digest(path) for path in files}}
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    flush_tree(partial)
    os.replace(partial, final)
    flush(final.parent)


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
