"""Several evaluations side by side, where they measured alike."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..common.errors import UsageError
from .metrics import METRICS
from .report import in_columns, label, number

# What must be equal in two evaluations, and its name for people; numbers of samples bias FID and its like
ALIKE = {
    "protocol": "protocol",
    "features_fingerprint": "features",
    "dataset_fingerprint": "real images",
    "samples": "number of samples",
}
HELD_OUT = {"held_out_fingerprint": "held-out images"}
LIKELIHOOD, BITS = "likelihood", "bits/dim"  # its row, here and in an ablation's table; less is better
# What must be equal in two likelihoods
OF_A_LIKELIHOOD = {
    "held_out": "likelihoods of held-out images:",
    "images": "number of images of the likelihood",
    "timesteps": "steps of the chain of the likelihood",
    "unit": "unit of the likelihood",
}


class Column(NamedTuple):
    """One set of samples of one evaluation."""

    name: str
    figures: dict[str, dict[str, Any]]


def reads_held_out(record: dict[str, Any]) -> bool:
    """Whether an evaluation has figures that depend on the held-out images."""
    bound = record.get("likelihood") or {}
    named = {name for result in record["results"] for name in result["figures"]}
    return bool(bound.get("held_out")) or any("train" in METRICS[name].needs for name in named & METRICS.keys())


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """What two evaluations that do not compare differ in, for people, and the two values."""
    both = reads_held_out(one) and reads_held_out(other)
    for key, said in {**ALIKE, **(HELD_OUT if both else {})}.items():
        values = [record["stamp"].get(key) for record in (one, other)]
        if values[0] == values[1]:
            continue
        if key.endswith("_fingerprint"):
            shown = [record["stamp"].get(key.removesuffix("_fingerprint")) for record in (one, other)]
            values = [value if title is None else f"{title} ({value})" for title, value in zip(shown, values)]
        yield said, values
    bounds = [record["likelihood"] for record in (one, other) if record.get("likelihood")]
    if len(bounds) == 2:
        for key, said in OF_A_LIKELIHOOD.items():
            if bounds[0].get(key) != bounds[1].get(key):
                yield said, [bound.get(key) for bound in bounds]


def check_alike(names: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """Raise UsageError for evaluations whose figures do not compare: the message says what differs."""
    for (name, record), (another, other) in itertools.combinations(zip(names, records), 2):
        for said, values in differences(record, other):
            raise UsageError(
                f"{name} and {another} do not compare: {said} {values[0]} and {values[1]}; evaluate one of them as the"
                " other was"
            )


def columns_of(names: Sequence[str], records: Sequence[dict[str, Any]]) -> list[Column]:
    """A column for each set of samples; its name says the sampler where an evaluation has several."""
    columns = []
    for name, record in zip(names, records):
        for result in record["results"]:
            shown = f"{name} ({result['title']})" if len(record["results"]) > 1 else name
            columns.append(Column(shown, result["figures"]))
        bound = record.get("likelihood")
        if bound is not None and len(record["results"]) == 1:
            columns[-1] = Column(name, {**columns[-1].figures, LIKELIHOOD: bound})
        elif bound is not None:
            columns.append(Column(name, {LIKELIHOOD: bound}))
    return columns


def best(name: str, columns: Sequence[Column]) -> int | None:
    """The column whose figure is better than all others, its interval apart from theirs; None if there is none."""
    lower = METRICS[name].lower_is_better if name in METRICS else True if name in (LIKELIHOOD, BITS) else None
    if lower is None or len(columns) < 2:
        return None
    sign = 1 if lower else -1
    bounds = []
    for index, column in enumerate(columns):
        figure = column.figures.get(name)
        if figure is not None and figure["low"] is not None:
            ends = sorted((sign * figure["low"], sign * figure["high"]))
            bounds.append((*ends, index))
    bounds.sort()
    return bounds[0][2] if len(bounds) > 1 and bounds[0][1] < bounds[1][0] else None


def compare_table(columns: Sequence[Column]) -> str:
    """Figures with their intervals, a metric a line; a star marks one whose interval is better than all others'."""
    metrics = list(dict.fromkeys(name for column in columns for name in column.figures))
    rows: list[Sequence[str]] = [("", *(column.name for column in columns))]
    for name in metrics:
        winner, cells = best(name, columns), []
        for index, column in enumerate(columns):
            figure = column.figures.get(name)
            cells.append(_cell(figure) + " *" * (index == winner) if figure else "")
        unit = next((column.figures[name].get("unit") for column in columns if name in column.figures), None)
        rows.append((f"{name} ({unit})" if name == LIKELIHOOD else label(name), *cells))
    return in_columns(rows)


def _cell(figure: dict[str, Any]) -> str:
    if figure["low"] is None:
        return number(figure["value"])
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"
