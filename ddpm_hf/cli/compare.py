"""`ddpm-hf compare`: evaluations side by side."""

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

ddpm-hf compare evaluation-small evaluation-large

ddpm-hf compare runs/a runs/b runs/c"""


def compare(
    evaluations: Annotated[
        list[Path],
        typer.Argument(metavar="EVALUATION...", help="Folders that `ddpm-hf evaluate --out` wrote, two or more."),
    ],
) -> None:
    """Set evaluations side by side, each figure with its 95% interval.

    A star marks a figure whose interval lies apart from all others, on the better side. Evaluations of another
    protocol, network, dataset or number of samples are refused: their figures do not compare.
    """
    from ..evaluation.compare import check_alike, columns_of, compare_table
    from ..evaluation.report import read_record

    names = [str(path) for path in evaluations]
    records = [read_record(path) for path in evaluations]
    if len(records) == 1 and len(records[0]["results"]) < 2:
        raise ValueError(f"{names[0]} is one evaluation; give two or more")
    check_alike(names, records)
    columns = columns_of(names, records)
    if not any(column.figures for column in columns):
        raise ValueError(f"{names[0]} has no figures; evaluate it with --metrics")
    typer.echo(compare_table(columns))
    stamp = records[0]["stamp"]
    if stamp.get("samples"):
        typer.echo(
            f"\n{stamp['samples']:,} samples against {stamp['real_images']:,} images of {stamp['dataset']}; protocol"
            f" {stamp['protocol']}, features {stamp['features']}"
        )
