"""The figures of a saved model."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_atomically
from ..common.layout import COMPONENTS, METRICS_FILE, RESULTS_FILE, RUN_FILE, VARIANT, is_record
from ..common.ownership import claim_files


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, but for one that is being written; none of another program's file."""
    path = folder / METRICS_FILE
    text = path.read_text(encoding="utf-8") if is_record(folder, METRICS_FILE) else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def weights_digest(folder: Path) -> str:
    """A digest of a pipeline's weights, by which figures of a folder without a training are known to be of them."""
    found = hashlib.sha256()
    for path in sorted(one for name in COMPONENTS for one in (folder / name).glob("*.safetensors")):
        if not VARIANT.search(path.name):
            with open(path, "rb") as file:
                while chunk := file.read(2**20):
                    found.update(chunk)
    return found.hexdigest()[:16]


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
    folder = Path(folder)
    step = read_json(folder / RUN_FILE).get("step") if is_record(folder, RUN_FILE) else None
    key = {"metric": metric, "dataset": dataset, "split": split, "settings": settings, "step": step}
    if (folder / RESULTS_FILE).exists() and not is_record(folder, RESULTS_FILE):
        raise ValueError(f"{folder / RESULTS_FILE} does not hold results of ours; move it, or remove it")
    results = [one for one in read_json(folder / RESULTS_FILE) or [] if {**one, **key} != one]
    weights = {"weights": weights_digest(folder)} if step is None else {}
    results += [{**key, **weights, "value": float(value), "samples": int(samples)}]
    claim_files(folder, [RESULTS_FILE])
    write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
