"""What a plan file says, and the line and key of what it says wrongly."""

import pytest

from ddpm_hf.ablation.plan import read_plan
from ddpm_hf.common.errors import UsageError
from tests.support.ablations import write_plan

WHOLE = """\
title: A table
flags:
  num_epochs: 3
  use_ema: no
grid:
  loss_type: [l1, l2]
  schedule:
    short: {ddpm_num_steps: 100, ddpm_beta_schedule: cosine}
    long: {}
cells:
  alone: {num_epochs: 5}
seeds:
  others: [0]
  l2, long: [1, 2]
evaluate:
  metrics: [is, fid]
  features: [efficientnet-lite0, inception]
  num-samples: 100
published:
  source: a paper
  cells:
    l1, short: {fid: 1e1}
  real: {is: 4}
"""


def test_a_grid_multiplies_and_cells_add(tmp_path):
    """Else a table lacks rows, or a cell has the flags of another."""
    plan = read_plan(write_plan(tmp_path / "p.yaml", WHOLE))
    assert [cell.name for cell in plan.cells] == ["l1, short", "l1, long", "l2, short", "l2, long", "alone"]
    assert plan.axes == {"loss_type": ["l1", "l2"], "schedule": ["short", "long"]}
    short, alone = plan.cells[2], plan.cells[4]
    assert short.flags == {
        "num_epochs": "3", "use_ema": "no", "loss_type": "l2", "ddpm_num_steps": "100", "ddpm_beta_schedule": "cosine"
    }  # fmt: skip
    assert (short.seeds, plan.cells[3].seeds, alone.seeds) == ((0,), (1, 2), (0,))
    assert alone.flags == {"num_epochs": "5", "use_ema": "no"}
    assert plan.networks == ("efficientnet-lite0", "inception")
    assert plan.evaluate == {"metrics": ["is", "fid"], "num_samples": "100"}
    assert plan.published == {"l1, short": {"fid": 10.0}}
    assert plan.published_real == {"is": 4.0}


def test_changes_of_the_command_line_win_over_flags_and_not_over_axes(tmp_path):
    """Else --set does nothing, or makes all cells alike."""
    plan = read_plan(write_plan(tmp_path / "p.yaml", WHOLE), {"num_epochs": "9"})
    assert {cell.flags["num_epochs"] for cell in plan.cells} == {"9"}
    with pytest.raises(UsageError, match=r"--set loss_type=huber: the grid of .* varies it"):
        read_plan(tmp_path / "p.yaml", {"loss_type": "huber"})
    plan = read_plan(tmp_path / "p.yaml", {"evaluate.num_samples": "7", "real.split": "test"})
    assert plan.evaluate["num_samples"] == "7"
    assert plan.real == {"split": "test"}
    with pytest.raises(UsageError, match=r"--set grid\.x=1"):
        read_plan(tmp_path / "p.yaml", {"grid.x": "1"})


def test_labels_may_be_numbers(tmp_path):
    """Else widths such as 8 and 16 as labels end in a traceback."""
    text = "grid: {width: {8: {model_config_name_or_path: {a: 1, b: no}}, 1.5: {resolution: 8}}}"
    plan = read_plan(write_plan(tmp_path / "p.yaml", text))
    assert [cell.name for cell in plan.cells] == ["8", "1.5"]
    assert plan.document.typed["grid"]["width"]["8"]["model_config_name_or_path"] == {"a": 1, "b": False}


def test_real_images_require_metrics(tmp_path):
    """Else an ablation for likelihoods alone fails after its trainings."""
    with pytest.raises(UsageError, match="real: requires metrics"):
        read_plan(write_plan(tmp_path / "p.yaml", "evaluate: {metrics: none}\nreal: {split: test}"))


def test_a_plan_of_one_model_needs_no_grid(tmp_path):
    """Else the paper's single row cannot be one command."""
    (cell,) = read_plan(write_plan(tmp_path / "p.yaml", "flags: {num_epochs: 2}")).cells
    assert (cell.name, cell.seeds) == ("model", (0,))


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("flags: {a: 1}\ngird: {}", 2, "gird: unknown key; did you mean 'grid'?"),
        ("script: paint", 1, "script: must be one of train"),
        ("flags: 3", 1, "flags: must map names to values (got '3')"),
        ("flags: {a: 1}\nflags: {b: 1}", 2, "flags: is there twice"),
        ("grid:\n  loss_type: l1", 2, "grid.loss_type: must be a list"),
        ("grid:\n  loss_type: [l1, l1]", 2, "'l1' twice"),
        ("grid:\n  a: [[l1]]", 2, "grid.a.0: must be a text"),
        ("seeds: [a]", 1, "seeds: must be a list of whole numbers"),
        ("cells:\n  x: {a: 1}\nseeds:\n  y: [1]", 4, "seeds.y: unknown key"),
        ("grid: {a: [x]}\ncells: {x: {}}", 2, "cells.x: is the name of two cells"),
        ("evaluate: {features: 'classifier:{classifier}'}", 1, "requires the key classifier"),
        ("real: {split: test}", 1, "real: requires evaluate"),
        ("evaluate: {}\nreal: {splits: test}", 2, "real.splits: unknown key; did you mean 'split'?"),
        ("published: {cells: {model: {fid: 3}}}", 1, "published: must say its source"),
        ("published:\n  source: a\n  cells:\n    model: {fid: low}", 4, "published.cells.model.fid: must be a number"),
        ("published:\n  source: a\n  cells:\n    model: {fed: 3}", 4, "unknown key; did you mean 'fid'?"),
        ("published: {source: a, real: {FID: 3}}", 1, "published.real.FID: unknown key"),
        ("published: {source: a, cells: {modle: {fid: 3}}}", 1, "did you mean 'model'?"),
        ("flags: [", 1, "not YAML"),
        ("? [a]\n: b", 1, "a key that is not a text"),
        ("grid:\n" + "".join(f"  a{n}: [1, 2, 3, 4]\n" for n in range(9)), 6, "more than 1,000 cells"),
    ],
)
def test_a_mistake_is_found_by_its_line(tmp_path, text, line, says):
    """Else a long plan is read from its beginning to find what is wrong."""
    path = write_plan(tmp_path / "p.yaml", text)
    with pytest.raises(UsageError) as error:
        read_plan(path)
    assert str(error.value).startswith(f"{path}:{line}:")
    assert says in str(error.value)


@pytest.mark.parametrize("value", ["!!int ''", "!!bool maybe", "!!timestamp x"])
def test_a_value_that_its_tag_does_not_allow(tmp_path, value):
    """Else what the parser raises is a traceback."""
    with pytest.raises(UsageError, match="not YAML"):
        read_plan(write_plan(tmp_path / "p.yaml", f"flags: {{a: {value}}}"))


def test_aliases_do_not_make_a_small_file_endless(tmp_path):
    """Else ten lines of YAML take all memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(UsageError, match="values"):
        read_plan(write_plan(tmp_path / "p.yaml", "\n".join(lines)))
