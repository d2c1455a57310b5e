"""A plan: which runs, how they are evaluated, and what others published of them."""

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.errors import UsageError
from ..evaluation.compare import BITS
from ..evaluation.metrics import METRICS
from .yaml_lines import Document, read_document

SCRIPTS = {"train": "train_unconditional", "train-text2image": "train_text2image"}  # by the command of ddpm-hf
KEYS = (
    "title", "script", "launch", "flags", "grid", "cells", "seeds", "classifier", "evaluate", "real", "published",
)  # fmt: skip
OTHERS = "others"  # in `seeds`: of the cells that it does not name
REAL_KEYS = ("dataset", "split", "images")
PUBLISHED_KEYS = ("source", "cells", "real")
CHANGEABLE = ("classifier", "evaluate", "real")
ONLY_CELL = "model"  # the name of the cell of a plan without a grid and cells
MOST_CELLS = 1000


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Args:
        name: of its labels on the axes, or of its own.
        flags: of the training, over those of the plan.
        seeds: of its runs.
        labels: on the axes of the grid; empty for a cell of its own.
        paths: where each flag stands in the plan.
    """

    name: str
    flags: dict[str, Any]
    seeds: tuple[int, ...]
    labels: tuple[str, ...] = ()
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a plan file says.

    Args:
        document: the file.
        title: of the table.
        script: the training script, as a command of ddpm-hf.
        launch: words for `accelerate launch`; without any, a run is one process.
        axes: the labels of each axis of the grid.
        cells: the rows of the table.
        classifier: a folder, or the flags of `ddpm-hf train-classifier`.
        evaluate: options of `ddpm-hf evaluate`.
        networks: whose features the samples are measured by, one evaluation each.
        real: which held-out images are scored as the samples are; None for none.
        published: figures of others by cell and metric.
        published_real: theirs of real images.
        source: where they were published.
    """

    document: Document
    title: str
    script: str
    launch: tuple[str, ...]
    axes: dict[str, list[str]]
    cells: tuple[Cell, ...]
    classifier: str | dict[str, Any] | None
    evaluate: dict[str, Any] | None
    networks: tuple[str, ...]
    real: dict[str, str] | None
    published: dict[str, dict[str, float]]
    published_real: dict[str, float]
    source: str


def read_plan(file: Path, changes: Mapping[str, str] | None = None) -> Plan:
    """The plan in a YAML file.

    Args:
        changes: values over those of the plan: flags of all cells, or "evaluate.steps" and the like.

    Raises:
        UsageError: not a plan; the message names the key and its line.
    """
    document, changed = read_document(file), dict[str, str]()
    for name, value in (changes or {}).items():
        section, dot, key = name.partition(".")
        if dot and section not in CHANGEABLE:
            raise UsageError(f"--set {name}={value}: must be a flag, or begin with {', '.join(CHANGEABLE)} and a dot")
        section, key = (section, key) if dot else ("flags", name)
        changed |= {} if dot else {name: value}
        top = _mapping(document, ())
        top[section] = {**_mapping(document, (section,)), key: value}
    top = _mapping(document, ())
    _known(document, (), top, KEYS)
    script = _text(document, ("script",), top.get("script", "train"))
    if script not in SCRIPTS:
        raise document.error(("script",), f"must be one of {', '.join(SCRIPTS)} (got {script!r})")
    shared = _mapping(document, ("flags",))
    paths: dict[str, tuple[str, ...]] = {name: ("flags", name) for name in shared}
    axes, cells = _grid(document, shared, paths)
    for name in _mapping(document, ("cells",)):
        own = _mapping(document, ("cells", name))
        where = {**paths, **{flag: ("cells", name, flag) for flag in own}}
        cells.append(Cell(name, {**shared, **own}, (), paths=where))
    if not cells:
        cells = [Cell(ONLY_CELL, shared, (), paths=paths)]
    names = [cell.name for cell in cells]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise document.error(("cells", twice), "is the name of two cells")
    seeds = _seeds(document, top.get("seeds"), names)
    cells = [Cell(one.name, one.flags, seeds[one.name], one.labels, one.paths) for one in cells]
    cells = [_with_changes(document, cell, changed) for cell in cells]
    classifier = top.get("classifier")
    if isinstance(classifier, dict):
        classifier = _mapping(document, ("classifier",))
    elif classifier is not None:
        classifier = _text(document, ("classifier",), classifier)
    evaluate, networks = _evaluation(document, classifier is not None)
    real = None
    if "real" in top:
        real = _mapping(document, ("real",))
        _known(document, ("real",), real, REAL_KEYS)
        if evaluate is None:
            raise document.error(("real",), "requires evaluate, which says how they are scored")
        if evaluate.get("metrics") == "none":
            raise document.error(("real",), "requires metrics, and evaluate names none")
        if not str(real.get("images", "1")).isdecimal():
            raise document.error(("real", "images"), f"must be a whole number (got {_kind(real['images'])})")
    published, of_real, source = _published(document, names)
    return Plan(
        document, _text(document, ("title",), top.get("title", file.stem)), script,
        tuple(str(_text(document, ("launch",), top.get("launch", ""))).split()), axes, tuple(cells), classifier,
        evaluate, networks, real, published, of_real, source,
    )  # fmt: skip


def _at(document: Document, path: tuple[str, ...]) -> Any:
    """The value at a path; None where there is none."""
    value = document.values
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _mapping(document: Document, path: tuple[str, ...]) -> dict[str, Any]:
    """The mapping at a path; empty where there is none."""
    value = _at(document, path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise document.error(path, f"must map names to values (got {_kind(value)})")
    return value


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), repr(value))


def _text(document: Document, path: tuple[str, ...], value: Any) -> str:
    if not isinstance(value, str):
        raise document.error(path, f"must be a text (got {_kind(value)})")
    return value


def _known(document: Document, path: tuple[str, ...], given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"must be one of {', '.join(known)}"
            raise document.error((*path, name), f"unknown key; {hint}")


def _grid(
    document: Document, shared: dict[str, Any], paths: dict[str, tuple[str, ...]]
) -> tuple[dict[str, list[str]], list[Cell]]:
    """The axes with their labels, and a cell for each combination, the last axis fastest."""
    axes: dict[str, list[tuple[str, dict[str, Any], dict[str, tuple[str, ...]]]]] = {}
    for axis, values in _mapping(document, ("grid",)).items():
        path = ("grid", axis)
        if isinstance(values, list) and values:
            named = {str(index): _text(document, (*path, str(index)), one) for index, one in enumerate(values)}
            axes[axis] = [(one, {axis: one}, {axis: (*path, index)}) for index, one in named.items()]
        elif isinstance(values, dict) and values:
            flags = {label: _mapping(document, (*path, label)) for label in values}
            axes[axis] = [(one, flags[one], {name: (*path, one, name) for name in flags[one]}) for one in values]
        else:
            raise document.error(path, "must be a list of values of this flag, or map labels to flags")
        labels = [label for label, _, _ in axes[axis]]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise document.error(path, f"has {twice!r} twice")
    count = 1
    for axis in axes:
        count *= len(axes[axis])
        if count > MOST_CELLS:
            raise document.error(("grid", axis), f"makes more than {MOST_CELLS:,} cells")
    cells = []
    for combination in itertools.product(*axes.values()) if axes else ():
        labels, flags, where = tuple(one[0] for one in combination), dict(shared), dict(paths)
        for _, of_axis, its_paths in combination:
            flags |= of_axis
            where |= its_paths
        cells.append(Cell(", ".join(labels), flags, (), labels, where))
    return {axis: [label for label, _, _ in values] for axis, values in axes.items()}, cells


def _with_changes(document: Document, cell: Cell, changes: Mapping[str, str]) -> Cell:
    """A cell with the flags of `--set`, over its own.

    Raises:
        UsageError: one that the grid varies.
    """
    for name, value in changes.items():
        if cell.flags.get(name) != value and cell.labels:
            raise UsageError(f"--set {name}={value}: the grid of {document.name} varies it; leave it out")
    return replace(cell, flags={**cell.flags, **changes})


def _seeds(document: Document, given: Any, cells: list[str]) -> dict[str, tuple[int, ...]]:
    """The seeds of each cell: of one list, or of a mapping from cells and `others`; 0 where none is given."""
    if given is None:
        return dict.fromkeys(cells, (0,))
    if isinstance(given, list):
        return dict.fromkeys(cells, _numbers(document, ("seeds",), given))
    if not isinstance(given, dict):
        raise document.error(("seeds",), f"must be a list of numbers such as [0, 1, 2] (got {_kind(given)})")
    _known(document, ("seeds",), given, [*cells, OTHERS])
    read = {name: _numbers(document, ("seeds", name), values) for name, values in given.items()}
    return {name: read.get(name, read.get(OTHERS, (0,))) for name in cells}


def _numbers(document: Document, path: tuple[str, ...], values: Any) -> tuple[int, ...]:
    if not (isinstance(values, list) and values and all(isinstance(one, str) and one.isdecimal() for one in values)):
        raise document.error(path, "must be a list of whole numbers, 0 or more, such as [0, 1, 2]")
    numbers = tuple(int(one) for one in values)
    if len(set(numbers)) < len(numbers) or max(numbers) >= 2**63:
        raise document.error(path, "must be different numbers below 2^63")
    return numbers


def _evaluation(document: Document, has_classifier: bool) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The options of the evaluation without the networks, and these; (None, ()) without an evaluation."""
    if _at(document, ("evaluate",)) is None:
        return None, ()
    options = {name.replace("-", "_"): value for name, value in _mapping(document, ("evaluate",)).items()}
    networks = options.pop("features", "inception")
    networks = networks if isinstance(networks, list) else [networks]
    for network in networks:
        if "{classifier}" in _text(document, ("evaluate", "features"), network) and not has_classifier:
            raise document.error(("evaluate", "features"), "{classifier} requires the key classifier")
    if not networks:
        raise document.error(("evaluate", "features"), "is empty; leave it out, or name a network")
    return options, tuple(networks)


def _published(document: Document, cells: list[str]) -> tuple[dict[str, dict[str, float]], dict[str, float], str]:
    given = _mapping(document, ("published",))
    _known(document, ("published",), given, PUBLISHED_KEYS)
    _known(document, ("published", "cells"), _mapping(document, ("published", "cells")), cells)
    figures = {name: _figures(document, ("published", "cells", name)) for name in given.get("cells") or {}}
    source = _text(document, ("published", "source"), given.get("source", ""))
    if (figures or given.get("real")) and not source:
        raise document.error(("published",), "must say its source")
    return figures, _figures(document, ("published", "real")), source


def _figures(document: Document, path: tuple[str, ...]) -> dict[str, float]:
    _known(document, path, _mapping(document, path), [*METRICS, BITS])
    found = {}
    for name, value in _mapping(document, path).items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            raise document.error((*path, name), f"must be a number (got {_kind(value)})") from None
    return found
