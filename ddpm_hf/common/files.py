"""Atomic file writes, flushed to the disk."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it does not exist.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fix it, or remove it") from error


PARTIAL_SUFFIX = ".partial"  # the suffix of an unfinished file or folder


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file and flush it to the disk, completely or not at all."""
    data = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX)
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


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if not path.is_dir():
        with open(path, "r+b") as file:  # Windows flushes only writable files
            os.fsync(file.fileno())
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows: folders cannot be opened, and NTFS journals renames
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """`flush` a folder and its content."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the lines after a step, which a run logged between its last checkpoint and its end."""
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
    write_atomically(path, "".join(kept))


def expand_home(word: str) -> str:
    """Expand `~` at the start of an argument's value, also after `--flag=`.

    Shells expand only `--flag ~/data`, and config files are read by no shell.

    >>> expand_home("--flag=~/data") == "--flag=" + os.path.expanduser("~/data"), expand_home("--flag")
    (True, '--flag')
    """
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(value)
