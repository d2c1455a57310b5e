"""The data that a model card is written from."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.files import read_json
from ...common.layout import RESULTS_FILE, RUN_FILE, is_record
from ...evaluation.metrics import METRICS
from ...evaluation.results import read_metrics, weights_digest
from ...inference.kinds import KINDS


@dataclass(frozen=True)
class Facts:
    """The data that a card is written from.

    Args:
        repository: user/name on the Hub, or a folder.
        pipeline: the trained pipeline.
        folder: the folder that it is saved in, with its pictures.
        run: the content of `run.json`; empty if the training is unknown.
        metrics: the lines of `metrics.jsonl`.
        results: the content of `evaluation.json`, written by `record_result`.
        license: the model's license, if one was chosen.
    """

    repository: str
    pipeline: Any
    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    license: str | None = None

    @property
    def class_name(self) -> str:
        """The name of the pipeline's class in this package."""
        return self.pipeline.portable_class().__name__

    @property
    def kind(self) -> str:
        """Its task on the Hub, which depends on its conditions: none, a class or a text."""
        return KINDS[self.class_name].task

    @property
    def dataset(self) -> dict[str, Any]:
        """Name, number of images and so on of the training data."""
        return self.run.get("dataset", {})

    @property
    def base_run(self) -> dict[str, Any]:
        """Of the local model that the training started from: the name of its folder, and its datasets."""
        return self.run.get("base_run") or {}

    @property
    def held_out_seen(self) -> bool:
        """Whether it was trained on images that were held out later."""
        return any(one.get("held_out_seen") for one in self.run.get("sessions", ()))

    def has(self, picture: str) -> bool:
        """Whether a picture of the card exists."""
        return (self.folder / picture).is_file()


def read_facts(folder: Path, repository: str, pipeline: Any, license: str | None = None) -> Facts:
    """Read a folder's data for its card."""
    known = {name: read_json(folder / name) for name in (RUN_FILE, RESULTS_FILE)}  # what is broken is named
    run, results = (value if is_record(folder, name) else None for name, value in known.items())
    return Facts(repository, pipeline, folder, run or {}, read_metrics(folder), results or [], license)


def datasets_of(run: dict[str, Any], base: bool = False) -> list[dict[str, Any]]:
    """The datasets that a run was trained on, each once: several where it was resumed on other data.

    Args:
        run: the content of `run.json`.
        base: with those of the local model that it started from.
    """
    of_sessions = [one["dataset"] for one in run.get("sessions", ()) if one.get("dataset")]
    now = of_sessions or ([run["dataset"]] if run.get("dataset") else [])
    every = [*((run.get("base_run") or {}).get("datasets", ()) if base else ()), *now]
    return list({one.get("fingerprint") or one["name"]: one for one in every}.values())


def all_results(facts: Facts) -> list[dict[str, Any]]:
    """The results recorded for these weights, and the training's last held-out loss."""
    held_out = [line for line in facts.metrics if "validation_loss" in line]
    step, images = facts.run.get("step"), 0 if facts.held_out_seen else facts.run.get("held_out", 0)
    of_training = [
        {
            "metric": "held-out loss",
            "value": line["validation_loss"],
            "samples": images,
            "dataset": facts.dataset.get("name", "unknown"),
            "split": "held out",
            "settings": None,
        }
        for line in held_out
        if line["step"] == step and images and math.isfinite(line["validation_loss"])
    ]
    recorded = [one for one in facts.results if one.get("step") == step]
    if any("weights" in one for one in recorded):
        weights = weights_digest(facts.folder)
        recorded = [one for one in recorded if one.get("weights", weights) == weights]
    return of_training + evaluated(facts) + recorded


def evaluated(facts: Facts) -> list[dict[str, Any]]:
    """The figures of `--evaluation_epochs` at the step of these weights."""
    about, step = facts.run.get("evaluation"), facts.run.get("step")
    if not about:
        return []
    lines = [line for line in facts.metrics if line["step"] == step]
    values = {name: line[f"evaluation_{name}"] for line in lines for name in METRICS if f"evaluation_{name}" in line}
    return [
        {
            "metric": METRICS[name].title,
            "value": value,
            "samples": about["samples"],
            "dataset": facts.dataset.get("name", about["dataset"]),
            "split": "train",
            "settings": about["settings"],
        }
        for name, value in values.items()
        if math.isfinite(value)
    ]
