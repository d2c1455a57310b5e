"""Replacing an earlier run.

It is first set aside, in a folder within the output folder; it is deleted once the new run has a checkpoint, and
brought back if the new run ends before that. Every step of this can be interrupted: `settle` completes it.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.checkpoints import checkpoint_step, discard, is_complete, unlisted_files
from ..common.errors import UsageError
from ..common.files import flush, write_atomically
from ..common.layout import AUTOENCODER, EARLIER, KEPT_IN_PLACE, LAYOUT, Entry, json_or_none, matching
from ..common.ownership import (
    MANIFEST,
    RUN,
    is_local_name,
    is_within,
    listed,
    load_manifest,
    manifest_lock,
    release_files,
    remove,
    remove_empty_folders,
    remove_empty_parents,
    run_files,
    save_manifest,
)


def in_the_way(folder: Path, entries: Sequence[Entry], ours: Iterable[str]) -> list[str]:
    """What exists under the names that a run is to write, and is not of `ours`."""
    ours = set(ours)
    names = [name for one in entries for name in matching(folder, one.pattern) if name not in ours]
    if os.path.lexists(folder / EARLIER) and _record(folder) is None:
        names.append(EARLIER)
    parents = {parent.as_posix() for one in entries for parent in PurePosixPath(one.pattern).parents}
    return [*names, *sorted(name for name in parents if os.path.isfile(folder / name))]


def cannot_be_moved(folder: Path, entries: Sequence[Entry], ours: Iterable[str]) -> list[str]:
    """What of a run lies behind a link that leaves the folder, and foreign files within its checkpoints."""
    names = {name for one in entries for name in matching(folder, one.pattern)}.intersection(ours)
    outside = [name for name in sorted(names) if not is_within(folder, name)]
    checkpoints = (name for name in sorted(names) if name.endswith("/"))
    return outside + [f"{name}{stranger}" for name in checkpoints for stranger in unlisted_files(folder / name)]


def this_process() -> dict[str, Any]:
    """What identifies this process: host, id, and start in seconds since 1970."""
    import psutil

    return {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _is_same(process: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two descriptions are of one process; clocks are set meanwhile, ids are not reused within a minute."""
    try:
        near = abs(process["started"] - other["started"]) < 60
    except (KeyError, TypeError):
        return False
    return near and all(process.get(key) == other[key] for key in ("host", "pid"))


def _is_running(process: dict[str, Any]) -> bool:
    """Whether a process of this machine still runs; one of another machine counts as running."""
    import psutil

    if process.get("host") != platform.node():
        return True
    try:
        running = psutil.Process(process["pid"])
        dead = running.status() == psutil.STATUS_ZOMBIE
        return not dead and _is_same(process, {**process, "started": running.create_time()})
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Move an earlier run's files into a folder of their own, from which `settle` brings them back or deletes them."""
    aside = folder / EARLIER
    aside.mkdir()
    with manifest_lock:
        manifest = load_manifest(folder)
        record = {"by": this_process(), "manifest": manifest, "names": sorted(names)}
        write_atomically(aside / MANIFEST, json.dumps(record, indent=1) + "\n")
        for name in names:
            if name not in KEPT_IN_PLACE and is_within(folder, name):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, aside / name)
                remove_empty_parents(folder, name)
        flush(aside)
        kept = {name: None for name in names if name in KEPT_IN_PLACE}
        # from here on the folder's manifest is the new run's
        save_manifest(folder, {"replaces": EARLIER, "files": {**manifest.get("files", {}), RUN: kept}})


def _record(folder: Path) -> dict[str, Any] | None:
    """What `set_aside` noted; None where no run waits there."""
    record = json_or_none(folder / EARLIER / MANIFEST)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), dict) for key in ("by", "manifest")):
        return None
    names = record.get("names")
    return record if isinstance(names, list) and all(isinstance(n, str) and is_local_name(n) for n in names) else None


def waiting(folder: str | Path) -> list[str]:
    """The names of the files of the run that was set aside in a folder."""
    record = _record(Path(folder))
    return [] if record is None else record["names"]


def replaces(folder: str | Path) -> bool:
    """Whether this process has set an earlier run aside in the folder, and it waits there."""
    record = _record(Path(folder))
    return record is not None and _is_same(record["by"], this_process())


def let_go(folder: str | Path) -> None:
    """Delete the run that was set aside, wherever this is cut off."""
    folder = Path(folder)
    discard(folder / EARLIER)
    with manifest_lock:
        save_manifest(folder, {key: value for key, value in load_manifest(folder).items() if key != "replaces"})


def bring_back(folder: str | Path) -> None:
    """Put the run that was set aside back; the files of the run that was to replace it go."""
    folder = Path(folder)
    aside, record = folder / EARLIER, _record(folder)
    if record is None:
        return
    for name in run_files(folder) if load_manifest(folder).get("replaces") else ():
        if name not in record["names"]:
            remove(folder, name)
    for name in record["names"]:
        if os.path.lexists(aside / name):
            remove(folder, name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / name, folder / name)
            remove_empty_parents(aside, name)
    flush(folder)
    with manifest_lock:
        save_manifest(folder, {key: value for key, value in record["manifest"].items() if key != "replaces"})
    (aside / MANIFEST).unlink()
    remove_empty_folders(aside)


def comes_back(folder: str | Path) -> bool:
    """Whether the run that was set aside is to come back: the one that replaces it has no complete checkpoint."""
    folder = Path(folder)
    if _record(folder) is None:
        return False
    steps = [part / name for part in (folder, folder / AUTOENCODER) for name in listed(part)]
    has_checkpoint = any(checkpoint_step(one) >= 0 and is_complete(one) for one in steps)
    return not (load_manifest(folder).get("replaces") and has_checkpoint)


def end_replacing(folder: str | Path) -> None:
    """Let the earlier run go if the new one has a complete checkpoint, else bring it back."""
    bring_back(folder) if comes_back(folder) else let_go(folder)


def settle(folder: str | Path, *, training: bool = False) -> None:
    """Complete what a program that was killed left half done: an earlier run goes, or comes back.

    Args:
        training: whether the caller is to train in this folder.

    Raises:
        UsageError: another process trains in the folder.
    """
    folder, record = Path(folder), _record(Path(folder))
    if record is None:
        if (folder / EARLIER).is_dir():  # nothing had been moved yet, or all has been moved back
            for path in (folder / EARLIER).iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink()
            remove_empty_folders(folder / EARLIER)
        return
    by = record["by"]
    elsewhere = by.get("host") != platform.node()
    if _is_same(by, this_process()) or not _is_running(by) or (training and elsewhere):
        end_replacing(folder)
    elif training:
        raise UsageError(f"{folder}: process {by['pid']} trains there; stop it, or name another --output_dir")


def forget_removed_checkpoints(folder: Path) -> None:
    """Take checkpoints off the manifest whose removal was cut off before that."""
    names = [name[:-1] for name in listed(folder) if checkpoint_step(folder / name) >= 0]
    there = {name for name in names for kind in ("", ".superseded") if (folder / f"{name}{kind}").is_dir()}
    release_files(folder, [f"{name}/" for name in names if name not in there])


# How the names of files and folders look while they are written
_UNFINISHED = re.compile(r"\.(saving-|writing-|publishing-|.+\.)[a-z0-9_]{8}\.partial")


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writes left in a run's folder; no other process may be writing there."""
    folders = {PurePosixPath(entry.pattern).parent.as_posix() for entry in LAYOUT}
    names = [
        path.relative_to(folder).as_posix()
        for pattern in (*folders, "cache/*")
        for path in folder.glob(f"{pattern}/.*.partial")
        if _UNFINISHED.fullmatch(path.name)
    ]
    names += [name for name in run_files(folder) if re.fullmatch(r"checkpoint-\d+(\.superseded)?\.partial/", name)]
    if os.path.isdir(folder / f"{EARLIER}.partial"):
        names.append(f"{EARLIER}.partial")
    for name in names:
        path = folder / name
        if is_within(folder, name) and not path.is_symlink():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
