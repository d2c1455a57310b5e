"""Flags of the diffusion and its objective."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..common.arguments import (
    FIXED,
    FREE,
    NOT_NEGATIVE,
    ONE_OR_MORE,
    HfArg,
    Need,
    Range,
    has_grids,
    synonyms,
)
from ..common.errors import UsageError
from ..portable.schedules_ddpm_hf import BETA_SCHEDULES
from .names import (
    LOSS_TYPES,
    LOSS_WEIGHTINGS,
    OBJECTIVES,
    PREDICTION_TYPES,
    TIMESTEP_SAMPLERS,
    TRAINED_BETAS,
    VARIANCE_TYPES,
)

SCHEDULE = synonyms("""
--ddpm_num_steps: timesteps num_timesteps t diffusion_steps num_diffusion_steps num_train_timesteps n_timesteps
--ddpm_num_steps: ddpm_timesteps diffusion_timesteps num_diffusion_timesteps noise_steps
--ddpm_beta_schedule: beta_schedule noise_schedule schedule beta_schedule_type
--rescale_betas_zero_snr: zero_snr rescale_betas zero_terminal_snr
""")
OBJECTIVE = synonyms("""
--variance_type learned_range --objective hybrid: learn_sigma learned_variance learned_sigma learn_variance
--variance_type fixed_small: sigma_small
--variance_type: var_type variance
--prediction_type: parameterization pred_type predict target
--prediction_type sample: predict_xstart predict_x0 pred_x0
--prediction_type v_prediction: v_prediction v_pred v_parameterization
--objective vlb: use_kl rescale_learned_sigmas
--loss_type: loss loss_fn criterion
--timestep_sampler: schedule_sampler
--snr_gamma 5: min_snr min_snr_loss_weight
--snr_gamma: min_snr_gamma
--loss_weighting: weighting loss_weight weighting_scheme snr_weighting
--loss_weighting soft_min_snr: soft_min_snr
--loss_weighting p2: p2 p2_weighting
--loss_weighting p2 --snr_gamma: p2_gamma p2_loss_weight_gamma
--loss_weighting debiased: debiased debiased_estimation debiased_estimation_loss
--ddpm_num_inference_steps: sampling_timesteps num_inference_steps inference_steps sampling_steps timestep_respacing
--ddpm_num_inference_steps: num_sampling_steps sample_timesteps
""")


WEIGHED = ("objective", "loss_type", "loss_weighting", "snr_gamma", "vlb_weight")  # what `training_losses` takes


@dataclass
class ScheduleFlags:
    """Which forward process."""

    title: ClassVar[str] = "Diffusion"
    meanings: ClassVar[dict[str, str]] = SCHEDULE

    ddpm_num_steps: int = HfArg(
        range=Range(lambda value: 1 <= value <= 1_000_000, "from 1 to 1,000,000"),
        resume=FIXED,
        default=1000,
        help="T, the diffusion's timesteps.",
    )
    ddpm_beta_schedule: str = HfArg(resume=FIXED, default="linear", help=f"{', '.join(BETA_SCHEDULES)}.")
    rescale_betas_zero_snr: bool = HfArg(
        resume=FIXED,
        default=False,
        help="Zero terminal SNR: x_T is pure noise. Requires --prediction_type v_prediction or sample.",
    )

    def check(self, flags: Any) -> None:
        """Raise UsageError for an unknown schedule."""
        # a trained model may have a schedule of its own
        trained = self.ddpm_beta_schedule == TRAINED_BETAS and getattr(flags, "pretrained_model_name_or_path", None)
        if self.ddpm_beta_schedule not in BETA_SCHEDULES and not trained:
            known = ", ".join(BETA_SCHEDULES)
            raise UsageError(f"--ddpm_beta_schedule {self.ddpm_beta_schedule!r}: must be one of {known}")


@dataclass
class ObjectiveFlags:
    """What the model predicts, and by which loss it learns to."""

    title: ClassVar[str] = "Prediction and loss"
    meanings: ClassVar[dict[str, str]] = OBJECTIVE
    needs: ClassVar[dict[str, Need]] = {
        "vlb_weight": Need(lambda run: run.objective == "hybrid", "has no effect with --objective {objective}"),
        "ddpm_num_inference_steps": Need(has_grids, "has no effect without sample grids"),
    }

    ddpm_num_inference_steps: int = HfArg(
        range=ONE_OR_MORE, resume=FREE, default=1000, help="Steps to sample the grids with."
    )
    prediction_type: str = HfArg(
        resume=FIXED, default="epsilon", help=f"What the model outputs: {', '.join(PREDICTION_TYPES)}."
    )
    variance_type: str = HfArg(default="fixed_small", help=f"Of the reverse step: {', '.join(VARIANCE_TYPES)}.")
    objective: str = HfArg(default="simple", help=f"{', '.join(OBJECTIVES)}; hybrid trains a learned variance too.")
    loss_type: str = HfArg(default="l2", help=f"Of the simple objective: {', '.join(LOSS_TYPES)}.")
    loss_weighting: str | None = HfArg(default=None, help=f"Of the simple objective: {', '.join(LOSS_WEIGHTINGS)}.")
    snr_gamma: float | None = HfArg(
        default=None, help="γ of --loss_weighting, without which it is min_snr's; 5 is usual, 1 for p2."
    )
    vlb_weight: float = HfArg(range=NOT_NEGATIVE, default=0.001, help="The bound's weight in the hybrid objective.")
    timestep_sampler: str = HfArg(
        resume=FIXED, default="uniform", help=f"{', '.join(TIMESTEP_SAMPLERS)}; the second is for --objective vlb."
    )

    def loss_options(self) -> dict[str, Any]:
        """What `training_losses` takes of them."""
        return {name: getattr(self, name) for name in WEIGHED}

    def check(self, flags: Any) -> None:
        """Raise UsageError for an unknown name."""
        choices = {
            "prediction_type": PREDICTION_TYPES,
            "variance_type": VARIANCE_TYPES,
            "timestep_sampler": TIMESTEP_SAMPLERS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"--{name} must be one of {', '.join(known)} (got {getattr(self, name)!r})")
