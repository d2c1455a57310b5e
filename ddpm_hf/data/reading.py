"""From the data flags, a dataset's name or a local path to rows."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.errors import DataError, one_line
from ..common.randomness import keyed_generator
from .digits import EMBEDDED_DATASET, embedded_digits
from .file_names import open_file_names
from .flags import DataFlags
from .labels import name_classes
from .rows import Rows, split_rows, usable_share

VALIDATION_SPLITS = ("validation", "valid", "val", "dev")


def load_rows(
    flags: DataFlags, seed: int, token: str | None = None, caption_column: str | None = None, validate: bool = False
) -> tuple[Rows, Rows | None]:
    """The images to train on, and those held out.

    Held out are a random share of them, if the flags say so; else, to `validate`, the dataset's validation split; of
    the embedded digits, their test part.

    Args:
        caption_column: a column of strings, or lists of strings, to read too.
        validate: whether held-out images will be used.

    Raises:
        DataError: no such dataset, column or split, or none to validate on.
    """
    if flags.embedded:
        rows, held_out = _embedded_rows(flags, caption_column)
        if flags.validation_split:
            rows, held_out = split_rows(rows, flags.validation_split, seed)
        return _limited(rows, flags.max_train_samples, seed), held_out
    dataset = open_dataset(flags.dataset_name, flags.train_data_dir, flags.dataset_config_name, flags.cache_dir, token)
    columns = Columns(flags.image_column, flags.label_column, caption_column)
    rows, held_out = read_rows(dataset, flags.dataset_split, columns, flags.streaming), None
    if flags.validation_split:
        rows, held_out = split_rows(rows, flags.validation_split, seed)
    elif validate:
        held_out = _validation_rows(dataset, flags, rows)
    return _limited(rows, flags.max_train_samples, seed), held_out


def _embedded_rows(flags: DataFlags, caption_column: str | None) -> list[Rows]:
    """The embedded digits to train on, and to validate on."""
    parts = [embedded_digits(part, flags.size()) for part in ("train", "test")]
    named = {
        "--image_column": flags.image_column,
        "--label_column": flags.label_column,
        "--caption_column": caption_column,
    }
    for flag, column in named.items():
        if column is not None and column not in parts[0].dataset.column_names:
            existing = ", ".join(parts[0].dataset.column_names)
            raise DataError(f"no column {column!r} in {EMBEDDED_DATASET}; it has {existing} ({flag})")
    if flags.image_column not in (None, "image"):
        raise DataError(f"--image_column {flags.image_column}: the images of {EMBEDDED_DATASET} are in 'image'")
    if flags.label_column not in (None, "label"):
        raise DataError(f"--label_column {flags.label_column}: the labels of {EMBEDDED_DATASET} are in 'label'")
    for part in parts:
        part.label_column, part.caption_column = flags.label_column, caption_column
    return parts


def _validation_rows(dataset: "OpenDataset", flags: DataFlags, rows: Rows) -> Rows:
    """The dataset's validation split, its classes numbered as those of the rows to train on.

    Raises:
        DataError: it has none, or trains on it.
    """
    from .readers import split_names

    way_out = "leave --validation_steps out"
    if not flags.streaming:  # no share of a stream can be held out
        way_out = f"give --validation_split {usable_share(len(rows.dataset))}, for example, or {way_out}"
    with dataset.errors_named():
        splits = dataset.source.splits()
    validation = next((name for name in VALIDATION_SPLITS if name in splits), None)
    if validation is None:
        raise DataError(
            f"--validation_steps requires held-out images, and {rows.name} has no validation split"
            f" (it has {', '.join(splits)}); {way_out}"
        )
    # a single dataset that was saved from another split is also found as `train`
    if {"all", validation} & set(split_names(flags.dataset_split)) or list(splits) == [validation]:
        raise DataError(
            f"--dataset_split {flags.dataset_split} trains on the split {validation!r}, which --validation_steps would"
            f" validate on; {way_out}"
        )
    columns = Columns(rows.image_column, rows.label_column, rows.caption_column)
    held_out = read_rows(dataset, validation, columns, flags.streaming and not dataset.is_local, rows)
    if (
        flags.streaming and not dataset.is_local
    ):  # held-out images are cached decoded, so the encoded ones fit into memory
        import datasets

        with dataset.errors_named():
            held_out.dataset = datasets.Dataset.from_list(list(held_out.dataset), held_out.dataset.features)
    return held_out


def _limited(rows: Rows, limit: int | None, seed: int) -> Rows:
    """The rows, or a random subset of `limit`."""
    if limit is None or limit >= len(rows.dataset):
        return rows
    order = keyed_generator(seed, "subset").permutation(len(rows.dataset))
    return rows.part(np.sort(order[:limit]))


class Columns(NamedTuple):
    """Which columns hold what; None for the image column is the one whose feature is an image."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None


@dataclasses.dataclass
class OpenDataset:
    """A dataset that is located but not read."""

    name: str  # as the user gave it
    source: Any  # local.Source
    is_local: bool
    folders: tuple[str, ...]  # in which its files may lie
    config_name: str | None = None

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turn whatever reading raises into a DataError."""
        with _errors_named(self.name, self.config_name):
            yield


@contextlib.contextmanager
def _errors_named(name: str, config_name: str | None) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # `datasets` has no common base for its errors
        first = error.__cause__ or error  # the cause says more than "an error occurred"
        reason = one_line(first, 300) + f" ({first.__class__.__name__})"
        asked = f" with --dataset_config_name {config_name}" if config_name else ""
        raise DataError(f"dataset {name!r} cannot be loaded{asked}: {reason}") from error


def open_dataset(
    name: str | None = None,
    directory: str | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> OpenDataset:
    """A dataset by its Hub name, or in a local folder or file.

    Args:
        name: a name on the Hub, or a local path; with a `directory`, the kind of files in it, such as `imagefolder`.

    Raises:
        DataError: no such dataset.
    """
    from .readers import Options, of_library, open_local

    given = directory or name
    if given is None:
        raise DataError("name a dataset: its name on the Hub, or a folder")
    path = Path(given).expanduser()
    is_local = directory is not None or path.exists()
    options = Options(name if directory else None, config_name, cache_dir)
    if is_local and not path.exists():
        raise DataError(f"--train_data_dir {directory}: no such folder")
    with _errors_named(str(path), config_name):
        source = open_local(path, options) if is_local else of_library(given, options, False, token)
    folders = _folders(path if is_local else None, cache_dir)
    return OpenDataset(given, source, is_local, folders, config_name)


def read_dataset(
    name: str | None = None,
    directory: str | None = None,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Rows:
    """The rows of a dataset by its Hub name, or of a local folder or file.

    Args:
        name: a name on the Hub, or a local path.
        directory: a local path; images may lie in class folders, or be described by `metadata.jsonl`.
        split: such as `train`, `train[:67%]` or `train+test`.
        image_column: by default the one whose feature is an image.

    Raises:
        DataError: no such dataset, split or column.
    """
    dataset = open_dataset(name, directory, config_name, cache_dir, token)
    return read_rows(dataset, split, Columns(image_column, label_column, caption_column), streaming)


def read_rows(
    opened: OpenDataset, split: str, columns: Columns, streaming: bool = False, like: Rows | None = None
) -> Rows:
    """The rows of a split.

    Args:
        like: rows of another split, whose classes are used.

    Raises:
        DataError: no such split or column.
    """
    import datasets

    source = opened.name
    with opened.errors_named():
        dataset = opened.source.read(split, streaming)
    features = dataset.features or {}
    existing = list(features) or list(dataset.column_names or [])
    image_column = _find_image_column(features, existing, columns.image, source)
    feature = features.get(image_column)
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        folder = opened.folders[0] if opened.is_local else None
        dataset = open_file_names(dataset, image_column, folder, source)
    if isinstance(feature, datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    for flag, column in (("--label_column", columns.label), ("--caption_column", columns.caption)):
        if column is not None and column not in existing:
            by_class = opened.is_local and flag == "--label_column"
            hint = "; class folders become labels where every image lies in one of two or more" if by_class else ""
            raise DataError(f"no column {column!r} in {source}; it has {', '.join(existing)} ({flag}){hint}")
    rows = Rows(dataset, source, image_column, columns.label, caption_column=columns.caption)
    rows.folders, rows.left_out = opened.folders, opened.source.note
    if like is not None:
        rows.dataset = _as_named(dataset, columns.label, like.label_names)
        rows.label_names, rows.labels_are_names = like.label_names, like.labels_are_names
    elif columns.label is not None:
        rows.label_names = list(getattr(features.get(columns.label), "names", None) or [])
        rows.labels_are_names = not rows.label_names
        if rows.labels_are_names and streaming:
            raise DataError(f"column {columns.label!r} of {source} has no class names, which a stream cannot find out")
        if rows.labels_are_names:
            rows.label_names = name_classes(dataset[columns.label], columns.label, source)
    return rows


def _as_named(dataset: Any, label_column: str | None, names: list[str]) -> Any:
    """The dataset with its labels as strings, if it declares other classes, or in another order, than these.

    Raises:
        DataError: a stream of other classes.
    """
    declared = getattr((dataset.features or {}).get(label_column), "names", None)
    if declared is None or list(declared) == names:
        return dataset
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"the validation split declares other classes in {label_column!r} than the training split, which a stream"
            " cannot match; leave --streaming or --validation_steps out"
        )
    labels = [None if label is None or label < 0 else declared[label] for label in dataset[label_column]]
    return dataset.remove_columns(label_column).add_column(label_column, labels)


def _folders(local: Path | None, cache_dir: str | None) -> tuple[str, ...]:
    """Where a dataset's files may lie: in its folder, or in the caches that the libraries download to."""
    import datasets
    import huggingface_hub

    caches = (cache_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    folder = None if local is None else local if local.is_dir() else local.parent
    named = [] if folder is None else [os.path.abspath(folder), os.path.realpath(folder)]
    return tuple(dict.fromkeys([*named, *(os.path.abspath(cache) for cache in caches if cache)]))


def _find_image_column(features: dict, columns: list[str], requested: str | None, source: str) -> str:
    import datasets

    if requested is not None:
        if requested not in columns:
            raise DataError(f"no column {requested!r} in {source}; it has {', '.join(columns)} (--image_column)")
        return requested
    image_columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not image_columns:
        raise DataError(f"no image column in {source}; name one of {', '.join(columns)} with --image_column")
    return "image" if "image" in image_columns else image_columns[0]
