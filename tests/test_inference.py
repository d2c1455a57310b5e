"""`ddpm_hf.load` picks the pipeline that a folder is for."""

import json

import pytest
import torch

import ddpm_hf
from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from tests.fixtures_pipeline import tiny_unet


def test_load_picks_the_class(tmp_path):
    # Breaks if a user must know which pipeline a folder holds.
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "plain")
    by_class = ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler(), {0: "cat", 1: "dog"})
    by_class.save_pretrained(tmp_path / "classes")
    assert type(ddpm_hf.load(tmp_path / "plain")) is DDPMPipeline
    assert ddpm_hf.load(tmp_path / "classes").labels == {"cat": 0, "dog": 1}
    with pytest.raises(ValueError, match="not a checkpoint-N folder"):
        ddpm_hf.load(tmp_path / "plain", ema=False)


def test_load_takes_a_checkpoint_with_and_without_ema(tmp_path):
    # Breaks if a checkpoint's other weights are taken, or its classes and diffusion are lost.
    checkpoint = tmp_path / "checkpoint-5"
    raw, averaged = (tiny_unet(seed=seed, num_class_embeds=3) for seed in (0, 1))
    raw.save_pretrained(checkpoint / "unet")
    state = {"settings": {"ddpm_num_steps": 50}, "classes": ["cat", "dog"], "step": 5, "files": {}}
    (checkpoint / "manifest.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="without --use_ema"):
        ddpm_hf.load(checkpoint, ema=True)
    assert torch.equal(ddpm_hf.load(checkpoint).unet.conv_in.weight, raw.conv_in.weight)
    averaged.save_pretrained(checkpoint / "unet_ema")
    for ema, unet in ((None, averaged), (True, averaged), (False, raw)):
        pipeline = ddpm_hf.load(checkpoint, ema=ema)
        assert torch.equal(pipeline.unet.conv_in.weight, unet.conv_in.weight)
        assert pipeline.labels == {"cat": 0, "dog": 1}
        assert len(pipeline.scheduler) == 50
