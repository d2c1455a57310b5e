"""Checkpoints that are complete or absent: each is written to a scratch folder and renamed; then old ones go."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils.other import load
from safetensors.torch import load_file, save_file

from ..common.checkpoints import MANIFEST, checkpoint_step, discard, is_complete, list_checkpoints, made_by_diffusers
from ..common.errors import UsageError, one_line
from ..common.files import flush
from ..common.layout import METRICS_FILE, TIMINGS_FILE
from ..common.ownership import claim_files, release_files
from .complete_checkpoints import complete_checkpoints, file_digest, seal
from .earlier_run import let_go, replaces
from .run import Resumed, Run
from .setup.optimizer import COUNTED
from .state import TrainingState, set_rates


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after a step, which a run that goes on from there is about to write anew; what they were.

    Else `latest` would return to them, with metrics that were meanwhile cut off at the step.
    """
    later = [path for path in reversed(complete_checkpoints(output_dir)) if checkpoint_step(path) > step]
    for path in later:
        aside = path.with_name(f"{path.name}.superseded")
        if aside.exists():
            discard(aside)
        os.replace(path, aside)
    return later


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
        if not path.is_file() or file_digest(path) != digest:
            raise UsageError(f"{checkpoint} is not a complete checkpoint: {name} is missing or damaged")
    if not (type(manifest.get("step", 0)) is int and isinstance(manifest.get("settings", {}), dict)):
        raise UsageError(f"{checkpoint} is not a complete checkpoint: its {MANIFEST} says no step, or no settings")
    return manifest


def check_random_states(checkpoint: Path, rank: int) -> None:
    """Raise what torch raises for random states that are not data alone; Accelerate passes over them in silence."""
    path = checkpoint / f"random_states_{rank}.pkl"
    if path.is_file():
        load(path)  # with weights_only=True


def find_checkpoint(output_dir: Path, wanted: str, warn: Callable[[str], object]) -> Resumed | None:
    """The checkpoint to resume from, and its state; None where `latest` finds none.

    Args:
        wanted: `latest`, `checkpoint-N` or a path.
        warn: called with a line for each broken checkpoint that `latest` passed over.

    Raises:
        UsageError: a named checkpoint that does not exist or is broken; or checkpoints, but no complete one.
    """
    if wanted == "latest":
        there = list_checkpoints(output_dir)
        for path in reversed(there):
            try:
                return Resumed(path, read_manifest(path))
            except UsageError as error:
                if made_by_diffusers(path) is None:
                    warn(f"passing over {error}")
        foreign = next(filter(None, map(made_by_diffusers, reversed(there))), None)
        if there:
            raise UsageError(
                foreign or f"no complete checkpoint in {output_dir}; train anew with --overwrite_output_dir"
            )
        return None
    for path in (output_dir / wanted, Path(wanted)):
        if path.is_dir():
            return Resumed(path, read_manifest(path))
    there = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
    raise UsageError(f"--resume_from_checkpoint {wanted}: no such checkpoint in {output_dir} (there: {there})")


def rotate(output_dir: Path, limit: int | None) -> list[Path]:
    """Remove all but the newest `limit` checkpoints, and those set aside that the run has written anew; which ones.

    Only complete checkpoints of this package are counted and removed.
    """
    kept = complete_checkpoints(output_dir)
    for path in output_dir.glob("checkpoint-*.superseded"):
        step = checkpoint_step(path.with_suffix(""))
        if kept and 0 <= step <= checkpoint_step(kept[-1]) and is_complete(path):
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


LOGS = (METRICS_FILE, TIMINGS_FILE)


def save_checkpoint(run: Run, state: TrainingState, limit: int | None) -> str | None:
    """Write `checkpoint-N` atomically, then remove the oldest. All ranks take part.

    Returns:
        What kept it from being written, for all ranks; then nothing of it is left, and no other has gone.
    """
    accelerator, output_dir = run.accelerator, run.folder
    partial, final = (output_dir / f"checkpoint-{state.step}{suffix}" for suffix in (".partial", ""))
    meter = state.meter.gathered(accelerator)

    def begin() -> None:
        claim_files(output_dir, [f"{final.name}/"])
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # and no parent: where the folder has gone, as with a disk, another would fill in its place

    def finish() -> None:
        save_tensors(partial, state.extra)
        for log in LOGS:  # a checkpoint that outlives a power cut must find all that was logged before it
            if (output_dir / log).is_file():
                flush(output_dir / log)
        seal(
            partial,
            final,
            {
                "step": state.step,
                "nonfinite_steps": state.nonfinite_steps,
                "grid_due": state.grid_due,
                "evaluation_due": state.evaluation_due,
                "meter": meter,
                "sessions": state.sessions.until(state.step),
                "lr_scheduler": json.loads(json.dumps(state.lr_scheduler.state_dict(), default=lambda _: None)),
                **state.facts,
            },
        )

    fault = run.attempt(begin)
    fault = fault or run.attempt(lambda: accelerator.save_state(str(partial)), on_all=True)
    fault = fault or run.attempt(finish)
    if fault is not None and accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # nor may the disk take a new manifest
            release_files(output_dir, [f"{final.name}/"])
    if fault is None:
        remove_earlier_run(run)
        rotate_checkpoints(run, limit)
    return fault


def remove_earlier_run(run: Run) -> None:
    """Delete the run that this one replaces, now that it has a checkpoint. All ranks take part.

    An autoencoder's checkpoint counts: its folder lies within that of the run.
    """

    def remove() -> None:
        for folder in (run.folder, run.folder.parent):
            if replaces(folder):
                let_go(folder)

    if stuck := run.attempt(remove):
        run.warn(f"the earlier run cannot be removed: {stuck}")


def rotate_checkpoints(run: Run, limit: int | None) -> None:
    """Remove the checkpoints that are too many. All ranks take part."""

    def remove() -> None:
        release_files(run.folder, [f"{path.name}/" for path in rotate(run.folder, limit)])

    if stuck := run.attempt(remove):
        run.warn(f"an old checkpoint cannot be removed: {stuck}")


def load_checkpoint(accelerator: Accelerator, state: TrainingState, checkpoint: Path) -> None:
    """Take over a checkpoint: weights, moments, averages and counts. The settings of optimizer, schedule and EMA stay.

    The manifest has been verified.

    Raises:
        UsageError: a malformed checkpoint, or one of another run. What is pickled is read with weights_only=True.
    """
    manifest = read_manifest(checkpoint)
    groups = state.optimizer.param_groups
    kept = ("params", *COUNTED)
    settings = [{name: value for name, value in group.items() if name not in kept} for group in groups]
    try:
        check_random_states(checkpoint, accelerator.process_index)
        accelerator.load_state(str(checkpoint))
        load_tensors(checkpoint, state.extra)
        state.lr_scheduler.load_state_dict({**manifest["lr_scheduler"], "base_lrs": state.lr_scheduler.base_lrs})
        set_rates(state, settings)
        state.meter.restore(manifest["meter"], accelerator)
        state.step, state.nonfinite_steps = manifest["step"], int(manifest["nonfinite_steps"])
        state.sessions.resume(manifest.get("sessions", []), state.step)
        state.grid_due = bool(manifest.get("grid_due", False))
        state.evaluation_due = bool(manifest.get("evaluation_due", False))
    except UsageError:
        raise
    except Exception as error:  # whatever a stranger's file makes the libraries raise
        reason = one_line(error, 200)
        raise UsageError(
            f"{checkpoint} cannot be resumed: malformed checkpoint ({type(error).__name__}: {reason})"
        ) from error
