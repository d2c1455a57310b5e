"""What every test process shares."""

import collections
import os
import signal
import sys

import hypothesis
import pytest
import torch

from tests.support import other_rounding
from tests.support.cheap import one_card, one_parser, without_onednn, without_waiting_for_disks

# Tests run in several processes at once, and torch's threads would wait for each other.
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if os.environ.get("OTHER_ROUNDING"):
    other_rounding.install()


hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")
without_waiting_for_disks()
without_onednn()
CHEAP = [*one_card(), *one_parser()]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `every(n)`, all cases that are not slow anyway, but one in n, are slow."""
    seen = collections.Counter()
    for item in items:
        if (mark := item.get_closest_marker("every")) and not item.get_closest_marker("slow"):
            test = item.location[0], item.originalname
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


@pytest.fixture(autouse=True)
def cheap_parts(monkeypatch):
    """A card's plot, the samplers that it names, and parsers are made once."""
    for place, name, new in CHEAP:
        monkeypatch.setattr(place, name, new)


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
