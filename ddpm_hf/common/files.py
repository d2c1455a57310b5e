"""Files that are written whole or not at all, and flushed to the disk."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend it, or remove it") from error


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


def expand_home(word: str) -> str:
    """A word of a command line with `~` at the start of its value made the home folder, also after `--flag=`.

    Shells do so for `--flag ~/data` alone, and config files have no shell.

    >>> expand_home("--flag=~/data") == "--flag=" + os.path.expanduser("~/data"), expand_home("--flag")
    (True, '--flag')
    """
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(value)
