"""Every source of local data gives its images, labels and columns."""

import json

import datasets
import numpy as np
import pytest

from ddpm_hf.common.errors import DataError
from ddpm_hf.data.dataset import ImageDataset
from ddpm_hf.data.images import ImageTransform, decode_row
from ddpm_hf.data.reading import read_dataset
from tests.support.pictures import encoded, image_rows, quiet, random_pixels, write_images, write_rows

PIXELS = random_pixels(6, 9, 7, seed=2)


def as_folder(folder):
    write_images(folder, PIXELS)
    return folder


def as_class_folders(folder):
    for number, one in enumerate(PIXELS):
        write_images(folder / ("cats" if number % 2 else "ants"), one[None], f"{number}.png")
    return folder


def as_metadata(folder):
    write_images(folder, PIXELS)
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"no. {number}"}) for number in range(len(PIXELS))]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def as_parquet(folder):
    folder.mkdir()
    image_rows([encoded(one) for one in PIXELS], "img", fine_label=list(range(6))).to_parquet(
        str(folder / "a.parquet")
    )
    return folder


def as_parquet_file(folder):
    return as_parquet(folder) / "a.parquet"


def as_arrow(folder):
    return next(write_rows(folder / "saved", [encoded(one) for one in PIXELS]).glob("*.arrow"))


def as_saved(folder):
    return write_rows(folder, [encoded(one) for one in PIXELS], "picture", caption=list("abcdef"))


def as_saved_splits(folder):
    parts = {"test": image_rows([encoded(PIXELS[0][::-1])]), "train": image_rows([encoded(one) for one in PIXELS])}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


SOURCES = {
    as_folder: "image", as_class_folders: "image", as_metadata: "image", as_parquet: "img", as_parquet_file: "img",
    as_arrow: "image", as_saved: "picture", as_saved_splits: "image",
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_source_gives_its_images(make, streaming, tmp_path):
    # Breaks if a kind of dataset loses images or its image column is not found by its type.
    with quiet():
        path = make(tmp_path / "data")
        rows = read_dataset(directory=str(path), streaming=streaming, cache_dir=str(tmp_path / "cache"))
    assert rows.image_column == SOURCES[make]
    images = [np.asarray(decode_row(row[rows.image_column], "one")) for row in rows.dataset]
    assert sorted(one.tobytes() for one in images) == sorted(one.tobytes() for one in PIXELS)


def test_class_folders_are_labels(tmp_path):
    # Breaks if a class-conditional model would learn names that do not belong to its images.
    with quiet():
        folder = as_class_folders(tmp_path / "data")
        rows = read_dataset(directory=str(folder), label_column="label", cache_dir=str(tmp_path / "cache"))
    assert rows.label_names == ["ants", "cats"]
    for row in rows.dataset:
        assert np.array_equal(np.asarray(decode_row(row["image"], "")), PIXELS[_number(row)])
        assert row["label"] == _number(row) % 2


def _number(row: dict) -> int:
    return int(row["image"]["path"].rpartition("/")[2].partition(".")[0])


def test_columns_that_do_not_exist_are_named_with_those_that_do(tmp_path):
    # Breaks if a typo in a column's name ends in a traceback, or leaves the user to guess.
    path = write_rows(tmp_path / "data", [encoded(PIXELS[0])], "img", label=[1])
    for options in ({"image_column": "image"}, {"label_column": "labels"}):
        with pytest.raises(DataError, match=rf"{next(iter(options.values()))}.*img, label"):
            read_dataset(directory=str(path), **options)
    only_labels = datasets.Dataset.from_dict({"label": [1], "text": ["a"]})
    with quiet():
        only_labels.save_to_disk(str(tmp_path / "labels"))
    with pytest.raises(DataError, match=r"no image column.*label, text"):
        read_dataset(directory=str(tmp_path / "labels"))


def test_a_split_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    # Breaks if --dataset_split silently trains on another split.
    with quiet():
        folder = str(as_saved_splits(tmp_path / "data"))
    assert len(read_dataset(directory=folder, split="test").dataset) == 1
    with pytest.raises(DataError, match=r"validation.*test, train"):
        read_dataset(directory=folder, split="validation")


def test_cells_that_are_arrays():
    # Breaks if a column of arrays is silently darkened, wrapped around or ends in a traceback.
    assert np.array_equal(np.asarray(decode_row([[0, 128], [255, 7]], "cell")), [[0, 128], [255, 7]])
    for cell in ([["a"]], [[[[1]]]], [], [[1], [2, 3]]):
        with pytest.raises(DataError, match="cell 4"):
            decode_row(cell, "cell 4")


def with_file_names(folder, *names):
    """A table whose images are named, and two of these files."""
    write_images(folder, PIXELS[:2])
    datasets.Dataset.from_dict({"path": list(names), "label": [0] * len(names)}).to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


def test_file_names_in_a_column_are_files_of_the_dataset(tmp_path, monkeypatch):
    """Else an image is read from wherever a program is started, and its cached latents are of another."""
    write_images(tmp_path, PIXELS[4:])  # 0.png and 1.png, in the current folder
    monkeypatch.chdir(tmp_path)
    table = with_file_names(tmp_path / "data", "0.png", str(tmp_path / "data/1.png"))
    rows = read_dataset(directory=str(table), image_column="path")
    for row, pixels in zip(rows.dataset, PIXELS):
        rows.check_inside(row["path"]["path"])
        assert np.array_equal(np.asarray(decode_row(row["path"], "")), pixels)
    before = rows.fingerprint()
    write_images(tmp_path / "data", PIXELS[2:4])
    assert rows.fingerprint() != before


def test_file_names_outside_of_the_dataset_are_not_read(tmp_path):
    """Else a table from elsewhere makes a model of private files."""
    write_images(tmp_path, PIXELS[:1])
    rows = read_dataset(directory=str(with_file_names(tmp_path / "data", "../0.png")), image_column="path")
    with pytest.raises(DataError, match="is outside of"):
        ImageDataset(rows, ImageTransform(4, 4, 3), 0, True)


@pytest.mark.parametrize(
    ("name", "streaming", "said"),
    [("https://example.com/0.png", False, "download the images"), ("0.png", True, "leave --streaming out")],
)
def test_file_names_that_cannot_be_opened_are_refused(name, streaming, said, tmp_path):
    """Else the error is of a file that nobody named."""
    table = with_file_names(tmp_path / "data", name)
    with pytest.raises(DataError, match=said):
        read_dataset(directory=str(table), image_column="path", streaming=streaming)
