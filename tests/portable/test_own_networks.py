"""Networks that Diffusers does not have: saved, loaded with the package, and by a stranger who trusts the code."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, load
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.sources import find_source
from ddpm_hf.portable.networks_ddpm_hf import OpenAIUNet2DModel, build_unet
from tests.support import warm
from tests.support.fixtures_hub import DRAWING, WITHOUT, bare_environment
from tests.support.fixtures_pipeline import tiny_unet_config
from tests.support.runs import read

OWN = {
    "num_attention_heads": 2,
    "timestep_scale": 0.25,
    "timestep_channels": 16,
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def own_unet(**more):
    torch.manual_seed(0)
    return build_unet(tiny_unet_config(3, **OWN, **more)).eval()


def by_class():
    """A class-conditional pipeline of two classes and none, with its classifier."""
    torch.manual_seed(1)
    classifier = NoisyClassifier(unet=tiny_unet_config(3, **OWN), num_classes=2).eval()
    return ClassConditionalDDPMPipeline(
        own_unet(num_class_embeds=3), DDPMScheduler(), {0: "a", 1: "b"}, classifier=classifier
    )


PIPELINES = {"plain": lambda: DDPMPipeline(own_unet(), DDPMScheduler()), "by_class": by_class}


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    what = [0, 1] if hasattr(pipeline, "class_ids") else 2
    return pipeline(what, generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for name, make in PIPELINES.items():
        make().save_pretrained(root / name)
    return root


def test_heads_and_timesteps_are_those_of_the_config():
    """Else the class is stock's under another name."""
    unet = own_unet()
    stock = build_unet({key: value for key, value in unet.config.items() if key not in OWN or "block" in key})
    assert (type(unet), type(stock)) == (OpenAIUNet2DModel, UNet2DModel)
    assert {module.heads for module in unet.modules() if hasattr(module, "heads")} == {2}
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(unet(x, 8).sample, unet(x, torch.tensor([8])).sample)
        scaled = own_unet()
        scaled.register_to_config(timestep_scale=1.0)
        assert torch.equal(unet(x, 8).sample, scaled(x, 2).sample)
    with pytest.raises(ValueError, match="num_attention_heads=3: must divide the 16 channels"):
        build_unet(tiny_unet_config(3, **{**OWN, "num_attention_heads": 3}))


@pytest.mark.parametrize("name", PIPELINES)
def test_our_class_loads_it_without_trust_and_draws_the_same(saved, name):
    """Else a user of the package must trust a folder's code, or gets other images."""
    (saved / name / "unet" / "networks_ddpm_hf.py").write_text("raise SystemExit('executed')\n")
    index = read(saved / name / "model_index.json")
    assert index["unet"] == ["networks_ddpm_hf", "OpenAIUNet2DModel"]
    pipeline = load(saved / name)
    assert type(pipeline.unet) is OpenAIUNet2DModel
    np.testing.assert_allclose(draw(pipeline), draw(PIPELINES[name]()), atol=1e-6)
    pipeline.save_pretrained(saved / name)  # the code is there again
    assert "class OpenAIUNet2DModel" in (saved / name / "unet" / "networks_ddpm_hf.py").read_text()
    assert set(OWN) <= set(find_source(_location(saved / name)).unet)


def _location(folder):
    from ddpm_hf.common.locations import find_location

    return find_location(str(folder))


STRANGER = (
    WITHOUT
    + DRAWING
    + """
root, out = map(Path, sys.argv[1:])
results = {}
for folder in sorted(root.iterdir()):
    results[f"{folder.name}-plainly"], _ = attempt(out / "none.npy", folder)
    results[folder.name], pipeline = attempt(out / f"{folder.name}.npy", folder, trust_remote_code=True)
    results[folder.name]["unet"] = named(pipeline.unet)
    if hasattr(pipeline, "class_ids"):
        guided = draw(pipeline, classifier=pipeline.classifier, classifier_scale=3.0, guidance_scale=2.0)
        np.save(out / "guided.npy", guided)
print(json.dumps(results))
"""
)


def test_a_stranger_who_trusts_the_code_draws_the_same(saved, tmp_path):
    """Else a published model of ours works with this package alone."""
    env = bare_environment(tmp_path / "home")
    done = warm.run("-c", STRANGER, saved, tmp_path, cwd=tmp_path, env=env, isolated=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for name, make in PIPELINES.items():
        assert "trust_remote_code" in results[f"{name}-plainly"]["error"]
        assert results[name]["unet"].startswith("diffusers_modules")
        assert not results[name]["said"]
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), draw(make()), atol=1e-4)
    pipeline = by_class()
    pipeline.set_progress_bar_config(disable=True)
    guided = pipeline(
        [0, 1], 2.0, torch.Generator().manual_seed(0), 5, "np", classifier=pipeline.classifier, classifier_scale=3.0
    )
    np.testing.assert_allclose(np.load(tmp_path / "guided.npy"), guided.images, atol=1e-3)
