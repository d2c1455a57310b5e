"""Evaluations during training: they change no weights, resume exactly, and give the figures of `ddpm-hf evaluate`."""

import json
import signal
from unittest import mock

import pytest
import torch

from ddpm_hf.common.errors import DataError
from ddpm_hf.evaluation.evaluate import Reference
from ddpm_hf.evaluation.features import EXTRACTORS
from ddpm_hf.publishing.publisher import Publisher
from tests.support.evaluation import PixelFeatures, Row, register
from tests.support.pictures import random_pixels, write_images, write_unet
from tests.support.runs import GRAY, attempt, records, train, weights

EVALUATED = {
    "evaluation_epochs": 1, "evaluation_samples": 6, "evaluation_features": "quarters", "evaluation_steps": 3,
    "evaluation_metrics": ["fid", "mind"], "max_train_steps": 6, "checkpointing_steps": 2, "logging_steps": 1,
}  # fmt: skip  # 3 steps an epoch


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    write_unet(root / "unet", in_channels=1, out_channels=1)
    for split, count, seed in (("train", 12, 0), ("validation", 6, 1)):
        write_images(root / f"images/{split}", random_pixels(count, 8, 8, seed=seed)[..., 0])
    for number, name in enumerate(("cat", "dog")):
        write_images(root / f"classes/{name}", random_pixels(4 + 4 * number, 8, 8, seed=number)[..., 0])
    return root


@pytest.fixture(autouse=True)
def features(monkeypatch, tmp_path):
    monkeypatch.setattr("ddpm_hf.evaluation.features.cache.cache_folder", lambda: tmp_path / "cache")
    return register(monkeypatch)


class ColourFeatures(PixelFeatures):
    """A network that reads no gray images."""

    def __call__(self, images):
        if images.shape[1] == 1:
            raise DataError(f"features {self.name}: are of images in colour")
        return super().__call__(images)


def figures(folder):
    """The evaluations of a run: by step, the figures."""
    lines = [(one["step"], {n: v for n, v in one.items() if n.startswith("evaluation")}) for one in records(folder)]
    return {step: found for step, found in lines if found}


def test_evaluations_change_no_weights_and_are_where_they_are_asked_for(shop, tmp_path):
    """Else a run with evaluations is another run; or its curve has other points."""
    plain = train(shop, tmp_path / "plain", GRAY, **{"max_train_steps": 6, "checkpointing_steps": 2})
    run = train(shop, tmp_path / "evaluated", GRAY, **EVALUATED)
    for name, value in weights(plain.folder).items():
        assert torch.equal(value, weights(run.folder)[name])
    found = figures(run.folder)
    names = {f"evaluation_{name}{end}" for name in ("fid", "mind") for end in ("", "_low", "_high")}
    assert {step: set(values) for step, values in found.items()} == {3: names, 6: names}
    assert "evaluating 6 samples (ddim, 3 steps)" in run.err
    assert "FID" in (run.folder / "README.md").read_text()
    assert run.json("run.json")["evaluation"]["samples"] == 6


def test_a_figure_that_cannot_be_is_no_end_of_the_training(shop, tmp_path):
    """Else hours of training are lost to an evaluation."""

    def fails(*arguments, **options):
        raise DataError("these samples have no figure")

    with mock.patch.object(Reference, "figure", fails):
        run = train(shop, tmp_path / "run", GRAY, **EVALUATED)
    for step in (3, 6):
        assert f"warning: no evaluation of step {step} (these samples have no figure); training goes on" in run.err
    assert figures(run.folder) == {}
    assert (run.folder / "model_index.json").is_file()


def test_the_figures_are_those_of_the_command(shop, tmp_path, run):
    """Else a curve of a training cannot be compared with an evaluation of its model."""
    trained = train(shop, tmp_path / "run", GRAY, **EVALUATED)
    words = "--features quarters --metrics fid,mind --num-samples 6 --sampler ddim --steps 3 --seed 3 --batch-size 2"
    code, _, err = run("evaluate", str(trained.folder), *words.split(), "--out", str(tmp_path / "out"))
    assert code == 0, err
    (result,) = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    last = figures(trained.folder)[6]
    for name, figure in result["figures"].items():
        assert last[f"evaluation_{name}"] == pytest.approx(figure["value"], rel=1e-9)
        assert last[f"evaluation_{name}_low"] == pytest.approx(figure["low"], rel=1e-9)


def test_a_run_stopped_during_an_evaluation_computes_it_when_it_is_resumed(shop, tmp_path):
    """Else a point of the curve is missing, or a resumed run is another run."""
    expected = train(shop, tmp_path / "expected", GRAY, **EVALUATED)
    calls = []
    original = PixelFeatures.__call__

    def stops(self, images):
        calls.append(len(images))
        if len(calls) == 2:  # after a trial at the start, the first samples of step 3, with more to come
            signal.raise_signal(signal.SIGTERM)
        return original(self, images)

    with mock.patch.object(PixelFeatures, "__call__", stops):
        stopped = attempt(shop, tmp_path / "run", GRAY, None, **EVALUATED)
    assert "stopped at step 3" in stopped.err
    assert figures(stopped.folder) == {}
    resumed = train(shop, tmp_path / "run", GRAY, **EVALUATED, resume_from_checkpoint="latest")
    assert figures(resumed.folder) == figures(expected.folder)
    for name, value in weights(expected.folder).items():
        assert torch.equal(value, weights(resumed.folder)[name])


def test_a_model_by_class_is_asked_for_the_classes_as_often_as_they_occur(shop, tmp_path):
    """Else the figures are of another mixture of classes."""
    from ddpm_hf.evaluation.in_training import TrainingEvaluation

    seen = []
    original = TrainingEvaluation.measure
    spy = lambda self, *args: seen.append(self.requests) or original(self, *args)  # noqa: E731
    flags = {**EVALUATED, "evaluation_samples": 12, "train_data_dir": "{shop}/classes", "label_column": "label"}
    with mock.patch.object(TrainingEvaluation, "measure", spy):
        train(shop, tmp_path / "run", GRAY, **{**flags, "evaluation_epochs": 2})
    assert sorted(seen[0]) == [0] * 4 + [1] * 8


def sampled(run):
    """How a run's card says that it was evaluated."""
    return run.json("run.json")["evaluation"]["settings"]


FLAGS = {
    "evaluation_epochs": (2, lambda run, seen: list(figures(run.folder)), [3, 6, 9], [3, 9]),
    "evaluation_samples": (4, lambda run, seen: run.json("run.json")["evaluation"]["samples"], 6, 4),
    "evaluation_metrics": (["fid,kid"], lambda run, seen: "evaluation_kid" in figures(run.folder)[9], False, True),
    "evaluation_features": ("fourths", lambda run, seen: "fourths" in json.dumps(run.json("run.json")), False, True),
    "evaluation_features_weights": ("w.pt", lambda run, seen: seen[-1]["weights"], None, "w.pt"),
    "evaluation_protocol": ("edm2", lambda run, seen: seen[-1]["protocol"].name, "adm", "edm2"),
    "evaluation_sampler": ("heun", lambda run, seen: sampled(run).split(",")[0], "ddim", "heun"),
    "evaluation_steps": (4, lambda run, seen: "4 steps" in sampled(run), False, True),
}  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_changes_what_is_seen(flag, shop, tmp_path, features):
    """Else a flag is accepted and ignored."""
    value, see, before, after = FLAGS[flag]
    for folder, expected, more in (("without", before, {}), ("given", after, {flag: value})):
        run = train(shop, tmp_path / folder, GRAY, **{**EVALUATED, "max_train_steps": 9, **more})
        assert see(run, features) == expected


@pytest.mark.parametrize(
    ("metric", "values", "best"), [("fid", [5, 3, 4], [1, 2]), ("recall", [0.2, 0.1, 0.3], [1, 3])]
)
def test_the_best_model_is_by_any_metric(metric, values, best, tmp_path):
    """Else `--hub_best_metric` keeps another model than the best."""
    publisher = Publisher.__new__(Publisher)
    publisher.folder = tmp_path
    publisher.flags = mock.Mock(hub_best_metric=metric)
    publisher.run = mock.Mock(flags=mock.Mock(checkpointing_steps=100))
    publisher.state = mock.Mock(sessions=mock.Mock(since=lambda fact: -1))
    kept = []
    for step, value in enumerate(values, start=1):
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, f"evaluation_{metric}": value}) + "\n")
        kept += [step] if publisher.is_best(step) else []
    assert kept == best


def test_the_best_model_is_by_figures_of_one_network(shop, tmp_path):
    """Else a resumed run with other features is compared with figures that have another scale, and never saved."""
    flags = {**EVALUATED, "hub_strategy": "best", "hub_best_metric": "fid", "max_train_steps": 3}
    first = train(shop, tmp_path / "run", GRAY, **flags)
    more = {"max_train_steps": 6, "evaluation_samples": 7, "resume_from_checkpoint": "latest"}
    metrics = first.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps({**line, "evaluation_fid": -1.0}) + "\n" for line in lines))
    run = train(shop, first.folder, GRAY, **{**flags, **more})
    assert "only the new ones are compared" in run.err
    assert run.json("run.json")["step"] > 3


def test_the_best_model_is_what_the_folder_holds(shop, tmp_path):
    """Else `--hub_strategy best` saves the last model, however good it is."""
    run = train(shop, tmp_path / "run", GRAY, **EVALUATED, hub_strategy="best", hub_best_metric="fid")
    found = figures(run.folder)
    assert run.json("run.json")["step"] == min(found, key=lambda step: found[step]["evaluation_fid"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"evaluation_metrics": ["fidd"]}, ("--evaluation_metrics fidd", "fid")),
        ({"evaluation_metrics": ["fid,kidd"]}, ("--evaluation_metrics kidd", "kid")),
        ({"evaluation_metrics": ["sfid"]}, ("--evaluation_metrics sfid", "spatial", "--evaluation_features")),
        ({"evaluation_metrics": ["ct"]}, ("--evaluation_metrics ct", "held-out", "--validation_steps")),
        ({"evaluation_samples": 1}, ("--evaluation_metrics fid", "2 samples")),
        ({"evaluation_features": "eighths"}, ("eighths",)),
        ({"evaluation_features": "torchscript:net.pt"}, ("torchscript:net.pt", "--trust-remote-code")),
        ({"evaluation_features": "no-gray"}, ("no-gray", "colour")),
        ({"evaluation_protocol": "adn"}, ("--evaluation_protocol adn",)),
        ({"evaluation_sampler": "plms"}, ("--evaluation_sampler plms", "ddim")),
        ({"evaluation_steps": 21}, ("--evaluation_steps 21", "20")),
        ({"streaming": True}, ("--evaluation_epochs", "--streaming")),
        ({"hub_strategy": "best", "hub_best_metric": "kid"}, ("--hub_best_metric kid", "--evaluation_metrics")),
        ({"hub_strategy": "best", "hub_best_metric": "ct", "evaluation_metrics": ["ct"], "validation_steps": 2},
         ("--hub_best_metric ct", "better")),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_training(flags, named, shop, tmp_path, monkeypatch):
    """Else hours of training end at the first evaluation."""
    monkeypatch.setitem(EXTRACTORS, "no-gray", Row([], "no-gray", extractor=ColourFeatures))
    run = attempt(shop, tmp_path / "run", GRAY, None, **{**EVALUATED, **flags})
    assert run.code == 2
    for word in named:
        assert word in run.error()
    assert not (tmp_path / "run").exists()
