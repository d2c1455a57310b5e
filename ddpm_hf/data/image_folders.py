"""A folder of images: which of its files are images, which split and class each is of, and what metadata says of it.

`datasets` reads such a folder by patterns of names, so that a name like `train.png` decides what is read, and the rest
disappears. Here the files are listed one by one, only folders divide them, and what is left out is named.
"""

import collections
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from ..common.errors import DataError
from ..common.ownership import MANIFEST, RUN, load_manifest
from .formats import PLUGINS, begins_like_an_image, image_suffixes, suffix_of
from .metadata_tables import METADATA, image_column_of, read_metadata

TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".tar")
# The names of a split's folder, as `datasets` knows them, maybe with a number, as in val2017
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
# Names that people understand as a split too, such as train_images, seg_test or trainset
SPLIT_IN_NAME = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(SPLIT_OF)})(?:set)?(?:[-._ 0-9]|$)", re.IGNORECASE)
UNREPORTED = ("thumbs.db", "desktop.ini", "readme", "readme.md", "readme.txt", "license", "license.txt")
HINTS = {".zip": "unpack it", **{suffix: f"pip install {plugin[0]}" for suffix, plugin in PLUGINS.items()}}
# What a run leaves in its output folder besides the files in its manifest; it may be the folder of images too
RUN_FOLDERS = re.compile(r"checkpoint-\d+(\.superseded|\.partial)+|earlier-run")
# The same for a run of a version without manifests
RUN_ENTRIES = re.compile(
    r"checkpoint-\d+|samples|assets|logs|unet|scheduler|vae|text_encoder|tokenizer|latents|autoencoder|earlier-run|.*\.json|(metrics|timings)\.jsonl"
)


# The files


@dataclass
class Listing:
    """The files of a folder, as paths relative to it with `/`, sorted."""

    root: str  # absolute, links resolved
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)  # folders and files of runs
    written: set[str] = field(default_factory=set)  # the files that manifests list
    unclear: list[str] = field(default_factory=list)  # folders that may be those of splits or those of classes
    left_out: collections.Counter = field(default_factory=collections.Counter)  # a description -> how many

    def path(self, name: str) -> str:
        """The absolute path of one of the files."""
        return os.path.join(self.root, *name.split("/"))

    def note(self) -> str:
        """What was left out and why, in one line; empty for nothing."""
        return ", ".join(
            what if count == 1 else f"{count:,} × {what}" for what, count in sorted(self.left_out.items())
        )


def list_folder(folder: str | Path) -> Listing:
    """The files of a folder and of all folders in it.

    Links are followed, and each real folder is read once, so that a loop of links ends. Hidden files and folders,
    folders that begin with `__`, and the outputs of runs are left out.
    """
    listing = Listing(os.path.realpath(folder))
    suffixes = image_suffixes()
    for name, entry in _walk(listing):
        suffix = suffix_of(name)
        if entry.name == MANIFEST:
            continue
        if entry.name in METADATA:
            listing.metadata.append(name)
        elif suffix in suffixes:
            listing.images.append(name)
        elif suffix in TABLES:
            listing.tables.append(name)
        elif _may_be_image(name, suffix) and begins_like_an_image(entry.path):
            listing.images.append(name)
        elif entry.name.lower() not in UNREPORTED:
            kind = f"{suffix} file" if suffix else "file without a suffix that is not an image"
            listing.left_out[kind + (f" ({HINTS[suffix]})" if suffix in HINTS else "")] += 1
    for names in (listing.images, listing.metadata, listing.tables):
        names.sort()
    return listing


def _may_be_image(name: str, suffix: str) -> bool:
    """Whether a file's content decides: it has no usual suffix, or one that some programs write on JPEGs too."""
    return suffix in PLUGINS or not (suffix or name.endswith("~"))


def _walk(listing: Listing) -> Iterator[tuple[str, os.DirEntry]]:
    """The regular files of a folder, by relative name: those of real folders first, then those behind links."""
    seen: set[str] = set()
    real: list[tuple[str, str]] = [("", listing.root)]  # (relative name, resolved path)
    linked: list[tuple[str, str]] = []
    while real or linked:
        name, resolved = real.pop() if real else linked.pop(linked.index(min(linked)))
        if resolved in seen or (name and _holds(resolved, listing.root)):
            listing.left_out[f"{name}/ (a link to a folder that is read already)"] += 1
            continue
        seen.add(resolved)
        for entry in _entries(listing, name):
            inner = f"{name}/{entry.name}" if name else entry.name
            if entry.is_file():
                yield inner, entry
            elif entry.is_dir() and entry.is_symlink():
                linked.append((inner, os.path.realpath(entry.path)))
            elif entry.is_dir():
                real.append((inner, os.path.join(resolved, entry.name)))
            elif entry.is_symlink():
                listing.left_out["link to a file that does not exist"] += 1


def _holds(folder: str, path: str) -> bool:
    """Whether a folder is, or holds, an absolute path."""
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def _entries(listing: Listing, name: str) -> list[os.DirEntry]:
    """The entries of a folder that are to be read; none if it is the output of a run."""
    try:
        with os.scandir(listing.path(name)) as opened:
            entries = list(opened)
    except OSError as error:
        if not name:
            raise
        listing.left_out[f"{name}/ (cannot be read: {error.strerror})"] += 1
        return []
    names = {entry.name for entry in entries}
    manifest = load_manifest(Path(listing.path(name))).get("files", {}) if MANIFEST in names else {}
    is_output = bool(manifest.get(RUN)) or _held_a_run(listing.path(name), names)
    if is_output and name:
        listing.outputs.append(name)
        listing.left_out[f"{name}/ (the output of a run)"] += 1
        return []
    written = {one for part in manifest.values() for one in part}
    listing.written |= {f"{name}/{one}" if name else one for one in written}
    kept = []
    for entry in entries:
        inner = f"{name}/{entry.name}" if name else entry.name
        if entry.name.startswith(".") or (entry.name.startswith("__") and entry.is_dir()):
            if _holds_images(entry):
                listing.left_out[f"hidden {'folder' if entry.is_dir() else 'file'}"] += 1
        elif inner in listing.written or f"{inner}/" in listing.written:
            listing.outputs.append(inner)
            if not is_output and entry.is_file():
                listing.left_out[f"file that ddpm_hf wrote to {name or '.'}/"] += 1
        elif is_output and (RUN_FOLDERS if written else RUN_ENTRIES).fullmatch(entry.name):
            listing.outputs.append(inner)
        else:
            kept.append(entry)
    return kept


def _held_a_run(folder: str, names: set[str]) -> bool:
    """Whether a folder is the output of a run without a manifest: it has settings and log, or a checkpoint."""
    if "training_config.json" in names and names & {"run.json", "metrics.jsonl"}:
        return True
    checkpoints = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    return any(os.path.isfile(os.path.join(folder, name, "manifest.json")) for name in checkpoints)


def _holds_images(entry: os.DirEntry) -> bool:
    """Whether what is hidden is an image, or a folder with images in it."""
    if not entry.is_dir():
        return suffix_of(entry.name[1:]) in image_suffixes()
    try:
        return any(suffix_of(name) in image_suffixes() for name in os.listdir(entry.path))
    except OSError:
        return False


# Splits and classes


class Division:
    """Which folders are splits.

    A folder named `train`, `test` and the like is a split's at the top, and everywhere if anywhere two splits' folders
    are in one folder. Folders' names decide, and files' names never do.

    >>> division = Division(["train/a.png", "val/b.png", "cat/train.png"])
    >>> division.locate("train/a.png"), division.locate("cat/train.png")
    (('train', ()), (None, ('cat',)))
    """

    def __init__(self, files: list[str]):
        folders = {each for name in {posixpath.dirname(file) for file in files} for each in _lineage(name)}
        named = {folder: split for folder in folders if (split := _split_named(posixpath.basename(folder)))}
        together: dict[str, set[str]] = collections.defaultdict(set)  # a folder -> the splits whose folders it holds
        for folder, split in named.items():
            together[posixpath.dirname(folder)].add(split)
        if all(len(splits) < 2 for splits in together.values()):
            named = {folder: split for folder, split in named.items() if folder in SPLIT_OF}
        self.splits = named  # a folder -> its split
        self.unclear = [] if named else _unclear(folders)
        self._located: dict[str, tuple[str | None, tuple[str, ...]]] = {}

    def locate(self, name: str) -> tuple[str | None, tuple[str, ...]]:
        """A file's split (None outside of all), and the names of its folders without the split's."""
        folder = posixpath.dirname(name)
        if folder not in self._located:
            parts = tuple(folder.split("/")) if folder else ()
            dividing = [each for each in _lineage(folder) if each in self.splits][:1]
            depth = dividing[0].count("/") if dividing else len(parts)
            split = self.splits[dividing[0]] if dividing else None if self.splits else "train"
            self._located[folder] = split, parts[:depth] + parts[depth + 1 :]
        return self._located[folder]


def _unclear(folders: set[str]) -> list[str]:
    """Folders in one folder whose names suggest different splits."""
    together: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for folder in sorted(folders):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", posixpath.basename(folder))  # trainA, TrainImages
        split = SPLIT_IN_NAME.search(words)
        if split:
            together[posixpath.dirname(folder)][folder] = SPLIT_OF[split[1].lower()]
    return next((list(splits) for splits in together.values() if len(set(splits.values())) > 1), [])


def _split_named(folder: str) -> str | None:
    """The split that a folder's name stands for, also in capitals or with a number."""
    return SPLIT_OF.get(re.sub(r"[-._ ]?\d+$", "", folder.lower()))


def _lineage(folder: str) -> list[str]:
    """A folder and those that it lies in, the outermost first; the top is left out.

    >>> _lineage("a/b/c")
    ['a', 'a/b', 'a/b/c']
    """
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


# The rows


def image_splits(listing: Listing) -> dict[str, datasets.Dataset]:
    """The datasets of a folder's splits, as `imagefolder` makes them.

    Their columns are `image`, the files, and `label`, the class folders; or those of the metadata files. What is left
    out is added to the listing's `left_out`.

    Raises:
        DataError: metadata that cannot be read, or that names no images.
    """
    division = Division(listing.images)
    listing.unclear = division.unclear
    outside = [name for name in listing.images if division.locate(name)[0] is None]
    if outside:
        splits = ", ".join(f"{folder}/" for folder in sorted(division.splits)[:6])
        listing.left_out[f"image outside of {splits}"] += len(outside)
    tables, features = (_described if listing.metadata else _by_class)(listing, division)
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return {split: datasets.Dataset(tables[split], info.copy()) for split in SPLIT_NAMES if split in tables}


def _by_class(listing: Listing, division: Division) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """Images alone; with `label` where all lie equally deep in two or more class folders."""
    located = {name: division.locate(name) for name in listing.images}
    located = {name: where for name, where in located.items() if where[0] is not None}
    depths = {len(folders) for _, folders in located.values()}
    classes = sorted({folders[-1] for _, folders in located.values() if folders})
    labelled = len(depths) == 1 and len(classes) > 1
    features = {"image": datasets.Image()} | ({"label": datasets.ClassLabel(names=classes)} if labelled else {})
    numbers = {name: number for number, name in enumerate(classes)}
    tables = {}
    for split in {split for split, _ in located.values() if split is not None}:
        names = [name for name, where in located.items() if where[0] == split]
        columns = {"image": _image_column([listing.path(name) for name in names])}
        if labelled:
            columns["label"] = pa.array([numbers[located[name][1][-1]] for name in names], pa.int64())
        tables[split] = pa.table(columns)
    return tables, features


def _image_column(paths: list[str | None]) -> pa.Array:
    """Paths as the storage of an `Image` feature, [N]."""
    fields = [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())]
    return pa.StructArray.from_arrays(
        fields, ["bytes", "path"], mask=pa.array([path is None for path in paths], pa.bool_())
    )


def _described(listing: Listing, division: Division) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """The rows of all metadata files, each in the split of the folders in which the first image that it names lies."""
    if len({suffix_of(name) for name in listing.metadata}) > 1:
        raise DataError(f"{listing.root} has metadata of several kinds: {', '.join(listing.metadata)}; keep one kind")
    tables = [read_metadata(listing.path(name), posixpath.dirname(name)) for name in listing.metadata]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"the columns of {', '.join(listing.metadata)} differ in type: {error}") from error
    naming = {name: column for name in table.column_names if (column := image_column_of(name))}
    files = {name: table[name].to_pylist() for name in naming}  # a column -> paths relative to the root
    unlisted = set(listing.images).difference(*files.values())
    if unlisted:
        listing.left_out["image that no metadata file lists"] += len(unlisted)
    features = datasets.Features.from_arrow_schema(table.schema)
    columns, kinds = {}, {}
    for name in table.column_names:
        if naming.get(name, name) in kinds:
            raise DataError(f"{', '.join(listing.metadata)}: two columns give the column {naming.get(name, name)!r}")
        images = _image_column([path and listing.path(path) for path in files[name]]) if name in naming else None
        columns[naming.get(name, name)] = table[name] if images is None else images
        kinds[naming.get(name, name)] = features[name] if images is None else datasets.Image()
    firsts = [next((path for path in row if path is not None), "") for row in zip(*files.values(), strict=True)]
    rows = collections.defaultdict(list)
    for row, first in enumerate(firsts):
        rows[division.locate(first)[0]].append(row)
    if nameless := sum(not firsts[row] for row in rows[None]):  # in no folder, thus in no split's
        listing.left_out["metadata row without a file name"] += nameless
    return {split: pa.table(columns).take(indices) for split, indices in rows.items() if split is not None}, kinds
