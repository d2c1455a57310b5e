"""A Space's page in a real browser: its own process and environment, its model from a Hub of our own.

`make test-slow` makes the environment, as the Hub does: Gradio by the version in the README, then the requirements.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.inference.studio import MOMENTS
from ddpm_hf.publishing import spaces
from tests.support import ROOT
from tests.support.fixtures_browser import browser, need_browser
from tests.support.fixtures_hub import TOKEN, client_environment
from tests.support.fixtures_ranks import free_port
from tests.support.fixtures_spaces import put, seeded, tiny_pipelines
from tests.support.hub_server import Hub

pytestmark = pytest.mark.slow
PYTHON = Path(os.environ.get("SPACE_PYTHON", ROOT / ".venv-space" / "bin" / "python"))
PATIENCE = 180  # seconds that anything may take on a busy machine
STEPS = 40


WATCH = """
window.words = []; window.chains = [];
if (!window.watching) {
    window.watching = new MutationObserver(() => {
        window.words.push(document.querySelector("#progress").innerText);
        window.chains.push(document.querySelectorAll("#chain img").length);
    });
    window.watching.observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
}
"""


@contextlib.contextmanager
def served(folder, hub, home):
    """`python app.py` in a Space's folder, without the package; its address."""
    port = free_port()
    kept = client_environment(
        hub, home, HF_TOKEN=TOKEN, GRADIO_SERVER_PORT=str(port), GRADIO_TEMP_DIR=str(home / "gradio")
    )
    log = home / "log.txt"
    with open(log, "w") as out:
        app = subprocess.Popen([PYTHON, "-s", "app.py"], cwd=folder, env=kept, stdout=out, stderr=subprocess.STDOUT)
    address, opener = f"http://127.0.0.1:{port}/", urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert app.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError), opener.open(address, timeout=10) as reply:
                reply.read()
                break
            time.sleep(0.3)
        yield address
    finally:
        app.terminate()
        app.wait(PATIENCE)
    assert "Traceback" not in log.read_text()
    assert TOKEN not in log.read_text()


class Page:
    """A Space's page, as a visitor uses it."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address
        driver.get(address)
        self.wait(lambda: self.find("#draw button, button#draw"))

    def find(self, selector):
        """The elements that a CSS selector means."""
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition):
        """Until the condition holds, asked again where the page changed under it; what it returns."""
        from selenium.common.exceptions import StaleElementReferenceException

        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(StaleElementReferenceException):
                if found := condition():
                    return found
            assert time.monotonic() < deadline, self.driver.find_element("tag name", "body").text
            time.sleep(0.05)

    def type(self, name, text):
        """Write into a field, in place of what it holds."""
        from selenium.webdriver.common.keys import Keys

        field = self.find(f"#{name} input, #{name} textarea")[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(text), Keys.TAB)

    def choose(self, name, option):
        """Choose from a dropdown."""
        self.find(f"#{name} input")[0].click()

        def click():
            options = [one for one in self.find("[role=option]") if one.text.strip(" ✓\n") == option]
            return [one.click() for one in options]

        self.wait(click)

    def keep_the_seed(self, seed):
        """Draw with this seed."""
        box = self.find("#random input")[0]
        if box.is_selected():
            box.click()
        self.type("seed", seed)

    def draw(self):
        """Press the button and wait for the end; the words of the progress bar, and how far the chain was, in turn."""
        before = self.summary()
        self.driver.execute_script(WATCH)
        self.find("button#draw")[0].click()
        self.wait(lambda: self.summary() not in ("", before))
        return self.driver.execute_script("return [window.words, window.chains]")

    def summary(self):
        """What the page says of the last drawing; it differs by seed or steps from that of the one before."""
        found = re.search("Seed .*seconds", self.find("#progress")[0].text)
        return found[0] if found else ""

    def sources(self):
        """The addresses of the images in the gallery."""
        return [image.get_attribute("src") for image in self.find("#images .grid-wrap img")]

    def images(self):
        """The gallery's images, as they were sent: int [N, ...]."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        images = [Image.open(io.BytesIO(opener.open(source, timeout=60).read())) for source in self.sources()]
        return np.stack([np.asarray(image).astype(int) for image in images])

    def chain(self):
        """The chain: the headings, and the number of images."""
        return [span.text for span in self.find("#chain span")], len(self.find("#chain img"))

    def outside(self):
        """The addresses elsewhere that the page asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [one for one in messages if one["method"] == "Network.requestWillBeSent"]
        own = ("data:", "blob:", "chrome:", self.address)
        pages = [one["params"]["request"]["url"] for one in asked if one["params"].get("documentURL") == self.address]
        return [page for page in pages if not page.startswith(own)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with tiny models of each kind, one of them private."""
    need_browser()
    if not PYTHON.exists():
        pytest.skip(f"no environment of a Space at {PYTHON}; `make test-slow` makes it, or name one in SPACE_PYTHON")
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
