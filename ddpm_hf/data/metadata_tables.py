"""Tables beside images that say what they show: `metadata.csv`, `.jsonl` or `.parquet`, with labels or captions."""

import os
import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..common.errors import DataError
from .formats import suffix_of

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
    except (ValueError, OSError, pa.ArrowException) as error:
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
    import pandas

    columns = pandas.read_csv(path, nrows=0).columns
    texts = {name: str for name in columns if image_column_of(name)}  # "001" stays a string
    return pa.Table.from_pandas(pandas.read_csv(path, dtype=texts), preserve_index=False)


def _read_jsonl(path: str) -> pa.Table:
    import pyarrow.json

    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    options = pyarrow.json.ReadOptions(block_size=min(len(data) + 1, 2**31 - 1))  # lines may be of any length
    return pyarrow.json.read_json(pa.BufferReader(data), options)


def _read_parquet(path: str) -> pa.Table:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read()


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
