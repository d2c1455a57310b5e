"""A cascade: its stages one after the other, what does not fit together, and one folder that holds the chain."""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from ddpm_hf import (
    ClassConditionalDDPMPipeline,
    DDPMCascadePipeline,
    DDPMImageToImagePipeline,
    DDPMPipeline,
    DDPMScheduler,
    load,
)
from ddpm_hf.inference.samplers import SAMPLERS, schedulers_of, swapped
from ddpm_hf.portable.acceleration_ddpm_hf import AttentionBySize
from ddpm_hf.portable.conditioning_ddpm_hf import Conditioning
from ddpm_hf.portable.multistep_ddpm_hf import EpsilonMultistepScheduler
from tests.support import warm
from tests.support.fixtures_hub import WITHOUT, bare_environment
from tests.support.fixtures_pipeline import calls_of, tiny_unet
from tests.support.runs import read

NAMES = {0: "cat", 1: "dog"}


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def base(size=4, classes=None, channels=3):
    unet, scheduler = tiny_unet(channels, size=size, num_class_embeds=classes), DDPMScheduler(20)
    if classes:
        return quiet(ClassConditionalDDPMPipeline(unet, scheduler, NAMES))
    return quiet(DDPMPipeline(unet, scheduler))


def upper(size, noise=0.5, classes=None, task="super-resolution", channels=3, seed=1, **config):
    factor = {"factor": 2, "filter": "bicubic", "enlarge": "bicubic"} if task == "super-resolution" else {}
    conditioning = Conditioning(task, noise=noise, **factor)
    outputs = channels * (1 + ("variance_type" in config))
    unet = tiny_unet(channels + conditioning.extra_channels(channels), outputs, size, seed, num_class_embeds=classes)
    names = NAMES if classes else None
    return quiet(DDPMImageToImagePipeline(unet, DDPMScheduler(30, **config), conditioning.config(), names))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_stages_follow_one_another_with_noise_in_between():
    """Else a cascade samples other images than its models do one by one."""
    models = [base(), upper(8), upper(16, seed=2, variance_type="learned_range")]
    cascade = quiet(DDPMCascadePipeline.from_pipes(*models))
    options = {"num_inference_steps": 3, "output_type": "pt"}
    made = cascade(2, generator=generators(0, 1), conditioning_noise=[0.3, 0.0], **options).images
    assert made.shape == (2, 3, 16, 16)
    assert cascade.image_size == (16, 16)
    each = generators(0, 1)
    x = models[0](2, generator=each, **options).images
    x = models[1](x, conditioning_noise=0.3, generator=each, **options).images
    x = models[2](x, conditioning_noise=0.0, generator=each, **options).images
    torch.testing.assert_close(made, x)
    alone = cascade(1, generator=generators(1), conditioning_noise=[0.3, 0.0], **options).images
    torch.testing.assert_close(alone, made[1:])
    assert cascade.levels(None) == [0.1, 0.1]
    plain = DDPMCascadePipeline.from_pipes(base(), upper(8, noise=0.0))
    assert plain.levels(None) == [0.0]


def test_classes_go_through_the_stages_that_know_them():
    """Else a cascade by class enlarges a cat into a dog."""
    models = [base(classes=3), upper(8, classes=3), upper(16, noise=0.0, seed=2)]
    cascade = quiet(DDPMCascadePipeline.from_pipes(*models))
    options = {"num_inference_steps": 2, "output_type": "pt"}
    made = cascade(["dog", 0], 2.0, generators(0, 1), conditioning_noise=0.0, **options).images
    each = generators(0, 1)
    x = models[0](["dog", 0], 2.0, each, **options).images
    x = models[1](x, class_labels=["dog", 0], guidance_scale=2.0, generator=each, **options).images
    torch.testing.assert_close(made, models[2](x, generator=each, **options).images)
    assert len(cascade(num_inference_steps=2).images) == 2  # each class once
    with pytest.raises(ValueError, match="class 'owl'"):
        cascade(["owl"])
    always = DDPMCascadePipeline.from_pipes(base(classes=3), upper(8, classes=2))
    with pytest.raises(ValueError, match="always has a class"):
        always([None])
    with pytest.raises(ValueError, match="guidance_scale=3"):
        DDPMCascadePipeline.from_pipes(base(), upper(8))(1, guidance_scale=3.0)


def test_samplers_and_acceleration_are_of_every_stage():
    """Else the first stage alone is sampled as asked."""
    cascade = quiet(DDPMCascadePipeline.from_pipes(base(), upper(8), upper(16, seed=2)))
    with swapped(cascade, "dpm++") as steps:
        assert steps == 19
        kinds = {type(one) for one in schedulers_of(cascade).values()}
        assert kinds == {diffusers.DPMSolverMultistepScheduler}
        assert cascade(1, num_inference_steps=3, output_type="pt").images.shape == (1, 3, 16, 16)
    assert {type(one) for one in schedulers_of(cascade).values()} == {DDPMScheduler}
    cascade.use_multistep()
    assert {type(one) for one in schedulers_of(cascade).values()} == {EpsilonMultistepScheduler}
    assert set(schedulers_of(cascade)) == {"scheduler", "scheduler_2", "scheduler_3"}
    attending = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    small = DDPMPipeline(tiny_unet(3, size=4, **attending), DDPMScheduler(20))
    large = DDPMImageToImagePipeline(
        tiny_unet(6, 3, **attending),
        DDPMScheduler(20),
        Conditioning("super-resolution", 2, "bicubic", "bicubic").config(),
    )
    pair = DDPMCascadePipeline.from_pipes(small, large)
    pair.enable_acceleration()
    for unet in pair.networks():
        assert {type(one.processor) for one in unet.modules() if isinstance(one, Attention)} == {AttentionBySize}
    assert "dpm++" in SAMPLERS


def test_stages_of_other_lengths_are_asked_before_the_first_one_samples():
    """Else an error comes after the whole chain of the base, or an upper stage takes a part of its steps."""
    cascade = quiet(DDPMCascadePipeline.from_pipes(base(), upper(8)))  # T = 20 and 30
    counted = lambda *_: 1  # noqa: E731
    with calls_of(cascade.unet, counted) as base_calls, calls_of(cascade.unet_2, counted) as upper_calls:
        with pytest.raises(ValueError, match="num_inference_steps=25: must be from 1 to 20"):
            cascade(1, num_inference_steps=25)
        assert not base_calls
        cascade(1, output_type="pt")
    assert (len(base_calls), len(upper_calls)) == (20, 30)


def test_a_learned_variance_survives_another_sampler_in_every_stage():
    """Else the chain cannot be sampled by its own schedulers once another sampler was there."""
    cascade = quiet(DDPMCascadePipeline.from_pipes(base(), upper(8, variance_type="learned_range")))
    for name, scheduler in schedulers_of(cascade).items():
        setattr(cascade, name, diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config))
    for name, scheduler in schedulers_of(cascade).items():
        setattr(cascade, name, DDPMScheduler.from_config(scheduler.config))
    assert [one.config.variance_type for one in schedulers_of(cascade).values()] == ["fixed_small", "learned_range"]
    cascade(1, num_inference_steps=2)


BAD = {
    "reads images of 8x8, and the one before makes 4x4": lambda: [base(), upper(16)],
    "makes images of 1 channels": lambda: [base(), upper(8, channels=1)],
    r"must be of super-resolution \(deblur\)": lambda: [base(), upper(8, task="deblur")],
    "must be of super-resolution (it reads no image)": lambda: [base(), base()],
    "must sample small images": lambda: [upper(8), upper(16)],
    "give one of small images, and one or two": lambda: [base()],
    "is by class, and the first one is not": lambda: [base(), upper(8, classes=3)],
}


@pytest.mark.parametrize("says", BAD)
def test_models_that_do_not_fit_are_refused(says):
    """Else a network reads an image of another size, or noise alone."""
    with pytest.raises(ValueError, match=re.escape(says.replace("\\", ""))):
        DDPMCascadePipeline.from_pipes(*BAD[says]())


def test_levels_that_were_not_trained_are_refused():
    """Else a network is told a level that it never saw."""
    with pytest.raises(ValueError, match=r"conditioning_noise=0.7 for unet_2: it was trained with up to 0.5"):
        DDPMCascadePipeline.from_pipes(base(), upper(8), conditioning_noise=0.7)
    cascade = DDPMCascadePipeline.from_pipes(base(), upper(8), conditioning_noise=0.2)
    assert cascade.levels(None) == [0.2]
    with pytest.raises(ValueError, match=r"up to 0\.5"):
        cascade(1, conditioning_noise=0.6)
    with pytest.raises(ValueError, match="2 levels of conditioning_noise for 1 models"):
        cascade(1, conditioning_noise=[0.1, 0.1])


STRANGER = (
    WITHOUT
    + """
import json
import numpy as np, torch
from diffusers import DiffusionPipeline

said = {}
for name in ("two", "three"):
    pipeline = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    np.save(f"{sys.argv[1]}/{name}.npy", pipeline(["dog"] if name == "two" else 2, **options).images)
    said[name] = type(pipeline).__module__
print(json.dumps(said))
"""
)


def test_one_folder_holds_the_chain_and_loads_anywhere(tmp_path):
    """Else a cascade is published in pieces that nobody puts together."""
    cascades = {
        "two": DDPMCascadePipeline.from_pipes(base(classes=3), upper(8, classes=3), conditioning_noise=0.3),
        "three": DDPMCascadePipeline.from_pipes(base(), upper(8), upper(16, seed=2, variance_type="learned_range")),
    }
    for name, cascade in cascades.items():
        cascade.save_pretrained(tmp_path / name)
    index = read(tmp_path / "two/model_index.json")
    assert index["_class_name"] == ["pipeline_cascade_ddpm_hf", "DDPMCascadePipeline"]
    assert index["unet_2"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler_2"] == ["diffusers", "DDPMScheduler"]
    assert index["conditioning_noise"] == {"unet_2": 0.3}
    assert "unet_3" not in index
    env = bare_environment(tmp_path / "home")
    done = warm.run("-c", STRANGER, tmp_path, cwd=tmp_path, env=env, isolated=True)
    assert done.returncode == 0, done.stderr
    assert all(one.startswith("diffusers_modules") for one in json.loads(done.stdout.splitlines()[-1]).values())
    for name, what in (("two", ["dog"]), ("three", 2)):
        again = quiet(load(tmp_path / name))
        assert type(again) is DDPMCascadePipeline
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), again(what, **options).images, atol=1e-5)
