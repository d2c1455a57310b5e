"""Runs that are killed at any moment and resumed end as if nobody had: rounds of tests/support/kills.py."""

import re

import pytest

from tests.support import warm


def kill(*words, seconds=900):
    """What the harness printed, and the kills that it counted: all, those within saving, and the runs compared."""
    done = warm.run("-m", "tests.support.kills", *words, resident=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+) \| (\d+) \| 0 \|$", done.stdout, re.M)
    counts = tuple(sum(map(int, column)) for column in zip(*rows, strict=True))
    assert f"{counts[0]} kills, {counts[0]} resumed, 0 lost" in done.stdout
    return done.stdout, *counts


def test_killed_runs_lose_nothing(tmp_path):
    """Else a job that is killed while it trains or saves ends as another model, or cannot go on."""
    _, kills, saving, compared = kill(
        "--kills", "3", "--configurations", "by class", "--folder", str(tmp_path / "runs")
    )
    assert kills >= 3  # one at each kind of moment
    assert saving >= 1
    assert compared >= 1


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    """Else some kind of run, or some moment, is not safe."""
    words = ("--kills", "100", "--real", "9", "--folder", str(tmp_path / "runs"))
    _, kills, saving, compared = kill(*words, seconds=4 * 3600)
    assert kills >= 100
    assert saving >= 20
    assert compared >= 9  # each configuration at least once


@pytest.mark.slow
def test_killing_one_rank_or_both_loses_nothing(tmp_path):
    """Else a run on several processes is lost with one of them, or the others wait for ever."""
    names = ("bf16", "loss-aware", "streamed", "text")
    words = ("--ranks", "2", "--kills", "20", "--real", "4", "--configurations", *names)
    said, kills, *_ = kill(*words, "--folder", str(tmp_path / "runs"), seconds=2 * 3600)
    assert kills >= 20
    assert "the other rank ended by itself" in said
