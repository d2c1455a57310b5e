"""The manifest of a folder: each file is listed before it is written, and no other file is replaced or removed."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .checkpoints import discard, is_complete
from .errors import UsageError
from .files import write_atomically
from .layout import (
    AUTOENCODER,
    CHECKPOINT,
    COMPONENTS,
    MODEL,
    TIMINGS,
    TRAINING,
    TRAINING_CONFIG,
    is_model_config,
    json_or_none,
    layout,
    matching,
)

MANIFEST = "ddpm_hf_files.json"
ABOUT = "Files that ddpm_hf wrote here. It replaces and removes no others."
RUN = "run"  # the manifest's section for a model and its training; other commands have their own

manifest_lock = threading.Lock()  # background uploads write too


# The manifest


def load_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, validated; empty if there is none.

    Raises:
        UsageError: it is malformed, or lists a path outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = json_or_none(path)
    parts = manifest.get("files") if isinstance(manifest, dict) else None
    names = None
    if isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values()):
        names = [name for part in parts.values() for name in part]
    if names is None or any(not is_local_name(name) for name in names):
        raise UsageError(f"{path} is malformed; remove it, or name another folder")
    return manifest


def is_local_name(name: str) -> bool:
    """Whether a path from a manifest stays within its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set("\\:\0") & set(name)


def save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a folder's manifest; remove it if it lists nothing."""
    parts = {part: dict(sorted(files.items())) for part, files in manifest.get("files", {}).items() if files}
    if parts or manifest.get("replaces"):
        manifest = {"about": ABOUT, **manifest, "files": parts}
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    else:
        (folder / MANIFEST).unlink(missing_ok=True)


def listed(folder: str | Path, part: str = RUN) -> dict[str, str | None]:
    """The files in a section of a folder's manifest, each with the digest of its content if known.

    Raises:
        UsageError: the manifest is malformed.
    """
    return dict(load_manifest(Path(folder)).get("files", {}).get(part, {}))


def claim_files(folder: str | Path, names: Iterable[str] | Mapping[str, str | None], part: str = RUN) -> None:
    """List files in the folder's manifest before they are written; their digests may be added later."""
    _update(
        Path(folder), part, lambda files: files.update(names if isinstance(names, Mapping) else dict.fromkeys(names))
    )


def release_files(folder: str | Path, names: Iterable[str], part: str = RUN) -> None:
    """Take removed files off the manifest."""
    gone = set(names)
    _update(Path(folder), part, lambda files: [files.pop(name, None) for name in gone])


def _update(folder: Path, part: str, change: Callable[[dict], Any]) -> None:
    with manifest_lock:
        manifest = load_manifest(folder)
        parts = manifest.setdefault("files", {})
        before, files = parts.get(part, {}), dict(parts.get(part, {}))
        change(files)
        if files != before:
            parts[part] = files
            save_manifest(folder, manifest)


# The files in a folder


def run_files(folder: Path) -> list[str]:
    """The existing files of a run in a folder, including those of its autoencoder's training.

    They are listed in the manifest or, for a run of a version without manifests, recognised by their content.
    """
    return [name for name in _names_of_run(folder) if os.path.lexists(folder / name)]


def _names_of_run(folder: Path) -> list[str]:
    names = _listed_or_recognised(folder)
    nested = folder / AUTOENCODER
    if nested.is_dir() and not nested.is_symlink():
        names += [f"{AUTOENCODER}/{name}" for name in _listed_or_recognised(nested)]
        if (nested / MANIFEST).is_file():
            names.append(f"{AUTOENCODER}/{MANIFEST}")
    return names


def has_manifest(folder: Path) -> bool:
    """Whether a folder's manifest lists files of a run."""
    return bool(listed(folder))


def _listed_or_recognised(folder: Path) -> list[str]:
    known = listed(folder)
    if not known:
        return recognise(folder)
    copied = {n for one in TRAINING[:3] for n in matching(folder, one.pattern) if is_complete(folder / n)}
    names = {**known, **dict.fromkeys(sorted(copied))}
    kinds = (".partial/", ".superseded/", ".superseded.partial/")  # of an unfinished or superseded checkpoint
    return list(dict.fromkeys([*names, *(name[:-1] + kind for name in names if name.endswith("/") for kind in kinds)]))


def recognise(folder: Path) -> list[str]:
    """The files of a run of a version without manifests; empty if nothing proves that there was one."""
    proofs = (CHECKPOINT, TRAINING_CONFIG, TIMINGS)
    if not any(one.recognised(folder / name) for one in proofs for name in matching(folder, one.pattern)):
        return []
    index = json_or_none(folder / "model_index.json")
    components = [name for name in COMPONENTS if isinstance(index, dict) and name in index]
    entries = layout(*components) + (MODEL if is_model_config(folder / "config.json") else ())
    return [n for one in entries for n in matching(folder, one.pattern) if one.recognised(folder / n)]


def foreign(folder: str | Path, names: Iterable[str]) -> list[str]:
    """Those of the names that exist in a folder and are not files of a run."""
    existing = [name for name in names if os.path.lexists(Path(folder) / name)]
    ours = set(_names_of_run(Path(folder))) if existing else set()
    return [name for name in existing if name not in ours]


def may_write(folder: str | Path, name: str) -> bool:
    """Whether a name in a folder is free or is a file of a run."""
    return not foreign(folder, [name])


def is_within(folder: Path, name: str) -> bool:
    """Whether a path stays inside the folder, with links resolved."""
    return (folder / name).parent.resolve().is_relative_to(folder.resolve())


def remove(folder: Path, name: str) -> None:
    """Remove a file or checkpoint, never through a link, and then empty folders."""
    path = folder / name
    if not os.path.lexists(path) or not is_within(folder, name):
        return
    if path.is_dir() and not path.is_symlink():
        discard(path)
    else:
        path.unlink()
    remove_empty_parents(folder, name)


def remove_empty_folders(folder: Path) -> None:
    """Remove a folder and its subfolders, if empty."""
    for path in (*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder):
        if not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def remove_empty_parents(folder: Path, name: str) -> None:
    """Remove the empty folders that a removed file leaves."""
    for parent in (folder / name).parents:
        if parent == folder or parent.is_symlink() or not parent.is_dir() or any(parent.iterdir()):
            return
        parent.rmdir()


# Files that a command replaces on each call, such as sampled images


def digest(data: bytes) -> str:
    """The SHA-256 of a file's content."""
    return hashlib.sha256(data).hexdigest()


def check_replaceable(folder: str | Path, part: str, patterns: Sequence[str], flag: str) -> None:
    """Raise UsageError for files that a command would replace but did not write, or that were edited since.

    Args:
        part: the command's section of the manifest.
        patterns: the files that it may write, as in `Entry`.
        flag: the flag that names the folder, for the message.
    """
    folder = Path(folder)
    ours = listed(folder, part)
    names = {name for pattern in patterns for name in matching(folder, pattern)} | set(ours)
    existing = [name for name in sorted(names) if os.path.lexists(folder / name)]
    foreign = [name for name in existing if name not in ours or _was_edited(folder / name, ours[name])]
    if foreign:
        raise UsageError(
            f"--{flag} {folder} holds files that would be replaced but were not written by this command, or"
            f" were edited ({some(foreign)}); move them, or name another folder"
        )


def _was_edited(path: Path, known: str | None) -> bool:
    return not path.is_file() or (known is not None and digest(path.read_bytes()) != known)


def replace_files(folder: str | Path, part: str, files: Mapping[str, Callable[[], bytes]]) -> None:
    """Write files atomically, and remove the command's earlier files that are not among them.

    Args:
        part: the command's section of the manifest.
        files: functions that return the content, by posix path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = [name for name in listed(folder, part) if name not in files]
    claim_files(folder, dict.fromkeys(files), part)
    for name in before:
        remove(folder, name)
    digests = {}
    for name, content in files.items():
        data = content()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, data)
        digests[name] = digest(data)
    release_files(folder, before, part)
    claim_files(folder, digests, part)


def some(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
