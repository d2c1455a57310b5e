"""The table of an ablation: a row for each cell, its figures over its seeds with intervals, and published ones."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..common.files import read_json
from ..evaluation.compare import ALIKE, BITS, OF_A_LIKELIHOOD, best
from ..evaluation.compare import Column as ComparedColumn
from ..evaluation.report import in_columns, label, number
from .plan import Plan
from .tasks import TRAINING, CellRun, Chain

REAL_ROW = "real images"
HELD_OUT = "validation_loss"
# Student's t, two-sided 95%, for 1 to 30 degrees of freedom
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Key(NamedTuple):
    """Of a column: the metric, the network whose features it reads, and how was sampled."""

    metric: str
    network: str
    chain: str


@dataclass(frozen=True)
class Mean:
    """A figure over the seeds of a cell.

    Args:
        value: the mean.
        low, high: the ends of its 95% interval; None where there is none.
        interval: how it was computed.
        seeds: how many there are.
    """

    value: float
    low: float | None
    high: float | None
    interval: str
    seeds: int

    @property
    def text(self) -> str:
        """The value and its interval."""
        return (
            number(self.value)
            if self.low is None
            else f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"
        )


def mean_of(figures: Sequence[dict[str, Any]]) -> Mean:
    """One figure as it is; of several their mean, with Student's interval over the seeds.

    The spread over seeds includes that of the samples, for each seed has samples of its own.
    """
    if len(figures) == 1:
        one = figures[0]
        return Mean(one["value"], one.get("low"), one.get("high"), one.get("interval", ""), 1)
    values = [one["value"] for one in figures]
    count, value = len(values), math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((one - value) ** 2 for one in values) / (count - 1))
    half = student(count - 1) * deviation / math.sqrt(count)
    return Mean(value, value - half, value + half, f"Student's t over {count} seeds", count)


def student(degrees: int) -> float:
    """The two-sided 95% quantile of Student's t.

    >>> round(student(2), 3), round(student(1000), 2)
    (4.303, 1.96)
    """
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees)  # Cornish and Fisher's expansion


def figures_of(chain: Chain) -> dict[Key, dict[str, Any]]:
    """What the evaluations of a run found; empty before they are done. `stamp` says what a figure depends on."""
    found: dict[Key, dict[str, Any]] = {}
    for network, path in chain.results.items():
        record = read_json(path)
        if record is None:
            continue
        stamp = {said: record["stamp"].get(key) for key, said in ALIKE.items()}
        several = len(record["results"]) > 1
        for result in record["results"]:
            for name, figure in result["figures"].items():
                found[Key(name, network, result["title"] if several else "")] = {**figure, "stamp": stamp}
        if bound := record.get("likelihood"):
            of_bound = {said: bound.get(key) for key, said in OF_A_LIKELIHOOD.items()}
            found[Key(BITS, "", "")] = {**bound, "stamp": of_bound}
    return found


@dataclass
class Row:
    """A cell, or the real images.

    Args:
        runs: those of it that are done, with their figures and the record of their training.
        means: over them.
        published: others' figures by metric.
    """

    name: str
    labels: tuple[str, ...]
    seeds: int
    runs: list[dict[str, Any]]
    means: dict[Key, Mean]
    published: dict[str, float]


@dataclass
class Table:
    """All rows.

    Args:
        columns: those that any row has.
    """

    plan: Plan
    rows: list[Row]
    columns: list[Key]

    def heading(self, key: Key) -> str:
        """A column's name: the network and the chain where there are several."""
        networks, chains = ({getattr(one, part) for one in self.columns} - {""} for part in ("network", "chain"))
        parts = [part for part, all in ((key.network, networks), (key.chain, chains)) if part and len(all) > 1]
        name = f"{BITS} ↓" if key.metric == BITS else label(key.metric)
        return name + (f" ({', '.join(parts)})" if parts else "").replace(":{classifier}", "")

    def unlike(self, key: Key, cells: bool = False) -> list[str]:
        """What the figures of a column differ in, so that they do not compare; empty if they do.

        Args:
            cells: whether to leave the real images out.
        """
        rows = [row for row in self.rows if not cells or row.name != REAL_ROW]
        figures = [run["figures"][key] for row in rows for run in row.runs if key in run["figures"]]
        stamps = [figure.get("stamp", {}) for figure in figures]
        return [said for said in stamps[0] if len({str(one.get(said)) for one in stamps}) > 1] if stamps else []

    def warnings(self) -> list[str]:
        """A line for the columns whose figures do not compare."""
        differ = {self.heading(key): said for key in self.columns if (said := self.unlike(key))}
        if not differ:
            return []
        what = list(dict.fromkeys(said for several in differ.values() for said in several))
        return [f"{', '.join(differ)}: of different {' and '.join(what)}; these do not compare between all rows"]

    def best(self, key: Key) -> str | None:
        """The name of the cell whose interval is better than all others'; None if there is none."""
        if self.unlike(key, cells=True):
            return None
        cells = [row for row in self.rows if key in row.means and row.name != REAL_ROW]
        columns = [
            ComparedColumn(row.name, {key.metric: vars(row.means[key])}) for row in cells
        ]  # fmt: skip
        index = best(key.metric, columns)
        return None if index is None else cells[index].name


def make_table(plan: Plan, runs: Sequence[CellRun], real: Chain | None) -> Table:
    """The table of what is done so far."""
    rows = []
    for cell in plan.cells:
        of_cell = [run for run in runs if run.cell is not None and run.cell.name == cell.name]
        records = [_record(run) for run in of_cell if (run.folder / TRAINING).is_file()]
        rows.append(_row(cell.name, cell.labels, len(cell.seeds), records, plan.published.get(cell.name, {})))
    if real is not None:
        figures = figures_of(real)
        records = [{"seed": None, "folder": str(real.folder), "figures": figures, "training": {}}] if figures else []
        rows.append(_row(REAL_ROW, (), 0, records, plan.published_real))
    columns = list(dict.fromkeys(key for row in rows for key in row.means))
    order = {network: index for index, network in enumerate(plan.networks)}
    return Table(plan, rows, sorted(columns, key=lambda key: order.get(key.network, len(order))))


def _record(run: CellRun) -> dict[str, Any]:
    training = read_json(run.folder / TRAINING) or {}
    return {"seed": run.seed, "folder": str(run.folder), "figures": figures_of(run), "training": training}


def _row(
    name: str, labels: tuple[str, ...], seeds: int, runs: list[dict[str, Any]], published: dict[str, float]
) -> Row:
    keys = dict.fromkeys(key for run in runs for key in run["figures"])
    means = {key: mean_of([run["figures"][key] for run in runs if key in run["figures"]]) for key in keys}
    return Row(name, labels, seeds, runs, means, published)


def training_figure(row: Row, read: Callable[[dict[str, Any]], Any]) -> str:
    """The mean over a row's runs of a figure of their training; empty where none has it."""
    values = [value for run in row.runs if (value := read(run["training"])) is not None]
    return number(math.fsum(values) / len(values)) if values else ""


def minutes(training: dict[str, Any]) -> float | None:
    """How long a training took."""
    return round(training["seconds"] / 60, 1) if training.get("seconds") else None


def held_out_loss(training: dict[str, Any]) -> float | None:
    """The last one that was measured."""
    return (training.get("last") or {}).get(HELD_OUT)


def as_text(table: Table) -> str:
    """For the terminal: a row for each cell; with two axes, for each column also the grid of its values."""
    shown = list(table.columns)
    head = ["", "seeds"]
    for key in shown:
        head += [table.heading(key), "published"]
    rows: list[list[str]] = [[*head, "held-out loss", "minutes"]]
    for row in table.rows:
        done = f"{len(row.runs)} of {row.seeds}" if len(row.runs) < row.seeds else str(row.seeds or "")
        cells = [row.name, done]
        for key in shown:
            mean = row.means.get(key)
            star = " *" if mean and table.best(key) == row.name else ""
            cells += [mean.text + star if mean else "", _published(row, key, shown)]
        rows.append([*cells, training_figure(row, held_out_loss), training_figure(row, minutes)])
    return "\n".join([in_columns(rows), *table.warnings()])


def _published(row: Row, key: Key, shown: Sequence[Key]) -> str:
    """The published figure, beside the first column of its metric."""
    first = next(one for one in shown if one.metric == key.metric)
    return number(row.published.get(key.metric)) if key == first else ""


def grid_of_axes(table: Table, key: Key, text: Callable[[Row, Mean], str]) -> list[list[str]] | None:
    """With two axes, the values of a column: rows of the first, columns of the second; else None."""
    axes = list(table.plan.axes.values())
    if len(axes) != 2:
        return None
    by_labels = {row.labels: row for row in table.rows}
    rows = [["", *axes[1]]]
    for one in axes[0]:
        cells = [by_labels[(one, other)] for other in axes[1]]
        rows.append([one, *(text(row, row.means[key]) if key in row.means else "" for row in cells)])
    return rows


def as_csv(table: Table) -> str:
    """A line for each figure of each cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    axes = list(table.plan.axes)
    names = ["cell", *axes, "metric", "network", "sampler", "value", "low", "high", "interval", "seeds", "published"]
    writer.writerow(names)
    for row in table.rows:
        labels = row.labels or ("",) * len(axes)
        for key, mean in row.means.items():
            figures = [mean.value, mean.low, mean.high, mean.interval, mean.seeds]
            writer.writerow([row.name, *labels, *key, *figures, row.published.get(key.metric)])
    return buffer.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    """All of it: figures of each run, means, settings, published figures."""
    rows = []
    for row in table.rows:
        runs = [{**run, "figures": _listed(run["figures"])} for run in row.runs]
        means = [{**key._asdict(), **vars(mean)} for key, mean in row.means.items()]
        rows.append({"name": row.name, "labels": row.labels, "means": means, "published": row.published, "runs": runs})
    plan = table.plan
    return {
        "version": 1, "title": plan.title, "plan": plan.document.name, "axes": plan.axes, "source": plan.source,
        "rows": rows,
    }  # fmt: skip


def _listed(figures: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**key._asdict(), **figure} for key, figure in figures.items()]


def plan_copy(plan: Plan) -> bytes:
    """The plan's text."""
    return Path(plan.document.name).read_bytes()
