"""Files of ours within a data folder, folders that mix kinds, and flags that name a folder together."""

import datasets
import numpy as np
import pytest

import train_unconditional
from ddpm_hf.common.errors import DataError
from ddpm_hf.common.ownership import claim_files
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.data.image_folders import list_folder
from ddpm_hf.data.reading import load_rows
from tests.support.pictures import encoded, image_rows, quiet


def write(folder, *names):
    """PNG files of these names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(np.full((4, 4, 3), 20 * number, dtype=np.uint8)))
    return folder


def read(**flags):
    """(rows to train on, held-out rows)."""
    return load_rows(DataFlags(**flags), seed=0)


def test_only_what_a_run_wrote_leaves_the_data(tmp_path):
    """Else a user's own folder samples/ is no longer trained on once the data folder is an output folder too."""
    write(tmp_path, "cat/a.png", "samples/mine.png", "samples/step-4.png", "assets/b.png", "checkpoint-2/c.png")
    claim_files(tmp_path, ["samples/step-4.png", "checkpoint-2/", "training_config.json"])
    assert list_folder(tmp_path).images == ["assets/b.png", "cat/a.png", "samples/mine.png"]


def test_sampled_pictures_are_not_trained_on(tmp_path):
    """Else `ddpm-hf sample --out photos/samples` puts grid.png into the next training's data."""
    write(tmp_path, "a.png", "samples/0000.png", "samples/grid.png", "samples/mine.png")
    claim_files(tmp_path / "samples", {"0000.png": None, "grid.png": None}, part="sample")
    listing = list_folder(tmp_path)
    assert listing.images == ["a.png", "samples/mine.png"]
    assert listing.note() == "2 × file that ddpm_hf wrote to samples/"


def test_a_dataset_saved_as_validation_is_not_validated_on_itself(tmp_path):
    """Else the held-out loss is that of the images that are trained on."""
    rows = image_rows([encoded(np.full((4, 4, 3), 9 * n, dtype=np.uint8)) for n in range(4)])
    saved = datasets.Dataset(rows.data, rows.info, split=datasets.Split.VALIDATION)
    with quiet():
        saved.save_to_disk(str(tmp_path / "saved"))
    assert len(read(train_data_dir=str(tmp_path / "saved"))[0].dataset) == 4
    with pytest.raises(DataError, match="validate on"):
        load_rows(DataFlags(train_data_dir=str(tmp_path / "saved")), seed=0, validate=True)


def test_the_column_called_image_is_the_images(tmp_path):
    """Else a mask that stands before it is trained on."""
    masks, images = ([encoded(np.full((4, 4, 3), n, dtype=np.uint8)) for n in (one, one + 1)] for one in (1, 7))
    rows = image_rows(images, mask=[{"bytes": mask, "path": None} for mask in masks])
    rows = rows.cast_column("mask", datasets.Image()).select_columns(["mask", "image"])
    with quiet():
        rows.to_parquet(str(tmp_path / "rows.parquet"))
    assert read(train_data_dir=str(tmp_path))[0].image_column == "image"


def test_tables_beside_a_picture_are_read_by_their_kind(tmp_path):
    """Else the way out that a mixed folder has, `--dataset_name parquet`, reads the picture as a table."""
    with quiet():
        image_rows([encoded(np.full((4, 4, 3), n, dtype=np.uint8)) for n in range(3)]).to_parquet(
            str(tmp_path / "rows.parquet")
        )
    write(tmp_path, "preview.png")
    assert len(read(dataset_name="parquet", train_data_dir=str(tmp_path))[0].dataset) == 3


@pytest.mark.parametrize("parts", [("trainA", "testA"), ("trainset", "testset"), ("TrainImages", "TestImages")])
def test_folders_that_sound_like_splits_are_not_trained_on_together(parts, tmp_path):
    """Else test images are trained on without a word."""
    write(tmp_path, *(f"{part}/{n}.png" for part in parts for n in range(2)))
    with pytest.raises(DataError, match="splits or classes"):
        read(train_data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("weaker", "flag"),
    [("dataset_name: imagefolder\ntrain_data_dir: old", "train_data_dir"), ("train_data_dir: new", "dataset_name")],
)
def test_a_kind_and_a_folder_stay_together(weaker, flag, tmp_path):
    """Else --train_data_dir on the command line drops the kind that --config says: another is read."""
    (tmp_path / "flags.yaml").write_text(weaker)
    given = {"train_data_dir": "new", "dataset_name": "imagefolder"}
    config = train_unconditional.parse(["--config", str(tmp_path / "flags.yaml"), f"--{flag}", given[flag]])
    assert (config.dataset_name, config.train_data_dir) == ("imagefolder", "new")


def test_a_folder_still_replaces_a_dataset_of_the_hub(tmp_path):
    """Else the two are given together, which is refused."""
    (tmp_path / "flags.yaml").write_text("dataset_name: user/photos")
    config = train_unconditional.parse(["--config", str(tmp_path / "flags.yaml"), "--train_data_dir", "new"])
    assert (config.dataset_name, config.train_data_dir) == (None, "new")
