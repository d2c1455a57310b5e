"""Trackers."""

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from ..common.errors import UsageError, one_line
from ..common.ownership import claim_files
from .flags import TrainingFlags
from .run import Run
from .setup.settings import public_settings

if TYPE_CHECKING:
    from PIL import Image


def start_trackers(run: Run, default_project: str) -> None:
    """Open the tracker, with the settings that it can show (scalars; no secrets).

    Raises:
        UsageError: it does not start, without a login for example.
    """
    flags = run.flags
    if flags.logger == "none":
        return
    logging.getLogger("torch.utils.tensorboard").setLevel(logging.ERROR)
    settings = {k: v for k, v in public_settings(run.settings).items() if isinstance(v, (int, float, str, bool))}
    project, reason = flags.tracker_project_name or default_project, None
    before = log_files(flags, project)
    try:
        run.accelerator.init_trackers(project, config=settings)
    except Exception as error:  # of whatever library
        reason = f"{error.__class__.__name__}: {one_line(error, 200)}"
    reasons = gather_object([reason])
    if any(reasons):
        reason = next(one for one in reasons if one)
        run.end_by_main(
            UsageError(f"--logger {flags.logger} does not start ({reason}); mend that, or pass --logger none")
        )

    def claim() -> None:
        claim_files(flags.output_dir, sorted(log_files(flags, project) - before))

    run.must_write(claim, "the list of the run's files")


def log_files(flags: TrainingFlags, project: str) -> set[str]:
    """The files in a tracker's folder for a project, where that lies within the output folder; relative to it."""
    folder = Path(flags.output_dir).resolve()
    logs = (folder / flags.logging_dir / project).resolve()
    if not logs.is_relative_to(folder):
        return set()
    return {path.relative_to(folder).as_posix() for path in logs.rglob("*") if path.is_file()}


def track_image(run: Run, name: str, image: "Image.Image", step: int) -> None:
    """A PIL picture in whatever tracker there is."""
    import numpy as np

    def show(tracker: Any) -> None:
        if tracker.name == "tensorboard":
            pixels = np.asarray(image.convert("RGB"))
            tracker.writer.add_image(name, pixels, step, dataformats="HWC")
        else:  # wandb and trackio share this interface
            module = importlib.import_module(tracker.name)
            tracker.log({name: module.Image(image)}, step=step)

    run.track(show)
