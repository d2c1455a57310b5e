"""Folders on disk give the rows that `datasets.load_dataset` gives for them, and nothing disappears for its name."""

import hashlib
import io
import json
import os
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from ddpm_hf.common.errors import DataError
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.dataset import ImageDataset
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.data.formats import register_plugins
from ddpm_hf.data.images import decode_row
from ddpm_hf.data.reading import load_rows, read_dataset
from ddpm_hf.training.flags import Flags
from tests.support.pictures import encoded, image_rows, quiet

IMAGE = object()  # stands for a tiny image, each another one
FORMS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".heic": "JPEG", ".avif": "AVIF", ".gif": "GIF"}


def picture(number: int, form: str = "PNG") -> bytes:
    """One of 125 tiny images, as the bytes of a file."""
    colour = [60 * (number // 5**channel % 5) for channel in range(3)]
    return encoded(np.full((2, 2, 3), colour, dtype=np.uint8), form)


def write(folder: Path, *names: str, **files) -> Path:
    """A folder with images of these names, and with other files: texts, bytes or tables of (split of) image rows."""
    contents = dict.fromkeys(names, IMAGE) | files
    for number, (name, content) in enumerate(contents.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is IMAGE:
            content = picture(number, FORMS.get(path.suffix.lower(), "PNG"))
        if isinstance(content, datasets.Dataset):
            with quiet():
                content.to_parquet(str(path)) if path.suffix == ".parquet" else content.save_to_disk(str(path))
        elif isinstance(content, pandas.DataFrame):
            content.to_parquet(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def table(first: int, count: int, **columns: list) -> datasets.Dataset:
    """Rows of images, from one number on."""
    return image_rows([picture(number) for number in range(first, first + count)], **columns)


def tar(count: int) -> bytes:
    """A shard of a webdataset: images and their classes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(count):
            for suffix, data in (("png", picture(number)), ("cls", str(number % 2).encode())):
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


CSV = 'file_name,text\n1.png,one\n2.png,\n3.png,"three, too"\n'
JSONL = "\n".join(
    json.dumps({"file_name": f"{name}.png", "text": f"no. {name}", "kind": name % 2}) for name in (1, 2, 3)
)
CONFIGURED = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/*.parquet}]
- config_name: large
  data_files: [{split: train, path: large/a.parquet}, {split: test, path: large/b.parquet}]
---
"""

# layout -> how to write it; each is read by `datasets.load_dataset` and by us, split by split
SAME = {
    "flat": lambda f: write(f, "b.png", "a.png", "c.jpg"),
    "capitals": lambda f: write(f, "B.PNG", "a.JPG"),
    "classes": lambda f: write(f, "cat/1.png", "cat/2.png", "ant/1.png"),
    "one class": lambda f: write(f, "cat/1.png", "cat/2.png"),
    "classes and loose images": lambda f: write(f, "cat/1.png", "ant/1.png", "1.png"),
    "classes in groups": lambda f: write(f, "a/x/1.png", "b/y/1.png", "b/x/2.png"),
    "classes of unequal depth": lambda f: write(f, "a/1.png", "b/y/1.png"),
    "classes in splits": lambda f: write(f, "train/cat/1.png", "train/ant/2.png", "test/cat/3.png"),
    "a class in one split alone": lambda f: write(f, "train/cat/1.png", "train/ant/2.png", "val/dog/3.png"),
    "other names of splits": lambda f: write(
        f, "training/a/1.png", "training/b/2.png", "dev/b/3.png", "evaluation/a/4.png"
    ),
    "a split and another folder": lambda f: write(f, "train/a/1.png", "train/b/3.png", "extra/a/2.png"),
    "splits deeper": lambda f: write(f, "data/train/1.png", "data/train/2.png", "data/test/3.png"),
    "numbered splits": lambda f: write(f, "train2017/1.png", "train2017/2.png", "val2017/3.png"),
    "flat splits": lambda f: write(f, "train/1.png", "train/2.png", "valid/3.png", "test/4.png"),
    "only a test split": lambda f: write(f, "test/a/1.png", "test/b/2.png"),
    "hidden": lambda f: write(f, "1.png", ".2.png", ".thumbs/3.png", "__MACOSX/4.png"),
    "names": lambda f: write(f, "a b.png", "ä.png", "100%.png", "#1.png", "漢字/a[1].png", "漢字/b?*.png", "x.y.png"),
    "csv": lambda f: write(f, "1.png", "2.png", "3.png", **{"metadata.csv": CSV}),
    "jsonl": lambda f: write(f, "1.png", "2.png", "3.png", **{"metadata.jsonl": JSONL}),
    "parquet metadata": lambda f: write(
        f, "1.png", "2.png",
        **{"metadata.parquet": pandas.DataFrame({"text": ["a", "b"], "file_name": ["2.png", "1.png"]})},
    ),
    "metadata of some": lambda f: write(f, "1.png", "2.png", "3.png", "4.png", **{"metadata.csv": CSV}),
    "metadata in class folders": lambda f: write(
        f, "a/1.png", "a/2.png", "b/x/3.png",
        **{"a/metadata.csv": "file_name,text\n1.png,a\n2.png,b\n", "b/metadata.csv": "file_name,text\nx/3.png,c\n"},
    ),
    "metadata of folders": lambda f: write(
        f, "a/1.png", "b/2.png", **{"metadata.csv": "file_name,label,score\na/1.png,x,0.5\n./b/../b/2.png,y,2\n"}
    ),
    "metadata in splits": lambda f: write(
        f, "train/1.png", "train/2.png", "test/3.png",
        **{"train/metadata.csv": "file_name,text\n2.png,b\n1.png,a\n",
           "test/metadata.csv": "file_name,text\n3.png,c\n"},
    ),
    "pairs": lambda f: write(
        f, "1.png", "2.png", **{"metadata.csv": "in_file_name,out_file_name,edit\n1.png,2.png,a\n2.png,1.png,b\n"}
    ),
    "one parquet": lambda f: write(f, **{"a.parquet": table(0, 3, label=[0, 2, 1])}),
    "parquets named after splits": lambda f: write(
        f, **{"train.parquet": table(0, 3), "my-test.parquet": table(3, 2)}
    ),
    "parquets in split folders": lambda f: write(
        f, **{"train/a.parquet": table(0, 3), "validation/b.parquet": table(3, 2)}
    ),
    "converted by the Hub": lambda f: write(
        f, **{"default/train/0000.parquet": table(0, 3), "default/test/0000.parquet": table(3, 2)}
    ),
    "shards": lambda f: write(
        f, "assets/logo.png",
        **{"data/train-00000-of-00002.parquet": table(0, 3), "data/train-00001-of-00002.parquet": table(3, 2),
           "data/holdout-00000-of-00001.parquet": table(5, 1)},
    ),
    "a train file for all": lambda f: write(f, **{"x/train-1.parquet": table(0, 3), "x/other.parquet": table(3, 2)}),
    "webdataset": lambda f: write(f, **{"shard-0.tar": tar(4), "README.md": "four"}),
    "configured": lambda f: write(
        f, **{"README.md": CONFIGURED.replace("- config_name: small", "- config_name: small\n  default: true"),
              "small/a.parquet": table(0, 3), "large/a.parquet": table(3, 2), "large/b.parquet": table(5, 1)},
    ),
}  # fmt: skip
# `imagefolder` gives the images of split folders a class after the split, and half of them none
NONSENSE_LABELS = ("flat splits", "splits deeper", "numbered splits")


def plain(dataset, folder: Path) -> list[dict]:
    """Rows in a comparable form: images as their paths within the folder or their content, classes as names."""
    kinds = dataset.features
    for name, kind in kinds.items():
        if isinstance(kind, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    rows = [dict(row) for row in dataset]
    for row in rows:
        for name, value in row.items():
            if isinstance(kinds[name], datasets.Image):
                data = value["bytes"]
                row[name] = hashlib.md5(data).hexdigest() if data else os.path.relpath(value["path"], folder.resolve())
            elif isinstance(kinds[name], datasets.ClassLabel) and value is not None:
                row[name] = kinds[name].names[value]
    return sorted(rows, key=str)


@pytest.mark.parametrize("layout", SAME)
def test_a_folder_gives_what_datasets_gives(layout, tmp_path):
    """Else held-out images are trained on, or images, classes or captions are lost."""
    folder, cache = SAME[layout](tmp_path / "data"), str(tmp_path / "cache")
    with quiet():
        theirs = datasets.load_dataset(str(folder), cache_dir=cache)
        assert len(theirs) > 0
        for split, expected in theirs.items():
            rows = read_dataset(directory=str(folder), split=split, cache_dir=cache)
            if layout in NONSENSE_LABELS:
                assert None in theirs["train"]["label"]
                expected = expected.remove_columns("label")
            got = plain(rows.dataset, folder)
            assert got == plain(expected, folder)
            assert set(rows.dataset.features) == set(expected.features)
            streamed = read_dataset(
                directory=str(folder), split=split, streaming=True, cache_dir=str(tmp_path / "cache")
            )
            assert plain(streamed.dataset, folder) == got
        missing = next(split for split in ("train", "validation", "test", "holdout", "none") if split not in theirs)
        with pytest.raises(DataError) as caught:
            read_dataset(directory=str(folder), split=missing, cache_dir=cache)
    assert repr(missing).strip("'") in str(caught.value)
    assert all(split in str(caught.value) for split in theirs)


# What datasets reads otherwise: names of files, and of folders that merely sound like splits


OURS = {
    "a file named train": (["train.png", "cat.png"], ["cat.png", "train.png"], None),
    "files with split words": (["a test.png", "b-train.png", "val_1.png", "dev.jpg"], None, None),
    "suffixes with a capital": (["1.Png", "2.jPeG"], None, None),
    "class folders with split words": (["part-train-a/1.png", "part-b/2.png"], None, ["part-b", "part-train-a"]),
    "a class named after a split, deeper": (["x/train/1.png", "x/bus/2.png"], None, ["bus", "train"]),
    "a class with a capital": (["Train/1.png", "Bus/2.png"], None, ["Bus", "Train"]),
    "splits with capitals": (["Train/1.png", "Test/2.png"], ["Train/1.png"], None),
    "splits in each class": (["cat/train/1.png", "ant/train/2.png", "cat/test/3.png"],
                             ["ant/train/2.png", "cat/train/1.png"], ["ant", "cat"]),
    "harbor's and logs' names": (["instruction.png", "log.png", "eval.png"], None, None),
}  # fmt: skip


@pytest.mark.parametrize("layout", OURS)
def test_only_folders_divide(layout, tmp_path):
    """Else an image disappears, or is held out, because of its name."""
    names, expected, classes = OURS[layout]
    folder = write(tmp_path / "data", *names)
    rows = read_dataset(directory=str(folder))
    assert [row["image"] for row in plain(rows.dataset, folder)] == (expected or sorted(names))
    feature = rows.dataset.features.get("label")
    assert (feature and feature.names) == classes


def test_what_lies_outside_of_the_splits_is_named(tmp_path):
    """Else images are missing and nobody knows."""
    folder = write(tmp_path, "train/1.png", "2.png", "more/3.png")
    rows = read_dataset(directory=str(folder))
    assert len(rows.dataset) == 1
    assert rows.left_out == "2 × image outside of train/"


@pytest.mark.parametrize(
    "names", [["train_images/1.png", "test_images/2.png"], ["a/seg_train/1.png", "a/seg_test/2.png"]]
)
def test_folders_that_may_be_splits_are_asked_about(names, tmp_path):
    """Else held-out images are trained on as a class, or a class is held out."""
    folder = write(tmp_path, *names)
    with pytest.raises(DataError, match=r"train.*/, .*may be splits or classes.*--dataset_split all"):
        read_dataset(directory=str(folder))
    rows = read_dataset(directory=str(folder), split="all", label_column="label")
    assert len(rows.dataset) == len(rows.label_names) == 2
    assert len(read_dataset(directory=str((folder / names[0]).parent)).dataset) == 1


# Formats


def test_all_that_pil_reads_is_read(tmp_path):
    """Else photos are left out for their suffix."""
    names = ["1.png", "2.jfif", "3.gif", "4", "5.jpg_large", "6.heic", "v1.5", "c.JPE"]
    folder = write(tmp_path, *names, **{"LICENSE2": "no image", "Makefile": "P6 neither", "a.txt": "text"})
    if ".avif" in Image.registered_extensions():
        names += ["7.avif"]
        write(tmp_path, "7.avif")
    rows = read_dataset(directory=str(folder))
    assert [row["image"] for row in plain(rows.dataset, folder)] == sorted(names)
    for row in rows.dataset:
        assert decode_row(row["image"], "one").size == (2, 2)
    assert rows.left_out == ".txt file, 2 × file without a suffix that is not an image"


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"  # how such a file begins


def test_formats_of_plugins_are_named_with_the_way_out_or_read(tmp_path, monkeypatch):
    """Else an iPhone's photos are silently left out, or the advice does not help."""
    folder = write(tmp_path, "1.png", **{"2.HEIC": HEIC, "pics.zip": b"PK"})
    rows = read_dataset(directory=str(folder))
    assert len(rows.dataset) == 1
    assert rows.left_out == ".heic file (pip install pillow-heif), .zip file (unpack it)"
    registered = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append(True), __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    register_plugins.cache_clear()
    register_plugins()
    assert registered
    register_plugins.cache_clear()


def test_what_pil_cannot_decode_is_no_image(tmp_path):
    """Else a film or a program among the pictures stops the run."""
    folder = write(
        tmp_path, "1.png", **{"2.eps": "%!PS-Adobe-3.0 EPSF-3.0", "3.mpg": b"\0\0\1\xb3", "4.h5": b"\x89HDF\r\n"}
    )
    rows = read_dataset(directory=str(folder))
    assert len(rows.dataset) == 1
    assert {".eps file", ".mpg file", ".h5 file"} == set(rows.left_out.split(", "))


# Links


def test_a_linked_folder_is_read(tmp_path):
    """Else data on another disk is "broken"."""
    write(tmp_path / "disk", "photos/cat/1.png", "photos/dog/2.png")
    (tmp_path / "data").symlink_to("disk")
    (tmp_path / "pics").symlink_to(tmp_path / "disk" / "photos")
    for folder in (tmp_path / "pics", tmp_path / "data" / "photos"):
        rows = read_dataset(directory=str(folder), label_column="label")
        assert rows.label_names == ["cat", "dog"]
        assert len(ImageDataset(rows, ImageTransform(2, 2, 3), 0, True)) == 2


def test_links_within_a_folder_are_followed_and_end(tmp_path):
    """Else linked classes are lost, or a loop of links never ends."""
    write(tmp_path / "disk", "owls/1.png", "more/2.png")
    folder = write(tmp_path / "data", "cats/1.png", "cats/2.png")
    (folder / "owls").symlink_to(tmp_path / "disk" / "owls")
    (folder / "cats" / "3.png").symlink_to(tmp_path / "disk" / "more" / "2.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "cats" / "up").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    (folder / "again").symlink_to(folder / "cats")
    (tmp_path / "disk" / "owls" / "back").symlink_to(folder / "owls")
    rows = read_dataset(directory=str(folder), label_column="label")
    assert [row["image"] for row in plain(rows.dataset, folder)] == [
        "cats/1.png",
        "cats/2.png",
        "cats/3.png",
        "owls/1.png",
    ]
    assert rows.label_names == ["cats", "owls"]
    assert len(ImageDataset(rows, ImageTransform(2, 2, 3), 0, True)) == 4
    assert "link to a file that does not exist" in rows.left_out
    assert rows.left_out.count("a link to a folder that is read already") == 4


# Tables, metadata, and outputs of runs among the images


def test_a_table_does_not_take_the_images_over(tmp_path):
    """Else annotations beside the images are the dataset."""
    scores = pandas.DataFrame({"id": [1], "score": [0.5]})
    folder = write(
        tmp_path, "a.png", "b/c.png", **{"n.parquet": scores, "b/boxes.json": "[]", "sub/x.csv": "a,b\n1,2\n"}
    )
    rows = read_dataset(directory=str(folder))
    assert len(rows.dataset) == 2
    assert set(rows.left_out.split(", ")) == {
        f"{kind} table in a folder of images" for kind in (".parquet", ".json", ".csv")
    }


METADATA_ERRORS = {
    "no file names": ({"metadata.csv": "name,text\n1.png,a\n"}, "metadata.csv has no column file_name"),
    "two kinds": ({"metadata.csv": CSV, "a/metadata.jsonl": JSONL}, "several kinds"),
    "not JSON": ({"metadata.jsonl": "{"}, "metadata.jsonl cannot be read"),
    "empty": ({"metadata.csv": ""}, "metadata.csv cannot be read"),
    "a comma": ({"metadata.csv": "file_name,text\n1.png,a cat, sitting\n"}, "line 2 has 3 fields, and the first line"),
    "a list": ({"metadata.jsonl": '{"file_name": "1.png"}\n\n[1]\n'}, "line 3 is not an object"),
    "half a line": ({"metadata.jsonl": '{"file_name": "1.png"}\n{"file_name"'}, "line 2: "),
    "a quote": ({"metadata.csv": 'file_name,text\n1.png,"a\n'}, "metadata.csv cannot be read"),
    "a huge number": ({"metadata.jsonl": '{"file_name": "1.png", "n": 99999999999999999999}'}, "cannot be read"),
    "not UTF-8": ({"metadata.csv": "file_name,text\n1.png,\xe9".encode("latin-1")}, "metadata.csv cannot be read"),
    "numbers": ({"metadata.jsonl": '{"file_name": 1}'}, "file names are strings"),
    "one column twice": ({"metadata.csv": "file_name,image\n1.png,a\n"}, "two columns give the column 'image'"),
    "none of the images": ({"metadata.csv": "file_name,text\n"}, "no images to read; left out: image that no"),
    "a URL": ({"metadata.csv": "file_name,text\nfile:///etc/passwd,a\n"}, "pointing inside its folder"),
    "types that differ": ({"metadata.csv": "file_name,text\n1.png,a\n", "b/metadata.csv": "file_name,text\n1.png,5\n"},
                          "differ in type"),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA_ERRORS)
def test_metadata_that_cannot_be_used_is_named(name, tmp_path):
    """Else captions are lost, or a traceback ends the run."""
    files, said = METADATA_ERRORS[name]
    with pytest.raises(DataError, match=said) as caught:
        read_dataset(directory=str(write(tmp_path, "1.png", **files)), caption_column="text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", ["train/metadata.csv", "metadata.jsonl"])
def test_a_metadata_row_without_a_file_name_is_said(metadata, tmp_path):
    """Else such a row, which no split's folder holds, disappears without a word."""
    rows = {"csv": "file_name,text\n1.png,a\n,b\n", "jsonl": '{"file_name": "train/1.png"}\n{"file_name": ""}\n'}
    folder = write(tmp_path, "train/1.png", "val/2.png", **{metadata: rows[metadata.split(".")[1]]})
    read = read_dataset(directory=str(folder))
    assert len(read.dataset) == 1
    assert "metadata row without a file name" in read.left_out


def test_metadata_above_the_split_folders_counts(tmp_path):
    """Else captions in one file for all splits are lost, as `imagefolder` loses them."""
    lines = "file_name,text\ntrain/1.png,a\nval/2.png,b\n"
    folder = write(tmp_path, "train/1.png", "val/2.png", **{"metadata.csv": lines})
    assert read_dataset(directory=str(folder), caption_column="text").dataset["text"][:] == ["a"]
    assert read_dataset(directory=str(folder), split="validation", caption_column="text").dataset["text"][:] == ["b"]


def test_edited_captions_are_read_though_the_files_date_stays(tmp_path):
    """Else the model trains on old captions out of a cache."""
    folder = write(tmp_path, "1.png", "2.png", "3.png", **{"metadata.jsonl": JSONL})
    before, date = read_dataset(directory=str(folder)).dataset["text"][:], (folder / "metadata.jsonl").stat()
    write(folder, **{"metadata.jsonl": JSONL.replace("no.", "of")})
    os.utime(folder / "metadata.jsonl", ns=(date.st_atime_ns, date.st_mtime_ns))
    assert read_dataset(directory=str(folder)).dataset["text"][:] == [text.replace("no.", "of") for text in before]


def test_an_image_that_metadata_names_and_that_is_missing_is_named_or_skipped(tmp_path):
    """Else a typo in a caption file is a traceback, or silent."""
    rows = read_dataset(directory=str(write(tmp_path, "1.png", "2.png", **{"metadata.csv": CSV})))
    with pytest.raises(DataError, match=r"broken image .*3\.png"):
        ImageDataset(rows, ImageTransform(2, 2, 3), 0, True)
    assert len(ImageDataset(rows, ImageTransform(2, 2, 3), 0, True, skip_broken=True)) == 2


RUN = {
    "training_config.json": "{}",
    "run.json": "{}",
    "metrics.jsonl": "{}",
    "samples/1.png": IMAGE,
    "latents/x.arrow": "x",
}
CHECKPOINT = {"checkpoint-5/manifest.json": "{}", "checkpoint-5/unet/config.json": "{}", "samples/2.png": IMAGE}


@pytest.mark.parametrize("files", [RUN, CHECKPOINT], ids=["a run that ended", "a run that stopped"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "tables"])
@pytest.mark.parametrize("inside", ["out/", ""], ids=["in a folder", "in the data folder"])
def test_the_outputs_of_runs_are_not_data(files, images, inside, tmp_path):
    """Else the second run trains on the first one's samples, or on its settings."""
    outputs = {f"{inside}{name}": content for name, content in files.items()}
    data = {"a.png": IMAGE, "b.png": IMAGE} if images else {"a.parquet": table(0, 2)}
    folder = write(tmp_path / "data", **data)
    with quiet():
        before = plain(read_dataset(directory=str(folder), cache_dir=str(tmp_path / "cache")).dataset, folder)
        write(folder, **outputs)
        rows = read_dataset(directory=str(folder), cache_dir=str(tmp_path / "cache"))
    assert plain(rows.dataset, folder) == before
    assert not inside or "out/ (the output of a run)" in rows.left_out


# Paths

PATHS = ["photos[2023]", "a*b", "what?", "100%", "#5", "sp ace", "漢字", "{x}", "~"]


@pytest.mark.parametrize("name", [*PATHS, "a::b", "c:/d"])
def test_any_path_holds_images(name, tmp_path):
    """Else a bracket in a folder's name makes its images disappear."""
    rows = read_dataset(directory=str(write(tmp_path / name, "a.png", "b.png")), cache_dir=str(tmp_path / "cache"))
    assert len(ImageDataset(rows, ImageTransform(2, 2, 3), 0, True)) == 2


@pytest.mark.parametrize("name", PATHS)
def test_any_path_holds_tables(name, tmp_path):
    """Else a bracket in a folder's name makes its tables disappear, or both splits are read."""
    folder = write(tmp_path / name, **{"train-1.parquet": table(0, 2), "test.parquet": table(2, 1)})
    with quiet():
        for path, count in ((folder, 2), (folder / "test.parquet", 1)):
            assert len(read_dataset(directory=str(path), cache_dir=str(tmp_path / "cache")).dataset) == count


# Splits


def as_images(folder: Path) -> Path:
    return write(folder, "1.png", "2.png", "3.png")


def as_parquet(folder: Path) -> Path:
    return write(folder, **{"a.parquet": table(0, 3)})


def as_file(folder: Path) -> Path:
    return as_parquet(folder) / "a.parquet"


def as_saved(folder: Path) -> Path:
    return write(folder, saved=table(0, 3)) / "saved"


def as_saved_splits(folder: Path) -> Path:
    with quiet():
        datasets.DatasetDict({"train": table(0, 3), "test": table(3, 2)}).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "make", [as_images, as_parquet, as_file, as_saved, as_saved_splits], ids=lambda make: make.__name__
)
def test_parts_of_a_split_are_read(make, streaming, tmp_path):
    """Else --dataset_split is ignored, or works for some kinds of data alone."""
    folder, options = make(tmp_path / "data"), {"streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    with quiet():
        every = plain(read_dataset(directory=str(folder), cache_dir=options["cache_dir"]).dataset, tmp_path)
        for split, count in {"train[:67%]": 2, "train[67%:]": 1, "train[1:]": 2, "train[:1]+train[2:]": 2}.items():
            rows = plain(read_dataset(directory=str(folder), split=split, **options).dataset, tmp_path)
            assert len(rows) == count
            assert all(row in every for row in rows)
        for bad in ("nowhere", "train[:", "nowhere[:50%]", "train+nowhere"):
            with pytest.raises(DataError) as caught:
                read_dataset(directory=str(folder), split=bad, **options)
            assert "\n" not in str(caught.value)
            assert "nowhere" not in bad or ("nowhere" in str(caught.value) and "train" in str(caught.value))


def test_a_single_saved_dataset_is_the_split_that_it_was(tmp_path):
    """Else a held-out part that was saved alone is trained on under another split's name."""
    with quiet():
        named = datasets.Dataset.from_dict({"image": [{"bytes": picture(1), "path": None}]}, split="validation")
        named.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    for split in ("train", "validation", "validation[:100%]"):
        assert len(read_dataset(directory=str(tmp_path / "saved"), split=split).dataset) == 1
    with pytest.raises(DataError, match="no split 'test'"):
        read_dataset(directory=str(tmp_path / "saved"), split="test")


def test_configurations_are_named(tmp_path):
    """Else two configurations are merged, or which there are must be guessed."""
    folder = SAME["configured"](tmp_path / "data")
    (folder / "README.md").write_text(CONFIGURED)
    options = {"directory": str(folder), "cache_dir": str(tmp_path / "cache")}
    with quiet():
        with pytest.raises(DataError, match=r"small, large; name one with --dataset_config_name"):
            read_dataset(**options)
        assert len(read_dataset(config_name="large", **options).dataset) == 2
        assert len(read_dataset(config_name="large", split="test", **options).dataset) == 1


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_a_kind_of_files_can_be_named(kind, tmp_path):
    """Else a command line of Diffusers' scripts does not work: --dataset_name imagefolder --train_data_dir pics."""
    folder = write(tmp_path / "data", *["1.png", "2.png"] * (kind == "imagefolder"), **{"a.parquet": table(0, 3)})
    flags = DataFlags(dataset_name=kind, train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    Flags([flags]).check()
    with quiet():
        assert len(load_rows(flags, 0)[0].dataset) == {"imagefolder": 2, "parquet": 3}[kind]
    for wrong in (DataFlags(dataset_name="imagefolder"), DataFlags(dataset_name="photos", train_data_dir=str(folder))):
        with pytest.raises(DataError, match="--train_data_dir"):
            Flags([wrong]).check()


# Validation


def as_image_splits(folder: Path) -> Path:
    return write(folder, "train/cat/1.png", "train/ant/2.png", "val/cat/3.png")


def as_table_splits(folder: Path) -> Path:
    return write(
        folder, **{"train.parquet": table(0, 2, label=["cat", "ant"]), "valid.parquet": table(2, 1, label=["cat"])}
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", [as_image_splits, as_table_splits], ids=lambda make: make.__name__)
def test_a_validation_split_is_validated_on(make, streaming, tmp_path):
    """Else images that were held out by hand are not used, or trained on."""
    folder, label = make(tmp_path / "data"), None if streaming and make is as_table_splits else "label"
    flags = {"train_data_dir": str(folder), "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    with quiet():
        rows, held_out = load_rows(DataFlags(label_column=label, **flags), 0, validate=True)
        assert len(plain(rows.dataset, folder)) == 2
        assert len(held_out.dataset) == 1
        held_out = ImageDataset(held_out, ImageTransform(2, 2, 3), 0, True)
        assert label is None or held_out.labels.tolist() == [1]
        assert load_rows(DataFlags(**flags), 0)[1] is None
        with pytest.raises(DataError, match="trains on the split 'validation'"):
            load_rows(DataFlags(dataset_split="train+validation", **flags), 0, validate=True)


def test_validation_without_images_to_validate_on_is_refused(tmp_path):
    """Else --validation_steps is taken and nothing is validated."""
    flags = DataFlags(train_data_dir=str(write(tmp_path, "train/1.png", "train/3.png", "test/2.png")))
    with pytest.raises(DataError, match=r"no validation split \(it has train, test\); give --validation_split"):
        load_rows(flags, 0, validate=True)
    flags.validation_split = 0.5
    assert [len(rows.dataset) for rows in load_rows(flags, 0, validate=True)] == [1, 1]


# Speed


def test_ten_thousand_images_are_listed_in_under_two_seconds(tmp_path):
    """Else a large folder delays each start."""
    data = picture(0)
    for folder in range(10):
        (tmp_path / str(folder)).mkdir()
        for number in range(1000):
            (tmp_path / str(folder) / f"{number}.png").write_bytes(data)
    start = time.process_time()
    rows = read_dataset(directory=str(tmp_path), label_column="label")
    assert time.process_time() - start < 2
    assert len(rows.dataset) == 10_000
    assert len(rows.label_names) == 10
