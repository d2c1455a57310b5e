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


# Tests kill processes, and never the machine: no file has to reach the disk; waiting for it is a tenth of a tiny run.
os.fsync = lambda handle: None


@pytest.fixture(autouse=True)
def one_card(monkeypatch):
    """What a card shows is made once: for each tiny run anew, it would be a third of the run's time."""
    from ddpm_hf.publishing.card import illustrations, sections

    plot, usable = illustrations.loss_curve, sections.usable_samplers
    monkeypatch.setattr(illustrations, "loss_curve", lambda metrics: _plotted(plot))
    monkeypatch.setattr(sections, "usable_samplers", lambda pipeline: _usable(usable, pipeline))


@functools.cache
def _plotted(plot) -> bytes:
    return plot([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])


USABLE = {}


def _usable(usable, pipeline) -> dict[str, int]:
    scheduler = pipeline.scheduler
    key = usable, type(scheduler), scheduler.to_json_string(), pipeline.unet.config.out_channels
    if key not in USABLE:
        USABLE[key] = usable(pipeline)
    return USABLE[key]


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
