"""Tables beside images that say what they show: `metadata.csv`, `.jsonl` or `.parquet`, with labels or captions."""

import collections
import csv
import json
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..common.errors import DataError
from .formats import suffix_of

INTEGER, DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,17}"), re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def image_column_of(name: str) -> str | None:
    """The image column that a metadata file's column of file names becomes: `file_name` image, `x_file_name` x."""
    if name != "file_name" and not name.endswith("_file_name"):
        return None
    return name[: -len("_file_name")] or "image"


def read_metadata(path: str, folder: str) -> pa.Table:
    """A metadata file.

    Args:
        folder: in which it lies, relative to the root of the images, to which its file names become relative.

    Raises:
        DataError: it cannot be read, names no files, or names files outside of its folder.
    """
    try:
        table = READERS[suffix_of(path)](path)
    except (ValueError, OSError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    naming = [column for column in table.column_names if image_column_of(column)]
    if not naming:
        raise DataError(f"{path} has no column file_name or *_file_name that names the images; add one, or rename it")
    for column in naming:
        files = [_inside(path, folder, file) for file in table[column].to_pylist()]
        table = table.set_column(table.column_names.index(column), column, pa.array(files, pa.string()))
    return table


def _inside(path: str, folder: str, file: Any) -> str | None:
    """A file that metadata names, relative to the root; untrusted metadata must not reach outside of its folder."""
    if file is None or file == "":
        return None
    if not isinstance(file, str):
        raise DataError(f"{path} names the file {file!r}; file names are strings")
    normal = os.path.normpath(file).replace("\\", "/")
    if "://" in file or os.path.isabs(file) or normal.startswith("/") or normal.split("/")[0] == "..":
        raise DataError(f"{path} names the file {file!r}, which is not a relative path pointing inside its folder")
    return posixpath.join(folder, normal)


def _read_csv(path: str) -> pa.Table:
    """Cells as they stand: "None", "NA" and "01" are texts, which pandas would drop or make numbers of."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            rows = [row for row in ((_filled(row), reader.line_num) for row in reader) if row[0]]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError("it is empty")
    header = rows.pop(0)[0]
    columns = len(header)
    if twice := [name for name, count in collections.Counter(header).items() if count > 1]:
        raise ValueError(f"its first line names the column {twice[0]!r} twice")
    for row, line in rows:
        if len(row) > columns:
            raise ValueError(
                f"line {line} has {len(row)} fields, and the first line names {columns} columns; put a text with a"
                ' comma into quotes: "..."'
            )
    cells = zip(*([cell or None for cell in row] + [None] * (columns - len(row)) for row, _ in rows))
    by_column = list(cells) or [()] * columns
    return pa.table({name: _numbers(name, column) for name, column in zip(header, by_column)})


def _filled(row: list[str]) -> list[str]:
    """A row without the empty cells at its end, which spreadsheets add."""
    while row and not row[-1]:
        row.pop()
    return row


def _numbers(name: str, cells: Sequence[str | None]) -> pa.Array:
    """A column of texts, as numbers if each is written as a number is: of 01 and 1e3 nothing would tell the text."""
    texts = [cell for cell in cells if cell is not None]
    for pattern, number, kind in ((INTEGER, int, pa.int64()), (DECIMAL, float, pa.float64())):
        if texts and not image_column_of(name) and all(pattern.fullmatch(text) for text in texts):
            return pa.array([None if cell is None else number(cell) for cell in cells], kind)
    return pa.array(cells, pa.string())


def _read_jsonl(path: str) -> pa.Table:
    """Strings stay strings: pyarrow's reader makes timestamps of those that look like dates."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number} is not an object {{"file_name": ...}}')
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _read_parquet(path: str) -> pa.Table:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read()


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
