"""The diffusion that the flags describe."""

from typing import TYPE_CHECKING

from ..common.errors import UsageError
from ..objectives.flags import ObjectiveFlags, ScheduleFlags
from .pretrained import changed_scheduler, trained_scheduler, trained_settings
from .sources import Source

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    from ..portable.scheduling_ddpm_hf import DDPMScheduler


def make_scheduler(
    schedule: ScheduleFlags, objective: ObjectiveFlags, latents: bool = False, source: Source | None = None
) -> "DDPMScheduler":
    """The diffusion that the flags describe; latents have no range to clip to, and no bytes whose likelihood to bound.

    Args:
        source: the trained model to start from: its diffusion, but for what the flags say of it.

    Raises:
        UsageError: a combination that cannot train or sample.
    """
    from ..objectives.losses import check_objective
    from ..portable.scheduling_ddpm_hf import DDPMScheduler

    if latents and objective.objective != "simple":
        raise UsageError(
            f"--objective {objective.objective} bounds the likelihood of bytes, and latents are none; use simple"
        )
    trained = None if source is None else trained_scheduler(source)
    if source is not None and trained is not None:
        scheduler = changed_scheduler(trained, trained_settings(source), {**vars(schedule), **vars(objective)})
    else:
        scheduler = DDPMScheduler(
            clip_sample=not latents,
            num_train_timesteps=schedule.ddpm_num_steps,
            beta_schedule=schedule.ddpm_beta_schedule,
            prediction_type=objective.prediction_type,
            variance_type=objective.variance_type,
            rescale_betas_zero_snr=schedule.rescale_betas_zero_snr,
        )
    try:
        weighting = objective.loss_type, objective.snr_gamma, objective.loss_weighting
        check_objective(scheduler, objective.objective, *weighting)
        scheduler.check_invertible(range(schedule.ddpm_num_steps))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return scheduler


def terminal_snr_warning(scheduler: "DDPMScheduler", schedule: ScheduleFlags) -> str | None:
    """A warning where x_T still shows the image: sampling starts from pure noise, which is then the wrong place."""
    left = float(scheduler.exact_tables.alphas_cumprod[-1])
    if left <= 0.01:
        return None
    return (
        f"warning: {schedule.ddpm_beta_schedule} with --ddpm_num_steps {schedule.ddpm_num_steps} leaves"
        f" ᾱ_T = {left:.2f} of the image in x_T; use more steps, --ddpm_beta_schedule cosine,"
        " or --rescale_betas_zero_snr with --prediction_type v_prediction"
    )
