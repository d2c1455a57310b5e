"""Captioned pictures, checkpoints and models to train with, and runs that no test makes twice."""

import functools
from pathlib import Path

import pytest
from diffusers import PNDMScheduler

from tests.support.fixtures_pipeline import tiny_vae
from tests.support.fixtures_text import (
    WIDTH,
    stock_pipeline,
    tiny_text_pipeline,
    tiny_text_unet,
    write_captioned,
    write_text_unet,
)
from tests.support.text_runs import DIFFUSION, train_text


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Captioned pictures, checkpoints and models to train with, by name."""
    root = tmp_path_factory.mktemp("shop")
    write_captioned(root / "pictures")
    write_captioned(root / "seven", count=7)
    write_captioned(root / "few", count=3)
    write_captioned(root / "large", height=22, width=20)
    write_captioned(root / "described", captions=["a cat", "a dog"], column="description")
    write_captioned(root / "uncaptioned", column="title")
    write_text_unet(root / "unet")
    write_text_unet(root / "wide", block_out_channels=[16, 16])
    write_text_unet(root / "narrow", cross_attention_dim=WIDTH)
    write_text_unet(root / "broad", cross_attention_dim=WIDTH, block_out_channels=[16, 16])
    write_text_unet(root / "rgb", in_channels=3, out_channels=3)
    write_text_unet(root / "plain", _class_name="UNet2DModel")
    tiny_vae(scaling_factor=0.5).save_pretrained(root / "vae")
    pipeline = tiny_text_pipeline()
    sampler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False, **DIFFUSION)
    stock_pipeline(pipeline, sampler).save_pretrained(root / "stable")
    raw = tiny_text_unet(seed=1)
    (root / "no-model").mkdir()
    raw.save_pretrained(root / "raw")
    return root


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """A run's folder by how it starts and its flags; none is made twice."""
    root = tmp_path_factory.mktemp("trained")

    @functools.cache
    def made(start: str, flags: tuple) -> Path:
        return train_text(start, shop, root / str(made.cache_info().misses), **dict(flags)).folder

    return lambda start, **flags: made(start, tuple(flags.items()))
