"""Trackers."""

import importlib.util
import logging
from pathlib import Path

from accelerate.utils import gather_object

from ..common.errors import UsageError
from ..common.ownership import claim_files
from .flags import TrainingFlags
from .run import Run
from .setup.settings import public_settings


def start_trackers(run: Run, default_project: str) -> None:
    """Open the tracker, with the settings that it can show (scalars; no secrets).

    Raises:
        UsageError: it does not start, without a login for example.
    """
    config = run.flags
    if config.logger == "none":
        return
    logging.getLogger("torch.utils.tensorboard").setLevel(logging.ERROR)
    settings = {k: v for k, v in public_settings(run.settings).items() if isinstance(v, (int, float, str, bool))}
    project, reason = config.tracker_project_name or default_project, None
    before = log_files(config, project)
    try:
        run.accelerator.init_trackers(project, config=settings)
    except Exception as error:  # of whatever library
        reason = f"{error.__class__.__name__}: {' '.join(str(error).split())[:200]}"
    reasons = gather_object([reason])
    if any(reasons):
        reason = next(one for one in reasons if one)
        run.end_by_main(
            UsageError(f"--logger {config.logger} does not start ({reason}); mend that, or pass --logger none")
        )

    def claim():
        claim_files(config.output_dir, sorted(log_files(config, project) - before))

    run.must_write(claim, "the list of the run's files")


def log_files(config: TrainingFlags, project: str) -> set[str]:
    """The files in a tracker's folder for a project, where that lies within the output folder; relative to it."""
    folder = Path(config.output_dir).resolve()
    logs = (folder / config.logging_dir / project).resolve()
    if not logs.is_relative_to(folder):
        return set()
    return {path.relative_to(folder).as_posix() for path in logs.rglob("*") if path.is_file()}


def track_image(run: Run, name: str, image, step: int) -> None:
    """A PIL picture in whatever tracker there is."""
    import numpy as np

    def show(tracker):
        if tracker.name == "tensorboard":
            pixels = np.asarray(image.convert("RGB"))
            tracker.writer.add_image(name, pixels, step, dataformats="HWC")
        else:  # wandb and trackio share this interface
            module = importlib.import_module(tracker.name)
            tracker.log({name: module.Image(image)}, step=step)

    run.track(show)


def end_training(run: Run, last_lines: str) -> None:
    """Say the last lines; close the trackers, and the connection of the processes."""
    run.log(last_lines)
    run.track(lambda tracker: tracker.finish())
    run.accelerator.trackers.clear()
    run.accelerator.end_training()
