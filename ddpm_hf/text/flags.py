"""The flags of text to image."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..common.arguments import (
    FIXED,
    FREE,
    ONE_OR_MORE,
    SHARE,
    HfArg,
    Need,
    Range,
    has_grids,
    synonyms,
)
from ..common.errors import UsageError
from ..data.flags import CAPTION_COLUMN
from ..models.flags import ON_THE_HUB
from ..objectives.names import LOSS_TYPES, LOSS_WEIGHTINGS, PREDICTION_TYPES

NUMBER = Range(lambda value: value >= 0, "a number of 0 or more")

# What other programs call these flags
MODEL = synonyms("""
--pretrained_model_name_or_path: model model_id model_name pretrained pretrained_model base_model checkpoint_path sd
--pretrained_model_name_or_path: pretrained_model_name model_name_or_path model_path pretrained_path
--text_encoder_name_or_path: text_encoder clip clip_model
--train_text_encoder: finetune_text_encoder train_clip
""")
CAPTIONS = synonyms("""
--caption_column: caption text_column prompt_column caption_key txt_column captions
--caption_dropout: p_uncond uncond_prob cond_drop_prob proportion_empty_prompts text_dropout cfg_dropout
--aspect_ratio_buckets: buckets bucketing enable_bucket aspect_ratio_bucketing
""")
OBJECTIVE = synonyms("""
--prediction_type: parameterization pred_type
--prediction_type v_prediction: v_prediction v_pred v_parameterization
--loss_type: loss loss_fn
--snr_gamma 5: min_snr
--snr_gamma: min_snr_gamma
--loss_weighting: weighting loss_weight weighting_scheme snr_weighting
--loss_weighting debiased: debiased debiased_estimation debiased_estimation_loss
--noise_offset: offset_noise
--dream_training: dream
""")
PROMPTS = synonyms("""
--validation_prompts: prompt prompts validation_prompt sample_prompts
--guidance_scale: cfg_scale guidance cfg
--num_inference_steps: inference_steps sampling_steps num_sampling_steps sampling_timesteps ddpm_num_inference_steps
""")


@dataclass
class TextModelFlags:
    """Flags of the networks."""

    title: ClassVar[str] = "Model"
    meanings: ClassVar[dict[str, str]] = MODEL
    needs: ClassVar[dict[str, Need]] = {
        "revision": ON_THE_HUB,
        "non_ema_revision": ON_THE_HUB,
        "train_text_encoder": Need(
            lambda run: run.pretrained_model_name_or_path or run.text_encoder_name_or_path,
            "changes nothing: a new text encoder is trained in any case",
        ),
        **dict.fromkeys(
            ("ddpm_num_steps", "ddpm_beta_schedule"),
            Need(
                lambda run: not run.pretrained_model_name_or_path, "has no effect: the diffusion is the checkpoint's"
            ),
        ),
    }

    pretrained_model_name_or_path: str | None = HfArg(
        resume=FIXED,
        default=None,
        help="A Stable Diffusion checkpoint (1.x, 2.x) on the Hub or on disk; without, from scratch.",
    )
    revision: str | None = HfArg(resume=FIXED, default=None, help="Branch, tag or commit of the checkpoint.")
    variant: str | None = HfArg(resume=FIXED, default=None, help="Variant of the checkpoint's files, such as fp16.")
    non_ema_revision: str | None = HfArg(
        resume=FIXED, default=None, help="Revision that holds the UNet's raw weights to train on."
    )
    model_config_name_or_path: str | None = HfArg(
        resume=FREE, default=None, help="From scratch: a UNet2DConditionModel's config, on the Hub or on disk."
    )
    text_encoder_name_or_path: str | None = HfArg(
        resume=FIXED,
        default=None,
        help="From scratch: a CLIPTextModel with its tokenizer to use, frozen, instead of a new one.",
    )
    train_text_encoder: bool = HfArg(resume=FIXED, default=False, help="Train the text encoder along with the UNet.")

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder learns too: on request, and where it is a new one."""
        return self.train_text_encoder or not (self.pretrained_model_name_or_path or self.text_encoder_name_or_path)

    def check(self, flags: Any) -> None:
        """Raise UsageError for flags that do not go with a checkpoint, or with a new model."""
        scratch = not self.pretrained_model_name_or_path
        if flags.streaming:
            self.check_streaming(flags, scratch)
        if scratch and flags.aspect_ratio_buckets and not flags.vae_name_or_path:
            raise UsageError("--aspect_ratio_buckets: give --vae_name_or_path; a new autoencoder trains on one size")
        for name in ("revision", "variant", "non_ema_revision"):
            if scratch and getattr(self, name) is not None:
                raise UsageError(f"--{name} is of the checkpoint: give --pretrained_model_name_or_path")
        if flags.label_column is not None:
            raise UsageError("--label_column is for train_unconditional.py; here captions say what is to be seen")
        for name in ("model_config_name_or_path", "text_encoder_name_or_path", "vae_name_or_path"):
            if not scratch and getattr(flags, name):
                raise UsageError(f"--{name} is for training from scratch; the checkpoint brings its own")

    def check_streaming(self, flags: Any, scratch: bool) -> None:
        """Raise UsageError for what a stream does not give."""
        if scratch and not flags.vae_name_or_path:
            raise UsageError("--streaming: a new autoencoder requires all images at once; give --vae_name_or_path")
        if flags.cache_latents:
            raise UsageError("--cache_latents requires all images at once; leave it or --streaming out")
        if scratch and not self.text_encoder_name_or_path:
            raise UsageError("--streaming: a tokenizer is fitted to all captions; give --text_encoder_name_or_path")
        if flags.aspect_ratio_buckets:
            raise UsageError("--aspect_ratio_buckets requires all images at once; leave it or --streaming out")


@dataclass
class CaptionFlags:
    """Flags of the captions."""

    title: ClassVar[str] = "Captions"
    meanings: ClassVar[dict[str, str]] = CAPTIONS

    caption_column: str = HfArg(default=CAPTION_COLUMN, help="The column of the captions: texts, or lists of them.")
    caption_dropout: float = HfArg(
        range=SHARE,
        default=0.0,
        help="Share of the captions to train without, for classifier-free guidance; 0.1 is usual.",
    )
    aspect_ratio_buckets: bool = HfArg(
        default=False,
        help="Crop each image to the nearest of several sizes of up to the resolution's area, at most twice as wide as"
        " high or the reverse; a batch holds one size. Needs an autoencoder that is trained already.",
    )


@dataclass
class TextObjectiveFlags:
    """Flags of what the model predicts, and of its loss."""

    title: ClassVar[str] = "Prediction and loss"
    meanings: ClassVar[dict[str, str]] = OBJECTIVE
    needs: ClassVar[dict[str, Need]] = {
        "dream_detail_preservation": Need(lambda run: run.dream_training, "has no effect without --dream_training")
    }

    prediction_type: str | None = HfArg(
        resume=FIXED, default=None, help=f"{', '.join(PREDICTION_TYPES)}; by default the checkpoint's, or epsilon."
    )
    loss_type: str = HfArg(default="l2", help=f"{', '.join(LOSS_TYPES)}.")
    loss_weighting: str | None = HfArg(default=None, help=f"{', '.join(LOSS_WEIGHTINGS)}.")
    snr_gamma: float | None = HfArg(
        default=None, help="γ of --loss_weighting, without which it is min_snr's; 5 is usual, 1 for p2."
    )
    noise_offset: float = HfArg(
        range=NUMBER, default=0.0, help="Noise shared by all of a channel, for dark and light images."
    )
    input_perturbation: float = HfArg(
        range=NUMBER, default=0.0, help="Perturb the noise that is added, not the one predicted; 0.1."
    )
    dream_training: bool = HfArg(default=False, help="DREAM: train on the model's own errors, with a second pass.")
    dream_detail_preservation: float = HfArg(
        range=NUMBER, default=1.0, help="DREAM's p: the higher, the more detail is kept."
    )

    def loss_options(self) -> dict[str, Any]:
        """What `training_losses` takes of them."""
        return {name: getattr(self, name) for name in ("loss_type", "loss_weighting", "snr_gamma")}

    def check(self, flags: Any) -> None:
        """Raise UsageError for an unknown name."""
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise UsageError(
                f"--prediction_type must be one of {', '.join(PREDICTION_TYPES)} (got {self.prediction_type!r})"
            )


@dataclass
class PromptFlags:
    """Flags of the grids."""

    title: ClassVar[str] = "Samples and logging"
    meanings: ClassVar[dict[str, str]] = PROMPTS
    needs: ClassVar[dict[str, Need]] = {
        "validation_prompts": Need(has_grids, "is not sampled: sample grids are turned off"),
        "num_inference_steps": Need(has_grids, "has no effect without sample grids"),
    }

    validation_prompts: list[str] = HfArg(  # noqa: RUF009
        resume=FREE,
        default_factory=list,
        help="Prompts of the grids that are sampled while training; by default some captions.",
    )
    guidance_scale: float | None = HfArg(
        range=NUMBER,
        resume=FREE,
        default=None,
        help="Classifier-free guidance scale of the grids, saved with the pipeline as its default; if omitted, the"
        " checkpoint's (7.5 for Stable Diffusion), or 3 from scratch.",
    )
    num_inference_steps: int = HfArg(
        range=ONE_OR_MORE, resume=FREE, default=50, help="Steps to sample the grids with."
    )


# Where Diffusers' script has other defaults than its unconditional one, and what `--help` says of them
OTHERWISE: dict[str, Any] = {
    "defaults": {
        "output_dir": "sd-model-finetuned", "image_interpolation_mode": "lanczos", "lr_scheduler": "constant",
        "adam_beta1": 0.9, "adam_weight_decay": 1e-2, "save_images_epochs": 5,
        "tracker_project_name": "text2image-fine-tune",
    },
    "helps": {
        "resolution": "512, or HEIGHTxWIDTH such as 512x768; by default the size of the checkpoint, else 512; from"
        " scratch 32.",
        "save_images_epochs": "Epochs between grids of the validation prompts; 0 turns them off.",
        "tracker_project_name": "The tracker's project.",
    },
    "spellings": {"save_images_epochs": ["--validation_epochs"]},
}  # fmt: skip
