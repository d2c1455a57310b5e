"""Networks that read an image: the chain is theirs, outputs agree with the image, and the folder loads anywhere."""

import json
import math
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMImageToImagePipeline, DDPMScheduler, load
from ddpm_hf.models import conditioning as flags
from ddpm_hf.portable.conditioning_ddpm_hf import (
    CONDITIONINGS,
    MASK_KINDS,
    Conditioning,
    corrected,
    correction_of,
    shifted_to_mean,
)
from ddpm_hf.portable.guidance_ddpm_hf import classifier_free_guidance
from ddpm_hf.portable.image_to_image_ddpm_hf import known_of_picture
from ddpm_hf.portable.networks_ddpm_hf import build_unet
from tests.support import warm
from tests.support.fixtures_hub import WITHOUT, bare_environment
from tests.support.fixtures_pipeline import tiny_unet, tiny_unet_config
from tests.support.runs import read

TASKS = {
    "super-resolution": Conditioning("super-resolution", 2, "average", "bicubic", noise=0.5),
    "colorize": Conditioning("colorize"),
    "inpaint": Conditioning("inpaint", masks=("box",), noise=0.5),
    "deblur": Conditioning("deblur", blur_size=1.0),
}
SHAPE = (3, 8, 8)
KNOWN = torch.arange(64).reshape(8, 8) % 3 > 0


def pipeline_of(task="super-resolution", classes=None, **config):
    conditioning = TASKS[task]
    outputs = 6 if config.get("variance_type") == "learned_range" else 3
    unet = tiny_unet(3 + conditioning.extra_channels(3), outputs, num_class_embeds=classes)
    names = None if classes is None else {0: "cat", 1: "dog"}
    pipeline = DDPMImageToImagePipeline(unet, DDPMScheduler(20, **config), conditioning.config(), names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def upsampler(classes=None):
    torch.manual_seed(0)
    unet = build_unet(tiny_unet_config(3, 6, condition_channels=3, num_class_embeds=classes)).eval()
    pipeline = DDPMImageToImagePipeline(unet, DDPMScheduler(20, variance_type="learned_range"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def observed(task, count=2):
    """Images in [0, 1] of the task's shape, that lie well within it."""
    shape = TASKS[task].observed_shape(SHAPE)
    return 0.3 + 0.4 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def noise(seed=2, count=2):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def one_step(pipeline, x, t, condition, labels=None):
    """A chain of a single step by the network itself."""
    with torch.no_grad():
        output = pipeline.unet(torch.cat([x, condition], dim=1), t, labels).sample
    return pipeline.scheduler.step(output, t, x).prev_sample


def test_the_network_reads_the_enlarged_image_and_the_level():
    """Else it is sampled with another input than it was trained with."""
    pipeline, small = pipeline_of(), observed("super-resolution")
    made = pipeline(small, num_inference_steps=1, latents=noise(), output_type="latent", correction="none").images
    enlarged = torch.nn.functional.interpolate(2 * small - 1, (8, 8), mode="bicubic")
    condition = torch.cat([enlarged, torch.zeros(2, 1, 8, 8)], dim=1)
    torch.testing.assert_close(made, one_step(pipeline, noise(), 0, condition))
    generator = torch.Generator().manual_seed(5)
    options = {"latents": noise(), "output_type": "latent", "correction": "none", "conditioning_noise": 0.3}
    made = pipeline(small, num_inference_steps=1, generator=generator, **options).images
    added = torch.randn(small.shape, generator=torch.Generator().manual_seed(5))
    noised = math.sqrt(1 - 0.3**2) * (2 * small - 1) + 0.3 * added
    enlarged = torch.nn.functional.interpolate(noised, (8, 8), mode="bicubic")
    condition = torch.cat([enlarged, torch.full((2, 1, 8, 8), 0.3)], dim=1)
    torch.testing.assert_close(made, one_step(pipeline, noise(), 0, condition))


def test_noise_that_is_there_is_said_and_none_is_added():
    """Else a noisy image is read as an exact one, or becomes noisier."""
    pipeline, small = pipeline_of(), observed("super-resolution")
    options = {"num_inference_steps": 1, "latents": noise(), "output_type": "latent", "correction": "none"}
    made = pipeline(small, sigma_y=0.4, **options).images
    level = 0.4 / math.sqrt(1 + 0.4**2)
    enlarged = torch.nn.functional.interpolate(math.sqrt(1 - level**2) * (2 * small - 1), (8, 8), mode="bicubic")
    condition = torch.cat([enlarged, torch.full((2, 1, 8, 8), level)], dim=1)
    torch.testing.assert_close(made, one_step(pipeline, noise(), 0, condition))
    with pytest.raises(ValueError, match=r"sigma_y=0.7: this model was trained with conditioning noise up to 0.5"):
        pipeline(small, sigma_y=0.7)


def test_inpainting_reads_the_mask_and_nothing_that_it_hides():
    """Else what is to be painted shows through."""
    pipeline, images = pipeline_of("inpaint"), observed("inpaint")
    options = {"num_inference_steps": 1, "latents": noise(), "output_type": "latent", "correction": "none"}
    made = pipeline(images, KNOWN, **options).images
    condition = torch.cat([(2 * images - 1) * KNOWN, torch.where(KNOWN, 1.0, -1.0).expand(2, 1, 8, 8)], dim=1)
    condition = torch.cat([condition, torch.zeros(2, 1, 8, 8)], dim=1)
    torch.testing.assert_close(made, one_step(pipeline, noise(), 0, condition))
    white = Image.fromarray(np.where(KNOWN, 0, 255).astype(np.uint8))  # where to paint
    torch.testing.assert_close(pipeline(images, [KNOWN, white], **options).images, made)


@pytest.mark.parametrize("sampler", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize(
    "config", [{}, {"prediction_type": "v_prediction"}, {"variance_type": "learned_range"}], ids=str
)
def test_colours_are_those_of_the_image(sampler, config):
    """Else outputs are lighter or darker than what they were made of."""
    pipeline, small = pipeline_of(**config), observed("super-resolution")
    if sampler != "DDPMScheduler":
        pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    options = {"num_inference_steps": 5, "output_type": "pt"}
    made = pipeline(small, generator=torch.Generator().manual_seed(0), **options).images
    plain = pipeline(small, generator=torch.Generator().manual_seed(0), correction="none", **options).images
    error, without = ((one.mean((2, 3)) - small.mean((2, 3))).abs().max() * 255 for one in (made, plain))
    assert error < 0.5 < without


def test_flags_offer_what_there_is():
    """Else --help, which does not import the tables, offers other tasks and masks than there are."""
    assert (flags.TASKS, flags.MASK_KINDS) == (CONDITIONINGS, MASK_KINDS)


def test_the_correction_reads_nothing_from_the_device():
    """Else a GPU makes the host wait at each step: values of the meta device cannot be read."""
    scheduler, x = DDPMScheduler(20), torch.zeros(2, 3, 8, 8, device="meta")
    correct = correction_of("colour", TASKS["super-resolution"], x[..., :4, :4], (3, 8, 8), None)
    output = corrected(lambda x_t, t: x_t, correct, scheduler)(x, torch.tensor(7, device="meta"))
    assert output.shape == x.shape


def test_the_shift_keeps_the_mean_of_the_clipped_image():
    """Else the images of mostly black or white have another mean than they should."""
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(3).sub(2.5).clamp(-1, 1)  # mostly black
    for mean in (-0.99, -0.6, 0.3):
        moved = shifted_to_mean(x, torch.full((4, 3, 1, 1), mean), iterations=8)
        torch.testing.assert_close(moved.mean((2, 3)), torch.full((4, 3), mean), atol=2e-3, rtol=0)
        assert moved.min() >= -1
        assert moved.max() <= 1


@pytest.mark.parametrize("task", TASKS)
def test_an_observation_is_kept(task):
    """Else what the image says for certain is changed."""
    pipeline, images = pipeline_of(task, clip_sample=False), observed(task)
    known = KNOWN if task == "inpaint" else None
    options = {"num_inference_steps": 3, "output_type": "latent", "correction": "observation"}
    made = pipeline(images, known, generator=torch.Generator().manual_seed(0), **options).images
    if known is not None:
        torch.testing.assert_close(made * known, (2 * images - 1) * known)
        return
    operator = TASKS[task].operator(SHAPE)
    said = operator.forward(operator.pseudo_inverse(2 * images - 1))  # what it can have come from
    torch.testing.assert_close(operator.forward(made), said, atol=2e-3, rtol=0)


def test_solutions_and_classes():
    """Else several solutions are of other images, or a class is not the one that was asked for."""
    pipeline, small = pipeline_of(classes=3), observed("super-resolution")
    options = {"num_inference_steps": 2, "output_type": "pt", "num_solutions": 2}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 0, 1)]
    made = pipeline(small, class_labels=["dog", "cat"], generator=generators, **options).images
    assert made.shape == (4, *SHAPE)
    single = pipeline(
        small[1:], class_labels=0, generator=[torch.Generator().manual_seed(1)], **{**options, "num_solutions": 1}
    ).images
    torch.testing.assert_close(made[3:], single)
    guided = pipeline(
        small, class_labels=1, guidance_scale=3.0, num_inference_steps=1, latents=noise(), output_type="latent",
        correction="none",
    ).images  # fmt: skip
    condition = torch.nn.functional.interpolate(2 * small - 1, (8, 8), mode="bicubic")
    x = torch.cat([noise(), condition, torch.zeros(2, 1, 8, 8)], dim=1)
    with torch.no_grad():
        both = [pipeline.unet(x, 0, torch.tensor([label, label])).sample for label in (1, 2)]
    output = classifier_free_guidance(*both, 3.0, 0.0, 3)
    torch.testing.assert_close(guided, pipeline.scheduler.step(output, 0, noise()).prev_sample)


def test_an_upsampler_of_openai_reads_the_bilinearly_enlarged_image():
    """Else the image is another one, or in another range, than in OpenAI's scripts."""
    pipeline = upsampler(classes=4)
    small = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))  # of any size
    options = {"num_inference_steps": 1, "latents": noise(), "output_type": "latent", "correction": "none"}
    made = pipeline(small, class_labels=[1, 3], **options).images
    enlarged = torch.nn.functional.interpolate(2 * small - 1, 8, mode="bilinear")
    torch.testing.assert_close(made, one_step(pipeline, noise(), 0, enlarged, torch.tensor([1, 3])))
    output = pipeline(small, class_labels=[1, 3], num_inference_steps=2, output_type="pt").images
    assert (output.mean((2, 3)) - small.mean((2, 3))).abs().max() < 0.01


BAD = {
    "size": (lambda p: p(torch.rand(1, 3, 8, 8)), "reads 3 channels and 4x4 pixels"),
    "channels": (lambda p: p(torch.rand(1, 1, 4, 4)), "1 channels"),
    "range": (lambda p: p(torch.rand(1, 3, 4, 4) * 255), "values in [0, 1]"),
    "nan": (lambda p: p(torch.full((1, 3, 4, 4), math.nan)), "values in [0, 1]"),
    "nothing": (lambda p: p([]), "a PIL image"),
    "text": (lambda p: p("a.png"), "a PIL image"),
    "flat": (lambda p: p(torch.rand(4, 4).numpy()), "3 or 4 dimensions"),
    "sizes": (lambda p: p([torch.rand(3, 4, 4), torch.rand(3, 8, 8)]), "several sizes"),
    "level": (lambda p: p(torch.rand(1, 3, 4, 4), conditioning_noise=0.6), "up to 0.5"),
    "negative": (lambda p: p(torch.rand(1, 3, 4, 4), conditioning_noise=-1), "0 or more"),
    "mask": (lambda p: p(torch.rand(1, 3, 4, 4), KNOWN), "leave the mask out"),
    "correction": (lambda p: p(torch.rand(1, 3, 4, 4), correction="hue"), "must be one of colour"),
    "class": (lambda p: p(torch.rand(1, 3, 4, 4), class_labels=1), "no classes"),
    "guidance": (lambda p: p(torch.rand(1, 3, 4, 4), guidance_scale=2.0), "also learned no class"),
    "solutions": (lambda p: p(torch.rand(1, 3, 4, 4), num_solutions=0), "num_solutions"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    """Else an error of the network says nothing that a user can mend."""
    call, says = BAD[case]
    with pytest.raises(ValueError, match=re.escape(says)):
        call(pipeline_of())


def test_networks_and_masks_that_do_not_fit_are_refused():
    """Else a model is sampled that never read an image, or a mask of another size."""
    with pytest.raises(ValueError, match="does not read an image"):
        DDPMImageToImagePipeline(tiny_unet(3), DDPMScheduler())
    with pytest.raises(ValueError, match="the UNet reads 6 channels"):
        DDPMImageToImagePipeline(tiny_unet(6, 3), DDPMScheduler(), TASKS["super-resolution"].config())
    with pytest.raises(ValueError, match="must have a task"):
        DDPMImageToImagePipeline(tiny_unet(6, 3), DDPMScheduler(), {"task": "dream"})
    with pytest.raises(ValueError, match="requires a mask"):
        pipeline_of("inpaint")(observed("inpaint"))
    with pytest.raises(ValueError, match="a mask of shape"):
        pipeline_of("inpaint")(observed("inpaint"), torch.ones(4, 4))
    with pytest.raises(ValueError, match="use 'observation'"):
        pipeline_of("colorize")(observed("colorize"), correction="colour")
    with pytest.raises(ValueError, match="give class_labels"):
        upsampler(classes=4)(torch.rand(1, 3, 4, 4))


def test_a_mask_is_read_as_it_is_seen():
    """Else the wrong part is painted, or nothing, without a word."""
    painted = np.zeros((4, 6), np.uint8)
    painted[:, :2] = 255
    gray = Image.fromarray(painted)
    layer = Image.new("RGBA", (6, 4), (90, 20, 10, 255))
    layer.putalpha(Image.fromarray(255 - painted))
    deep = Image.fromarray(np.where(painted > 0, 65535, 300).astype(np.uint16))
    floats = Image.fromarray((painted / 255).astype(np.float32))
    for mask in (gray, gray.convert("1"), layer, deep, floats, gray.convert("I"), gray.convert("F")):
        np.testing.assert_array_equal(known_of_picture(mask), painted == 0)
    strokes = Image.new("RGBA", (6, 4), (255, 255, 255, 255))
    strokes.putalpha(gray)
    with pytest.raises(ValueError, match="white on transparent"):
        known_of_picture(strokes)
    with pytest.raises(ValueError, match="hides nothing"):
        pipeline_of("inpaint")(observed("inpaint"), Image.new("L", (8, 8)))


STRANGER = (
    WITHOUT
    + """
import json
import numpy as np, torch
from diffusers import DiffusionPipeline

said = {}
for name, size, channels in (("super-resolution", 4, 3), ("inpaint", 8, 3), ("upsampler", 4, 3)):
    pipeline = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.full((1, channels, size, size), 0.25)
    mask = torch.eye(8, dtype=torch.bool) if name == "inpaint" else None
    generator = torch.Generator().manual_seed(0)
    made = pipeline(image, mask, num_inference_steps=2, generator=generator, output_type="np").images
    np.save(f"{sys.argv[2]}/{name}.npy", made)
    said[name] = type(pipeline).__module__
print(json.dumps(said))
"""
)


def test_a_published_folder_loads_with_and_without_the_package(tmp_path):
    """Else a trained or converted model is for this package alone, or lost when the process ends."""
    pipelines = {"super-resolution": pipeline_of(), "inpaint": pipeline_of("inpaint"), "upsampler": upsampler()}
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / name)
    index = read(tmp_path / "super-resolution" / "model_index.json")
    assert index["_class_name"] == ["pipeline_image_to_image_ddpm_hf", "DDPMImageToImagePipeline"]
    assert index["conditioning"] == TASKS["super-resolution"].config()
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    env = bare_environment(tmp_path / "home")
    done = warm.run("-c", STRANGER, tmp_path, tmp_path, cwd=tmp_path, env=env, isolated=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for name, pipeline in pipelines.items():
        assert said[name].startswith("diffusers_modules")
        again = load(tmp_path / name)
        assert type(again) is DDPMImageToImagePipeline
        assert again.conditioning == pipeline.conditioning
        again.set_progress_bar_config(disable=True)
        image = torch.full((1, 3, 8 if name == "inpaint" else 4, 8 if name == "inpaint" else 4), 0.25)
        mask = torch.eye(8, dtype=torch.bool) if name == "inpaint" else None
        generator = torch.Generator().manual_seed(0)
        made = again(image, mask, num_inference_steps=2, generator=generator, output_type="np").images
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), made, atol=1e-5)
