"""Checkpoints that are complete or absent: each is written to a scratch folder and renamed; then old ones go."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accelerate.utils.other import load
from safetensors.torch import load_file, save_file

from .config import UsageError

MANIFEST = "manifest.json"
SETTINGS = "training_config.json"  # in the folder of the checkpoints
SCRAP = ".partial"  # how the name of a file or folder ends until it is complete


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file completely, flushed to the disk, or not at all."""
    data = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SCRAP)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def checkpoint_step(path: Path) -> int:
    """N of `checkpoint-N`, or -1 for another name.

    >>> checkpoint_step(Path("run/checkpoint-500")), checkpoint_step(Path("run/checkpoint-500.partial"))
    (500, -1)
    """
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path, complete: bool = False) -> list[Path]:
    """The checkpoints in a folder, oldest first: all by name, or those alone that a run of ours has completed."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted((path for path in found if not complete or is_sealed(path)), key=checkpoint_step)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if not path.is_dir():
        with open(path, "r+b") as file:  # Windows flushes only what may be written to
            os.fsync(file.fileno())
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows: a folder cannot be opened, and its file system journals renames by itself
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """`flush` a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def is_sealed(folder: Path) -> bool:
    """Whether a folder has the manifest that completes a checkpoint of ours; its files are not looked at."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(manifest["files"], dict) and type(manifest["step"]) is int
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def strangers(checkpoint: Path) -> list[str]:
    """The files within a complete checkpoint that are not listed in its manifest, as posix paths."""
    if checkpoint.is_symlink() or not is_sealed(checkpoint):
        return []
    known = {*json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"], MANIFEST}
    found = sorted(path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
    return [name for path in found if (name := path.relative_to(checkpoint).as_posix()) not in known]


def discard(folder: Path) -> None:
    """Remove a folder of ours so that a partly deleted checkpoint is never loaded, wherever that is cut off.

    Of a link, the link alone; and of a checkpoint, what its manifest lists.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    if kept := strangers(folder):
        (folder / MANIFEST).unlink()
        for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
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


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after a step, which a run that goes on from there is about to write anew; what they were.

    Else `latest` would return to them, with metrics that were meanwhile cut off at the step.
    """
    later = [path for path in reversed(list_checkpoints(output_dir, complete=True)) if checkpoint_step(path) > step]
    for path in later:
        aside = path.with_name(f"{path.name}.superseded")
        if aside.exists():
            discard(aside)
        os.replace(path, aside)
    return later


def seal(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Make a written folder the checkpoint: manifest with checksums and the run's state, flush, rename.

    Where there is one of the same step already, that one stays: replacing it would leave a moment with neither.
    """
    if final.exists():
        discard(partial)
        return
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {**state, "files": {path.relative_to(partial).as_posix(): _digest(path) for path in files}}
    write_whole(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    flush_tree(partial)
    os.replace(partial, final)
    flush(final.parent)


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


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The state that `seal` wrote.

    Raises:
        UsageError: no manifest, or a file that is missing or differs from its checksum.
    """
    foreign = made_by_diffusers(checkpoint)
    if foreign:
        raise UsageError(foreign)
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{checkpoint} is not a complete checkpoint: its {MANIFEST} cannot be read") from error
    for name, digest in files:
        path = checkpoint / name.replace("\\", "/")  # as Windows wrote it
        if not path.resolve().is_relative_to(checkpoint.resolve()):
            raise UsageError(f"{checkpoint}: the manifest names {name!r}, outside the checkpoint")
        if not path.is_file() or _digest(path) != digest:
            raise UsageError(f"{checkpoint} is not a complete checkpoint: {name} is missing or damaged")
    if not (type(manifest.get("step", 0)) is int and isinstance(manifest.get("settings", {}), dict)):
        raise UsageError(f"{checkpoint} is not a complete checkpoint: its {MANIFEST} says no step, or no settings")
    return manifest


def check_random_states(checkpoint: Path, rank: int) -> None:
    """Raise what torch raises for random states that are not data alone; Accelerate passes over them in silence."""
    path = checkpoint / f"random_states_{rank}.pkl"
    if path.is_file():
        load(path)  # with weights_only=True


def find_checkpoint(output_dir: Path, wanted: str, warn) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, and its state; None where `latest` finds none.

    Args:
        wanted: `latest`, `checkpoint-N` or a path.
        warn: called with a line for each broken checkpoint that `latest` passed over.

    Raises:
        UsageError: a named checkpoint that does not exist or is broken; or checkpoints, but no whole one.
    """
    if wanted == "latest":
        found = list_checkpoints(output_dir)
        for path in reversed(found):
            try:
                return path, read_manifest(path)
            except UsageError as error:
                if made_by_diffusers(path) is None:
                    warn(f"passing over {error}")
        foreign = next(filter(None, map(made_by_diffusers, reversed(found))), None)
        if found:
            raise UsageError(
                foreign or f"no complete checkpoint in {output_dir}; train anew with --overwrite_output_dir"
            )
        return None
    for path in (output_dir / wanted, Path(wanted)):
        if path.is_dir():
            return path, read_manifest(path)
    there = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
    raise UsageError(f"--resume_from_checkpoint {wanted}: no such checkpoint in {output_dir} (there: {there})")


def settings_of(output_dir: Path, wanted: str) -> dict[str, Any]:
    """The settings that the run of a checkpoint was last started with; nothing where there is no such checkpoint.

    They lie in the checkpoint's parent folder, and within it for one that was copied without its run. `wanted` is as
    for `find_checkpoint`, which reads all files to compare their checksums; this does not.
    """
    named = [path for path in (output_dir / wanted, Path(wanted)) if os.path.isfile(path / MANIFEST)]
    for path in reversed(list_checkpoints(output_dir)) if wanted == "latest" else named:
        for file, read in ((path.parent / SETTINGS, dict), (path / MANIFEST, lambda found: dict(found["settings"]))):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return read(json.loads(file.read_text(encoding="utf-8")))
    return {}


def rotate(output_dir: Path, limit: int | None) -> list[Path]:
    """Remove all but the newest `limit` checkpoints, and those set aside that the run has written anew; which ones.

    Only complete checkpoints of ours are counted and removed.
    """
    kept = list_checkpoints(output_dir, complete=True)
    for path in output_dir.glob("checkpoint-*.superseded"):
        step = checkpoint_step(path.with_suffix(""))
        if kept and 0 <= step <= checkpoint_step(kept[-1]) and is_sealed(path):
            discard(path)
    removed = kept[:-limit] if limit is not None else []
    for path in removed:
        discard(path)
    return removed


def save_tensors(directory: Path, states: dict[str, Any]) -> None:
    """Write each object's `state_dict()` of tensors as `name.safetensors`."""
    for name, item in states.items():
        save_file(
            {key: value.contiguous() for key, value in item.state_dict().items()}, directory / f"{name}.safetensors"
        )


def load_tensors(directory: Path, states: dict[str, Any]) -> None:
    """Restore what `save_tensors` wrote."""
    for name, item in states.items():
        path = directory / f"{name}.safetensors"
        if not path.is_file():
            raise UsageError(f"{directory} is of another run: it has no {path.name}; resume with the flags it had")
        item.load_state_dict(load_file(path))


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the lines after a step: what a run logged between its last checkpoint and its end."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off in the middle
        kept.append(line + "\n")
    write_whole(path, "".join(kept))
