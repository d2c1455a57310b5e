"""OpenAI's upsamplers: the network reads the small image, and the folder loads with and without the package."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMScheduler, UpsamplingDDPMPipeline
from ddpm_hf.portable.networks_ddpm_hf import build_unet
from tests.support.fixtures_pipeline import tiny_unet_config
from tests.support.runs import read


def upsampler(classes=None, **config):
    torch.manual_seed(0)
    unet = build_unet(tiny_unet_config(3, 6, condition_channels=3, num_class_embeds=classes)).eval()
    pipeline = UpsamplingDDPMPipeline(unet, DDPMScheduler(20, variance_type="learned_range", **config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_images():
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_the_chain_is_that_of_the_network_with_the_enlarged_image():
    """Else the image is another one, or in another range, than in OpenAI's scripts."""
    pipeline, small = upsampler(classes=4), small_images()
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    made = pipeline(small, [1, 3], num_inference_steps=1, latents=noise, output_type="latent").images
    enlarged = torch.nn.functional.interpolate(2 * small - 1, 8, mode="bilinear")
    pipeline.scheduler.set_timesteps(1)
    with torch.no_grad():
        t = int(pipeline.scheduler.timesteps[0])
        output = pipeline.unet(torch.cat([noise, enlarged], dim=1), t, torch.tensor([1, 3])).sample
    expected = pipeline.scheduler.step(output, t, noise).prev_sample
    torch.testing.assert_close(made, expected)


def test_pictures_and_samplers(tmp_path):
    """Else it takes tensors alone, or loses its variance in a swap of samplers."""
    import diffusers

    pipeline = upsampler()
    picture = Image.fromarray((255 * small_images()[0].permute(1, 2, 0).numpy()).astype(np.uint8))
    assert pipeline([picture, picture], num_inference_steps=2).images[1].size == (8, 8)
    ours = pipeline.scheduler
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(ours.config)
    assert pipeline(picture, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.config.variance_type == "learned_range"


def test_it_is_saved_and_loaded(tmp_path):
    """Else a converted upsampler is lost when the process ends."""
    pipeline = upsampler()
    pipeline.save_pretrained(tmp_path)
    index = read(tmp_path / "model_index.json")
    assert index["_class_name"] == ["pipeline_upsampling_ddpm_hf", "UpsamplingDDPMPipeline"]
    assert index["unet"] == ["networks_ddpm_hf", "OpenAIUNet2DModel"]
    again = UpsamplingDDPMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    one, other = (
        each(
            small_images(), generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np"
        ).images
        for each in (pipeline, again)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("labels", [None, [1], [1, 4], [-1, 0], [0.5, 1.0]])
def test_wrong_classes_are_refused(labels):
    """Else the network raises an error about shapes, or reads another class."""
    with pytest.raises(ValueError, match="class_labels"):
        upsampler(classes=4)(small_images(), labels, num_inference_steps=1)


def test_a_network_without_a_condition_is_refused():
    """Else the image that is to be enlarged is not read."""
    unet = build_unet(tiny_unet_config(3))
    with pytest.raises(ValueError, match="condition_channels"):
        UpsamplingDDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(ValueError, match="no classes"):
        upsampler()(small_images(), [0, 1])
