"""What every test process shares."""

import os
import sys

import pytest
import torch

from tests import other_rounding

# Tests run in several processes at once, and torch's threads would wait for each other.
torch.set_num_threads(1)
if os.environ.get("OTHER_ROUNDING"):
    other_rounding.install()


@pytest.fixture
def run(monkeypatch, capfd):
    """Call `ddpm-hf`, the entry point, with some words; its exit code, stdout and stderr."""
    from diffusers.utils import logging as diffusers_logging

    from ddpm_hf import cli

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
