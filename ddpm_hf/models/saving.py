"""Saving models and pipelines atomically, and variants of their weights."""

import copy
import json
import os
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..common.checkpoints import SETTINGS
from ..common.errors import UsageError
from ..common.files import PARTIAL_SUFFIX, flush, flush_tree, write_atomically
from ..common.layout import CHAIN, LOSS_CURVE, RESULTS_FILE, RUN_FILE, SAMPLES
from ..common.ownership import claim_files, foreign, listed, release_files, remove


def save_model(
    model: Any, folder: str | Path, only: str = "*", within: str | Path | None = None, **options: Any
) -> list[Path]:
    """Save what has a `save_pretrained` such that each file is complete: written to a scratch folder, then moved.

    Args:
        only: of the files that it writes, those whose names match.
        within: the output folder whose manifest lists them, if there is one.
        options: for `save_pretrained`.

    Returns: what was written, relative to the folder.

    Raises:
        UsageError: a file there is not of a run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-", suffix=PARTIAL_SUFFIX))
    try:
        model.save_pretrained(scratch, **options)
        for path in scratch.rglob("config.json"):
            forget_origin(path)
        flush_tree(scratch)
        paths = [path.relative_to(scratch) for path in scratch.rglob(only) if path.is_file()]
        if within is not None:
            claim_paths(Path(within), [(folder / path).relative_to(within).as_posix() for path in paths])
        for last in (False, True):  # a config says that the weights are there: it goes last
            moved = [path for path in paths if (path.suffix == ".json") == last]
            for path in moved:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                os.chmod(scratch / path, 0o644)  # safetensors makes them readable by their owner alone
                os.replace(scratch / path, folder / path)
            for parent in {(folder / path).parent for path in moved} | {folder}:
                flush(parent)
        return paths
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def claim_paths(folder: Path, names: list[str]) -> None:
    """List files in the manifest of an output folder, but refuse to replace what is not of a run there."""
    for name in foreign(folder, names):
        raise UsageError(f"{folder / name} is not of a run and would be replaced; move it, or remove it")
    claim_files(folder, names)


def forget_origin(config: Path) -> None:
    """Drop where a model was loaded from: a path of this machine, or another one where its training was resumed."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.pop("_name_or_path", None) is not None:
        write_atomically(config, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def save_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Save a pipeline as `save_model` does; older variants of its weights are removed."""
    written = {path.as_posix() for path in save_model(pipeline, folder, within=folder)}
    outdated = [
        name
        for name in listed(folder)
        if name not in written
        and name.split("/")[0] in networks(pipeline)
        and (name.endswith(".safetensors") or fnmatch(name, "*.index*.json"))
    ]
    for name in outdated:
        remove(Path(folder), name)
    release_files(folder, outdated)


def forget_records(folder: str | Path) -> None:
    """Remove what a folder's manifest lists of the training, figures and pictures of an earlier model."""
    records = (RUN_FILE, SETTINGS, RESULTS_FILE, SAMPLES, CHAIN, LOSS_CURVE)
    outdated = [name for name in records if name in listed(folder)]
    for name in outdated:
        remove(Path(folder), name)
    release_files(folder, outdated)


def networks(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components of a pipeline that have weights, by the names of their folders."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def save_half_precision(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Save a pipeline's weights in fp16 as well: `from_pretrained(..., variant="fp16")` loads them.

    The pipeline itself stays as it is.
    """
    for name, part in networks(pipeline).items():
        half = copy.deepcopy(part).to("cpu", torch.float16)
        save_model(half, Path(folder) / name, only="*.fp16[.-]*", within=folder, variant="fp16")
