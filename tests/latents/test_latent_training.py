"""Diffusion in the latents of an autoencoder: `train_unconditional.py --vae_name_or_path`."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.models.autoencoder import load_autoencoder
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import attempt, fill, losses, train

SETTINGS = {
    "train_data_dir": "{shop}/photos", "vae_name_or_path": "{shop}/vae", "model_config_name_or_path": "{shop}/unet",
    "resolution": 16, "train_batch_size": 4, "max_train_steps": 6, "eval_batch_size": 2, "cpu_threads": 1, "seed": 0,
    "ddpm_num_steps": 20, "ddpm_num_inference_steps": 2, "ddpm_beta_schedule": "cosine", "logger": "none",
    "lr_warmup_steps": 0, "logging_steps": 1, "center_crop": True, "checkpointing_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Photos with two labels, a tiny autoencoder of RGB images, and the config of a UNet for its latents."""
    root = tmp_path_factory.mktemp("shop")
    files = [encoded(one) for one in random_pixels(10, 16, 16)]
    write_rows(root / "photos", files, label=[row % 2 for row in range(10)])
    write_rows(root / "tall", [encoded(one) for one in random_pixels(4, 16, 12)])
    vae = tiny_vae(channels=4)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    vae.save_pretrained(root / "vae")
    write_unet(root / "unet", in_channels=4, out_channels=4)
    return root


def test_noise_does_not_depend_on_the_layout_in_memory():
    """Else a latent straight from a convolution gets other noise than the same one from the cache."""
    keys = StepKeys(seed=0, step=1, first=0, count=2)
    plain = torch.zeros(2, 4, 3, 5)
    for other in (plain.to(memory_format=torch.channels_last), torch.zeros(2, 8, 3, 5).chunk(2, dim=1)[1]):
        assert torch.equal(keys.normal_like(other), keys.normal_like(plain))


@pytest.mark.parametrize("label_column", [None, "label"])
def test_the_saved_pipeline_decodes_its_latents(label_column, shop, tmp_path):
    """Else a latent model is saved without its decoder, or samples images of the latents' size."""
    folder = train(shop, tmp_path / "run", SETTINGS, label_column=label_column).folder
    kind = ClassConditionalDDPMPipeline if label_column else DDPMPipeline
    pipeline = kind.from_pretrained(folder)
    weights = load_autoencoder(str(shop / "vae")).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.vae.state_dict().items())
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.unet.config.in_channels == 4
    assert pipeline.unet.config.sample_size == 8
    assert not pipeline.scheduler.config.clip_sample  # latents have no range
    images = pipeline([0, 1] if label_column else 2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"][1] == kind.__name__


@pytest.mark.every(3)
@pytest.mark.parametrize("flags", [{}, {"random_flip": True}, {"label_column": "label", "use_ema": True}], ids=str)
def test_cached_latents_train_the_same_model(flags, shop, tmp_path):
    """Else the cache gives an image another's latent, or a latent that is drawn once for all."""
    plain = train(shop, tmp_path / "plain", SETTINGS, **flags).folder
    cached = train(shop, tmp_path / "cached", SETTINGS, cache_latents=True, **flags).folder
    assert np.allclose(losses(plain), losses(cached), rtol=1e-4)
    ours, theirs = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in (plain, cached))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache_dataset", ["never", "always"])
def test_broken_images_are_left_out_of_the_plan(cache_dataset, shop, tmp_path):
    """Else the last batches of an epoch have indices without an image."""
    files = [encoded(one) for one in random_pixels(9, 16, 16)]
    for broken in (2, 5, 6):
        files[broken] = b"junk"
    write_rows(tmp_path / "some", files)
    flags = {"skip_broken_images": True, "cache_dataset": cache_dataset, "cache_latents": True}
    folder = train(shop, tmp_path / "run", SETTINGS, train_data_dir=tmp_path / "some", **flags).folder
    assert json.loads((folder / "checkpoint-6" / "manifest.json").read_text())["samples"] == 6


def test_a_run_on_cached_latents_resumes_exactly(shop, tmp_path):
    """Else a resumed run draws other latents than it would have."""
    flags = {"cache_latents": True, "random_flip": True, "label_column": "label"}
    whole = train(shop, tmp_path / "whole", SETTINGS, **flags).folder
    part = train(shop, tmp_path / "part", SETTINGS, **flags).folder
    train(shop, part, SETTINGS, resume_from_checkpoint="checkpoint-3", **flags)
    for name in ("metrics.jsonl", "unet/diffusion_pytorch_model.safetensors"):
        assert (whole / name).read_bytes() == (part / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"vae_name_or_path": "{shop}/unet"}, "no AutoencoderKL there"),
        ({"vae_name_or_path": "{shop}/nowhere"}, "no AutoencoderKL there"),
        ({"resolution": 15}, "multiples of 2"),
        ({"resolution": 18}, "multiples of 4"),
        ({"objective": "vlb"}, "latents are none"),
        ({"vae_name_or_path": None, "cache_latents": True, "model_config_name_or_path": None}, "--vae_name_or_path"),
        ({"cache_latents": True, "center_crop": None, "train_data_dir": "{shop}/tall"}, "--center_crop"),
        ({"channels": 1}, "channels"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(flags, said, shop, tmp_path):
    """Else a mistake ends in a traceback from inside the autoencoder."""
    run = attempt(shop, tmp_path / "run", SETTINGS, **fill(flags, shop))
    assert run.code == 2
    assert said in run.error()
    assert "Traceback" not in run.out + run.err
