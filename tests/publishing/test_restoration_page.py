"""The page of a Space that restores, in a real browser: an image is uploaded, painted over, and restored."""

import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.publishing import spaces
from ddpm_hf.publishing.space.restoration_page import READY
from tests.support.fixtures_browser import browser
from tests.support.fixtures_hub import TOKEN
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_spaces import STEPS
from tests.support.hub_server import Hub
from tests.support.pages import Page, need_space, served
from tests.support.pictures import random_pixels

pytestmark = pytest.mark.slow
SIZE = 8


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a Space that holds its model, in a browser."""
    need_space()
    root = tmp_path_factory.mktemp("space")
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(tiny_unet(3), scheduler).save_pretrained(root / "model")
    spaces.write_space(root / "space", spaces.look_up(str(root / "model"), None, (), True, True))
    assert json.loads((root / "space/space.json").read_text())["holds_model"]
    (root / "home").mkdir()
    Image.fromarray(random_pixels(1, SIZE, SIZE)[0]).save(root / "image.png")
    with (
        Hub({TOKEN: "user"}) as hub,
        served(root / "space", hub, root / "home") as address,
        browser(root / "profile", height=1500) as driver,
    ):
        page = Page(driver, address)
        page.image = root / "image.png"
        time.sleep(4)  # the editor is there before its scripts take files
        yield page


def upload(page, image=None):
    """Give the page an image, its own by default, and wait until it can be painted on."""
    if clear := page.find("#editor button[aria-label='Clear canvas'], #editor button[title='Clear canvas']"):
        clear[0].click()
    page.wait(lambda: page.find("#editor input[type=file]"))[0].send_keys(str(image or page.image))
    page.wait(lambda: READY in page.find("#progress")[0].text and page.find("#editor canvas"))
    time.sleep(1)  # the browser draws the image


def paint(page):
    """Paint over the middle of the image, from left to right."""
    from selenium.webdriver import ActionChains

    canvas = page.find("#editor canvas")[0]
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    strokes = ActionChains(page.driver)
    for down in (-20, 0, 20):
        strokes.move_to_element_with_offset(canvas, -60, down).click_and_hold()
        strokes.move_by_offset(60, 0).move_by_offset(60, 0).release().pause(0.3)
    strokes.perform()


def views(page):
    """The titles of the second gallery's pictures."""
    return [one.text for one in page.find("#views .caption-label")]


def test_a_visitor_restores_what_was_painted_over(page):
    """Else the mask does not reach the model, or what was not painted changes."""
    upload(page)
    paint(page)
    page.type("steps", 10)
    page.type("solutions", 3)
    page.keep_the_seed(11)
    page.find("#estimate input")[0].click()
    page.wait(lambda: page.find("#noise input"))  # 0: what is known stays as it is
    page.draw()
    solutions, truth = page.images(), np.asarray(Image.open(page.image)).astype(int)
    assert solutions.shape == (3, SIZE, SIZE, 3)
    changed = np.abs(solutions - truth).max((0, 3)) > 1
    assert 2 <= changed.sum() < SIZE * SIZE - 8  # painted, and the rest as it was
    rows = np.flatnonzero(changed.any(1))
    assert 2 <= rows.min() <= rows.max() <= 5  # in the middle
    assert views(page) == ["observed", "mean", "deviation", "5%", "95%"]
    assert "Noise 0, residual" in page.find("#progress")[0].text


def test_other_tasks_degrade_the_image_and_compare(page):
    """Else a visitor without a degraded image sees nothing."""
    upload(page)
    page.choose("task", "Enlarge (super-resolution)")
    page.wait(lambda: page.find("#factor input"))
    page.type("steps", 12)
    page.draw()
    assert re.search(r"residual \S+e-0[5-9]\. PSNR of the solutions", page.find("#progress")[0].text)
    assert views(page)[-1] == "truth"


def test_a_visitor_without_an_image_gets_one(page):
    """Else who has no such image cannot try the model."""
    page.find("#own")[0].click()
    page.wait(lambda: READY in page.find("#progress")[0].text)
    page.choose("task", "Colorize")
    page.type("steps", 14)
    page.draw()
    assert page.images().shape == (3, SIZE, SIZE, 3)


def test_a_photograph_of_a_telephone_is_taken(page, tmp_path):
    """Else it is refused without a word: the editor sends it as PNG, which is many times larger than the JPEG file."""
    Image.fromarray(random_pixels(1, 2800, 2800)[0]).save(tmp_path / "large.png")  # noise: 23 MB
    upload(page, tmp_path / "large.png")
    page.choose("task", "Colorize")
    page.type("steps", 13)
    page.draw()


def test_what_is_missing_is_said_to_the_visitor(page):
    """Else nothing happens, and nobody knows why."""
    upload(page)
    page.choose("task", "Inpaint what is painted over")
    page.find("button#draw")[0].click()
    said = page.wait(lambda: [toast.text for toast in page.find(".toast-body") if toast.text])
    assert "paint over" in said[0]


def test_the_page_asks_no_other_host(page):
    """Else others learn of the visitors' images."""
    assert page.outside() == []
