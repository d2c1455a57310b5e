"""The plans in benchmarks/plans: flags of every cell and options of every evaluation are those of the scripts."""

import pytest

from ddpm_hf.ablation.flags import CellFlags
from ddpm_hf.ablation.plan import read_plan
from ddpm_hf.cli.ablate import Ablation
from ddpm_hf.evaluation.metrics import METRICS
from tests.support import ROOT

PLANS = sorted((ROOT / "benchmarks/plans").glob("*.yaml"))


def test_the_plans_are_there():
    """Else the tests below look at nothing."""
    assert {"fashion-mnist", "fashion-mnist-quick", "table2-quick", "ddpm-cifar10"} <= {path.stem for path in PLANS}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_is_valid(path, tmp_path, monkeypatch):
    """Else its first cell, or its last after a week, ends with a usage error."""
    monkeypatch.chdir(tmp_path)
    plan = read_plan(path)
    everything = Ablation(plan, tmp_path / "out", tmp_path, 1)
    assert isinstance(everything.flags, CellFlags)
    assert len({run.folder for run in everything.runs}) == sum(len(cell.seeds) for cell in plan.cells)
    settings = [str(run.settings) for run in everything.runs]
    assert len(set(settings)) == len(plan.cells), "two cells have the same settings"
    for figures in (*plan.published.values(), plan.published_real):
        assert set(figures) <= {*METRICS, "bits/dim"}
        assert set(figures) <= {*(plan.evaluate or {})["metrics"], "bits/dim"}
    text = path.read_text(encoding="utf-8")
    assert f"ddpm-hf ablate benchmarks/plans/{path.name}" in text.partition("title:")[0]
