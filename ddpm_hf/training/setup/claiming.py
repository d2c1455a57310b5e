"""The output folder: what is resumed, what may be replaced, what is refused."""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from ...common.arguments import APPLIED, FIXED, flags_by_resume
from ...common.checkpoints import SETTINGS, checkpoint_step, list_checkpoints, made_by_diffusers
from ...common.errors import UsageError
from ...common.files import truncate_jsonl
from ...common.layout import AUTOENCODER, KEPT_IN_PLACE, STEPS, TIMINGS, TRAINING_CONFIG, Entry
from ...common.ownership import claim_files, has_manifest, listed, run_files, some
from ..checkpointing import LOGS, find_checkpoint, rotate_checkpoints, set_aside_later
from ..complete_checkpoints import complete_checkpoints
from ..earlier_run import (
    cannot_be_moved,
    forget_removed_checkpoints,
    in_the_way,
    remove_unfinished,
    set_aside,
    settle,
    waiting,
)
from ..flags import Flags, TrainingFlags
from ..logs import start_trackers
from ..power_averages import drop_later_snapshots
from ..reporting import table
from ..run import Resumed, Run
from .held_out import trained_on_held_out
from .settings import save_settings

if TYPE_CHECKING:
    import torch


def find_run(run: Run, data: Sequence[str | None] = ()) -> Resumed | None:
    """The checkpoint to resume from and its state, or None; an earlier run that waits for one that ended comes back.

    Args:
        data: the folders that it reads.

    Raises:
        UsageError: the folder holds an earlier run and neither resuming nor overwriting was asked for, or files that
            this run would replace; a checkpoint that does not exist, is broken, or is of another run than the folder.
    """
    flags, folder = run.flags, run.folder
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        what = "is a file" if there == folder.absolute() else f"lies in {there}, which is a file"
        raise UsageError(f"--output_dir {folder} {what}; name a folder")
    if flags.overwrite_output_dir and flags.resume_from_checkpoint:
        raise UsageError(
            "--overwrite_output_dir would remove the run that --resume_from_checkpoint goes on from; give one of them"
        )
    if not flags.dry_run:
        settle_earlier_run(run)
    ours = [*run_files(folder), *waiting(folder)]
    if not ours:
        refuse_other_runs(folder)
    refuse_foreign_files(flags, run.entries, ours)
    if flags.resume_from_checkpoint:
        resumed = find_checkpoint(folder, flags.resume_from_checkpoint, run.log)
        if resumed is None:
            refuse_lost_checkpoints(folder, can_start=hasattr(run.settings, "pretrained_model_name_or_path"))
            run.log(f"no checkpoint in {folder} yet: training from the beginning")
        else:
            refuse_checkpoint_of_another_run(folder, resumed.checkpoint)
        return resumed
    if ours and not flags.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {folder} holds an earlier run ({some(ours)}); go on with"
            " --resume_from_checkpoint latest, replace it with --overwrite_output_dir, or name another folder"
        )
    refuse_to_remove_data(folder, ours, data)
    return None


def refuse_lost_checkpoints(folder: Path, can_start: bool) -> None:
    """Raise UsageError for a run whose checkpoints somebody removed: from the beginning, it would lose its model.

    Args:
        can_start: whether the program can start from the weights of a pipeline.
    """
    suffixes = ("", ".partial", ".superseded", ".superseded.partial")  # also while it is written or removed
    there = {name for name in listed_checkpoints(folder) for end in suffixes if (folder / f"{name}{end}").is_dir()}
    lost = [name for name in listed_checkpoints(folder) if name not in there]
    if not lost:
        return
    start = f"start from its weights with --pretrained_model_name_or_path {folder} and another --output_dir, or "
    can_start = can_start and (folder / "model_index.json").is_file()
    raise UsageError(
        f"--resume_from_checkpoint latest: the checkpoints of the run in {folder} are gone ({some(lost)});"
        f" {start if can_start else ''}train anew with --overwrite_output_dir"
    )


def refuse_checkpoint_of_another_run(folder: Path, checkpoint: Path) -> None:
    """Raise UsageError for a checkpoint from elsewhere where the output folder holds a run that would be lost.

    A run without checkpoints may be one that began with this checkpoint and was stopped: it begins again.
    """
    if checkpoint.resolve().parent == folder.resolve():
        return
    there = complete_checkpoints(folder)
    if there or listed_checkpoints(folder):
        go_on = f", or go on from {there[-1].name} with --resume_from_checkpoint latest" if there else ""
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint} is of another run than that in --output_dir {folder}; name another"
            f" --output_dir{go_on}"
        )


def listed_checkpoints(folder: Path) -> list[str]:
    """The names of the checkpoints that the manifest of a run lists."""
    names = (name.removesuffix("/") for name in listed(folder))
    return [name for name in names if "/" not in name and checkpoint_step(folder / name) >= 0]


def settle_earlier_run(run: Run) -> None:
    """Complete what a program that was killed left half done in the folder. All ranks take part."""
    error = None
    if run.accelerator.is_main_process:
        try:
            settle(run.folder, training=True)
        except (UsageError, OSError) as problem:
            error = problem
    if any(gather_object([error is not None])):
        run.end(error)


def refuse_other_runs(folder: Path) -> None:
    """Raise UsageError for a folder with a run of Diffusers' scripts."""
    for checkpoint in reversed(list_checkpoints(folder)):
        line = made_by_diffusers(checkpoint)
        if line is not None:
            raise UsageError(line)


def refuse_foreign_files(flags: TrainingFlags, entries: Sequence[Entry], ours: Sequence[str]) -> None:
    """Raise UsageError for files that the run would replace and that are not of an earlier one."""
    folder, resuming = Path(flags.output_dir), flags.resume_from_checkpoint
    if resuming and ours and not has_manifest(folder):  # of a version without manifests, which wrote over such files
        return
    foreign = in_the_way(folder, entries, ours)
    if resuming and ours:  # a card that a person began is completed
        foreign = [name for name in foreign if name not in KEPT_IN_PLACE]
    if flags.overwrite_output_dir:
        foreign += cannot_be_moved(folder, entries, ours)
    if foreign:
        raise UsageError(
            f"--output_dir {folder} holds files that training would replace and that are not of an earlier run"
            f" ({some(foreign)}); move them, or name another folder"
        )


def refuse_to_remove_data(folder: Path, ours: Sequence[str], data: Sequence[str | None]) -> None:
    """Raise UsageError for files of an earlier run that lie in a folder of training data within the output folder."""
    for name in data:
        path = Path(name or "")
        if not name or not path.is_dir() or path.resolve() not in map(Path.resolve, _folders_within(folder, ours)):
            continue
        raise UsageError(
            f"--overwrite_output_dir would remove the training data in {path}, which an earlier run wrote; copy them"
            " to another folder, or name another --output_dir"
        )


def _folders_within(folder: Path, names: Sequence[str]) -> set[Path]:
    """All folders between a folder and files within it."""
    return {folder / parent for name in names for parent in Path(name).parents if parent != Path(".")}


def describe_start(run: Run) -> str:
    """What a start would do with the output folder, for --dry_run."""
    folder = run.folder
    if run.resumed is not None:
        line = f"goes on from {run.resumed.checkpoint}, step {run.resumed.manifest.get('step', 0):,}"
    elif earlier := [*run_files(folder), *waiting(folder)]:
        line = f"replaces the earlier run in {folder} ({some(earlier)}) once there is a checkpoint"
    else:
        line = "from the beginning"
    return f"     start  {line}; the first batch has been through the model and back"


def start_writing(run: Run, step: int, lines: dict[str, str], project: str) -> None:
    """Make the output folder this run's, once all else has been checked; open its tracker; say what runs.

    Args:
        step: the one that the run goes on from.
        lines: what runs, by name.
        project: of the tracker, by default.
    """
    claim_output_dir(run, step)
    start_trackers(run, project)
    run.must_write(lambda: save_settings(run.settings), SETTINGS)
    run.log(table(lines))


def claim_output_dir(run: Run, step: int) -> None:
    """Make the output folder this run's, once all else has been checked; an earlier run is set aside.

    Args:
        step: the one that the run goes on from: what was done in the folder after it counts no more.

    Raises:
        UsageError: a folder that cannot be written.
    """
    folder, error = run.folder, None
    if run.accelerator.is_main_process:
        try:
            _claim(folder, run.flags.overwrite_output_dir, run.entries)
        except OSError as problem:
            error = UsageError(f"--output_dir {folder} cannot be written: {problem.strerror}; name another folder")
    if any(gather_object([error is not None])):
        run.end(error)
    run.must_write(lambda: forget_later(run, step), str(folder))
    if step:  # the run may have been killed before it could
        rotate_checkpoints(run, run.flags.checkpoints_total_limit)


def forget_later(run: Run, step: int) -> None:
    """Let nothing count that an earlier run, which was killed or is resumed before its end, did after a step."""
    for path in set_aside_later(run.folder, step):
        run.log(f"{path.name} is of a later step; it is removed once this run has got there")
    for name in LOGS:
        truncate_jsonl(run.folder / name, step)
    drop_later_snapshots(run.folder, step)


def _claim(folder: Path, overwrite: bool, entries: Sequence[Entry]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # or it cannot be written, and nothing is moved
        ours = run_files(folder)
    if ours and overwrite:
        set_aside(folder, ours)
    elif ours and not has_manifest(folder):  # a run of a version without manifests goes on
        ours += in_the_way(folder, entries, ours)
        claim_files(folder, [name for name in ours if not name.startswith(f"{AUTOENCODER}/")])
    remove_unfinished(folder)
    forget_removed_checkpoints(folder)
    claim_files(folder, [entry.pattern for entry in (TRAINING_CONFIG, STEPS, TIMINGS)])


def check_unchanged(flags: Flags, resumed: dict[str, Any] | None) -> None:
    """Raise UsageError for a setting that the run to resume was built on, and that is another one now.

    Args:
        resumed: the state of the checkpoint, or None.
    """
    before = (resumed or {}).get("settings", {})
    if not flags.knows(before):
        return  # `check_resumable` refuses the checkpoint
    for name in flags_by_resume(flags.fields(), FIXED):
        was, now = before.get(name), getattr(flags, name)
        if name in before and was != now and not _was_moved(was, now):
            raise UsageError(
                f"--{name} {now}: the run to resume was trained with {was}, which its weights depend on; leave the"
                " flag out, or train anew in another --output_dir"
            )


def _was_moved(was: Any, now: Any) -> bool:
    """Whether two names may be of one local file or folder: of which the first is there no more, or the same.

    A name that is not absolute may be a relative path, or that of a download: it moves to one that ends alike.
    """
    if not (isinstance(was, str) and isinstance(now, str) and os.path.exists(now)):
        return False
    if os.path.exists(was):
        return os.path.samefile(was, now)
    path = PureWindowsPath(was)  # which divides at either slash
    absolute = os.path.isabs(was) or path.is_absolute()
    return absolute or path.name in ("", "..", Path(now).resolve().name)


OF_THE_DATA = {"trained_classes"}  # of a model's config, which later data may change


def check_resumable(run: Run, model: "torch.nn.Module", facts: dict[str, Any], name: str) -> None:
    """Say what is another than in the run to resume, and counts from here on.

    Args:
        model: the one to train, of Diffusers.
        facts: what `run_facts` gave.
        name: the model's folder in a checkpoint.

    Raises:
        UsageError: a checkpoint of another model.
    """
    if run.resumed is None:
        return
    checkpoint, manifest = run.resumed
    if not (checkpoint / name / "config.json").is_file():
        raise UsageError(f"{checkpoint} is of another kind of run: it has no {name}/")
    try:
        saved = dict(json.loads((checkpoint / name / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{checkpoint}: {name}/config.json is not a model's config") from error
    ours = json.loads(model.to_json_string())
    for key in ours:
        if not key.startswith("_") and key not in OF_THE_DATA and ours[key] != saved.get(key):
            raise UsageError(
                f"{checkpoint} is of another model: its {key} is {saved.get(key)}, this run's {ours[key]}; resume with"
                " the flags that it was trained with"
            )
    if manifest.get("step", 0) >= facts.get("total_steps", math.inf):
        run.log(f"step {manifest['step']:,} of {facts['total_steps']:,}: nothing is left to train")
    if trained_on_held_out(run, facts.get("samples")):
        run.log(
            "warning: --validation_split chooses the held-out images anew, and this run was trained on some of them:"
            " its held-out loss is too low from here on, and stays out of the card"
        )
    counts = {*facts, *flags_by_resume(run.settings.fields(), APPLIED)} - {"settings", "scheduler"}
    flat, before = ({**each, **each.get("settings", {})} for each in (facts, manifest))
    for name in (name for name in flat if name in counts and name in before and before[name] != flat[name]):
        run.log(f"warning: {name} was {before[name]} and is {flat[name]}: not an exact continuation")
    if facts["processes"] != before["processes"] and facts["global_batch"] != before["global_batch"]:
        run.log(
            f"each step saw {before['global_batch']} images and sees {facts['global_batch']}; the order goes on where"
            " it was if processes × --train_batch_size × --gradient_accumulation_steps stays the same",
        )
