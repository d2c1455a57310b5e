"""A Space's page in a headless Chromium, as a visitor uses it; its app in a process of its own."""

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

from tests.support import ROOT
from tests.support.fixtures_browser import need_browser
from tests.support.fixtures_hub import TOKEN, client_environment
from tests.support.fixtures_ranks import free_port

PYTHON = Path(os.environ.get("SPACE_PYTHON", ROOT / ".venv-space" / "bin" / "python"))
PATIENCE = 180  # seconds that anything may take on a busy machine
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
        before, known = self.summary(), self.errors()
        self.driver.execute_script(WATCH)
        self.find("button#draw")[0].click()
        self.wait(lambda: self.summary() not in ("", before) or self.new_errors(known))
        assert not (errors := self.new_errors(known)), errors
        return self.driver.execute_script("return [window.words, window.chains]")

    def errors(self):
        """The errors that the page shows."""
        return [toast.text for toast in self.find(".toast-body.error")]

    def new_errors(self, known):
        """Those that were not there before."""
        return [error for error in self.errors() if error not in known]

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


def need_space() -> None:
    """Skip the test where there is no browser or no environment of a Space."""
    need_browser()
    if not PYTHON.exists():
        pytest.skip(f"no environment of a Space at {PYTHON}; `make test-slow` makes it, or name one in SPACE_PYTHON")
