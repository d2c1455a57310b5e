"""Which files in a folder are ours: a manifest lists each file before it is written, and no other file is removed.

`LAYOUT` is the one table of what a run writes into its output folder. A run that replaces an earlier one first sets it
aside, in a folder within the output folder; it is deleted once the new run has a checkpoint, and brought back if the
new run ends before that. Every step of this can be interrupted: `settle` completes it.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .checkpointing import SETTINGS, checkpoint_step, discard, flush, is_sealed, strangers, write_whole
from .config import UsageError

MANIFEST = "ddpm_hf_files.json"
EARLIER = "earlier-run"  # where a run that is being replaced waits
AUTOENCODER = "autoencoder"  # the folder of a run of its own, within that of the model that it is for
ABOUT = "Files that ddpm_hf wrote here. It replaces and removes no others."
RUN = "run"  # the manifest's part for a model and its training; other programs have parts of their own

_lock = threading.Lock()  # uploads in the background write too


# What a run writes


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _has(*keys: str) -> Callable[[Path], bool]:
    """A test whether a file is a JSON object with these keys."""

    def test(path: Path) -> bool:
        value = _read_json(path)
        return isinstance(value, dict) and set(keys) <= set(value)

    return test


def _logs(*keys: str) -> Callable[[Path], bool]:
    """A test whether the first line of a file is a JSON object with these keys."""

    def test(path: Path) -> bool:
        try:
            with open(path, encoding="utf-8") as file:
                line = json.loads(file.readline())
        except (OSError, ValueError):
            return False
        return isinstance(line, dict) and set(keys) <= set(line)

    return test


def _is_results(path: Path) -> bool:
    results = _read_json(path)
    return isinstance(results, list) and all(isinstance(one, dict) and "metric" in one for one in results)


def _is_card(path: Path) -> bool:
    try:
        return "<!-- ddpm_hf" in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _is_model(path: Path) -> bool:
    """Whether it is the config of a model that is trained by itself."""
    config = _read_json(path)
    return isinstance(config, dict) and config.get("_class_name") in ("NoisyClassifier", "AutoencoderKL")


def _is_file(path: Path) -> bool:
    return path.is_file()


class Entry(NamedTuple):
    """A kind of file in an output folder.

    Attributes:
        pattern: its path; `*` stands for any characters but a slash, `#` for digits; a folder ends with a slash.
        published: whether it is uploaded with the model.
        recognised: how a file is recognised as a run's where the run is older than the manifest.
    """

    pattern: str
    published: bool = False
    recognised: Callable[[Path], bool] = _is_file


CHECKPOINT = Entry("checkpoint-#/", recognised=is_sealed)
TRAINING_CONFIG = Entry(SETTINGS, recognised=_has("output_dir", "checkpointing_steps"))
STEPS = Entry("metrics.jsonl", published=True, recognised=_logs("step", "epoch"))
TIMINGS = Entry("timings.jsonl", recognised=_logs("step", "seconds"))
GRIDS = "samples/step-#.png"
TRAINING = (
    CHECKPOINT,
    Entry("checkpoint-#.superseded/", recognised=is_sealed),
    Entry("checkpoint-#.partial/", recognised=Path.is_dir),
    TRAINING_CONFIG,
    STEPS,
    TIMINGS,
    Entry(GRIDS),
    Entry("samples/chain-#.png"),
)
PIPELINE = (
    Entry("model_index.json", published=True, recognised=_has("_class_name", "scheduler")),
    Entry("pipeline_*ddpm_hf.py", published=True),
    *(
        Entry(f"{name}_ddpm_hf.py", published=True)
        for name in ("hub", "guidance", "sampling", "scheduling", "schedules", "operators")
    ),
    Entry("run.json", published=True, recognised=_has("sessions")),
    Entry("evaluation.json", published=True, recognised=_is_results),
    Entry("README.md", published=True, recognised=_is_card),
    Entry("assets/samples.png", published=True),
    Entry("assets/chain.png", published=True),
    Entry("assets/loss.png", published=True),
)
# Of a single model, and of each component of a pipeline
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index*.json")
MODEL = (Entry("config.json", recognised=_is_model), *map(Entry, WEIGHTS))
COMPONENTS = (
    "unet", "vae", "scheduler", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder",
)  # fmt: skip
COMPONENT_FILES = (
    "config.json", *WEIGHTS, "model*.safetensors", "model*.index*.json", "scheduler_config.json",
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
KEPT_IN_PLACE = ("README.md",)  # people write into it: its own sections are renewed, and the rest stays


def layout(*components: str, autoencoder: bool = False, model: bool = False) -> tuple[Entry, ...]:
    """What a training writes.

    Args:
        components: of the pipeline that it saves.
        autoencoder: whether it trains one first.
        model: whether it saves a single model instead of a pipeline.
    """
    entries = TRAINING + (MODEL if model else PIPELINE)
    entries += tuple(Entry(f"{name}/{file}") for name in components for file in COMPONENT_FILES)
    if autoencoder:
        nested = (one._replace(pattern=f"{AUTOENCODER}/{one.pattern}", published=False) for one in TRAINING + MODEL)
        entries += tuple(nested)
    return entries


LAYOUT = layout(*COMPONENTS, autoencoder=True) + MODEL


def matching(folder: Path, pattern: str) -> list[str]:
    """The names in a folder that an entry's pattern matches, as posix paths; a folder's ends with a slash."""
    bare = pattern.removesuffix("/")
    expression = re.escape(bare).replace(r"\*", "[^/]*").replace(r"\#", r"\d+").replace("#", r"\d+")
    found = folder.glob(bare.replace("#", "*")) if set(bare) & set("*#") else [folder / bare]
    names = [path.relative_to(folder).as_posix() for path in found if os.path.lexists(path)]
    return sorted(name + pattern[len(bare) :] for name in names if re.fullmatch(expression, name))


# The manifest


def _load(folder: Path) -> dict[str, Any]:
    """A folder's manifest, checked; empty where there is none.

    Raises:
        UsageError: it is malformed, or lists a path outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = _read_json(path)
    parts = manifest.get("files") if isinstance(manifest, dict) else None
    names = None
    if isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values()):
        names = [name for part in parts.values() for name in part]
    if names is None or any(not _is_local(name) for name in names):
        raise UsageError(f"{path} is malformed; remove it, or name another folder")
    return manifest


def _is_local(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set("\\:\0") & set(name)


def _save(folder: Path, manifest: dict[str, Any]) -> None:
    parts = {part: dict(sorted(files.items())) for part, files in manifest.get("files", {}).items() if files}
    if parts or manifest.get("replaces"):
        manifest = {"about": ABOUT, **manifest, "files": parts}
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    else:
        (folder / MANIFEST).unlink(missing_ok=True)


def listed(folder: str | Path, part: str = RUN) -> dict[str, str | None]:
    """The files that the manifest of a folder lists for a part, each with the digest of its content if that is known.

    Raises:
        UsageError: the manifest is malformed.
    """
    return dict(_load(Path(folder)).get("files", {}).get(part, {}))


def claim_files(folder: str | Path, names: Iterable[str] | Mapping[str, str | None], part: str = RUN) -> None:
    """List files in the folder's manifest, before they are written; their digests may follow."""
    _update(
        Path(folder), part, lambda files: files.update(names if isinstance(names, Mapping) else dict.fromkeys(names))
    )


def release_files(folder: str | Path, names: Iterable[str], part: str = RUN) -> None:
    """Take files off the manifest, after they have been removed."""
    gone = set(names)
    _update(Path(folder), part, lambda files: [files.pop(name, None) for name in gone])


def _update(folder: Path, part: str, change: Callable[[dict], Any]) -> None:
    with _lock:
        manifest = _load(folder)
        parts = manifest.setdefault("files", {})
        before, files = parts.get(part, {}), dict(parts.get(part, {}))
        change(files)
        if files != before:
            parts[part] = files
            _save(folder, manifest)


# What is in a folder


def run_files(folder: Path) -> list[str]:
    """The files of a run that exist in a folder, those of its autoencoder's training too.

    They are listed, or, for a run of a version without manifests, recognised.
    """
    names = _listed_or_recognised(folder)
    nested = folder / AUTOENCODER
    if nested.is_dir() and not nested.is_symlink():
        names += [f"{AUTOENCODER}/{name}" for name in _listed_or_recognised(nested)]
        if (nested / MANIFEST).is_file():
            names.append(f"{AUTOENCODER}/{MANIFEST}")
    return [name for name in names if os.path.lexists(folder / name)]


def has_manifest(folder: Path) -> bool:
    """Whether a folder's manifest lists files of a run."""
    return bool(listed(folder))


def _listed_or_recognised(folder: Path) -> list[str]:
    if not has_manifest(folder):
        return recognise(folder)
    copied = {n for one in TRAINING[:3] for n in matching(folder, one.pattern) if is_sealed(folder / n)}
    names = {**listed(folder), **dict.fromkeys(sorted(copied))}
    kinds = (".partial/", ".superseded/", ".superseded.partial/")  # of a checkpoint under way, or that went
    return list(dict.fromkeys([*names, *(name[:-1] + kind for name in names if name.endswith("/") for kind in kinds)]))


def recognise(folder: Path) -> list[str]:
    """The files of a run of a version without manifests; empty where nothing proves that there was one."""
    proofs = (CHECKPOINT, TRAINING_CONFIG, TIMINGS)
    if not any(one.recognised(folder / name) for one in proofs for name in matching(folder, one.pattern)):
        return []
    index = _read_json(folder / "model_index.json")
    components = [name for name in COMPONENTS if isinstance(index, dict) and name in index]
    entries = layout(*components) + (MODEL if _is_model(folder / "config.json") else ())
    return [n for one in entries for n in matching(folder, one.pattern) if one.recognised(folder / n)]


def may_write(folder: str | Path, name: str) -> bool:
    """Whether a name in a folder is free, or holds a file of a run's."""
    return not os.path.lexists(Path(folder) / name) or name in run_files(Path(folder))


def in_the_way(folder: Path, entries: Sequence[Entry], ours: Iterable[str]) -> list[str]:
    """What exists under the names that a run is to write, and is not of `ours`."""
    ours = set(ours)
    found = [name for one in entries for name in matching(folder, one.pattern) if name not in ours]
    if os.path.lexists(folder / EARLIER) and _record(folder) is None:
        found.append(EARLIER)
    parents = {parent.as_posix() for one in entries for parent in PurePosixPath(one.pattern).parents}
    return [*found, *sorted(name for name in parents if os.path.isfile(folder / name))]


def cannot_be_moved(folder: Path, entries: Sequence[Entry], ours: Iterable[str]) -> list[str]:
    """What of a run lies behind a link that leaves the folder, and foreign files within its checkpoints."""
    names = {name for one in entries for name in matching(folder, one.pattern)}.intersection(ours)
    found = [name for name in sorted(names) if not is_within(folder, name)]
    checkpoints = (name for name in sorted(names) if name.endswith("/"))
    return found + [f"{name}{stranger}" for name in checkpoints for stranger in strangers(folder / name)]


def is_within(folder: Path, name: str) -> bool:
    """Whether a file lies in the folder itself, and not behind a link to elsewhere."""
    return (folder / name).parent.resolve().is_relative_to(folder.resolve())


def remove(folder: Path, name: str) -> None:
    """Remove a file or checkpoint of ours, never through a link, and the folders that are empty then."""
    path = folder / name
    if not os.path.lexists(path) or not is_within(folder, name):
        return
    if path.is_dir() and not path.is_symlink():
        discard(path)
    else:
        path.unlink()
    remove_empty_parents(folder, name)


def remove_empty_folders(folder: Path) -> None:
    """Remove a folder and those within it, as far as they are empty."""
    for path in (*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder):
        if not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def remove_empty_parents(folder: Path, name: str) -> None:
    """Remove the folders of a file that was removed, as far as they are empty."""
    for parent in (folder / name).parents:
        if parent == folder or parent.is_symlink() or not parent.is_dir() or any(parent.iterdir()):
            return
        parent.rmdir()


# Files that a program writes anew each time, such as sampled images


def digest(data: bytes) -> str:
    """What tells a file's content from another."""
    return hashlib.sha256(data).hexdigest()


def check_replaceable(folder: str | Path, part: str, patterns: Sequence[str], flag: str) -> None:
    """Raise UsageError for files that a program would replace or mix its own with, and that it did not write.

    Args:
        part: the program's part of the manifest.
        patterns: what it may write, as in `Entry`.
        flag: the one that names the folder, for the message.
    """
    folder = Path(folder)
    ours = listed(folder, part)
    names = {name for pattern in patterns for name in matching(folder, pattern)} | set(ours)
    there = [name for name in sorted(names) if os.path.lexists(folder / name)]
    foreign = [name for name in there if name not in ours or _was_edited(folder / name, ours[name])]
    if foreign:
        raise UsageError(
            f"--{flag} {folder} holds files that would be replaced and that are not ours, or were edited since"
            f" ({some(foreign)}); move them, or name another folder"
        )


def _was_edited(path: Path, known: str | None) -> bool:
    return not path.is_file() or (known is not None and digest(path.read_bytes()) != known)


def replace_files(folder: str | Path, part: str, files: Mapping[str, Callable[[], bytes]]) -> None:
    """Write files, each whole, in the place of all that the program wrote into the folder before.

    Args:
        part: the program's part of the manifest.
        files: what makes the content of each, by its posix path.
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
        write_whole(folder / name, data)
        digests[name] = digest(data)
    release_files(folder, before, part)
    claim_files(folder, digests, part)


def some(names: Sequence[str]) -> str:
    """Some of many names, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


# Replacing an earlier run


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
    with _lock:
        manifest = _load(folder)
        record = {"by": this_process(), "manifest": manifest, "names": sorted(names)}
        write_whole(aside / MANIFEST, json.dumps(record, indent=1) + "\n")
        for name in names:
            if name not in KEPT_IN_PLACE and is_within(folder, name):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / name, aside / name)
                remove_empty_parents(folder, name)
        flush(aside)
        kept = {name: None for name in names if name in KEPT_IN_PLACE}
        # from here on the folder's manifest is the new run's
        _save(folder, {"replaces": EARLIER, "files": {**manifest.get("files", {}), RUN: kept}})


def _record(folder: Path) -> dict[str, Any] | None:
    """What `set_aside` noted; None where no run waits there."""
    record = _read_json(folder / EARLIER / MANIFEST)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), dict) for key in ("by", "manifest")):
        return None
    names = record.get("names")
    return record if isinstance(names, list) and all(isinstance(n, str) and _is_local(n) for n in names) else None


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
    with _lock:
        _save(folder, {key: value for key, value in _load(folder).items() if key != "replaces"})


def bring_back(folder: str | Path) -> None:
    """Put the run that was set aside in its place again; the files of the run that was to replace it go."""
    folder = Path(folder)
    aside, record = folder / EARLIER, _record(folder)
    for name in run_files(folder) if _load(folder).get("replaces") else ():
        if name not in record["names"]:
            remove(folder, name)
    for name in record["names"]:
        if os.path.lexists(aside / name):
            remove(folder, name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / name, folder / name)
            remove_empty_parents(aside, name)
    flush(folder)
    with _lock:
        _save(folder, {key: value for key, value in record["manifest"].items() if key != "replaces"})
    (aside / MANIFEST).unlink()
    remove_empty_folders(aside)


def comes_back(folder: str | Path) -> bool:
    """Whether the run that was set aside is to come back: the one that replaces it has no complete checkpoint."""
    folder = Path(folder)
    if _record(folder) is None:
        return False
    steps = [part / name for part in (folder, folder / AUTOENCODER) for name in listed(part)]
    has_checkpoint = any(checkpoint_step(one) >= 0 and is_sealed(one) for one in steps)
    return not (_load(folder).get("replaces") and has_checkpoint)


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
    places = {PurePosixPath(entry.pattern).parent.as_posix() for entry in LAYOUT}
    names = [
        path.relative_to(folder).as_posix()
        for pattern in (*places, "cache/*")
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
