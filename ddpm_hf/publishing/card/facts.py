"""What a model card is made from."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.files import read_json
from ...common.layout import RESULTS_FILE, RUN_FILE
from ...evaluation.results import read_metrics
from ...inference.kinds import KINDS


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Args:
        repository: user/name on the Hub, or a folder.
        pipeline: the trained one.
        folder: where it is saved, with its pictures.
        run: what `run.json` says of the training; empty where it is not known.
        metrics: the lines of `metrics.jsonl`.
        results: those of `evaluation.json`, as `record_result` wrote them.
        license: the model's, if one was chosen.
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
        """The pipeline's class among ours."""
        return self.pipeline.portable_class().__name__

    @property
    def kind(self) -> str:
        """What it is conditioned on: nothing, a class or a text."""
        return KINDS[self.class_name].task

    @property
    def dataset(self) -> dict[str, Any]:
        """Name, number of images and so on of what it was trained on."""
        return self.run.get("dataset", {})

    def has(self, picture: str) -> bool:
        """Whether a picture of the card is there."""
        return (self.folder / picture).is_file()


def read_facts(folder: Path, repository: str, pipeline, license: str | None = None) -> Facts:
    """What a folder tells of its model."""
    run, results = (read_json(folder / name) for name in (RUN_FILE, RESULTS_FILE))
    return Facts(repository, pipeline, folder, run or {}, read_metrics(folder), results or [], license)


def all_results(facts: Facts) -> list[dict[str, Any]]:
    """What was recorded of these weights, and the last held-out loss of the training itself."""
    held_out = [line for line in facts.metrics if "validation_loss" in line]
    step, images = facts.run.get("step"), facts.run.get("held_out", 0)
    own = [
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
    return own + [one for one in facts.results if one.get("step") == step]
