"""The figures of a saved model."""

import json
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_atomically
from ..common.layout import METRICS_FILE, RESULTS_FILE, RUN_FILE
from ..common.ownership import claim_files


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, but for one that is being written."""
    path = folder / METRICS_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def record_result(
    folder: str | Path,
    metric: str,
    value: float,
    samples: int,
    dataset: str,
    split: str = "test",
    settings: str | None = None,
) -> None:
    """Record a figure of a saved model in its `evaluation.json`; the card and its metadata then show it.

    It is shown only while the weights are the same: after more training, a new figure must be recorded.

    Args:
        folder: the pipeline's.
        metric: what was measured, with its unit: "bits/dim", "FID".
        value: the figure; one of the same metric, dataset, split and settings is replaced.
        samples: how many images it was measured on.
        dataset: of the images that it was measured on or against.
        settings: how the samples were generated, for example "DDIM, 50 steps".

    Raises:
        ValueError: there is an `evaluation.json` that holds something else.
    """
    step = (read_json(Path(folder) / RUN_FILE) or {}).get("step")
    key = {"metric": metric, "dataset": dataset, "split": split, "settings": settings, "step": step}
    before = read_json(Path(folder) / RESULTS_FILE) or []
    if not isinstance(before, list) or not all(isinstance(one, dict) and "metric" in one for one in before):
        raise ValueError(f"{Path(folder) / RESULTS_FILE} does not hold results of ours; move it, or remove it")
    results = [one for one in before if {**one, **key} != one]
    results += [{**key, "value": float(value), "samples": int(samples)}]
    claim_files(folder, [RESULTS_FILE])
    write_atomically(Path(folder) / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
