"""The pictures of a model card."""

import io
import json
from pathlib import Path
from typing import Any

from ...common.files import read_json, write_atomically
from ...common.layout import CHAIN, GRIDS, LOSS_CURVE, RUN_FILE, SAMPLES, is_record, matching
from ...common.ownership import claim_files, may_write, release_files, remove
from ...evaluation.results import read_metrics


def write_pictures(folder: Path) -> None:
    """Write a run's newest grid and chain up to the saved step, and its loss curve, under fixed names."""
    metrics, run = read_metrics(folder), read_json(folder / RUN_FILE) if is_record(folder, RUN_FILE) else None
    run = run if run is not None and "step" in run else None
    grids = {int(name[len("samples/step-") : -len(".png")]): folder / name for name in matching(folder, GRIDS)}
    newest = max((step for step in grids if run is None or step <= run["step"]), default=None)
    for kind, target in (("step", SAMPLES), ("chain", CHAIN)):
        source = None if newest is None else grids[newest].with_name(grids[newest].name.replace("step", kind))
        if source is not None and source.is_file():
            write_picture(folder, target, source.read_bytes())
        elif grids and may_write(folder, target):  # the existing picture is of other weights
            remove(folder, target)
            release_files(folder, [target])
    if run is not None and run.get("pictures_step") != newest and (grids or may_write(folder, RUN_FILE)):
        write_atomically(folder / RUN_FILE, json.dumps({**run, "pictures_step": newest}, indent=1) + "\n")
    if any("loss" in line for line in metrics):
        write_picture(folder, LOSS_CURVE, loss_curve(metrics))


def write_picture(folder: Path, name: str, data: bytes) -> None:
    """Write a picture of the card, unless another program's file has its name."""
    if may_write(folder, name):
        claim_files(folder, [name])
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, data)


def loss_curve(metrics: list[dict[str, Any]]) -> bytes:
    """A PNG of training and held-out loss over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        """0.2 instead of 2 × 10⁻¹, at the ticks that have room for a label."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure = Figure(figsize=(7, 3), dpi=120)
    axes = figure.add_axes((0.1, 0.16, 0.87, 0.74))  # a computed layout would double the time
    for name, label in (("loss", "training"), ("validation_loss", "held out")):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points), label=label, linewidth=1, marker="." if len(points) < 20 else None)
    positive = all(line.get("loss", 1) > 0 for line in metrics)
    axes.set(xlabel="optimizer step", yscale="log" if positive else "linear")
    axes.set_title("loss", loc="left", fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # it is a MaxNLocator
    if positive:
        axes.yaxis.set_major_formatter(PlainNumbers())
        axes.yaxis.set_minor_formatter(PlainNumbers(minor_thresholds=(2, 0.6)))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
