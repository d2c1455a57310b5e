"""Datasets on disk: what `save_to_disk` wrote, files of tables, and folders of images or of tables.

A kind of local data is a function and a row in `READERS`.
"""

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import yaml
from huggingface_hub.repocard import metadata_load

from ..common.errors import DataError
from .errors import unreadable
from .formats import image_suffixes, suffix_of
from .image_folders import Listing, image_splits, list_folder

KIND_OF = {
    ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json",
    ".ndjson": "json", ".tar": "webdataset",
}  # fmt: skip


class Source(NamedTuple):
    """A dataset that is known and not yet read."""

    splits: Callable[[], list[str]]
    read: Callable[[str, bool], Any]  # (split, streaming) -> Dataset, or IterableDataset
    note: str = ""  # what was left out and why


class Options(NamedTuple):
    """What all readers are given."""

    kind: str | None = None  # of files, such as imagefolder; None: by their suffixes
    config_name: str | None = None
    cache_dir: str | None = None


def open_local(path: Path, options: Options) -> Source:
    """The dataset in a file or folder.

    Raises:
        DataError: there is no dataset in it.
    """
    for reader in READERS:
        source = reader(path, options)
        if source is not None:
            return source
    raise AssertionError("the last reader accepts every path")


# Splits


def of_parts(parts: dict[str, datasets.Dataset], name: str, note: str = "", mixed: bool = False) -> Source:
    """The source whose splits are in memory or mapped: any part of them can be read.

    Args:
        mixed: whether to shuffle a stream, always the same way, because its rows are sorted by class.
    """

    def read(split: str, streaming: bool) -> Any:
        dataset = take(parts, split, name)
        if streaming and mixed:
            dataset = dataset.shuffle(seed=0, keep_in_memory=True)
        return dataset.to_iterable_dataset() if streaming else dataset

    return Source(lambda: list(parts), read, note)


def take(parts: dict[str, datasets.Dataset], split: str, name: str) -> datasets.Dataset:
    """A split, a part of one (`train[:67%]`), or several (`train+test`), as `datasets.load_dataset` understands them.

    Raises:
        DataError: no such split, or a part that is empty.
    """
    if split in parts:
        return parts[split]
    unknown = [one for one in split_names(split) if one not in parts]
    if unknown and split != "all":
        raise DataError(f"{name} has no split {unknown[0]!r}; it has {', '.join(parts)} (--dataset_split)")
    try:
        instruction = datasets.ReadInstruction.from_spec("+".join(parts) if split == "all" else split)
        pieces = instruction.to_absolute({each: len(part) for each, part in parts.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"--dataset_split {split!r} is malformed ({error}); give train, train[:67%], train[100:] or train+test"
        ) from error
    chosen = [parts[piece.splitname].select(range(piece.from_, max(piece.from_, piece.to))) for piece in pieces]
    dataset = datasets.concatenate_datasets(chosen) if len(chosen) > 1 else chosen[0]
    if len(dataset) == 0:
        raise DataError(f"--dataset_split {split!r} of {name} is empty")
    return dataset


def split_names(split: str) -> list[str]:
    """The names of the splits in an expression.

    >>> split_names("train[:67%]+test")
    ['train', 'test']
    """
    return [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]


def of_library(name: str, options: Options, is_local: bool, token: str | None = None, **more: Any) -> Source:
    """The source that `datasets.load_dataset` reads."""
    named = {"cache_dir": options.cache_dir, "token": token, **more}

    def read(split: str, streaming: bool) -> Any:
        part = streaming and is_local and re.search(r"[^\w.-]", split) is not None  # a stream has no parts of splits
        try:
            dataset = datasets.load_dataset(
                name, options.config_name, split=split, streaming=streaming and not part, **named
            )
        except ValueError as error:  # several configurations and none named; network errors have other types
            configurations = _unnamed_configurations(name, options, named)
            if not configurations:
                raise
            raise DataError(
                f"{name} has several configurations: {', '.join(configurations)}; name one with --dataset_config_name"
            ) from error
        return dataset.to_iterable_dataset() if part else dataset

    return Source(lambda: datasets.get_dataset_split_names(name, options.config_name, **named), read)


def _unnamed_configurations(name: str, options: Options, named: dict[str, Any]) -> list[str]:
    """The configurations of a dataset that has several and no default, if none was requested."""
    if options.config_name is not None:
        return []
    try:
        names = datasets.get_dataset_config_names(name, **named)
        return names if len(names) > 1 and datasets.get_dataset_default_config_name(name, **named) is None else []
    except Exception:  # the error that kept the dataset from being read is reported instead
        return []


# Readers: each returns None for a path that is not of its kind


def _of_kind(path: Path, options: Options) -> Source | None:
    """A folder of files of the requested kind, or with the requested configuration."""
    if options.kind not in (None, "imagefolder"):
        listing = list_folder(path) if path.is_dir() and options.kind in KIND_OF.values() else None
        if listing and listing.images:  # `datasets` would read them as tables
            return _tables(path, listing, options, options.kind)
        return of_library(options.kind, options, True, data_dir=str(path))
    return of_library(str(path), options, True) if options.config_name is not None else None


def _saved(path: Path, options: Options) -> Source | None:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return None
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        return of_parts(dict(saved), str(path))
    recorded = split_names(str(saved.split or "train"))[0]

    def read(split: str, streaming: bool) -> Any:
        """A single dataset has the name of the split that it was saved from, and `train`, as a file has."""
        name = recorded if recorded in split_names(split) else "train"
        return of_parts({name: saved}, str(path)).read(split, streaming)

    return Source(lambda: [recorded], read)


def _configured(path: Path, options: Options) -> Source | None:
    """A folder whose README.md, or .huggingface.yaml, says which files make which split."""
    if options.kind is not None or not _has_configurations(path):
        return None
    if glob.has_magic(str(path.resolve())):
        raise DataError(
            f"{path}: its README.md gives patterns of the files to read, and * ? [ in the path would be part of them;"
            " rename the folder"
        )
    return of_library(str(path), options, True)


def _has_configurations(path: Path) -> bool:
    """Whether a folder's metadata for the Hub says which files to read."""
    readers = {"README.md": metadata_load, ".huggingface.yaml": lambda file: yaml.safe_load(file.read_text("utf-8"))}
    for name, read in readers.items():
        if (path / name).is_file():
            try:
                values = read(path / name)
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise unreadable(f"the metadata in {path / name}", error) from error
            if isinstance(values, dict) and values.get("configs"):
                return True
    return False


def _file(path: Path, options: Options) -> Source | None:
    """One file of a table."""
    if not path.is_file():
        return None
    kind = KIND_OF.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: not a table ({' '.join(KIND_OF)}); of images, name the folder")
    separator = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    return of_library(kind, options, True, data_files={"train": [glob.escape(str(path.resolve()))]}, **separator)


def _folder(path: Path, options: Options) -> Source:
    """A folder of images if it holds any; else one of tables."""
    listing = list_folder(path)
    sharded = any(re.fullmatch(r"data/[^/]+-\d{5}-of-\d{5}[^/]*", name) for name in listing.tables)
    if listing.images and (options.kind or not sharded):
        for name in listing.tables:
            listing.left_out[f"{suffix_of(name)} table in a folder of images"] += 1
        parts = image_splits(listing)
        if not parts:
            raise DataError(f"{path} holds no images to read; left out: {listing.note()}")
        source = of_parts(parts, str(path), listing.note(), mixed=True)
        return _all_or_nothing(source, path, listing.unclear) if listing.unclear else source
    if listing.tables and not options.kind:
        if listing.images:
            listing.left_out["image in a folder of tables"] += len(listing.images)
        return _tables(path, listing, options)._replace(note=listing.note())
    known = " ".join(sorted(image_suffixes()))
    tables = "" if options.kind else ", nor tables (parquet, arrow, csv, json, webdataset) or save_to_disk data"
    left_out = f"; left out: {listing.note()}" if listing.note() else ""
    raise DataError(f"{path} holds no images ({known}){tables}{left_out}")


def _all_or_nothing(source: Source, path: Path, unclear: list[str]) -> Source:
    """A source of which only `all` can be read: its folders may be classes, or splits that must not be trained on."""

    def read(split: str, streaming: bool) -> Any:
        if split != "all":
            named = ", ".join(f"{name}/" for name in unclear[:6])
            raise DataError(
                f"{path} holds {named}, which may be splits or classes: rename splits to train/, validation/ or test/,"
                " name one of the folders, or give --dataset_split all to train on all of them"
            )
        return source.read(split, streaming)

    return source._replace(read=read)


def _tables(path: Path, listing: Listing, options: Options, only: str | None = None) -> Source:
    """A folder of tables, as `datasets` reads it; without the outputs of runs, whose JSON files are tables too.

    Args:
        only: the kind of the tables to read; by default all.
    """
    if only is None and not listing.outputs and not glob.has_magic(listing.root):
        return of_library(listing.root, options, True)
    from datasets.data_files import _get_data_files_patterns, resolve_pattern
    from datasets.load import infer_module_for_data_files

    def matching(pattern: str) -> list[str]:
        suffixes = [suffix for suffix, kind in KIND_OF.items() if only in (None, kind)]
        files = resolve_pattern(pattern, glob.escape(listing.root), suffixes)
        outputs = [os.path.join(listing.path(name), "") for name in listing.outputs]
        return [file for file in files if not os.path.join(file, "").startswith(tuple(outputs))]

    patterns = _get_data_files_patterns(matching)
    files = {
        split: [file for pattern in each for file in _or_none(matching, pattern)] for split, each in patterns.items()
    }
    kind, more = infer_module_for_data_files(files, listing.root)
    escaped = {split: [glob.escape(file) for file in each] for split, each in files.items()}
    return of_library(kind, options, True, data_files=escaped, **more)


def _or_none(matching: Callable[[str], list[str]], pattern: str) -> list[str]:
    try:
        return matching(pattern)
    except FileNotFoundError:
        return []


READERS = (_of_kind, _saved, _configured, _file, _folder)
