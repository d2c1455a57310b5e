"""A column of file names in place of images: the files become the images, of the dataset's folder alone."""

import os
from typing import Any

from ..common.errors import DataError

INSPECTED = 100  # of the names, to see whether they name files


def open_file_names(dataset: Any, column: str, folder: str | None, source: str) -> Any:
    """The dataset with the column's file names as images that are not decoded yet.

    Args:
        folder: the dataset's, which relative names begin at; None for one of the Hub.

    Raises:
        DataError: a stream, an address, a relative name without a folder, or texts that name no files.
    """
    import datasets

    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"column {column!r} of {source} holds names of files, which a stream does not open; leave --streaming out"
        )
    names = dataset[column][:]
    files = [_located(name, column, folder, source) for name in names]
    there = [(name, file) for name, file in zip(names, files) if file is not None][:INSPECTED]
    if there and not any(os.path.exists(file) for _, file in there):
        raise DataError(
            f"column {column!r} of {source} holds texts that name no files, such as {there[0][0][:80]!r}; name the"
            " column of the images with --image_column"
        )
    images = [None if file is None else {"bytes": None, "path": file} for file in files]
    feature = datasets.Image(decode=False)
    return dataset.remove_columns(column).add_column(column, images, feature=feature)


def _located(name: str | None, column: str, folder: str | None, source: str) -> str | None:
    if name is None:
        return None
    if "://" in name:
        raise DataError(
            f"column {column!r} of {source} holds addresses, such as {name[:80]!r}; download the images into a folder"
        )
    if folder is None and not os.path.isabs(name):
        raise DataError(f"column {column!r} of {source} names the file {name[:80]!r}, which is not on this machine")
    return os.path.normpath(os.path.join(folder or "", name))
