"""A headless Chromium for the tests that look at pages; it reaches the loopback interface alone."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def need_browser() -> None:
    """Skip the test where there is no Chromium, or nothing to drive it."""
    pytest.importorskip("selenium", reason="drives the browser; pip install -e '.[test]'")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")


@contextlib.contextmanager
def browser(profile: Path, width: int = 1280, height: int = 1100) -> Iterator:
    """A selenium driver of a new Chromium, whose profile goes into an empty folder."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    service = webdriver.ChromeService(DRIVER, env=environment)
    driver = webdriver.Chrome(options, service)
    try:
        yield driver
    finally:
        driver.quit()
