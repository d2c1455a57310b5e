"""Call `ddpm-hf` within the test's process."""

import sys

import numpy as np
import pytest
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from ddpm_hf import cli


@pytest.fixture
def run(monkeypatch, capfd):
    """Call the entry point with some words; its exit code, stdout and stderr."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the command sets torch's threads for good
    verbosity = diffusers_logging.get_verbosity()

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["ddpm-hf", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    yield call
    diffusers_logging.set_verbosity(verbosity)
    diffusers_logging.enable_progress_bar()


def images(folder):
    """The single images of a folder, in order: int [N, H, W] or [N, H, W, 3]."""
    paths = sorted(path for path in folder.iterdir() if path.stem.isdecimal())
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


def assert_one_line(result, *named):
    """Exit code 2, and one line on stderr that names what is wrong."""
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("ddpm-hf: error: ")
    for word in named:
        assert str(word) in lines[0]
