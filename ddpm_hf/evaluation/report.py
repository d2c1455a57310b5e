"""What an evaluation writes: `metrics.json`, and `report.html`, one file that needs no other."""

import base64
import datetime
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._version import __version__
from ..common.layout import json_or_none
from ..common.ownership import check_replaceable, replace_files
from ..common.pictures import image_grid
from .evaluate import Reference, Samples, stamp
from .metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

VERSION = 1  # of metrics.json
METRICS_JSON, REPORT = "metrics.json", "report.html"
PART = "evaluation"  # of the folder's manifest
SHOWN = 64  # images in a grid
# What chains may differ in, by its label, and the axis of its plot
SWEPT = {"ema_std": "the width of the average", "network_calls": "network calls for an image"}
WIDE = 10  # from the least figure of a plot to the largest: the axis is logarithmic
PAIRS = 16  # of a sample and its nearest real image


class Sections(NamedTuple):
    """Results besides the metrics.

    Args:
        record: for `metrics.json`, by their names.
        plots: for the report, by their titles.
        text: for the terminal.
    """

    record: dict[str, Any] = {}
    plots: "dict[str, Figure]" = {}
    text: str = ""


NOTHING_MORE = Sections()


def check_out(out: Path) -> None:
    """Raise ValueError for a folder that cannot be written to, or that holds such files written by others."""
    import os

    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"--out {out} cannot be written; name another folder")
    check_replaceable(out, PART, (METRICS_JSON, REPORT), "out")


def as_record(
    model: str, reference: Reference, results: Sequence[dict[str, Any]], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `metrics.json`: the stamp, and for each way of sampling its figures."""
    return {
        "version": VERSION,
        "ddpm_hf": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "model": model,
        "stamp": stamp(reference, results[0]["samples"] if results else None),
        "seed": reference.measure.seed,
        "results": list(results),
        **(more or {}),
    }


def write_report(
    out: Path,
    model: str,
    reference: Reference,
    everything: Sequence[Samples],
    results: Sequence[dict[str, Any]],
    more: Sections = NOTHING_MORE,
) -> str:
    """Write `metrics.json` and `report.html`.

    Args:
        results: as `evaluate` returns them, one for each of `everything`.
        more: other results, such as the likelihood.

    Returns: the table for the terminal.
    """
    record = as_record(model, reference, results, more.record)
    page = make_page(record, reference, everything, more)
    files: dict[str, Callable[[], bytes]] = {
        METRICS_JSON: lambda: (json.dumps(record, indent=1, default=_plain) + "\n").encode(),
        REPORT: page.encode,
    }
    replace_files(out, PART, files)
    parts = [table(record) if results else "", more.text, f"{out / METRICS_JSON}, {out / REPORT}"]
    return "\n\n".join(part for part in parts if part)


def _plain(value: Any) -> Any:
    """A value of NumPy as one of Python."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def read_record(path: Path) -> dict[str, Any]:
    """The `metrics.json` of an evaluation's folder, or of a run's folder with an evaluation in it.

    Raises:
        ValueError: there is none.
    """
    places = [path] if path.is_file() else [path / METRICS_JSON, path / "evaluation" / METRICS_JSON]
    for place in places:
        record = json_or_none(place)
        if isinstance(record, dict) and record.get("version") == VERSION:
            if not _is_complete(record):
                raise ValueError(f"{place} is damaged: evaluate again with the same command, which keeps the samples")
            return record
    raise ValueError(f"{path} holds no {METRICS_JSON} of ddpm-hf evaluate; give the --out of one")


def _is_complete(record: dict[str, Any]) -> bool:
    """Whether a record has all that `as_record` writes of its figures."""
    results, bound = record.get("results"), record.get("likelihood")
    if not isinstance(record.get("stamp"), dict) or not isinstance(results, list):
        return False
    whole = [isinstance(one, dict) and isinstance(one.get("figures"), dict) and "title" in one for one in results]
    if not all(whole) or not (bound is None or isinstance(bound, dict)):
        return False
    figures = [figure for one in results for figure in one["figures"].values()] + [bound] * (bound is not None)
    return all(isinstance(one, dict) and {"value", "low", "high"} <= one.keys() for one in figures)


# For the terminal


def number(value: float | None) -> str:
    """A figure in five digits.

    >>> number(12.3456), number(0.000123456), number(None)
    ('12.346', '0.00012346', '')
    """
    return "" if value is None else f"{value:.5g}"


def interval(figure: dict[str, Any]) -> str:
    """A figure's interval."""
    return "" if figure.get("low") is None else f"{number(figure['low'])} to {number(figure['high'])}"


def table(record: dict[str, Any]) -> str:
    """All figures, one a line, in columns."""
    rows = [("", "metric", "value", "95% interval", "by", "note")]
    for result in record["results"]:
        for name, figure in result["figures"].items():
            value, note = number(figure["value"]), figure.get("note", "")
            rows.append((result["title"], label(name), value, interval(figure), figure["interval"], note))
    return in_columns(rows)


def label(name: str) -> str:
    """A metric's name, its unit, and which way is better."""
    metric = METRICS.get(name)
    if metric is None:
        return name
    arrow = {True: " ↓", False: " ↑", None: ""}[metric.lower_is_better]
    return metric.title + arrow


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, their columns aligned; columns without text are left out.

    >>> print(in_columns([("a", "", "b"), ("long", "", "c")]))
    a     b
    long  c
    """
    columns = [column for column in zip(*rows) if any(column[1:]) or len(column) == 1]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in zip(*columns))


# The page

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#1a1a1a;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em .25em 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid #999}td.n,th.n{text-align:right}td.n{font-variant-numeric:tabular-nums}
.plots{display:flex;flex-wrap:wrap;gap:1em}.plots>*{max-width:100%}figure{margin:0}
figcaption,small{color:#555}img{image-rendering:pixelated;max-width:100%}svg{max-width:100%;height:auto}
pre{white-space:pre-wrap}
"""


def make_page(record: dict[str, Any], reference: Reference, everything: Sequence[Samples], more: Sections) -> str:
    """The report as one HTML page, with its pictures in it."""
    title = f"Evaluation of {record['model']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p><small>ddpm_hf {record['ddpm_hf']}, {record['date']}</small></p>",
        "<h2>Figures</h2>",
        figure_table(record) if record["results"] else "",
        f"<pre>{html.escape(more.text)}</pre>" if more.text else "",
        *sweep_section(record),
        "<h2>How it was measured</h2>",
        facts_table({**record["stamp"], "seed": record["seed"]}),
        chain_table(record["results"]),
        "<h2>Images</h2>",
        '<div class="plots">',
        picture(grid_of(reference.images.read(spread(reference.images.count))), f"Real: {reference.images.name}"),
        *(picture(grid_of(one.take(range(min(SHOWN, one.count)))), f"Samples: {one.title}") for one in everything),
        "</div>",
    ]
    for one, result in zip(everything, record["results"]):
        parts += nearest_section(reference, one, result) + picture_section(reference, one)
    for name, figure in more.plots.items():
        parts += [f"<h2>{html.escape(name)}</h2>", svg(figure)]
    return html_page(title, parts)


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page that needs no other file, of parts that are HTML."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def figure_table(record: dict[str, Any]) -> str:
    """All figures with their intervals."""
    rows = [
        '<tr><th></th><th>metric</th><th class="n">value</th><th>95% interval</th><th>interval by</th><th></th></tr>'
    ]
    for result in record["results"]:
        for index, (name, figure) in enumerate(result["figures"].items()):
            first = html.escape(result["title"]) if index == 0 else ""
            rows.append(
                f'<tr><td>{first}</td><td>{html.escape(label(name))}</td><td class="n">{number(figure["value"])}</td>'
                f"<td>{interval(figure)}</td><td><small>{html.escape(figure['interval'])}</small></td>"
                f"<td><small>{html.escape(figure.get('note', ''))}</small></td></tr>"
            )
    return f"<table>{''.join(rows)}</table>"


def facts_table(facts: dict[str, Any]) -> str:
    """Names and values."""
    rows = [
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    ]
    return f"<table>{''.join(rows)}</table>"


def chain_table(results: Sequence[dict[str, Any]]) -> str:
    """How each set of samples was made."""
    known = [{name: value for name, value in one.items() if name not in ("title", "figures")} for one in results]
    names = list(dict.fromkeys(name for one in known for name in one))
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    rows = ["".join(f"<td>{html.escape(str(one.get(name, '')))}</td>" for name in names) for one in known]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>" if known else ""


def sweep_section(record: dict[str, Any]) -> list[str]:
    """Quality against what was varied, where several chains, or averages of the weights, were sampled."""
    for name, axis in SWEPT.items():
        results = [one for one in record["results"] if one.get(name)]
        if len({one[name] for one in results}) > 1:
            baseline = next((one for one in record["results"] if one.get(name) == 0), None)
            plots = [svg(sweep_plot(results, name, metric, baseline)) for metric in results[0]["figures"]]
            return [f"<h2>Quality against {axis}</h2>", '<div class="plots">', *plots, "</div>"]
    return []


def sweep_plot(
    results: Sequence[dict[str, Any]], varied: str, name: str, baseline: dict[str, Any] | None = None
) -> "Figure":
    """A metric against what was varied, a line for each sampler, with its intervals; `baseline` as a level.

    Its axis is logarithmic where the figures are positive and the largest is many times the least.
    """
    figure, axes = new_figure()
    samplers = dict.fromkeys(one["sampler"] for one in results)
    for number, sampler in enumerate(samplers):
        line = sorted((one for one in results if one["sampler"] == sampler), key=lambda one: one[varied])
        beside = 1.015 ** (number - (len(samplers) - 1) / 2)  # intervals at the same place would cover each other
        x = [one[varied] * beside for one in line]
        y, low, high = ([one["figures"][name][key] for one in line] for key in ("value", "low", "high"))
        axes.errorbar(x, y, yerr=errors(y, low, high), marker="o", capsize=3, label=sampler)
    if baseline is not None:
        axes.axhline(baseline["figures"][name]["value"], color="gray", linestyle="dashed", label="the run's weights")
    axes.set(xscale="log", xlabel=SWEPT[varied], ylabel=label(name))
    there = sorted({one[varied] for one in results})
    axes.set_xticks(there, map(str, there))
    axes.minorticks_off()
    values = [one["figures"][name]["value"] for one in results]
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # beside the points
    return figure


def errors(values: Sequence[float], low: Sequence[float | None], high: Sequence[float | None]) -> np.ndarray:
    """Lengths of error bars [2, N]: zero where there is no interval."""
    below = [0.0 if one is None else max(0.0, value - one) for value, one in zip(values, low)]
    above = [0.0 if one is None else max(0.0, one - value) for value, one in zip(values, high)]
    return np.array([below, above])


def nearest_section(reference: Reference, samples: Samples, result: dict[str, Any]) -> list[str]:
    """Samples beside their nearest training images, for the metrics that name them."""
    parts = []
    for name, figure in result["figures"].items():
        pairs = (figure.get("details") or {}).get("nearest")
        if not pairs:
            continue
        pairs = pairs[:PAIRS]
        ours = samples.take([int(pair[0]) for pair in pairs])
        real = reference.images.read([int(pair[1]) for pair in pairs])
        both = np.concatenate([ours, real])
        parts += [
            f"<h2>Nearest training images ({html.escape(label(name))}, {html.escape(result['title'])})</h2>",
            picture(grid_of(both, columns=len(pairs)), "Above samples, below the training image nearest to each"),
        ]
    return parts


def picture_section(reference: Reference, samples: Samples) -> list[str]:
    """The plots that metrics on pixels have."""
    parts = []
    for row in reference.measure.rows.values():
        if row.picture is not None:
            drawn = row.picture(reference.summary(reference.images, row), samples.summary(row))
            parts += [f"<h2>{html.escape(row.label.capitalize())} ({html.escape(samples.title)})</h2>", svg(drawn)]
    return parts


def spread(count: int) -> list[int]:
    """Indices of some of `count` images, evenly spread."""
    shown = min(SHOWN, count)
    return [index * count // shown for index in range(shown)]


def grid_of(images: np.ndarray, columns: int | None = None) -> "Image.Image":
    """Images uint8 [N, C, H, W] as one picture."""
    from PIL import Image

    cells = [Image.fromarray(one[0] if len(one) == 1 else one.transpose(1, 2, 0)) for one in np.asarray(images)]
    return image_grid(cells, columns, scale=max(1, 56 // cells[0].width))


def picture(image: "Image.Image", caption: str) -> str:
    """A PIL picture with a caption, for the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    said = html.escape(caption)
    return f'<figure><img alt="{said}" src="data:image/png;base64,{data}"><figcaption>{said}</figcaption></figure>'


def new_figure() -> tuple["Figure", Any]:
    """A plot and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def svg(figure: "Figure") -> str:
    """A plot as SVG, for the page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"
