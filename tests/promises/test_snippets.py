"""The Python snippets of README.md and docs/ run as they are, page by page, with tiny models in their folders."""

import re
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import dynamic_modules_utils

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMImageToImagePipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.saving import save_half_precision
from ddpm_hf.portable.conditioning_ddpm_hf import Conditioning
from tests.support.fixtures_pipeline import tiny_unet, tiny_unet_config
from tests.support.fixtures_text import tiny_text_pipeline
from tests.support.pictures import quiet, write_images
from tests.support.snippets import PAGES, ROOT, program

SMALL = {
    "channels": 3,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder that holds what the snippets name: untrained models of every kind, and photos."""
    root = tmp_path_factory.mktemp("models")
    unconditional = DDPMPipeline(tiny_unet(**SMALL), DDPMScheduler())
    for name in ("photos-ddpm", "user/photos-ddpm"):
        unconditional.save_pretrained(root / name)
    save_half_precision(unconditional, root / "user/photos-ddpm")
    unconditional.unet.save_pretrained(root / "user/photos-ddpm/unet", variant="non_ema")
    names = {0: "cat", 1: "dog", 2: "horse"}
    by_class = ClassConditionalDDPMPipeline(tiny_unet(**SMALL, num_class_embeds=4), DDPMScheduler(), names)
    by_class.save_pretrained(root / "by-class")
    reads = Conditioning("super-resolution", 2, "bicubic", "bicubic", noise=0.5)
    unet = tiny_unet(**{**SMALL, "channels": 7}, out_channels=3)
    DDPMImageToImagePipeline(unet, DDPMScheduler(), reads.config()).save_pretrained(root / "photos-x2")
    DDPMPipeline(tiny_unet(**SMALL, size=4), DDPMScheduler()).save_pretrained(root / "photos-4")
    tiny_text_pipeline().save_pretrained(root / "text2image")
    NoisyClassifier(tiny_unet_config(3), 2).save_pretrained(root / "classifier")
    write_images(
        root / "photos", np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), "000{}.png"
    )
    return root


@pytest.fixture
def workplace(models, monkeypatch):
    """The current folder is that of the models, and nothing is uploaded or written elsewhere."""
    uploads = []
    monkeypatch.chdir(models)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(models / "modules"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", models / "datasets")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "push_to_hub", lambda self, repo_id, **options: uploads.append(repo_id)
    )
    yield uploads
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_snippets_run(page, workplace):
    # Breaks if what a page shows does not work as it stands.
    diffusers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(), quiet():
        exec(compile(program(page), str(page), "exec"), {"__name__": page.stem})
    assert bool(workplace) == ("push_to_hub(" in program(page))


def test_every_snippet_is_found():
    # Breaks if a snippet is in a fence that the tests do not read, or a page is left out.
    count = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text("utf-8")
        assert not re.search(r"^\s*```(py|python3|Python)\s*$", text, re.M), page
        fences = len(re.findall(r"^ *```python$", text, re.M))
        assert (page in PAGES) == bool(fences)
        count += fences
    assert count >= 20
