"""What follows an optimizer step: figures, a held-out loss, pictures, a saved model, a checkpoint."""

from typing import NamedTuple

from .flags import GridFlags
from .plan import StepPlan
from .run import Run


class Due(NamedTuple):
    """What follows a step, by the flags."""

    end: bool  # the training's last step
    log: bool
    validate: bool
    evaluate: bool
    samples: bool
    model: bool
    checkpoint: bool
    snapshot: bool = False

    @classmethod
    def after(cls, step: int, run: Run, plan: StepPlan, evaluation_epochs: int = 0) -> "Due":
        """What follows a step of a training that can do all of it.

        Args:
            step: counted from 1.
            evaluation_epochs: between evaluations; 0 for none.
        """
        flags, end = run.flags, step == plan.total
        epoch, epoch_ends = plan.epoch_of(step - 1), end or step % plan.steps_per_epoch == 0
        return cls(
            end=end,
            log=end or step % flags.logging_steps == 0,
            validate=flags.validation_steps is not None and (end or step % flags.validation_steps == 0),
            evaluate=bool(evaluation_epochs) and epoch_ends and (end or epoch % evaluation_epochs == 0),
            samples=samples_due(run.grids, step, epoch, epoch_ends, end),
            model=epoch_ends and (end or epoch % flags.save_model_epochs == 0),
            checkpoint=end or step % flags.checkpointing_steps == 0,
            snapshot=flags.ema_snapshot_steps is not None and (end or step % flags.ema_snapshot_steps == 0),
        )

    def if_skipped(self) -> "Due":
        """What follows if the step was skipped: no figures, and no checkpoint or snapshot but the last."""
        return self._replace(log=False, checkpoint=self.end, snapshot=self.snapshot and self.end)


def samples_due(grids: GridFlags | None, step: int, epoch: int, epoch_ends: bool, end: bool) -> bool:
    """Whether pictures follow a step: at the end of training in any case, unless they are turned off."""
    if grids is None:
        return False
    if grids.save_images_steps:
        return end or step % grids.save_images_steps == 0
    every = grids.save_images_epochs
    return bool(every) and epoch_ends and (end or epoch % every == 0)
