"""How many steps a plan has, and how long it takes, from a few measured steps of each kind of cell."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..evaluation.report import in_columns
from ..training.reporting import duration
from .flags import digest
from .tasks import CellRun

# Settings that change what is learned and not how long a step takes
FREE_OF_COST = re.compile(
    r"seed|ddpm_beta_schedule|ddpm_num_steps|rescale_betas_zero_snr|loss_type|prediction_type|snr_gamma|vlb_weight"
    r"|learning_rate|lr_\w+|adam_\w+|ema_\w+|class_dropout|timestep_sampler|max_grad_norm"
)
FORWARD_SHARE = 1 / 3  # of a training step: the backward pass costs two


class Cost(NamedTuple):
    """Of one run of a cell.

    Args:
        steps: of the training.
        step: seconds of one.
        batch: images of one.
        calls: of the network in the evaluation.
    """

    steps: int
    step: float
    batch: int
    calls: int

    @property
    def training(self) -> float:
        """Seconds."""
        return self.steps * self.step

    @property
    def evaluation(self) -> float:
        """Seconds, without features."""
        return self.calls * self.step / self.batch * FORWARD_SHARE


def kind_of(run: CellRun) -> str:
    """Runs of one kind have as many steps, and take as long for each."""
    return digest({name: value for name, value in run.settings.items() if not FREE_OF_COST.fullmatch(name)})


def read_rehearsal(text: str) -> tuple[int, float, int]:
    """The steps, the seconds of one, and the images of one, that a script's --dry_run printed.

    Raises:
        ValueError: it printed something else.
    """
    pace = re.search(r"^ *time  ([\d.e+-]+) s a step, .* for ([\d,]+) steps", text, re.M)
    batch = re.search(r"^ *batch  .* = ([\d,]+)$", text, re.M)
    if pace is None or batch is None:
        raise ValueError("the dry run of a cell printed no time of a step")
    return int(pace[2].replace(",", "")), float(pace[1]), int(batch[1].replace(",", ""))


def estimate(
    runs: Sequence[CellRun], rehearse: Callable[[CellRun], str], calls: Callable[[CellRun], int]
) -> dict[str, Cost]:
    """The cost of each run, by its title.

    Args:
        rehearse: runs a script's --dry_run, and returns what it printed; called once for each kind of run.
        calls: of the network in a run's evaluation.
    """
    known: dict[str, tuple[int, float, int]] = {}
    costs = {}
    for run in runs:
        kind = kind_of(run)
        if kind not in known:
            known[kind] = read_rehearsal(rehearse(run))
        costs[run.title] = Cost(*known[kind], calls(run))
    return costs


def as_text(runs: Sequence[CellRun], costs: dict[str, Cost], processes: int) -> str:
    """A line for each run, and the sum of what is not done."""
    rows = [("", "steps", "a step", "training", "evaluation", "")]
    total = 0.0
    for run in runs:
        cost = costs[run.title]
        state = "done" if run.done else "evaluation left" if run.tasks[0].done else ""
        seconds = cost.evaluation + (0 if run.tasks[0].done else cost.training)
        total += 0 if run.done else seconds
        rows.append(
            (
                run.title,
                f"{cost.steps:,}",
                f"{cost.step:.2g} s",
                duration(cost.training),
                duration(cost.evaluation),
                state,
            )
        )
    several = f", {processes} at once: {duration(total / processes)}" if processes > 1 else ""
    steps = sum(costs[run.title].steps for run in runs)
    return (
        f"{in_columns(rows)}\n{len(runs)} runs, {steps:,} steps; left: {duration(total)}{several}, features, pictures"
        " and files on top. Sampling is estimated from the time of a step."
    )
