"""From a dataset's name or a local path to rows."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from .digits import EMBEDDED_DATASET, embedded_digits
from .errors import DataError
from .flags import DataFlags
from .labels import name_classes
from .rows import Rows, split_rows

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def load_rows(
    flags: DataFlags, seed: int, token: str | None = None, caption_column: str | None = None
) -> tuple[Rows, Rows | None]:
    """The images to train on, and those held out: a random share, or the embedded digits' test part.

    Args:
        caption_column: of texts, or lists of texts, to read along.

    Raises:
        DataError: no such dataset, column or split.
    """
    if not flags.embedded:
        rows = read_dataset(
            flags.dataset_name,
            flags.train_data_dir,
            config_name=flags.dataset_config_name,
            split=flags.dataset_split,
            image_column=flags.image_column,
            label_column=flags.label_column,
            caption_column=caption_column,
            streaming=flags.streaming,
            cache_dir=flags.cache_dir,
            token=token,
        )
        parts = split_rows(rows, flags.validation_split, seed) if flags.validation_split else (rows, None)
        return _limited(parts[0], flags.max_train_samples, seed), parts[1]
    parts = embedded_digits("train", flags.size()), embedded_digits("test", flags.size())
    named = {
        "--image_column": flags.image_column,
        "--label_column": flags.label_column,
        "--caption_column": caption_column,
    }
    for flag, wanted in named.items():
        if wanted is not None and wanted not in parts[0].dataset.column_names:
            there = ", ".join(parts[0].dataset.column_names)
            raise DataError(f"no column {wanted!r} in {EMBEDDED_DATASET}; it has {there} ({flag})")
    if flags.label_column not in (None, "label"):
        raise DataError(f"--label_column {flags.label_column}: the labels of {EMBEDDED_DATASET} are in 'label'")
    for part in parts:
        part.label_column, part.caption_column = flags.label_column, caption_column
    return _limited(parts[0], flags.max_train_samples, seed), parts[1]


def _limited(rows: Rows, most: int | None, seed: int) -> Rows:
    """The rows, or `most` of them, drawn at random."""
    if most is None or most >= len(rows.dataset):
        return rows
    order = np.random.Generator(np.random.Philox(key=[seed, 5])).permutation(len(rows.dataset))
    return rows.part(np.sort(order[:most]))


def _read_local(path: Path, config_name: str | None, split: str, streaming: bool, cache_dir: str | None):
    """A dataset from a folder or file: `save_to_disk`, parquet, arrow, images, or as its README.md configures it."""
    import datasets

    options = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
    if config_name is not None:
        return datasets.load_dataset(str(path), config_name, **options)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            dataset = _pick_split(dataset, split, path)
        return dataset.to_iterable_dataset() if streaming else dataset
    for kind in ("parquet", "arrow"):
        files = [path] if path.suffix == f".{kind}" else sorted(path.rglob(f"*.{kind}")) if path.is_dir() else []
        if files:
            named = {
                name for name in ("train", "validation", "test", split) if any(_is_of(file, name) for file in files)
            }
            if named and split not in named:
                raise DataError(f"{path} has no split {split!r}; it has {', '.join(sorted(named))} (--dataset_split)")
            in_split = [file for file in files if not named or _is_of(file, split)]
            return datasets.load_dataset(kind, data_files={split: [str(file) for file in in_split]}, **options)
    if not path.is_dir() or not any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        wanted = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{path}: neither images ({wanted}) nor parquet, arrow or save_to_disk data in it")
    return datasets.load_dataset("imagefolder", data_dir=str(path), **options)


def _is_of(file: Path, split: str) -> bool:
    """Whether a file's name says that it is (part of) a split."""
    return file.name.startswith(split)


def _pick_split(splits, split: str, name) -> Any:
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)} (--dataset_split)")
    return splits[split]


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
        directory: a local path; images may lie in class folders or beside a `metadata.jsonl`.
        image_column: by default the one whose feature is an image.

    Raises:
        DataError: no such dataset, split or column.
    """
    import datasets

    source = directory or name
    path = Path(source)
    try:
        if directory or path.exists():
            if not path.exists():
                raise DataError(f"--train_data_dir {directory}: no such folder")
            dataset = _read_local(path, config_name, split, streaming, cache_dir)
        else:
            dataset = datasets.load_dataset(
                name, config_name, split=split, streaming=streaming, cache_dir=cache_dir, token=token
            )
    except DataError:
        raise
    except Exception as error:  # datasets has no common base for what can go wrong
        first = error.__cause__ or error  # "an error occurred" says less than what it was
        reason = " ".join(str(first).split())[:300] + f" ({first.__class__.__name__})"
        asked = f" with --dataset_config_name {config_name}" if config_name else ""
        raise DataError(f"dataset {source!r} cannot be loaded{asked}: {reason}") from error
    features = dataset.features or {}
    columns = list(features) or list(dataset.column_names or [])
    image_column = _find_image_column(features, columns, image_column, source)
    if isinstance(features.get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if label_column is not None and label_column not in columns:
        hint = "; class folders become labels where every image lies in one of two or more" if directory else ""
        there = ", ".join(columns)
        raise DataError(f"no column {label_column!r} in {source}; it has {there} (--label_column){hint}")
    if caption_column is not None and caption_column not in columns:
        raise DataError(f"no column {caption_column!r} in {source}; it has {', '.join(columns)} (--caption_column)")
    names = getattr(features.get(label_column), "names", None) or []
    labels_are_names = label_column is not None and not names
    if labels_are_names:
        if streaming:
            raise DataError(f"column {label_column!r} of {source} has no class names, which a stream cannot count")
        names = name_classes(dataset[label_column], label_column, source)
    folders = _folders(path if directory or path.exists() else None, cache_dir)
    rows = Rows(dataset, str(source), image_column, label_column, list(names), caption_column, folders=folders)
    return dataclasses.replace(rows, labels_are_names=labels_are_names)


def _folders(local: Path | None, cache_dir: str | None) -> tuple[str, ...]:
    """Where a dataset's files may lie: in its own folder, or in the caches that the libraries download to."""
    import datasets
    import huggingface_hub

    caches = (cache_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    own = None if local is None else local if local.is_dir() else local.parent
    return tuple(os.path.abspath(folder) for folder in (own, *caches) if folder)


def _find_image_column(features: dict, columns: list[str], wanted: str | None, source: str) -> str:
    import datasets

    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"no column {wanted!r} in {source}; it has {', '.join(columns)} (--image_column)")
        return wanted
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        raise DataError(f"no image column in {source}; name one of {', '.join(columns)} with --image_column")
    return found[0]
