"""What every test process shares."""

import functools
import os
import signal
import sys

import pytest
import torch

from tests.support import other_rounding

# Tests run in several processes at once, and torch's threads would wait for each other.
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if os.environ.get("OTHER_ROUNDING"):
    other_rounding.install()


@pytest.fixture(autouse=True)
def one_loss_curve(monkeypatch):
    """The card's curve is plotted once: for each tiny run anew, it would be a fifth of the run's time."""
    from ddpm_hf.publishing.card import illustrations

    plot = illustrations.loss_curve
    monkeypatch.setattr(illustrations, "loss_curve", lambda metrics: _plotted(plot))


@functools.cache
def _plotted(plot) -> bytes:
    return plot([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])


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
