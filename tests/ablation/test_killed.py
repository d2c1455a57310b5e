"""A real `ddpm-hf ablate`, killed without notice at several moments, ends with the table of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT
from tests.support.ablations import PLAN, write_plan
from tests.support.pictures import random_pixels, write_images

LIMIT = 400  # seconds


def begin(folder):
    words = [sys.executable, "-m", "ddpm_hf", "ablate", "plan.yaml", "--out", folder, "--processes", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": "cache"}
    return subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def figures(folder):
    rows = json.loads((folder / "table.json").read_text())["rows"]
    return {(row["name"], one["metric"]): one["value"] for row in rows for one in row["means"]}


@pytest.mark.slow
def test_killed_without_notice(tmp_path, monkeypatch):
    """Else a run that outlives its ablation writes beside the next one, or a killed cell ends with other weights."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", random_pixels(8, 8, 8))
    plan = {**PLAN, "seeds": [0, 1], "evaluate": {"metrics": ["colour"], "num_samples": 6, "steps": 10}}
    plan["flags"] = {**PLAN["flags"], "train_data_dir": "photos", "max_train_steps": 40, "checkpointing_steps": 5}
    write_plan(tmp_path / "plan.yaml", plan)
    started = time.monotonic()
    whole = begin("whole")
    assert whole.wait(LIMIT) == 0, whole.stderr.read()
    usual = time.monotonic() - started  # seconds, most of them for the start on a busy machine
    chance, kills = random.Random(0), 0
    while True:
        process = begin("killed")
        try:
            code = process.wait(usual * chance.uniform(0.3, 0.6) if kills < 3 else LIMIT)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert kills < 3  # else it hangs
            kills += 1
            continue
        assert code == 0, process.stderr.read()
        break
    assert kills >= 2
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
