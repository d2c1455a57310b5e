"""Restoration for a page: what a model offers, what an upload becomes, and what the page makes of its controls."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import OPERATORS, ClassConditionalDDPMPipeline, DDPMPipeline, DDPMRestorationPipeline, DDPMScheduler, load
from ddpm_hf.inference.studio import MOMENTS, MOST_IMAGES, keyed_generators
from ddpm_hf.publishing.space.restoration_page import (
    CANVAS,
    NO_CLASS,
    editor_value,
    read_editor,
    request_of,
    shown_for,
    summary,
    to_paint,
)
from ddpm_hf.restoration.studio import RestorationRequest, RestorationStudio, fitted
from ddpm_hf.restoration.tasks import TASKS, Settings
from tests.support.fixtures_pipeline import tiny_unet, tiny_vae
from tests.support.pictures import random_pixels

SCHEDULER = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models: gray, colour, by class, of latents."""
    root, scheduler = tmp_path_factory.mktemp("models"), DDPMScheduler(**SCHEDULER)
    pipelines = {
        "gray": DDPMPipeline(tiny_unet(), scheduler),
        "rgb": DDPMPipeline(tiny_unet(3), scheduler),
        "by-class": ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=2), scheduler, {0: "cat", 1: "dog"}),
        "latent": DDPMPipeline(tiny_unet(4), scheduler, tiny_vae()),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def studios(folders):
    """What their pages restore with."""
    return {
        name: RestorationStudio(str(folders / name), device="cpu") for name in ("gray", "rgb", "by-class", "latent")
    }


@pytest.fixture(scope="module")
def upload():
    """A colour image of 8x8, and what is painted over: its right part."""
    painted = np.zeros((8, 8), dtype=np.uint8)
    painted[:, 5:] = 255
    return Image.fromarray(random_pixels(1, 8, 8)[0]), Image.fromarray(painted)


def array(image):
    return np.asarray(image).astype(int)


def test_inpainting_is_the_pipelines_and_keeps_what_is_not_painted(studios, folders, upload):
    """Else the page shows other solutions than the model's, or changes what its visitor did not paint."""
    image, painted = upload
    request = RestorationRequest(image, "inpaint", painted, sigma_y=0.0, steps=5, solutions=3, seed=4)
    steps = []
    restored = studios["rgb"].restore(request, steps.append)
    pipeline = DDPMRestorationPipeline.from_pipe(load(folders / "rgb"))
    pipeline.set_progress_bar_config(disable=True)
    y = torch.from_numpy(array(image)).movedim(-1, 0)[None] / 127.5 - 1
    known = torch.from_numpy(array(painted)) == 0
    operator = OPERATORS["mask"]((3, 8, 8), known)
    expected = pipeline(y * known, operator, 0.0, "ddnm", 5, 3, keyed_generators(torch.device("cpu"), 4, range(3)))
    for one, other in zip(restored.solutions, expected.images):
        assert np.abs(array(one) - array(other)).max() <= 1
        assert (array(one)[:, :5] == array(image)[:, :5]).all()
    assert [step.done for step in steps] == [1, 2, 3, 4, 5]
    assert steps[-1].predictions is not None
    assert [title for _, title in restored.views] == ["observed", "mean", "deviation", "5%", "95%"]
    deviation = array(restored.views[2][0])
    assert (deviation[:, :5] == 0).all()
    assert deviation.max() == 255
    assert restored.figures["residual"] < 1e-5


@pytest.mark.parametrize("name", ["gray", "rgb", "by-class"])
def test_every_task_that_is_offered_works(name, studios, upload):
    """Else a choice of the page is an error."""
    image, painted = upload
    studio = studios[name]
    assert ("colorize" in studio.tasks) == (name == "rgb")
    assert studio.factors == [2]  # 8 pixels: a smaller image would have fewer than four
    label = "dog" if name == "by-class" else None
    for task in studio.tasks:
        request = RestorationRequest(image, task, painted, steps=2, solutions=1, class_label=label)
        blind = studio.restore(request._replace(sigma_y=None if task == "denoise" else 0.1))
        assert [image.size for image in blind.solutions] == [(8, 8)]
        compared = studio.restore(request._replace(degrade=True))
        assert ("psnr" in compared.figures) == (task != "inpaint")
        assert [title for _, title in compared.views] == ["observed"] + ["truth"] * (task != "inpaint")


def test_a_model_of_latents_offers_what_it_can(studios, upload):
    """Else every request to it ends in an error."""
    image, painted = upload
    studio = studios["latent"]
    assert list(studio.methods) == ["dps"]
    painted = Image.new("L", studio.image_size, 0)
    painted.paste(255, (0, 0, 4, 4))
    image = image.resize(studio.image_size)
    restored = studio.restore(RestorationRequest(image, "inpaint", painted, sigma_y=0.1, method="dps", steps=2))
    assert restored.solutions[0].size == studio.image_size


def test_steps_with_time_travel_are_counted(studios, upload):
    """Else the bar is full long before the end."""
    image, painted = upload
    steps = []
    request = RestorationRequest(image, "inpaint", painted, sigma_y=0.0, method="repaint", steps=12, solutions=1)
    studios["gray"].restore(request, steps.append)
    assert [step.done for step in steps] == list(range(1, steps[0].total + 1))
    assert steps[0].total == 102  # ten steps ten times, then two
    assert sum(step.predictions is not None for step in steps) == MOMENTS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"solutions": 0}, "0 solutions"),
        ({"solutions": MOST_IMAGES + 1}, f"1 to {MOST_IMAGES}"),
        ({"painted": None}, "paint over"),
        ({"painted": Image.new("L", (8, 8))}, "paint over"),
        ({"task": "colorize"}, "supports inpaint"),
        ({"steps": 21}, "from 1 to 20"),
    ],
)
def test_what_cannot_be_restored_is_said(change, says, studios, upload):
    """Else a visitor's request is a crash."""
    image, painted = upload
    request = RestorationRequest(image, "inpaint", painted, sigma_y=0.0, steps=2)
    with pytest.raises(ValueError, match=says):
        studios["gray"].restore(request._replace(**change))


def test_an_image_of_the_models_own(studios, folders):
    """Else a visitor without an image cannot try it."""
    image = studios["by-class"].sample_image(3)
    assert image.size == (8, 8)
    assert np.abs(array(image) - array(studios["by-class"].sample_image(4))).max() > 20


# The page


@pytest.mark.parametrize(("width", "height", "model"), [(8, 8, (8, 8)), (5, 5, (5, 5)), (28, 20, (28, 20))])
def test_a_small_image_is_large_enough_to_paint_on_and_comes_back_exactly(width, height, model):
    """Else what the model gets is not what was uploaded."""
    image = Image.fromarray(random_pixels(1, height, width)[0])
    shown = to_paint(image, model)
    assert CANVAS[0] <= max(shown.size) <= CANVAS[1]
    np.testing.assert_array_equal(array(fitted(shown, model)), array(image))


def test_a_large_image_has_the_models_proportions():
    """Else a visitor paints what the model does not see."""
    image = Image.fromarray(random_pixels(1, 900, 1600)[0])
    assert to_paint(image, (32, 32)).size == (768, 768)
    assert to_paint(image, (32, 16)).size == (768, 384)
    assert to_paint(Image.new("RGB", (500, 400)), (32, 32)).size == (400, 400)


def test_what_is_painted_is_read_from_the_layers(upload):
    """Else the mask is empty, or covers what was not painted."""
    image, painted = upload
    layer = Image.new("RGBA", image.size)
    layer.paste((255, 0, 80, 255), mask=painted)
    background, mask = read_editor({"background": image, "layers": [layer, None], "composite": image})
    assert background is image
    np.testing.assert_array_equal(array(mask), array(painted))
    assert read_editor(editor_value(image))[1].getbbox() is None
    assert read_editor(None) == (None, None)


VALUES = {
    "task": "inpaint", "factor": 2, "filter": "average", "blur": "motion", "blur_size": 3.0, "blur_angle": 45,
    "degrade": True, "estimate": True, "sigma_y": 0.2, "solutions": 3, "method": "diffpir", "steps": 7,
    "random": False, "seed": 9, "class": NO_CLASS,
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_controls_become_a_request(task, upload):
    """Else the page restores something else than it shows."""
    image, _ = upload
    values = {**VALUES, "task": task, "image": editor_value(image)}
    request = request_of(values)
    assert (request.image, request.task, request.method) == (image, task, "diffpir")
    assert (request.steps, request.solutions, request.seed, request.class_label) == (7, 3, 9, None)
    used = {"super-resolution": Settings(factor=2, filter="average"),
            "deblur": Settings(blur="motion", blur_size=3.0, blur_angle=45)}  # fmt: skip
    assert request.settings == used.get(task, Settings())
    assert request.degrade == (task != "inpaint")
    assert request.sigma_y == (None if task == "inpaint" else 0.2)  # estimated, or what is added
    assert request_of({**values, "degrade": False}).sigma_y is None
    assert request_of({**values, "degrade": False, "estimate": False}).sigma_y == 0.2
    assert request_of({**values, "class": "class none"}).class_label == "none"
    assert len({request_of({**values, "random": True}).seed for _ in range(8)}) > 1
    assert shown_for({**values, "task": "deblur"})["blur_angle"]
    assert not shown_for({**values, "task": "deblur", "blur": "gaussian"})["blur_angle"]
    with pytest.raises(ValueError, match="upload an image"):
        request_of({**values, "image": None})


def test_the_line_says_what_was_assumed(studios, upload):
    """Else noise that was estimated passes for known."""
    image, painted = upload
    request = RestorationRequest(image, "inpaint", painted, steps=2, solutions=2, seed=5)
    line = summary(request, studios["gray"].restore(request), 1.0)
    assert "Seed 5, 2 steps" in line
    assert "(estimated)" in line
    request = request._replace(task="denoise", degrade=True, sigma_y=0.1)
    line = summary(request, studios["gray"].restore(request), 1.0)
    assert "Noise 0.1, residual" in line
    assert "PSNR" in line
