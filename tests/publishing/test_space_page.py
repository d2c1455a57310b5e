"""A Space's page in a real browser: its own process and environment, its model from a Hub of our own.

`make test-slow` makes the environment, as the Hub does: Gradio by the version in the README, then the requirements.
"""

import re

import numpy as np
import pytest

from ddpm_hf.inference.studio import MOMENTS
from ddpm_hf.publishing import spaces
from tests.support.fixtures_browser import browser
from tests.support.fixtures_hub import TOKEN
from tests.support.fixtures_spaces import put, seeded, tiny_pipelines
from tests.support.hub_server import Hub
from tests.support.pages import Page, need_space, served

pytestmark = pytest.mark.slow
STEPS = 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with tiny models of each kind, one of them private."""
    need_space()
    with Hub({TOKEN: "user"}) as hub:
        for name, pipeline in tiny_pipelines().items():
            folder = tmp_path_factory.mktemp(name)
            pipeline.save_pretrained(folder)
            put(hub, f"user/{name}", folder, private=name == "by-class")
        yield hub


@pytest.fixture(scope="module", params=["plain", "by-class", "text"])
def opened(request, hub, tmp_path_factory):
    """A model's kind, and its Space's page in a browser."""
    root = tmp_path_factory.mktemp("space")
    model = spaces.Model(f"user/{request.param}", f"{hub.url}/user/{request.param}")
    spaces.write_space(root / "space", model, ["a red square", "a dog"] if request.param == "text" else [])
    (root / "home").mkdir()
    with served(root / "space", hub, root / "home") as address, browser(root / "profile") as driver:
        yield request.param, Page(driver, address)


def expected(kind, pipeline, seed, count):
    """What our pipeline draws where the page is asked for the same."""
    options = {"generator": seeded(seed, count), "num_inference_steps": STEPS}
    if kind == "plain":
        return pipeline(count, **options).images
    if kind == "by-class":
        return pipeline(["dog"] * count, guidance_scale=2.0, **options).images
    return pipeline(["a green square"] * count, guidance_scale=7.5, **options).images


def test_a_visitor_draws_what_the_pipeline_draws(opened):
    """Else the page shows other images than the model's, or not how they formed."""
    kind, page = opened
    assert f"user/{kind}" in page.driver.find_element("tag name", "body").text
    if kind == "by-class":
        page.choose("class", "dog")
        page.type("guidance", 2)
    if kind == "text":
        page.type("prompt", "a green square")
    page.choose("sampler", "DDPM (ancestral)")
    page.type("steps", STEPS)
    page.type("count", 3)
    page.keep_the_seed(11)
    page.draw()
    pipeline = tiny_pipelines()[kind]
    drawn = np.stack([np.asarray(image).astype(int) for image in expected(kind, pipeline, 11, 3)])
    assert page.images().shape == drawn.shape
    assert np.abs(page.images() - drawn).max() <= 1
    heads, images = page.chain()
    assert len(heads) == MOMENTS
    timesteps = [int(head) for head in heads]
    assert timesteps == sorted(timesteps, reverse=True)
    assert images == 3 * MOMENTS
    size = page.driver.execute_script(
        "return [...document.querySelectorAll('#images .grid-wrap img')].map(i => [i.naturalWidth, i.clientWidth])"
    )
    assert all(natural == drawn.shape[2] and seen > 60 for natural, seen in size)  # shown, and large enough to see


def test_the_bar_and_the_chain_grow_while_it_draws(opened):
    """Else a visitor looks at nothing for a minute, and goes."""
    _, page = opened
    page.choose("sampler", "DDPM (ancestral)")
    page.type("steps", 60)
    page.type("count", 16)
    words, chains = page.draw()
    steps = [int(number) for text in words for number in re.findall(r"(\d+)/60 steps", text)]
    assert len(set(steps)) > 1
    assert steps == sorted(steps)
    assert len(set(chains)) > 2
    assert chains[-1] == 4 * MOMENTS
    assert len(page.images()) == 16


def test_a_new_seed_each_time_is_shown_and_can_be_drawn_again(opened):
    """Else a picture that a visitor likes is lost."""
    _, page = opened
    if not page.find("#random input")[0].is_selected():
        page.find("#random input")[0].click()
    page.draw()
    first, seed = page.images(), page.find("#seed input")[0].get_attribute("value")
    page.draw()
    assert page.find("#seed input")[0].get_attribute("value") != seed
    assert np.abs(page.images() - first).max() > 20
    page.keep_the_seed(seed)
    page.draw()
    np.testing.assert_array_equal(page.images(), first)


def test_what_cannot_be_drawn_is_said_to_the_visitor(opened):
    """Else a request that the model cannot fulfil is a page that does nothing."""
    _, page = opened
    page.choose("sampler", "DPM-Solver++")
    page.type("steps", 60)  # all of T: it would visit one twice
    page.find("button#draw")[0].click()
    said = page.wait(lambda: [toast.text for toast in page.find(".toast-body") if toast.text])
    assert "twice" in said[0]
    page.type("steps", 10)
    page.draw()  # and the page goes on


def test_who_stops_leaves_the_place_to_the_next(opened):
    """Else a long chain that nobody wants keeps all others waiting."""
    _, page = opened
    page.choose("sampler", "DDPM (ancestral)")
    page.type("steps", 60)
    page.type("count", 16)
    page.find("button#draw")[0].click()
    page.wait(lambda: page.find("#chain img"))
    page.find("button#stop")[0].click()
    page.wait(lambda: not page.find(".generating, #progress .progress-text"))
    page.type("steps", 5)
    page.type("count", 1)
    page.draw()
    assert len(page.images()) == 1


def test_the_page_asks_no_other_host(opened):
    """Else it is slow or broken where only the Space itself can be reached, and others learn of its visitors."""
    _, page = opened
    assert page.outside() == []
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
