"""Data and models that the promises are tried on, good and bad, and finished runs; tests work on copies of them."""

import json
import shutil

import datasets
import pytest

from tests.support.bad_input import STEADY
from tests.support.faults import SIX_STEPS
from tests.support.fixtures_text import tiny_text_pipeline, write_captioned, write_text_unet
from tests.support.ownership import QUICK
from tests.support.pictures import (
    TINY_UNET,
    encoded,
    image_rows,
    quiet,
    random_pixels,
    write_images,
    write_rows,
    write_unet,
)
from tests.support.runs import train


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """Datasets and models, by name."""
    root = tmp_path_factory.mktemp("shop")
    files = [encoded(one) for one in random_pixels(8)]
    write_rows(root / "photos", files, label=[0, 1] * 4, text=list("abcdefgh"))
    write_rows(root / "twenty", [encoded(one) for one in random_pixels(20)])
    write_rows(root / "broken", [*files[:5], b"junk"])
    write_rows(root / "marks", files, marks=[0.5] * 8)
    with quiet():
        datasets.DatasetDict({"train": image_rows(files)}).save_to_disk(str(root / "splits"))
        datasets.Dataset.from_dict({"label": [1], "text": ["a"]}).save_to_disk(str(root / "words"))
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "read.me").write_text("no pictures")
    write_captioned(root / "pictures")
    write_unet(root / "tiny")
    write_unet(root / "wide", block_out_channels=[16, 16])
    write_unet(root / "five", in_channels=5, out_channels=5)
    write_unet(root / "odd", norm_num_groups=3)
    write_unet(root / "unknown", sharpness=7)
    write_unet(root / "silent", without=("in_channels",))
    write_unet(root / "short", without=("block_out_channels",))
    write_unet(root / "uneven", down_block_types=["DownBlock2D"])
    write_unet(root / "text", _class_name="UNet2DConditionModel")
    write_text_unet(root / "unet")
    tiny_text_pipeline().save_pretrained(root / "stable")
    (root / "torn").mkdir()
    (root / "torn" / "config.json").write_text(json.dumps(TINY_UNET)[:50])
    (root / "file.txt").write_text("a file")
    return root


@pytest.fixture(scope="session")
def trained(shop, tmp_path_factory):
    """The output folder of a run of two steps, with a checkpoint after each."""
    return train(shop, tmp_path_factory.mktemp("trained") / "run", QUICK, checkpointing_steps=1).folder


@pytest.fixture
def earlier(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="session")
def steady(shop, tmp_path_factory):
    """A finished run of three steps at one learning rate, with a checkpoint after each."""
    return train(shop, tmp_path_factory.mktemp("steady") / "run", max_train_steps=3, **STEADY)


@pytest.fixture
def folder(steady, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(steady.folder, tmp_path / "run")


@pytest.fixture(scope="session")
def whole(shop, tmp_path_factory):
    """A run of six steps that nothing went wrong with."""
    return train(shop, tmp_path_factory.mktemp("whole") / "run", **SIX_STEPS)


@pytest.fixture
def files(tmp_path):
    """A folder of eight pictures."""
    return write_images(tmp_path / "files", random_pixels(8))
