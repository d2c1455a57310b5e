"""Datasets and models for the runs with flags, by name."""

import datasets
import numpy as np
import pytest

from tests.support.flag_rows import remembered
from tests.support.flag_runs import observe
from tests.support.pictures import encoded, image_rows, quiet, random_pixels, write_images, write_rows, write_unet
from tests.support.runs import BASE, fill


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Datasets and models for all the runs of this file, by name."""
    root = tmp_path_factory.mktemp("shop")
    pixels = random_pixels(8)
    files = [encoded(one) for one in pixels]
    write_rows(root / "photos", files)
    write_rows(root / "few", files[:4])
    write_rows(root / "broken", [*files[:5], b"junk"])
    write_rows(root / "labelled", files, label=[0, 0, 0, 0, 0, 0, 0, 1])
    write_rows(root / "deep", [encoded(np.full((8, 8), 1000 + 100 * (n % 2), np.uint16)) for n in range(4)])
    two = image_rows([encoded(np.full((8, 8), 10, np.uint8))] * 4, "a")
    two = two.add_column("b", [{"bytes": encoded(np.full((8, 8), 20, np.uint8)), "path": None}] * 4)
    with quiet():
        two.cast_column("b", datasets.Image()).save_to_disk(str(root / "two"))
        splits = {"train": image_rows(files), "small": image_rows(files[:4])}
        datasets.DatasetDict(splits).save_to_disk(str(root / "splits"))
    write_images(root / "folder", pixels)
    write_unet(root / "tiny")
    write_unet(root / "wide", block_out_channels=[16, 16])
    return root


@pytest.fixture
def base(shop):
    """BASE with its paths filled in."""
    return fill(BASE, shop)


@pytest.fixture(scope="module")
def seen_of(shop, tmp_path_factory):
    """What is seen with flags on top of BASE; a run that was made before is not made again."""
    watched = remembered(lambda flags, folder: observe(fill(flags, shop), folder), tmp_path_factory.mktemp("runs"))
    return lambda flags: watched({**BASE, **flags})
