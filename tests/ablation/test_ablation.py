"""`ddpm-hf ablate`: runs, kills, changed plans, failures, and what it refuses before any work."""

import contextlib
import copy
import csv
import json

import numpy as np
import pytest

from ddpm_hf.ablation import running
from ddpm_hf.ablation.table import mean_of
from ddpm_hf.ablation.tasks import Chain, Task, content_key
from ddpm_hf.cli import ablate
from tests.support.ablations import PLAN, InThisProcess, place, write_plan
from tests.support.fixtures_cli import assert_one_line

__all__ = ["place"]


class KilledError(BaseException):
    """SIGKILL, as far as this process can have it."""


@pytest.fixture
def start(place, run, monkeypatch):
    """Runs `ddpm-hf ablate` with commands in this process; returns its result and the titles of what was started."""
    parts = iter(range(100))

    def call(plan, *words, before=lambda task: None, after=lambda task: None):
        launcher = InThisProcess(run, before, after)
        monkeypatch.setattr(ablate.Ablation, "launcher", lambda self: launcher)
        path = write_plan(place / f"plan{next(parts)}.yaml", plan)
        return run("ablate", path, "--out", place / "out", *words), launcher.started

    return call


def plan_of(place, **changes):
    plan = {**copy.deepcopy(PLAN), **changes}
    plan["flags"] = {**plan["flags"], "train_data_dir": str(place / "photos/train")}
    return plan


def figures(place):
    """All values of the table, without times and paths."""
    rows = json.loads((place / "out/table.json").read_text())["rows"]
    return {(row["name"], one["metric"], one["network"]): one["value"] for row in rows for one in row["means"]}


def test_a_plan_becomes_a_table(start, place):
    """Else an ablation is runs without a result."""
    plan = plan_of(place, seeds={"others": [0], "l2": [0, 1]}, real={"dataset": "photos", "split": "test"})
    plan["evaluate"]["features"] = ["quarters"]
    plan["published"] = {"source": "nobody", "cells": {"l1": {"fid": 3.25}}, "real": {"fid": 0.5}}
    (code, out, err), started = start(plan)
    assert code == 0, err
    assert len(started) == 1 + 2 * 3
    assert started[0] == "real images: evaluation by quarters"
    record = json.loads((place / "out/table.json").read_text())
    one, two, real = record["rows"]
    assert (one["name"], two["name"], real["name"]) == ("l1", "l2", "real images")
    seeds = [next(f for f in run["figures"] if f["metric"] == "fid")["value"] for run in two["runs"]]
    mean = next(mean for mean in two["means"] if mean["metric"] == "fid")
    assert mean["value"] == pytest.approx(sum(seeds) / 2)
    assert mean["high"] - mean["value"] == pytest.approx(12.706 * abs(seeds[0] - seeds[1]) / 2)
    assert len(set(seeds)) == 2
    lines = list(csv.DictReader((place / "out/table.csv").read_text().splitlines()))
    assert {(line["cell"], line["metric"]) for line in lines} == {
        (name, metric) for name in ("l1", "l2", "real images") for metric in ("fid", "colour")
    }
    assert {line["published"] for line in lines if line["metric"] == "fid"} == {"3.25", "", "0.5"}
    assert "3.25" in out
    page = (place / "out/report.html").read_text()
    assert page.count("data:image/png") == 3  # a grid of each run
    assert '<th class="n">minutes of training</th>' in page
    assert "held-out loss" not in page  # no cell has one
    assert "published" in page


@pytest.mark.slow
def test_kills_at_any_command_change_nothing(start, place):
    """Else a night's work is lost, or the table is another than without the kill."""
    plan = plan_of(place)
    (code, _, err), whole = start(plan)
    assert code == 0, err
    expected = figures(place)
    assert len(expected) == 2 * 4
    (place / "out").rename(place / "uninterrupted")

    kills = iter(range(1, 100))
    seen = []

    def once(task):  # before each command that was not killed before, and after each, before its result is written
        if task.title not in seen:
            seen.append(task.title)
            raise KilledError

    for _ in range(40):
        try:
            result, _ = start(plan, before=once if next(kills) % 2 else lambda task: None, after=once)
            break
        except KilledError:
            continue
    assert result[0] == 0, result[2]
    assert set(seen) == set(whole)
    assert figures(place) == expected
    _, again = start(plan)
    assert again == []


def test_a_changed_plan_runs_what_changed_and_loses_nothing(start, place):
    """Else one more value on an axis trains everything again, or a result of other settings stays in the table."""
    plan = plan_of(place)
    del plan["evaluate"]
    assert start(plan)[0][0] == 0
    before = {path: path.read_bytes() for path in (place / "out/cells").rglob("*.safetensors")}
    plan["grid"]["loss_type"] = ["l1", "huber"]
    plan["cells"] = {"l2": {"loss_type": "l2", "learning_rate": 0.003}}
    plan["flags"]["logging_steps"] = 2
    (code, _, err), started = start(plan)
    assert code == 0, err
    assert started == ["huber, seed 0: training", "l2, seed 0: training"]
    (line,) = [line for line in err.splitlines() if "runs again" in line]
    assert "learning_rate default → 0.003" in line
    assert {path: path.read_bytes() for path in before} == before
    plan["cells"]["l2"].pop("learning_rate")
    assert start(plan)[1] == []


def test_cells_whose_names_differ_in_other_letters_are_no_earlier_runs_of_each_other(start, place):
    """Else "ε, L" is said to run again with the settings of "μ, L", for their folders share a stem."""
    plan = plan_of(place, grid={}, cells={"μ, L": {"loss_type": "l1"}, "ε, L": {"loss_type": "l2"}})
    del plan["evaluate"]
    assert start(plan, "--only", "μ, L")[1] == ["μ, L, seed 0: training"]
    (code, _, err), started = start(plan)
    assert (code, started) == (0, ["ε, L, seed 0: training"]), err
    assert "runs again" not in err
    del plan["cells"]["μ, L"]
    plan["cells"]["ε, L"] = {"loss_type": "huber"}
    (line,) = [line for line in start(plan)[0][2].splitlines() if "runs again" in line]
    assert "loss_type default → huber" in line


def test_figures_against_other_images_get_no_star_and_a_line(start, place):
    """Else cells of other subsets are ranked by distances to different images, which `compare` refuses."""
    plan = plan_of(place, grid={"max_train_samples": [5, 6]})
    plan["evaluate"] |= {"features": ["quarters"], "metrics": ["fid"], "likelihood_calls": 4, "likelihood_images": 2}
    (code, out, err), _ = start(plan)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "do not compare" in line]
    assert line.startswith("FID ↓: of different real images")
    assert " *" not in out
    assert "do not compare" in (place / "out/report.html").read_text()


def test_a_row_of_real_images_changes_no_likelihood(start, place):
    """Else it is measured on training images, once real images are scored too."""
    plan = plan_of(place, grid={}, cells={"one": {"train_data_dir": str(place / "photos")}})
    bound = {"likelihood_calls": 4, "likelihood_images": 2, "held_out_split": "test"}
    plan["evaluate"] |= {"features": ["quarters"], "metrics": ["fid"], **bound}
    found = []
    for real in ({}, {"real": {"split": "test"}}):
        if real:
            del plan["evaluate"]["held_out_split"]
        (code, _, err), _ = start({**plan, **real})
        assert code == 0, err
        (path,) = (place / "out/cells").glob("*/evaluation/metrics.json")
        found.append(json.loads(path.read_text())["likelihood"])
    assert found[0]["held_out"]
    assert found[1] == found[0]


def test_another_classifier_of_the_same_path_scores_anew(tmp_path):
    """Else a result stays in the table after the network that made it was trained again."""
    (tmp_path / "classifier").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "classifier" / name).write_text("a")
    before = content_key(str(tmp_path / "classifier"))
    assert content_key(str(tmp_path / "classifier")) == before
    (tmp_path / "classifier" / "diffusion_pytorch_model.safetensors").write_text("b")
    assert content_key(str(tmp_path / "classifier")) != before
    assert content_key("inception") == "inception"
    assert content_key(None) is None


def test_a_cell_that_fails_does_not_stop_the_others(start, place):
    """Else one bad cell costs the night, or a table lacks a row in silence."""
    plan = plan_of(place)
    del plan["evaluate"]
    plan["grid"] = {}
    plan["cells"] = {"broken": {"train_data_dir": "nowhere"}, "fine": {}}
    (code, out, err), _ = start(plan)
    assert code == 1
    assert "failed: broken, seed 0: training (exit code 2: " in err
    assert "nowhere" in err
    assert (place / "out/cells").is_dir()
    record = json.loads((place / "out/table.json").read_text())
    assert [len(row["runs"]) for row in record["rows"]] == [0, 1]
    assert "0 of 1" in out


@pytest.mark.parametrize(
    ("changes", "line", "says"),
    [
        ({"flags": {"num_epoch": 3}}, "flags.num_epoch:", "num_epochs"),
        ({"flags": {"num_epochs": "many"}}, "flags.num_epochs:", "many"),
        ({"flags": {"num_epochs": 0}}, "flags.num_epochs:", "more than 0"),
        ({"flags": {"seed": 3}}, "flags.seed:", "seeds"),
        ({"flags": {"output_dir": "x"}}, "flags.output_dir:", "leave it out"),
        ({"flags": {"hub_token": "hf_x"}}, "flags.hub_token:", "leave it out"),
        ({"grid": {"loss_type": ["l1", "l7"]}}, "grid.loss_type.1:", "l7"),
        ({"flags": {"conditioning": "inpaint"}, "evaluate": {}}, "flags.conditioning:", "leave out evaluate"),
        ({"evaluate": {"metrics": ["fad"]}}, "evaluate.metrics:", "fad"),
        ({"evaluate": {"sampler": "magic"}}, "evaluate.sampler:", "magic"),
        ({"evaluate": {"steps": 0}}, "evaluate.steps:", "0"),
        ({"evaluate": {"out": "x"}}, "evaluate.out:", "unknown option"),
        ({"evaluate": {"features": "magic"}}, "evaluate.features:", "magic"),
        ({"evaluate": {"sweep": "ddim"}}, "evaluate.sweep:", "SAMPLER:STEPS"),
        ({"evaluate": {"steps": [10]}}, "evaluate.steps:", "one value"),
        ({"evaluate": {"metrics": {"fid": 1}}}, "evaluate.metrics:", "one value"),
        ({"evaluate": {"protocol": "mine"}}, "evaluate.protocol:", "mine"),
        ({"classifier": {"label": "x"}, "evaluate": {}}, "classifier.label:", "unknown setting"),
    ],
)
def test_a_bad_plan_is_one_line_before_any_work(start, place, changes, line, says):
    """Else the mistake shows after the first cell's hours."""
    result, started = start(changes)
    assert_one_line(result, line, says)
    assert started == []
    assert not (place / "out").exists()


def test_bad_words_are_one_line(start, place):
    """Else a typing error trains everything."""
    assert_one_line(start(plan_of(place), "--only", "l3")[0], "--only 'l3'", "'l1', 'l2'")
    assert_one_line(start(plan_of(place), "--set", "num_epochs")[0], "--set num_epochs", "FLAG=VALUE")
    assert_one_line(start(plan_of(place), "--set", "num_epoch=3")[0], "num_epoch")
    (place / "out").mkdir()
    (place / "out/table.csv").write_text("mine")
    assert_one_line(start(plan_of(place))[0], "table.csv")


def test_each_option_does_something(start, place):
    """Else an option is accepted and ignored."""
    plan = plan_of(place)
    del plan["evaluate"]
    (code, out, _), started = start(plan, "--table")
    assert (code, started) == (0, [])
    assert "0 of 1" in out
    assert start(plan, "--only", "l2")[1] == ["l2, seed 0: training"]
    assert start(plan, "--set", "max_train_steps=2")[1] == ["l1, seed 0: training", "l2, seed 0: training"]


def test_a_dry_run_tells_steps_and_time_and_writes_nothing(start, place):
    """Else nobody knows before the night how long the plan takes, or a folder is left behind."""
    plan = plan_of(place)
    plan["cells"] = {"longer": {"max_train_steps": 7}}
    (code, out, err), started = start(plan, "--dry-run")
    assert (code, started) == (0, []), err
    assert err.count("measuring") == 2  # cells that take as long are measured once
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert " 3 " in rows["l1, seed 0"]
    assert " 7 " in rows["longer, seed 0"]
    assert "3 runs, 13 steps" in out
    assert not (place / "out").exists()
    assert_one_line(start(plan, "--dry-run", "--set", "lr_scheduler=l9")[0], "l9")


def test_processes_share_cores_and_gpus(monkeypatch, tmp_path):
    """Else two cells take twice as long each, or all run on the first GPU."""
    monkeypatch.setattr(running, "usable_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    task = Task("a", ["train", "--seed", "0"], tmp_path, tmp_path / "x", dict)
    two = running.Launcher(tmp_path, (), 2, 4, print)
    assert [two.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(5)] == ["0", "1", "2", "3", "0"]
    assert two.environment(0)["OMP_NUM_THREADS"] == "4"
    assert two.words(task) == [str(tmp_path / "train_unconditional.py"), "--seed", "0", "--cpu_threads", "4"]
    one = running.Launcher(tmp_path, ("--multi_gpu",), 1, 4, print)
    assert "OMP_NUM_THREADS" not in one.environment(0)
    assert "CUDA_VISIBLE_DEVICES" not in one.environment(0)
    assert one.words(task) == ["-m", "ddpm_hf", "train", "--multi_gpu", "--", "--seed", "0"]


def test_chains_run_at_once(tmp_path):
    """Else --processes says two, and one runs."""
    together, most = set(), 0

    class Counted:
        def __init__(self, task):
            self.task, self.looks = task, 0
            together.add(task.title)

        def poll(self):
            nonlocal most
            most, self.looks = max(most, len(together)), self.looks + 1
            if self.looks < 3:
                return None
            together.discard(self.task.title)
            return 0

        def wait(self):
            return 0

    tasks = [Task(str(n), [], tmp_path, tmp_path / f"{n}.json", dict) for n in range(5)]
    chains = [Chain(task.title, tmp_path, [task]) for task in tasks]
    pause, running.PAUSE = running.PAUSE, 0.0
    try:
        assert running.run_chains(chains, 2, lambda task, slot: Counted(task)) == []
    finally:
        running.PAUSE = pause
    assert most == 2
    assert all(task.done for task in tasks)


def test_what_another_ablation_did_meanwhile_is_not_done_again(tmp_path, monkeypatch):
    """Else two ablations of one folder train its cells twice, the second over the first's files."""
    task = Task("a", ["train"], tmp_path, tmp_path / "a.json", dict)
    launcher = running.Launcher(tmp_path, (), 1, 0, print)
    begun = []
    monkeypatch.setattr(running.Launcher, "begin", lambda self, task, *more: begun.append(task) or running.Nothing())

    @contextlib.contextmanager
    def locked(folder, say):  # the other one finishes while this one waits
        task.result.write_text('{"by": "the other"}')
        yield ()

    monkeypatch.setattr(running, "_locked", locked)
    assert running.run_chains([Chain("a", tmp_path, [task])], 1, launcher) == []
    assert begun == []
    assert json.loads(task.result.read_text()) == {"by": "the other"}


def test_a_cell_that_another_ablation_did_is_left_out(tmp_path):
    """Else the ablation ends with a traceback when its turn comes."""
    tasks = [Task(name, [], tmp_path, tmp_path / f"{name}.json", dict) for name in "ab"]
    begun = []

    def start(task, slot):
        begun.append(task.title)
        tasks[1].finish()  # meanwhile, another process
        return running.Nothing()

    assert running.run_chains([Chain(one.title, tmp_path, [one]) for one in tasks], 1, start) == []
    assert begun == ["a"]


def test_students_interval_covers():
    """Else three seeds look more certain than they are."""
    values = np.random.default_rng(0).normal(5, 2, (4000, 3))
    inside = [mean.low < 5 < mean.high for mean in (mean_of([{"value": v} for v in row]) for row in values)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


# The options, and the tests here that show them
APART = {
    "set_": "test_each_option_does_something",
    "only": "test_each_option_does_something",
    "table": "test_each_option_does_something",
    "out": "test_a_plan_becomes_a_table",
    "processes": "test_chains_run_at_once",
    "dry_run": "test_a_dry_run_tells_steps_and_time_and_writes_nothing",
}
