"""`ddpm-hf ablate`: the runs of a plan, their evaluation, and one table of them."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.errors import UsageError
from ..common.files import expand_home
from .exits import reports_stop
from .sample import option
from .train import ROOT

if TYPE_CHECKING:
    from ..ablation.plan import Plan
    from ..ablation.running import Failure, Launcher
    from ..ablation.tasks import CellRun, Chain

WHAT, HOW, WHERE = "Which cells", "How to run", "Where to"
EPILOG = """Examples:

ddpm-hf ablate benchmarks/plans/fashion-mnist-quick.yaml --dry-run

ddpm-hf ablate plan.yaml --set train_data_dir=photos --processes 2

ddpm-hf ablate plan.yaml --only "cosine, l2"

The same command goes on after it was stopped, and runs what a changed plan changes."""


def ablate(
    plan: Annotated[Path, typer.Argument(help="A YAML file: the cells, their flags, how they are evaluated.")],
    set_: Annotated[
        list[str] | None,
        option(WHAT, "FLAG=VALUE for all cells, over the plan's, or such as evaluate.steps=50; repeat it.", "--set"),
    ] = None,
    only: Annotated[list[str] | None, option(WHAT, "Only the cell of this name; repeat it for several.")] = None,
    processes: Annotated[
        int, option(HOW, "Runs at once; they share the cores, and take one GPU each.", min=1, max=256)
    ] = 1,
    dry_run: Annotated[
        bool, option(HOW, "Check the plan and its first batches; print cells, steps and time.", "--dry-run")
    ] = False,
    table: Annotated[bool, option(HOW, "Only print and write the table of what is done.", "--table")] = False,
    out: Annotated[
        Path | None, option(WHERE, "The folder for runs, table.csv, table.json and report.html. Default: of the plan.")
    ] = None,
) -> None:
    """Train and evaluate every cell of a plan, with its seeds, and write one table of them.

    Each run is resumed where it was stopped, and what is done is not run again. Runs whose settings a changed plan
    changes are run again beside the earlier ones, which stay.
    """
    from ..ablation.page import check_out
    from ..ablation.plan import read_plan

    changes = read_changes(set_ or [])
    what = read_plan(plan, changes)
    unknown = [name for name in only or () if name not in [cell.name for cell in what.cells]]
    if unknown:
        names = ", ".join(repr(cell.name) for cell in what.cells)
        raise UsageError(f"--only {unknown[0]!r}: must be one of {names}")
    folder = out or Path(f"ablation-{plan.stem}")
    check_out(folder)
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            everything = Ablation(what, folder, Path(scratch), processes)
            typer.echo(everything.rehearsal(only, Path(scratch)))
        return
    everything = Ablation(what, folder, folder, processes)
    for line in everything.changed():
        typer.echo(line, err=True)
    failures: list[Failure] = []
    if not table:
        with reports_stop(lambda: f"what is done lies in {folder}; the same command goes on from there"):
            failures = everything.run(only)
    typer.echo(everything.report())
    for failure in failures:
        typer.echo(f"failed: {failure.title} ({failure.reason}); see {failure.log}", err=True)
    if failures:
        raise typer.Exit(1)


def read_changes(words: list[str]) -> dict[str, str]:
    """The flags of --set.

    Raises:
        UsageError: one without a value.
    """
    changes = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip("-"):
            raise UsageError(f"--set {word}: give FLAG=VALUE, such as --set num_epochs=20")
        changes[name.lstrip("-").replace("-", "_")] = expand_home(value)
    return changes


class Ablation:
    """A plan with all that it stands for.

    Args:
        plan: the plan.
        out: the folder of its runs.
        unets: where the UNets that the plan describes are written: `out`, or a scratch folder.
        processes: runs at once.

    Raises:
        UsageError: a flag or option that a script refuses; the message names its line.
    """

    def __init__(self, plan: "Plan", out: Path, unets: Path, processes: int):
        from ..ablation.flags import CellFlags
        from ..ablation.tasks import Evaluations, cell_runs, classifier_chain, content_key
        from .ablation_options import (
            check_diffusion,
            check_evaluation,
            evaluation_words,
            load_script,
            training_dataset,
        )
        from .classifier_flags import CLASSIFIER

        self.plan, self.out, self.processes = plan, out, processes
        self.script = load_script(plan.script)
        self.flags = CellFlags(self.script.PROGRAM, unets, check_diffusion)
        self.flags.check(plan)
        check_evaluation(plan)
        self.first: list[Chain] = []
        classifier = plan.classifier
        classifier_flags = CellFlags(CLASSIFIER, unets)
        if isinstance(classifier, dict):
            classifier_flags.check_mapping(plan, ("classifier",), classifier)
        self.flags.write_unets([(cell.flags, cell.paths) for cell in plan.cells], plan.document.typed)
        if isinstance(classifier, dict):
            paths: dict[str, tuple[str, ...]] = {name: ("classifier", name) for name in classifier}
            classifier_flags.write_unets([(classifier, paths)], plan.document.typed)
            chain, classifier = classifier_chain(classifier, classifier_flags, out)
            self.first.append(chain)
        key = self.first[0].folder.name if self.first else content_key(classifier)
        self.of_first_cell = self.flags.parse(self.flags.words(plan.cells[0].flags))
        dataset = training_dataset(plan, self.of_first_cell)
        self.evaluations = Evaluations(plan, evaluation_words, classifier, key, dataset)
        self.runs = cell_runs(plan, self.flags, self.evaluations, out)
        self.real: Chain | None = None

    def changed(self) -> list[str]:
        """Which runs a changed plan runs again, and why; the earlier ones stay."""
        from ..ablation.tasks import earlier_folders, what_changed

        lines = []
        for run in self.runs:
            before = [] if run.tasks[0].done else earlier_folders(run, self.runs, self.out)
            if before:
                lines.append(
                    f"{run.title}: runs again, for its settings changed ({what_changed(run, before[-1])}); the earlier"
                    f" run stays in {before[-1]}"
                )
        return lines

    def run(self, only: list[str] | None) -> "list[Failure]":
        """Run what is not done, and write the table after each run."""
        from ..ablation.running import run_chains

        self.out.mkdir(parents=True, exist_ok=True)
        launcher = self.launcher()
        failures = run_chains(self.first, 1, launcher)
        if failures:  # without the classifier, nothing can be evaluated by it
            return failures
        self.prepare_real()
        chains: list[Chain] = [*([self.real] if self.real else []), *self.chosen(only)]
        return run_chains(chains, self.processes, launcher, lambda chain: self.write(page=False))

    def chosen(self, only: list[str] | None) -> "list[CellRun]":
        """The runs of these cells, or of all."""
        return [run for run in self.runs if not only or (run.cell is not None and run.cell.name in only)]

    def prepare_real(self) -> None:
        """Write the real images that are scored, and say how."""
        from ..ablation.tasks import REAL, real_chain
        from .ablation_options import image_shape, write_real_images

        if self.plan.real is None:
            return
        images, count = write_real_images(self.plan, self.of_first_cell, self.out / REAL)
        _, height, width = image_shape(self.plan, self.of_first_cell)
        self.real = real_chain(images, count, self.evaluations, ["--resolution", f"{height}x{width}"])

    def launcher(self) -> "Launcher":
        """What starts the commands."""
        import sys

        import torch

        from ..ablation.forking import ForkingLauncher
        from ..ablation.running import Launcher

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        arguments = (ROOT, self.plan.launch, self.processes, gpus, lambda line: typer.echo(line, err=True))
        if sys.platform == "linux" and not gpus and not self.plan.launch:
            return ForkingLauncher(*arguments, call=self.call)
        return Launcher(*arguments)

    def call(self, words: list[str]) -> int:
        """Run a command in this process, a copy of the one that was started; return its exit code."""
        import os

        import torch

        from . import app
        from .exits import run

        if "OMP_NUM_THREADS" in os.environ:  # torch read it when it was imported
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if words[0] != self.plan.script:
            return run(app, words)
        try:
            self.script.main(words[1:])
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0

    def write(self, page: bool = True) -> Any:
        """Write the table of what is done, and return it.

        Args:
            page: whether to make the report anew.
        """
        from ..ablation.page import write_results
        from ..ablation.table import make_table

        found = make_table(self.plan, self.runs, self.real)
        write_results(self.out, found, self.runs, page)
        return found

    def report(self) -> str:
        """The table for the terminal; all forms of it are written."""
        from ..ablation.page import CSV, JSON, REPORT
        from ..ablation.table import as_text

        if self.real is None:
            self.prepare_real()
        found = self.write()
        files = ", ".join(str(self.out / name) for name in (CSV, JSON, REPORT))
        return f"{as_text(found)}\n\n{files}"

    def rehearsal(self, only: list[str] | None, scratch: Path) -> str:
        """What --dry-run prints: cells, steps and time, from each kind of cell's own --dry_run."""
        from ..ablation.estimate import as_text, estimate
        from .ablation_options import network_calls

        launcher, runs = self.launcher(), self.chosen(only)

        def rehearse(run: "CellRun") -> str:
            typer.echo(f"measuring {run.title}", err=True)
            return launcher.rehearse(run.tasks[0], scratch / "model")

        def calls(run: "CellRun") -> int:
            return network_calls(self.plan, int(run.settings.get("ddpm_num_steps", 1000)))

        return as_text(runs, estimate(runs, rehearse, calls), self.processes)
