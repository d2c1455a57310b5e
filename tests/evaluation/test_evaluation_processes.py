"""Evaluations in processes of their own: two ranks, and one that is killed, give the figures of one alone."""

import json
import os
import subprocess
import sys
import time

import pytest

from ddpm_hf import DDPMPipeline, DDPMScheduler
from tests.support import ROOT
from tests.support.classifier import tiny_classifier
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_ranks import torchrun
from tests.support.pictures import random_pixels, write_images

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A command, without --out, and the results of a process that is left alone."""
    root = tmp_path_factory.mktemp("processes")
    classifier, unet = tiny_classifier(), tiny_unet()
    classifier.save_pretrained(root / "classifier")
    DDPMPipeline(unet, DDPMScheduler(40, beta_schedule="cosine")).save_pretrained(root / "model")
    shape = (unet.config.sample_size,) * 2
    pixels = random_pixels(60, *shape)
    write_images(root / "images", pixels if unet.config.in_channels == 3 else pixels[..., 0])
    options = (
        "--metrics fid,kid,mind,colour --num-samples 50 --batch-size 4 --steps 8 --likelihood-calls 4 --device cpu"
    )
    features = ["--features", f"classifier:{root}/classifier"]
    words = ["evaluate", str(root / "model"), "--dataset", str(root / "images"), *features, *options.split()]
    alone = root / "alone"
    subprocess.run([sys.executable, "-m", "ddpm_hf", *words, "--out", str(alone)], check=True, env=ENVIRONMENT)
    return words, results(alone)


def results(folder):
    """All figures of an evaluation."""
    record = json.loads((folder / "metrics.json").read_text())
    return record["results"], record["likelihood"]


def test_two_ranks_give_the_figures_of_one(words, tmp_path):
    """Else a figure depends on how many GPUs there were."""
    done = torchrun("-m", "ddpm_hf", *words[0], "--out", tmp_path / "out", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out") == words[1]
    assert done.stdout.count("metrics.json") == 1  # one rank speaks


def test_a_killed_evaluation_goes_on_to_the_same_figures(words, tmp_path):
    """Else what was sampled is lost, or the figures are others."""
    command = [sys.executable, "-m", "ddpm_hf", *words[0], "--out", str(tmp_path / "out")]
    killed = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(before := list((tmp_path / "out").rglob("*.npy"))) < 3:
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    times = {path: path.stat().st_mtime_ns for path in before}
    subprocess.run(command, check=True, env=ENVIRONMENT)
    assert results(tmp_path / "out") == words[1]
    assert {path: path.stat().st_mtime_ns for path in before} == times  # not sampled again
