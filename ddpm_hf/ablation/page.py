"""What an ablation writes into its folder: `table.csv`, `table.json`, and `report.html`, which needs no other file."""

import datetime
import html
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__
from ..common.files import read_json
from ..common.ownership import check_replaceable, replace_files
from ..evaluation.report import (
    METRICS_JSON,
    SHOWN,
    errors,
    facts_table,
    grid_of,
    html_page,
    new_figure,
    number,
    picture,
    svg,
)
from ..evaluation.results import read_metrics
from ..evaluation.sampling import AT_ONCE, SETTINGS
from .table import (
    HELD_OUT,
    REAL_ROW,
    Key,
    Mean,
    Row,
    Table,
    as_csv,
    as_json,
    grid_of_axes,
    held_out_loss,
    minutes,
    plan_copy,
    training_figure,
)
from .tasks import EVALUATION, CellRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PART = "ablation"  # of the folder's manifest
CSV, JSON, REPORT, PLAN = "table.csv", "table.json", "report.html", "plan.yaml"
STORES = "samples"  # of an evaluation's folder
# What a store of samples or a record of figures has alone
OF_ONE = {"title", "samples", "figures", "model", "precision", "conditions", "fit"}
POINTS = 200  # of a loss curve


def check_out(out: Path) -> None:
    """Raise UsageError for a folder that holds files of these names that this command did not write."""
    check_replaceable(out, PART, (CSV, JSON, REPORT, PLAN), "out")


def write_results(out: Path, table: Table, runs: Sequence[CellRun], page: bool = True) -> None:
    """Write the table of what is done so far, in all forms.

    Args:
        page: whether to make the report anew, which takes seconds; else one that is there stays.
    """
    text = json.dumps(as_json(table), indent=1, default=str) + "\n"
    files: dict[str, Callable[[], bytes]] = {
        CSV: as_csv(table).encode,
        JSON: text.encode,
        PLAN: lambda: plan_copy(table.plan),
    }
    if page:
        files[REPORT] = lambda: make_page(table, runs).encode()
    elif (out / REPORT).is_file():
        files[REPORT] = (out / REPORT).read_bytes
    replace_files(out, PART, files)


def make_page(table: Table, runs: Sequence[CellRun]) -> str:
    """The report as one HTML page."""
    plan = table.plan
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        f"<h1>{html.escape(plan.title)}</h1>",
        f"<p><small>ddpm_hf {__version__}, {date}; {html.escape(plan.document.name)}</small></p>",
        "<h2>Figures</h2>",
        "<p>95% intervals: over the seeds where there are several, else over the samples. A star marks a cell whose"
        " interval lies apart from all others, on the better side.</p>",
        cell_table(table),
        *(f"<p>{html.escape(line)}</p>" for line in table.warnings()),
        *grids(table),
        *forest(table),
        "<h2>Training</h2>",
        '<div class="plots">',
        *curves(runs),
        "</div>",
        "<h2>Samples</h2>",
        '<div class="plots">',
        *pictures(runs),
        "</div>",
        "<h2>Cells</h2>",
        *(cell_facts(run) for run in runs),
        f"<h2>Plan</h2><pre>{html.escape(plan_copy(plan).decode('utf-8', 'replace'))}</pre>",
    ]
    return html_page(plan.title, parts)


def cell_table(table: Table) -> str:
    """A row for each cell, published figures below ours; columns without figures are left out."""
    rows = table.rows
    columns = [(table.heading(key), [figure_cell(table, row, key) for row in rows]) for key in table.columns]
    for heading, read in (("held-out loss", held_out_loss), ("minutes of training", minutes)):
        columns.append((heading, [training_figure(row, read) for row in rows]))
    columns = [("seeds", [str(len(row.runs) or "") for row in rows]), *(one for one in columns if any(one[1]))]
    lines = ["<th></th>" + "".join(f'<th class="n">{html.escape(heading)}</th>' for heading, _ in columns)]
    for index, row in enumerate(rows):
        cells = "".join(f'<td class="n">{texts[index]}</td>' for _, texts in columns)
        lines.append(f"<td>{html.escape(row.name)}</td>{cells}")
    source = f"<p><small>Published: {html.escape(table.plan.source)}</small></p>" if table.plan.source else ""
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>{source}"


def figure_cell(table: Table, row: Row, key: Key) -> str:
    """A figure, its interval, and the published one."""
    mean, published = row.means.get(key), row.published.get(key.metric)
    star = " *" if mean and table.best(key) == row.name else ""
    low_high = f"<br><small>{number(mean.low)} to {number(mean.high)}</small>" if mean and mean.low is not None else ""
    theirs = f"<br><small>published {number(published)}</small>" if published is not None else ""
    return (number(mean.value) + star + low_high if mean else "") + theirs


def grids(table: Table) -> list[str]:
    """With two axes, a table of each column's values."""
    parts = []
    for key in table.columns:
        rows = grid_of_axes(table, key, lambda row, mean: number(mean.value))
        if rows:
            body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
            parts.append(
                f"<figure><figcaption>{html.escape(table.heading(key))}</figcaption><table>{body}</table></figure>"
            )
    return ['<div class="plots">', *parts, "</div>"] if parts else []


def forest(table: Table) -> list[str]:
    """A plot for each column: the cells with their intervals, published figures, the real images as a line."""
    plots = [svg(forest_plot(table, key)) for key in table.columns]
    return ['<div class="plots">', *plots, "</div>"] if plots else []


def forest_plot(table: Table, key: Key) -> "Figure":
    """A column's values, one below the other."""
    rows = [row for row in table.rows if row.name != REAL_ROW and key in row.means]
    figure, axes = new_figure()
    means: list[Mean] = [row.means[key] for row in rows]
    values = [mean.value for mean in means]
    lengths = errors(values, [mean.low for mean in means], [mean.high for mean in means])
    heights = range(len(rows))[::-1]
    axes.errorbar(values, heights, xerr=lengths, fmt="o", capsize=3, label="ours")
    theirs = [(row.published[key.metric], y) for row, y in zip(rows, heights) if key.metric in row.published]
    if theirs:
        axes.plot(*zip(*theirs), "x", label="published")
    real = next((row.means[key] for row in table.rows if row.name == REAL_ROW and key in row.means), None)
    if real is not None:
        axes.axvline(real.value, color="0.5", linestyle="--", label=REAL_ROW)
    axes.set_yticks(heights, [row.name for row in rows])
    axes.set(xlabel=table.heading(key))
    axes.legend(frameon=False, fontsize="small")
    figure.set_figheight(max(2.5, 1.2 + 0.25 * len(rows)))
    return figure


def curves(runs: Sequence[CellRun]) -> list[str]:
    """The losses of all runs against the step."""
    parts = []
    for name, said in (("loss", "training loss"), (HELD_OUT, "held-out loss")):
        lines = [(run, points) for run in runs if len(points := points_of(run, name)) > 1]
        if not lines:
            continue
        figure, axes = new_figure()
        colours: dict[str, str] = {}
        for run, points in lines:
            cell = run.cell.name if run.cell else ""
            first = cell not in colours
            colours.setdefault(cell, f"C{len(colours) % 10}")
            style = "-" if list(colours).index(cell) < 10 else "--"
            axes.plot(*zip(*points), style, color=colours[cell], linewidth=1, label=cell if first else None)
        axes.set(xlabel="step", ylabel=said, yscale="log")
        axes.legend(frameon=False, fontsize="x-small", ncols=1 + (len(colours) > 6))
        parts.append(svg(figure))
    return parts


def points_of(run: CellRun, name: str) -> list[tuple[int, float]]:
    """(step, value) of a figure of a training, thinned out to a few hundred means."""
    points = [(line["step"], line[name]) for line in read_metrics(run.model) if isinstance(line.get(name), float)]
    if len(points) <= POINTS:
        return points
    parts = [part for part in np.array_split(np.array(points), POINTS) if len(part)]
    return [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def pictures(runs: Sequence[CellRun]) -> list[str]:
    """A grid of samples of each run: the first ones of its first chain."""
    return [picture(grid_of(images), run.title) for run in runs if len(images := first_samples(run.folder))]


def first_samples(folder: Path) -> np.ndarray:
    """The first images of an evaluation's first set of samples, uint8 [N, C, H, W]; empty if there are none."""
    record = read_json(folder / EVALUATION / METRICS_JSON) or {}
    first: dict[str, Any] = next(iter(record.get("results", ())), {})
    for settings in sorted((folder / EVALUATION / STORES).glob(f"*/{SETTINGS}")):
        made, store = read_json(settings) or {}, settings.parent
        if any(made.get(name) != first.get(name) for name in {*made, *first} - OF_ONE):
            continue  # of another sampler, or of earlier settings
        found: list[np.ndarray] = []
        for path in sorted(store.glob("*.npy")):
            found.append(np.load(path)[:SHOWN])
            if sum(map(len, found)) >= SHOWN:
                break
        if found:
            return np.concatenate(found)[:SHOWN]
    return np.zeros((0, 1, AT_ONCE, AT_ONCE), np.uint8)


def cell_facts(run: CellRun) -> str:
    """What distinguishes a run, and its command line."""
    command = shlex.join(["ddpm-hf", *run.tasks[0].words])
    facts: dict[str, Any] = {"folder": run.folder, "command": command}
    return f"<details><summary>{html.escape(run.title)}</summary>{facts_table(facts)}</details>"
