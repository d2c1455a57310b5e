"""A column of captions: whether it holds strings, and what looks wrong about them."""

from collections.abc import Iterable
from typing import Any

from ..common.errors import DataError
from .rows import Rows

STRING_TYPES = ("string", "large_string", "string_view", "null")  # the names of string types in `datasets`


def check_captions(rows: Rows) -> list[str]:
    """Check the captions before anything is trained: one pass over their column, without an image.

    Returns: what looks wrong, a line each, for the log.

    Raises:
        DataError: captions that are not strings or lists of strings; or all of them are empty.
    """
    if rows.caption_column is None:
        return []
    _check_type(rows)
    if not hasattr(rows.dataset, "__len__"):  # a stream reports a bad caption when it reads it
        return []
    values = rows.dataset[rows.caption_column]
    empty = count_empty(values, rows)
    if empty == len(values):
        raise DataError(
            f"all {empty} captions in column {rows.caption_column!r} of {rows.name} are empty; name another"
            f" --caption_column{_text_columns(rows)}, or train without captions, with train_unconditional.py"
        )
    return [f"{empty} of {len(values)} captions are empty, and train as the empty prompt"] if empty else []


def count_empty(values: Iterable[Any], rows: Rows) -> int:
    """How many images have no caption: None, a blank string, or a list of only these.

    Raises:
        DataError: a caption that is neither a string nor a list of strings, with its row.
    """
    empty = 0
    for index, value in enumerate(values):
        texts = value if isinstance(value, (list, tuple)) else [value]
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"the caption of {rows.number_of(index)} of {rows.name} is {_short(value)}; captions are strings"
                    f" or lists of strings: name another --caption_column{_text_columns(rows)}"
                )
        empty += not any(text and text.strip() for text in texts)
    return empty


def _check_type(rows: Rows) -> None:
    """Raise DataError for a column that is declared to hold anything but strings."""
    feature = (getattr(rows.dataset, "features", None) or {}).get(rows.caption_column)
    inner = _item(feature)
    if inner is not None and getattr(inner, "dtype", None) not in STRING_TYPES:
        kind = getattr(inner, "dtype", None) or type(inner).__name__
        raise DataError(
            f"column {rows.caption_column!r} of {rows.name} holds {kind}; captions are strings or lists of strings:"
            f" name another --caption_column{_text_columns(rows)}"
        )


def _item(feature: Any) -> Any:
    """What a column's lists hold, or the column itself."""
    return feature.feature if hasattr(feature, "feature") else feature


def _text_columns(rows: Rows) -> str:
    """The columns that do hold strings, for a message."""
    features = getattr(rows.dataset, "features", None) or {}
    names = [
        name
        for name, feature in features.items()
        if name != rows.caption_column and getattr(_item(feature), "dtype", None) in STRING_TYPES[:-1]
    ]
    return f" (strings are in {', '.join(names)})" if names else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:80] + "..."
