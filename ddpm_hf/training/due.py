"""What follows an optimizer step: figures, a held-out loss, pictures, a saved model, a checkpoint."""

from typing import NamedTuple

from ..common.arguments import has_grids
from .flags import TrainingConfig
from .plan import StepPlan


class Due(NamedTuple):
    """What follows a step, by the flags."""

    end: bool  # the training's last step
    log: bool
    validate: bool
    samples: bool
    model: bool
    checkpoint: bool

    @classmethod
    def after(cls, step: int, config: TrainingConfig, plan: StepPlan) -> "Due":
        """What follows a step of a training that can do all of it.

        Args:
            step: counted from 1.
        """
        end = step == plan.total
        epoch, epoch_ends = plan.epoch_of(step - 1), end or step % plan.steps_per_epoch == 0
        return cls(
            end=end,
            log=end or step % config.logging_steps == 0,
            validate=bool(config.validation_steps) and (end or step % config.validation_steps == 0),
            samples=samples_due(config, step, epoch, epoch_ends, end),
            model=epoch_ends and (end or epoch % config.save_model_epochs == 0),
            checkpoint=end or step % config.checkpointing_steps == 0,
        )

    def if_skipped(self) -> "Due":
        """What follows if the step was skipped: no figures, and no checkpoint but the last."""
        return self._replace(log=False, checkpoint=self.end)


def samples_due(config: TrainingConfig, step: int, epoch: int, epoch_ends: bool, end: bool) -> bool:
    """Whether pictures follow a step: at the end of training in any case, unless they are turned off."""
    if not has_grids(config):
        return False
    if config.save_images_steps:
        return end or step % config.save_images_steps == 0
    return epoch_ends and (end or epoch % config.save_images_epochs == 0)
