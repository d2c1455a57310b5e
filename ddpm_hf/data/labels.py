"""The classes of a label column: their names, the ids of an image's label, and what looks wrong about them."""

import math
import numbers
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..common.errors import DataError
from ..common.randomness import StepKeys, to_device
from .rows import Rows

SHOWN = 8  # names in a message


def shortened(names: Sequence[str]) -> str:
    """Some names for a message: the first few, and how many more there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + rest


def class_name(value: Any) -> str | None:
    """The name of a label's class: strings as they are, booleans and integers (also 2.0) as written; else None."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    is_integer = isinstance(value, numbers.Integral) or (isinstance(value, numbers.Real) and float(value).is_integer())
    return str(int(value)) if is_integer else None


def is_missing(value: Any) -> bool:
    """Whether a label stands for no label: None, NaN, or a blank string."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def name_classes(values: Sequence[Any], column: str, source: str) -> list[str]:
    """The names of the classes in a column without declared names: its distinct values, in the order of their ids.

    Strings are sorted alphabetically, integers by their value: labels 10, 20 and 30 are three classes of these names.

    Raises:
        DataError: a label that is missing, negative, or of a type that cannot name a class.
    """
    distinct = {}
    for row, value in enumerate(values):
        name = class_name(value)
        if name is None:
            raise DataError(_no_class(value, row, column, source))
        if name not in distinct:
            if not isinstance(value, str) and value < 0:
                raise DataError(
                    f"label {value} in column {column!r} of {source} (row {row}): integer labels run from 0, and a"
                    " negative one usually means that there is none; remove such rows, or give the classes as strings"
                )
            distinct[name] = value
    if not distinct:
        raise DataError(f"column {column!r} of {source} holds no labels")
    kinds = {isinstance(value, str) for value in distinct.values()}
    if len(kinds) > 1:
        raise DataError(f"column {column!r} of {source} mixes strings and numbers; give all labels as strings")
    return sorted(distinct, key=None if kinds == {True} else distinct.__getitem__)


def _no_class(value: Any, row: int, column: str, source: str) -> str:
    """Why a cell is not a label."""
    if is_missing(value):
        return (
            f"row {row} of {source} has no label: column {column!r} holds {value!r}; remove such rows, or give them a"
            " class of their own"
        )
    text = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
    return (
        f"label {text} ({type(value).__name__}) in column {column!r} of {source} (row {row}):"
        " labels are integers from 0, strings or booleans"
    )


def label_ids(values: Sequence[Any], rows: Rows, indices: Sequence[int] | None = None) -> np.ndarray:
    """The ids, int64 [N], of labels as they stand in the column.

    An integer is an id where the dataset declares its classes (`ClassLabel`), else the name of its class.

    Args:
        indices: the labels' rows in `rows`, to name a bad one; by default all rows.

    Raises:
        DataError: a label outside the classes, with its row.
    """
    known = {name: number for number, name in enumerate(rows.label_names)}
    ids = []
    for index, value in enumerate(values):
        if rows.labels_are_names:
            number = known.get(class_name(value) or "", -1)
        elif isinstance(value, str):
            number = known.get(value, -1)
        else:
            number = int(value) if isinstance(value, numbers.Integral) else -1
        if not 0 <= number < len(known):
            row = rows.number_of(index if indices is None else indices[index])
            where = f"label {value!r} in column {rows.label_column!r} of {rows.name} (row {row})"
            missing = is_missing(value) or (not rows.labels_are_names and not isinstance(value, str) and value == -1)
            reason = "means that there is none; remove such rows, or label them" if missing else "must be one of them"
            raise DataError(f"{where}: the dataset has {len(known)} classes, {shortened(rows.label_names)}; {reason}")
        ids.append(number)
    return np.array(ids, dtype=np.int64)


def classes_of_resumed(rows: Rows, resumed: Any) -> list[str]:
    """The class names to continue with: the resumed run's, where it numbered its classes from 0 to the highest label.

    Earlier versions made a class of every integer up to the highest; such a run keeps its embeddings.
    """
    numbered = isinstance(resumed, list) and resumed == [str(number) for number in range(len(resumed))]
    if rows.labels_are_names and numbered and set(rows.label_names) <= set(resumed):
        return list(resumed)
    return rows.label_names


def trained_classes(labels: np.ndarray | None, count: int) -> list[int] | None:
    """The ids of the classes that some image has, where not all `count` have one; else None.

    Args:
        labels: the training images' ids [N]; None for a stream, all of whose classes count as trained.
    """
    if labels is None:
        return None
    trained = np.unique(labels).tolist()
    return trained if len(trained) < count else None


def label_warnings(rows: Rows, labels: np.ndarray, held_out: np.ndarray | None = None) -> list[str]:
    """What looks wrong about the classes of the training images, a line each.

    Args:
        labels: the training images' class ids [N].
        held_out: those of the held-out images, if there are any.
    """
    present = set(np.unique(labels).tolist())
    shown = [rows.label_names[number] for number in sorted(present)]
    checks = (
        _renumbered(rows),
        _empty(rows, present),
        _only_held_out(rows, present, held_out),
        _nearly_one_each(rows, len(present), len(labels)),
        *_alike(shown),
    )
    return [line for line in checks if line]


def _renumbered(rows: Rows) -> str | None:
    names = rows.label_names
    numbered = [str(number) for number in range(len(names))]
    if not rows.labels_are_names or names == numbered or not all(name.isdecimal() for name in names):
        return None
    return (
        f"the labels are not numbered from 0: classes 0 to {len(names) - 1} have the names {shortened(names)}; sample"
        f" them by name, as in class_labels=[{names[0]!r}]"
    )


def _empty(rows: Rows, present: set[int]) -> str | None:
    empty = [name for number, name in enumerate(rows.label_names) if number not in present]
    if not empty:
        return None
    return (
        f"{len(empty)} of {len(rows.label_names)} classes have no training image: {shortened(empty)}; their embeddings"
        " stay untrained, and they are sampled only if asked for"
    )


def _only_held_out(rows: Rows, present: set[int], held_out: np.ndarray | None) -> str | None:
    unseen = [] if held_out is None else sorted(set(np.unique(held_out).tolist()) - present)
    if not unseen:
        return None
    return (
        f"{int(np.isin(held_out, unseen).sum())} held-out images are of classes without training images"
        f" ({shortened([rows.label_names[number] for number in unseen])}); the held-out figures include them"
    )


def _nearly_one_each(rows: Rows, classes: int, images: int) -> str | None:
    if classes <= 10 or 2 * classes <= images:
        return None
    return (
        f"column {rows.label_column!r} makes {classes:,} classes of {images:,} images; is it the column of classes?"
        " (--label_column)"
    )


def _alike(names: list[str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    return [
        f"the classes {shortened(variants)} differ only in case or spaces, and are separate classes"
        for variants in groups.values()
        if len(variants) > 1
    ]


def class_input(
    labels: torch.Tensor, keys: StepKeys, null_class: int, class_dropout: float, device: torch.device
) -> torch.Tensor:
    """The classes that the network reads: in training, a share of them is the null class.

    Ho & Salimans 2022, Algorithm 1.

    Args:
        labels: class ids, [N].
        null_class: the id that stands for no class.
        class_dropout: that share, within 0..1; in validation no class is dropped.

    Returns: class ids on the device, [N].
    """
    if not keys.validation:
        labels = torch.where(keys.uniform("class_dropout") < class_dropout, null_class, labels)
    return to_device(labels, device)
