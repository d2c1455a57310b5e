"""Where a fit is kept: in the config of the model's scheduler, which stock Diffusers reads as before."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..common.checkpoints import checkpoint_step
from ..common.errors import UsageError
from ..common.files import read_json, write_atomically
from ..common.layout import (
    CHAIN,
    COMPONENTS,
    KEPT_IN_PLACE,
    LOSS_CURVE,
    RESULTS_FILE,
    RUN_FILE,
    SAMPLES,
    TRAINING,
    holds_run,
    layout,
    matching,
)
from ..common.ownership import claim_files, foreign
from ..models.saving import forget_records, save_pipeline

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


def check_target(model: str, out: Path | None) -> None:
    """Raise UsageError where there is no folder to write a fit to, before any work."""
    if out is None and not (
        (Path(model) / "model_index.json").is_file() and (Path(model) / SCHEDULER_CONFIG).is_file()
    ):
        raise UsageError(
            f"{model} is not the folder of a pipeline, which the fit would be written to; give --out FOLDER"
        )
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; give a folder")
    if out is None or is_same(model, out):
        return
    if holds_run(out):
        raise UsageError(f"--out {out}: holds a training run, which stays; name another folder")
    if out.is_dir() and checkpoint_step(out) >= 0:
        raise UsageError(f"--out {out}: is a checkpoint, which stays; name another folder")
    kept = (*KEPT_IN_PLACE, *(one.pattern for one in TRAINING), RUN_FILE, RESULTS_FILE, SAMPLES, CHAIN, LOSS_CURVE)
    patterns = [one.pattern for one in layout(*COMPONENTS) if one.pattern not in kept]  # what is written
    for name in foreign(out, [name for pattern in patterns for name in matching(out, pattern)]):
        raise UsageError(
            f"--out {out}: holds {name}, which is not of a run and would be replaced; name another folder"
        )


def is_same(model: str, out: Path | None) -> bool:
    """Whether `out` is the model's own folder, that of a pipeline whose scheduler can be changed in place."""
    return out is not None and out.resolve() == Path(model).resolve() and (out / SCHEDULER_CONFIG).is_file()


def save_fit(model: str, pipeline: DiffusionPipeline, fit: dict[str, Any], out: Path | None) -> Path:
    """Add entries to the config of a pipeline's scheduler: in its folder, or in a copy of it; the file's path.

    Args:
        fit: keys with an underscore, which stock ignores, and what JSON holds.
        out: the copy's folder; None, or the model's own, changes it in place.
    """
    if out is not None and not is_same(model, out):
        pipeline.scheduler.register_to_config(**fit)
        save_pipeline(pipeline, out)
        forget_records(out)
        return out / SCHEDULER_CONFIG
    path = Path(model) / SCHEDULER_CONFIG
    config = {**read_json(path), **fit}
    claim_files(model, [SCHEDULER_CONFIG])
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path
