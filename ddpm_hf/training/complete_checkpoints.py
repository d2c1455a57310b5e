"""What makes a checkpoint complete: a manifest, written last, that lists its files and their checksums."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..common.checkpoints import MANIFEST, discard, is_complete, list_checkpoints
from ..common.errors import UsageError
from ..common.files import flush, flush_tree, write_atomically


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return [path for path in list_checkpoints(output_dir) if is_complete(path)]


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


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


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
