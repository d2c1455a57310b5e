"""`ddpm-hf ema`: a pipeline of any width, and the figures of several."""

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import ddpm_hf
from ddpm_hf.training.post_hoc import Averages, read_snapshots
from tests.support.evaluation import register
from tests.support.fixtures_cli import assert_one_line
from tests.support.pictures import encoded, random_pixels, write_images, write_rows, write_unet
from tests.support.runs import GRAY, same, train, weights

FLAGS = {**GRAY, "max_train_steps": 9, "ema_snapshot_steps": 1, "save_images_epochs": 0, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A run that has kept snapshots, one that has not, and other images."""
    root = tmp_path_factory.mktemp("averaged")
    write_rows(root / "images", [encoded(pixels) for pixels in random_pixels(12, 8, 8)])
    write_unet(root / "unet", in_channels=1, out_channels=1)
    train(root, root / "run", FLAGS, use_ema=True)
    train(root, root / "plain", FLAGS, ema_snapshot_steps=None, max_train_steps=1)
    write_images(root / "others", random_pixels(7, 8, 8, seed=1))
    return root


class Seen(NamedTuple):
    """How a command ended, and its folder."""

    result: tuple
    folder: Any
    options: dict

    @property
    def record(self):
        return json.loads((self.folder / "metrics.json").read_text())


@pytest.fixture
def call(shop, tmp_path, run, monkeypatch):
    """Runs a command in a new folder, with features that need no weights."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm_hf.evaluation.features.cache.cache_folder", lambda: tmp_path / "cache")
    options, made = register(monkeypatch), iter(range(10))

    def call(words: str) -> Seen:
        folder = tmp_path / str(next(made))
        result = run(*(word.replace("~", " ") for word in words.format(shop=shop, out=folder).split()))
        return Seen(result, folder, options[-1] if options else {})

    return call


def figures(seen):
    return [one["figures"]["fid"]["value"] for one in seen.record["results"]]


def stamped(name):
    return lambda seen: seen.record["stamp"][name]


SWEEP = "ema {shop}/run --sweep 0.07,0.1 --features quarters --metrics fid --num-samples 4 --steps 2 --out {out}"
ROWS = {
    "sweep": ("--sweep 0.1", lambda seen: [one["ema_std"] for one in seen.record["results"]]),
    "dataset": ("--dataset {shop}/others", stamped("real_images")),
    "metrics": ("--metrics colour", lambda seen: list(seen.record["results"][0]["figures"])),
    "features": ("--features fourths", stamped("features")),
    "features_weights": ("--features-weights w.pt", lambda seen: seen.options["weights"]),
    "protocol": ("--protocol clean-fid", stamped("protocol")),
    "num_samples": ("--num-samples 5", stamped("samples")),
    "sampler": ("--sampler ddim", figures),
    "steps": ("--steps 3", lambda seen: seen.record["results"][0]["network_calls"]),
    "seed": ("--seed 1", figures),
    "batch_size": ("--batch-size 3", lambda seen: len(list(seen.folder.rglob("samples/*/*.npy")))),
    "step": ("--step 6", figures),
}
APART = {
    "std": "test_a_width_is_a_pipeline_like_any_other",
    "out": "test_a_width_is_a_pipeline_like_any_other",
    "device": "test_what_cannot_be_averaged_is_refused",
    "token": "test_what_cannot_be_averaged_is_refused",
}


@pytest.fixture(scope="module")
def usual():
    """What the sweep without further options gave."""
    return {}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ROWS)
def test_an_option_changes_what_is_seen(name, call, usual):
    """Else an option is accepted and ignored."""
    given, see = ROWS[name]
    if "seen" not in usual:
        usual["seen"] = call(SWEEP)
    before, after = usual["seen"], call(f"{SWEEP} {given}")
    assert (before.result[0], after.result[0]) == (0, 0), before.result[2] + after.result[2]
    assert see(before) != see(after)


def test_a_width_is_a_pipeline_like_any_other(shop, call, tmp_path, run):
    """Else the folder has other weights than the width's, cannot be sampled or pushed, or the run was changed."""
    before = {path: path.read_bytes() for path in (shop / "run").rglob("*") if path.is_file()}
    code, out, err = call("ema {shop}/run --std 0.07 --out {out}").result
    assert code == 0, err
    made = tmp_path / "0"
    assert "width 0.07 at step 9" in out
    assert {path: path.read_bytes() for path in (shop / "run").rglob("*") if path.is_file()} == before
    expected = ddpm_hf.load(shop / "run").unet
    Averages(shop / "run").put({"unet": expected}, 0.07)
    assert same(weights(made), dict(expected.state_dict()))
    assert not same(weights(made), weights(shop / "run"))
    pipeline = DiffusionPipeline.from_pretrained(made)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(1, torch.Generator().manual_seed(0), 2, "np").images.shape == (1, 8, 8, 1)
    record = json.loads((made / "run.json").read_text())
    assert (record["settings"]["ema_std"], record["step"]) == (0.07, 9)
    assert run("sample", made, "--num-images", 1, "--steps", 2, "--out", tmp_path / "drawn")[0] == 0
    ddpm_hf.record_result(made, "FID", 1.2, samples=10, dataset="photos")
    assert call("ema {shop}/run --std 0.1 --step 6 --out " + str(made)).result[0] == 0  # replaces its own
    assert not (made / "evaluation.json").exists()  # it was of the other width
    record, whole = json.loads((made / "run.json").read_text()), json.loads((shop / "run/run.json").read_text())
    assert record["sessions"][-1]["last_step"] == 6
    seconds = [sum(one["seconds"] for one in each["sessions"]) for each in (record, whole)]
    assert seconds[0] == pytest.approx(seconds[1] * 6 / 9, abs=0.1)
    (snapshot,) = [one.path for one in read_snapshots(shop / "run") if (one.std, one.step) == (0.1, 6)]
    other = ddpm_hf.load(made).unet
    values = torch.cat([one.detach().flatten() for one in other.parameters()])
    from safetensors.torch import load_file

    kept = load_file(snapshot)
    torch.testing.assert_close(values, torch.cat([kept[n].flatten() for n, _ in other.named_parameters()]))


def test_a_sweep_measures_each_width_and_the_runs_own_weights(shop, call, tmp_path, run):
    """Else widths are measured with each other's weights, or what is called best is not."""
    seen = call(SWEEP)
    assert seen.result[0] == 0, seen.result[2]
    results = seen.record["results"]
    assert [one["title"] for one in results] == [
        "the run's weights, ddpm, 2 steps",
        "EMA 0.07, ddpm, 2 steps",
        "EMA 0.1, ddpm, 2 steps",
    ]
    best = min(results, key=lambda one: one["figures"]["fid"]["value"])
    assert f"best FID: {best['title']}" in seen.result[1]
    assert len(set(figures(seen))) == 3
    for width, expected in ((None, figures(seen)[0]), (0.1, figures(seen)[2])):
        model = shop / "run"
        if width:
            model = tmp_path / "model"
            assert run("ema", shop / "run", "--std", width, "--out", model)[0] == 0
        words = ["--features", "quarters", "--metrics", "fid", "--num-samples", "4", "--steps", "2"]
        assert run("evaluate", model, *words, "--out", tmp_path / f"alone{width}")[0] == 0
        alone = json.loads((tmp_path / f"alone{width}" / "metrics.json").read_text())
        np.testing.assert_allclose(alone["results"][0]["figures"]["fid"]["value"], expected, rtol=1e-6)
    page = (seen.folder / "report.html").read_text()
    assert "Quality against the width of the average" in page
    assert "the run's weights</text>" in page  # the level to be compared with, in the plot


REFUSED = {
    "ema {shop}/run": ("--std", "--sweep"),
    "ema {shop}/run --std 0.05 --sweep 0.1": ("--std", "--sweep"),
    "ema {shop}/run --std 0.5": ("--std 0.5", "0.28"),
    "ema {shop}/run --sweep 0.1,wide": ("'wide'", "0.05"),
    "ema {shop}/run --sweep ,": ("--sweep", "empty"),
    "ema {shop}/run --std 0.005": ("0.005", "9 steps", "--ema_snapshot_steps"),
    "ema {shop}/run --std 0.05 --step 10": ("--step 10", "1 to 9"),
    "ema {shop}/run --std 0.05 --out {shop}/run": ("--out", "another"),
    "ema {shop}/run --std 0.05 --out {shop}/plain": ("--out", "plain", "training run"),
    "ema {shop}/plain --std 0.05": ("ema-snapshots", "--ema_snapshot_steps"),
    "ema {shop}/others --std 0.05": ("others", "model_index.json"),
    "ema {shop}/run --sweep 0.05 --metrics none": ("--metrics none",),
    "ema {shop}/run --sweep 0.05 --metrics fid --features quarters --device meta": ("--device meta", "cpu"),
    "ema {shop}/run --sweep 0.05 --metrics fid --features quarters --token a~b": ("token",),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_averaged_is_refused(words, shop, call, tmp_path):
    """Else a traceback is the answer, or files are written by a command that fails."""
    before = set(shop.rglob("*"))
    assert_one_line(call(words).result, *REFUSED[words])
    assert set(shop.rglob("*")) == before
    assert not list(tmp_path.iterdir())
