"""The commands that a plan stands for, in which order, and where their results lie.

A folder's name ends with a digest of the settings that decide its content. A changed plan therefore has other folders,
and what was trained before stays; a task is done if its result, which is written last, is there.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.checkpoints import MANIFEST
from ..common.files import read_json, write_atomically
from ..common.layout import RUN_FILE
from ..evaluation.report import METRICS_JSON, REPORT
from ..evaluation.results import read_metrics
from ..training.complete_checkpoints import complete_checkpoints
from .flags import CellFlags, digest
from .plan import Cell, Plan

CELLS, CLASSIFIER, REAL = "cells", "classifier", "real"
MODEL, EVALUATION, TRAINING, LOG = "model", "evaluation", "training.json", "log.txt"
OF_THE_MACHINE = ("device", "batch_size", "acceleration", "token")  # options that decide no figure
MODEL_FILES = (".json", ".safetensors")  # of a classifier's folder
RESUME = ["--resume_from_checkpoint", "latest"]


@dataclass
class Task:
    """A command, and the file that tells that it is done.

    Args:
        title: for the progress.
        words: of `ddpm-hf`.
        folder: for its log and its lock.
        result: written once the command has succeeded.
        collect: what to write there; it may raise ValueError or OSError if the command did not do all.
        watch: a training's folder, whose `metrics.jsonl` tells how far it is.
    """

    title: str
    words: list[str]
    folder: Path
    result: Path
    collect: Callable[[], dict[str, Any]]
    watch: Path | None = None

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return isinstance(_json(self.result), dict)

    def finish(self) -> None:
        """Write the result."""
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.result, json.dumps(self.collect(), indent=1, default=str) + "\n")


@dataclass
class Chain:
    """Tasks that follow each other, such as a training and the evaluations of its model.

    Args:
        title: of the progress and of messages.
        results: the files of the evaluations, by network.
    """

    title: str
    folder: Path
    tasks: list[Task]
    results: dict[str, Path] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether all of it is."""
        return all(task.done for task in self.tasks)


@dataclass
class CellRun(Chain):
    """A cell with one of its seeds.

    Args:
        settings: those that decide what is trained.
    """

    cell: Cell | None = None
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The run's output folder."""
        return self.folder / MODEL


@dataclass
class Evaluations:
    """How models and real images are evaluated.

    Args:
        plan: its options and networks.
        words: from options to words of `ddpm-hf evaluate`.
        classifier: the folder that {classifier} stands for.
        classifier_key: what identifies it, wherever the ablation's folder lies.
        dataset: to compare with, where the plan names none.
    """

    plan: Plan
    words: Callable[[dict[str, Any]], list[str]]
    classifier: str | None = None
    classifier_key: str | None = None
    dataset: dict[str, str] = field(default_factory=dict)

    def tasks(
        self, of: str, title: str, folder: Path, more: dict[str, Any], leave_out: tuple[str, ...] = ()
    ) -> dict[str, Task]:
        """A task for each network.

        Args:
            of: a model's folder, or a file of images.
            folder: for the results, and the samples, which the networks share.
            more: options besides those of the plan.
            leave_out: options of the plan that do not apply.
        """
        found = {}
        for index, network in enumerate(self.plan.networks if self.plan.evaluate is not None else ()):
            options = {**self.dataset, **more, **(self.plan.evaluate or {})}
            # the likelihood reads no features: once is enough
            omitted = leave_out + (("likelihood_calls", "likelihood_steps", "likelihood_images") if index else ())
            options = {name: value for name, value in options.items() if name not in omitted}
            options["features"] = network.replace("{classifier}", self.classifier or "")
            decisive = {name: value for name, value in options.items() if name not in OF_THE_MACHINE}
            decisive |= {"features": network, "classifier": self.classifier_key}
            for name, file in (("network", network.partition(":")[2]), ("weights", options.get("features_weights"))):
                content = content_key(file)
                decisive |= {name: content} if content != file else {}
            key = digest(decisive)
            out = folder / EVALUATION
            words = ["evaluate", of, "--out", str(out), *self.words(options)]
            name = f"{_slug(network)}-{key}"
            result = folder / f"{name}.json"
            collect = _collector(out, folder / f"{name}.html")
            by = network.replace(":{classifier}", "")
            found[network] = Task(f"{title}: evaluation by {by}", words, folder, result, collect)
        return found


def content_key(path: str | None) -> str | None:
    """A digest of a file, or of the files of a model's folder; what is neither identifies itself."""
    place = Path(path or "")
    files = sorted(one for one in place.iterdir() if one.suffix in MODEL_FILES) if place.is_dir() else [place]
    if not path or not all(one.is_file() for one in files):
        return path
    return hashlib.sha256(b"".join(hashlib.sha256(one.read_bytes()).digest() for one in files)).hexdigest()[:16]


def _collector(out: Path, page: Path) -> Callable[[], dict[str, Any]]:
    def collect() -> dict[str, Any]:
        record = read_json(out / METRICS_JSON)
        if not isinstance(record, dict):
            raise ValueError(f"{out} holds no {METRICS_JSON}")
        write_atomically(page, (out / REPORT).read_bytes())  # the next network's evaluation replaces it
        return record

    return collect


def cell_runs(plan: Plan, flags: CellFlags, evaluations: Evaluations, out: Path) -> list[CellRun]:
    """The runs of a plan, cell by cell, each with its evaluations."""
    runs = []
    for cell in plan.cells:
        words = flags.words(cell.flags)
        settings = flags.decisive(words)
        for seed in cell.seeds:
            folder = out / CELLS / f"{_slug(cell.name)}-seed{seed}-{digest([plan.script, settings, seed])}"
            title, model = f"{cell.name}, seed {seed}", folder / MODEL
            command = [plan.script, *words, "--seed", str(seed), "--output_dir", str(model), *RESUME]
            collect = _training_record(model, settings, cell.name)
            train = Task(f"{title}: training", command, folder, folder / TRAINING, collect, model)
            measured = evaluations.tasks(str(model), title, folder, {"seed": str(seed)})
            results = {network: task.result for network, task in measured.items()}
            tasks = [train, *measured.values()]
            runs.append(CellRun(title, folder, tasks, results, cell=cell, seed=seed, settings=settings))
    return runs


def classifier_chain(flags: dict[str, Any], parser: CellFlags, out: Path) -> tuple[Chain, str]:
    """The training of the plan's classifier, and its folder."""
    words = parser.words(flags)
    folder = out / f"{CLASSIFIER}-{digest(parser.decisive(words))}"
    model = folder / MODEL
    command = ["train-classifier", *words, "--seed", "0", "--output_dir", str(model), *RESUME]
    task = Task("classifier: training", command, folder, folder / TRAINING, _training_record(model, {}), model)
    return Chain("classifier", folder, [task]), str(model)


def real_chain(images: Path, count: int, evaluations: Evaluations, size: list[str]) -> Chain:
    """The evaluation of real images, in an npz file, as if they were samples.

    Args:
        count: of the images.
        size: words for their size, to which the images that they are compared with are brought.
    """
    folder = images.with_suffix("")
    omitted = (
        "sampler", "steps", "sweep", "eta", "num_samples", "likelihood_calls", "likelihood_steps", "likelihood_images",
        "class", "class_", "prompt", "ema", "guidance_scale", "guidance_rescale", "guidance_interval", "precision",
        "acceleration",
    )  # fmt: skip
    measured = evaluations.tasks(str(images), "real images", folder, {}, omitted)
    for task in measured.values():
        task.words += ["--num-samples", str(count), *size]
    results = {network: task.result for network, task in measured.items()}
    return Chain("real images", folder, list(measured.values()), results)


def _training_record(model: Path, settings: dict[str, Any], cell: str = "") -> Callable[[], dict[str, Any]]:
    """What is kept of a finished training of a cell, or of the classifier."""

    def collect() -> dict[str, Any]:
        ended = complete_checkpoints(model)
        manifest = (_json(ended[-1] / MANIFEST) if ended else None) or {}
        step, total = manifest.get("step", 0), manifest.get("total_steps", 0)
        if step < total:
            raise ValueError(f"{model}: ended at step {step:,} of {total:,}")
        lines = read_metrics(model)
        run = _json(model / RUN_FILE) or {}
        last: dict[str, Any] = {}
        for line in lines:
            last |= {name: value for name, value in line.items() if name not in ("step", "epoch")}
        return {
            "cell": cell,
            "settings": settings,
            "steps": max((line["step"] for line in lines), default=run.get("step")),
            "seconds": sum(session.get("seconds", 0) for session in run.get("sessions", ())),
            "hardware": next((one.get("hardware") for one in reversed(run.get("sessions", []))), None),
            "parameters": run.get("parameters"),
            "images": (run.get("dataset") or {}).get("images"),
            "last": last,
        }

    return collect


def earlier_folders(run: CellRun, runs: Sequence[CellRun], out: Path) -> list[Path]:
    """The folders of the same cell and seed with other settings, none of them that of another of the plan's `runs`."""
    stem, now = run.folder.name.rpartition("-")[0], {one.folder for one in runs}
    return [path for path in sorted((out / CELLS).glob(f"{stem}-*")) if path not in now and _is_of(path, stem, run)]


def _is_of(path: Path, stem: str, run: CellRun) -> bool:
    """Whether a finished training of this cell is there: two names, such as "μ, L" and "ε, L", can have one stem."""
    if not re.fullmatch(re.escape(stem) + r"-[0-9a-f]{10}", path.name):
        return False
    record, name = _json(path / TRAINING), run.cell.name if run.cell else ""
    return record is not None and record.get("cell", name) == name


def what_changed(run: CellRun, before: Path) -> str:
    """The settings in which a run differs from an earlier one, for people."""
    earlier = (_json(before / TRAINING) or {}).get("settings") or {}
    ours = json.loads(json.dumps(run.settings, default=str))
    names = sorted(name for name in {*ours, *earlier} if ours.get(name) != earlier.get(name))
    said = [f"{name} {_short(earlier.get(name))} → {_short(ours.get(name))}" for name in names]
    return ", ".join(said) or "the script"


def _short(value: Any) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _slug(name: str) -> str:
    """A name as part of a path.

    >>> _slug("linear, l2"), _slug("classifier:{classifier}")
    ('linear-l2', 'classifier-classifier')
    """
    return re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-.")[:60] or "cell"


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError:
        return None
