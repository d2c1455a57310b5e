"""Checkpoints that are complete or absent: written beside, flushed, renamed; old ones go once the new one is safe."""

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


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file completely, flushed to the disk, or not at all."""
    data = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Make a written folder the checkpoint: manifest with checksums and the run's state, flush, rename."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {**state, "files": {str(path.relative_to(partial)): _digest(path) for path in files}}
    for path in files:
        _flush(path)
    write_whole(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(final.parent)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The state that `seal` wrote.

    Raises:
        UsageError: no manifest, or a file that is missing or differs from its checksum.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{checkpoint} is not a complete checkpoint: its {MANIFEST} cannot be read") from error
    for name, digest in files:
        path = checkpoint / name
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
                warn(f"passing over {error}")
        if found:
            raise UsageError(f"no complete checkpoint in {output_dir}; train anew with --overwrite_output_dir")
        return None
    for path in (output_dir / wanted, Path(wanted)):
        if path.is_dir():
            return path, read_manifest(path)
    there = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
    raise UsageError(f"--resume_from_checkpoint {wanted}: no such checkpoint in {output_dir} (there: {there})")


def rotate(output_dir: Path, limit: int | None) -> None:
    """Remove all but the newest `limit` checkpoints, and what interrupted saves left behind."""
    for leftover in output_dir.glob("checkpoint-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(path)


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
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off in the middle
        kept.append(line + "\n")
    write_whole(path, "".join(kept))
