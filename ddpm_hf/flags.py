"""The flags of model and diffusion, and what they build: a UNet, and a scheduler whose objective can train."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .data.flags import DataFlags
from .models import MODEL_PRESETS, build_unet, preset_unet_config, smallest_sample_side, stock_unet_defaults
from .names import BETA_SCHEDULES, LOSS_TYPES, OBJECTIVES, PREDICTION_TYPES, TIMESTEP_SAMPLERS, VARIANCE_TYPES
from .pretrained import (
    TRAINED_BETAS,
    changed_scheduler,
    check_channels,
    read_source,
    trained_scheduler,
    trained_settings,
)
from .sources import Source
from .training.config import FIXED, FREE, SHORTER_TRAINING, HfArg, TrainingConfig, UsageError, has_grids, parse_layers
from .training.meanings import names_elsewhere
from .training.needs import Need

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    from .portable.scheduling_ddpm_hf import DDPMScheduler

# What other programs call these flags
UNET = names_elsewhere("""
--model_preset: preset arch architecture model model_name network unet
--model_config_name_or_path: unet_config model_config config_name_or_path
--model_preset or --model_config_name_or_path (a UNet2DModel config): num_channels model_channels base_channels dim
--model_preset or --model_config_name_or_path (a UNet2DModel config): dim_mults channel_mult ch_mult num_res_blocks
--model_preset or --model_config_name_or_path (a UNet2DModel config): attention_resolutions num_heads attn_resolutions
--model_preset or --model_config_name_or_path (a UNet2DModel config): num_head_channels attn_heads attn_dim_head
--model_preset or --model_config_name_or_path (a UNet2DModel config): dropout block_out_channels layers_per_block
--model_preset or --model_config_name_or_path (a UNet2DModel config): use_scale_shift_norm resblock_updown full_attn
--model_preset or --model_config_name_or_path (a UNet2DModel config): attention_head_dim norm_num_groups
""")
SCHEDULE = names_elsewhere("""
--ddpm_num_steps: timesteps num_timesteps t diffusion_steps num_diffusion_steps num_train_timesteps n_timesteps
--ddpm_num_steps: ddpm_timesteps diffusion_timesteps num_diffusion_timesteps noise_steps
--ddpm_beta_schedule: beta_schedule noise_schedule schedule beta_schedule_type
--rescale_betas_zero_snr: zero_snr rescale_betas zero_terminal_snr
""")
OBJECTIVE = names_elsewhere("""
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
--ddpm_num_inference_steps: sampling_timesteps num_inference_steps inference_steps sampling_steps timestep_respacing
--ddpm_num_inference_steps: num_sampling_steps sample_timesteps
""")
START_FROM = names_elsewhere("""
--pretrained_model_name_or_path: pretrained pretrained_model init_from finetune fine_tune pretrained_unet
--pretrained_model_name_or_path: unet_name_or_path pretrained_path load_from init_checkpoint pretrained_model_path
--pretrained_model_name_or_path: model_name_or_path base_model init_checkpoint_path checkpoint_path
""")
LATENTS = names_elsewhere("""
--vae_name_or_path: vae autoencoder vae_path first_stage pretrained_vae_model_name_or_path
--cache_latents: precompute_latents latent_cache
""")

# The peer's model where neither preset nor config is named, so that its command lines train the same here
DEFAULT_UNET = {
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}


@dataclass
class UNetFlags:
    """Which UNet."""

    title: ClassVar[str] = "Model"
    meanings: ClassVar[dict[str, str]] = UNET

    model_preset: str | None = HfArg(
        instead_of="model_config_name_or_path",
        resume=FREE,
        default=None,
        help=f"A UNet by name, with its paper's recipe: {', '.join(MODEL_PRESETS)}.",
    )
    model_config_name_or_path: str | None = HfArg(
        instead_of="model_preset",
        resume=FREE,
        default=None,
        help="A UNet2DModel's config on the Hub or on disk; trained from scratch.",
    )

    def check_unet(self) -> None:
        """Raise UsageError for two models."""
        if self.model_preset and self.model_config_name_or_path:
            raise UsageError("--model_preset and --model_config_name_or_path name two models; give one of them")


ON_THE_HUB = Need(
    lambda run: not os.path.isdir(run.pretrained_model_name_or_path or ""),
    "has no effect on {pretrained_model_name_or_path}, which is a folder on this machine",
)


@dataclass
class StartFlags:
    """Which trained weights to start from."""

    title: ClassVar[str] = "Starting from trained weights"
    meanings: ClassVar[dict[str, str]] = START_FROM
    needs: ClassVar[dict[str, Need]] = {"revision": ON_THE_HUB}

    pretrained_model_name_or_path: str | None = HfArg(
        resume=FIXED,
        default=None,
        help="Start from trained weights: the folder of a pipeline, of a checkpoint-N (its averaged weights where it"
        " has them) or of a UNet2DModel, or a model on the Hub. Its diffusion, size and autoencoder are the defaults.",
    )
    revision: str | None = HfArg(resume=FIXED, default=None, help="Branch, tag or commit of that model on the Hub.")
    variant: str | None = HfArg(resume=FIXED, default=None, help="Variant of its weights, such as fp16 or non_ema.")
    subfolder: str | None = HfArg(
        resume=FIXED, default=None, help="The folder within it: checkpoint-500/unet, for example."
    )

    def check_start(self) -> None:
        """Raise UsageError for two models, and for what only concerns one to start from."""
        if self.pretrained_model_name_or_path is None:
            for name in ("revision", "variant", "subfolder"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name} is of the model to start from: give --pretrained_model_name_or_path")
            return
        if self.model_config_name_or_path is not None:
            raise UsageError(
                "--model_config_name_or_path and --pretrained_model_name_or_path name two models; give one of them"
            )


@dataclass
class ScheduleFlags:
    """Which forward process."""

    title: ClassVar[str] = "Diffusion"
    meanings: ClassVar[dict[str, str]] = SCHEDULE

    ddpm_num_steps: int = HfArg(resume=FIXED, default=1000, help="T, the diffusion's timesteps.")
    ddpm_beta_schedule: str = HfArg(resume=FIXED, default="linear", help=f"{', '.join(BETA_SCHEDULES)}.")
    rescale_betas_zero_snr: bool = HfArg(
        resume=FIXED,
        default=False,
        help="Zero terminal SNR: x_T is pure noise. Requires --prediction_type v_prediction or sample.",
    )

    def check_schedule(self) -> None:
        """Raise UsageError for an unknown name or a number out of range."""
        trained = getattr(self, "pretrained_model_name_or_path", None) and self.ddpm_beta_schedule == TRAINED_BETAS
        if self.ddpm_beta_schedule not in BETA_SCHEDULES and not trained:
            known = ", ".join(BETA_SCHEDULES)
            raise UsageError(f"--ddpm_beta_schedule {self.ddpm_beta_schedule!r}: must be one of {known}")
        if not 1 <= self.ddpm_num_steps <= 1_000_000:
            raise UsageError(f"--ddpm_num_steps {self.ddpm_num_steps}: must be from 1 to 1,000,000")


@dataclass
class ObjectiveFlags:
    """What the model predicts, and by which loss it learns to."""

    title: ClassVar[str] = "Prediction and loss"
    meanings: ClassVar[dict[str, str]] = OBJECTIVE
    needs: ClassVar[dict[str, Need]] = {
        "vlb_weight": Need(lambda run: run.objective == "hybrid", "has no effect with --objective {objective}"),
        "ddpm_num_inference_steps": Need(has_grids, "has no effect without sample grids"),
    }

    ddpm_num_inference_steps: int = HfArg(resume=FREE, default=1000, help="Steps to sample the grids with.")
    prediction_type: str = HfArg(
        resume=FIXED, default="epsilon", help=f"What the model outputs: {', '.join(PREDICTION_TYPES)}."
    )
    variance_type: str = HfArg(default="fixed_small", help=f"Of the reverse step: {', '.join(VARIANCE_TYPES)}.")
    objective: str = HfArg(default="simple", help=f"{', '.join(OBJECTIVES)}; hybrid trains a learned variance too.")
    loss_type: str = HfArg(default="l2", help=f"Of the simple objective: {', '.join(LOSS_TYPES)}.")
    snr_gamma: float | None = HfArg(default=None, help="Min-SNR weighting of the simple objective; 5 is usual.")
    vlb_weight: float = HfArg(default=0.001, help="The bound's weight in the hybrid objective.")
    timestep_sampler: str = HfArg(
        resume=FIXED, default="uniform", help=f"{', '.join(TIMESTEP_SAMPLERS)}; the second is for --objective vlb."
    )

    def check_objective_flags(self) -> None:
        """Raise UsageError for an unknown name or a number out of range."""
        choices = {
            "prediction_type": PREDICTION_TYPES,
            "variance_type": VARIANCE_TYPES,
            "timestep_sampler": TIMESTEP_SAMPLERS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"--{name} must be one of {', '.join(known)} (got {getattr(self, name)!r})")
        if self.ddpm_num_inference_steps < 1:
            raise UsageError(f"--ddpm_num_inference_steps {self.ddpm_num_inference_steps}: must be 1 or more")
        if not self.vlb_weight >= 0:
            raise UsageError(f"--vlb_weight {self.vlb_weight}: must be 0 or more")


@dataclass
class LatentFlags:
    """Flags of the latents."""

    title: ClassVar[str] = "Latents"
    meanings: ClassVar[dict[str, str]] = LATENTS

    vae_name_or_path: str | None = HfArg(
        resume=FIXED,
        default=None,
        help="An AutoencoderKL, or a pipeline with one, on the Hub or on disk: diffuse in its latents.",
    )
    cache_latents: bool = HfArg(
        resume=FREE,
        default=False,
        help="Encode images, and captions where the text encoder is frozen, once and for all.",
    )

    def cache_folder(self) -> Path:
        """Where that is kept: below --cache_dir, for all runs, or in the run's folder."""
        return Path(self.cache_dir) / "ddpm_hf" if self.cache_dir else Path(self.output_dir) / "cache"


AUTOENCODER_FOLDER = "autoencoder"  # of its run, within that of the model that it is for


@dataclass
class AutoencoderFlags(LatentFlags):
    """Flags of the autoencoder, where a script trains one."""

    title: ClassVar[str] = "Autoencoder"
    needs: ClassVar[dict[str, Need]] = dict.fromkeys(
        ("vae_train_steps", "vae_learning_rate", "vae_kl_weight", "vae_latent_channels", "vae_widths"),
        Need(
            lambda run: not (run.vae_name_or_path or run.pretrained_model_name_or_path),
            "has no effect: no autoencoder is trained, that of --vae_name_or_path or of the checkpoint is used",
        ),
    )

    vae_train_steps: int = HfArg(
        resume=FIXED, default=1500, help="Steps to train a new autoencoder for, where there is none."
    )
    vae_learning_rate: float = HfArg(resume=FIXED, default=1e-3, help="Its learning rate, decaying as a cosine.")
    vae_kl_weight: float = HfArg(
        resume=FIXED, default=1e-4, help="Weight of the latents' KL to a unit Gaussian, added to the L1 loss."
    )
    vae_latent_channels: int = HfArg(resume=FIXED, default=4, help="Channels of its latents.")
    vae_widths: str = HfArg(
        resume=FIXED, default="16,32,64", help="Channels at each of its levels; each but the first halves."
    )

    def widths(self) -> tuple[int, ...]:
        """The numbers of --vae_widths."""
        parts = self.vae_widths.split(",")
        widths = [int(part) if part.strip().isdecimal() and len(part) < 6 else 0 for part in parts]
        if len(widths) > 8 or not all(0 < width <= 4096 and width % 8 == 0 for width in widths):
            raise UsageError(
                f"--vae_widths {self.vae_widths}: give up to 8 multiples of 8, each up to 4096, such as 16,32,64"
            )
        return tuple(widths)

    def check_autoencoder(self) -> None:
        """Raise UsageError for a value out of range."""
        self.widths()
        for name in ("vae_train_steps", "vae_latent_channels", "vae_learning_rate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} {getattr(self, name)}: must be more than 0")
        if self.vae_latent_channels > 1024:
            raise UsageError(f"--vae_latent_channels {self.vae_latent_channels}: must be 1024 or less")
        if not self.vae_kl_weight >= 0:
            raise UsageError(f"--vae_kl_weight {self.vae_kl_weight}: must be 0 or more")


# The recipe for the embedded digits: a grid worth looking at after four minutes on two cores
EMBEDDED_RECIPE = {
    "model_preset": "small-16",
    "train_batch_size": 64,
    "num_epochs": 28,
    "learning_rate": 2e-3,
    "lr_warmup_steps": 100,
    "adam_beta1": 0.9,
    "adam_weight_decay": 0.0,
    "use_ema": True,
    "ema_max_decay": 0.995,
    "eval_batch_size": 64,
    "ddpm_num_inference_steps": 200,
    "save_images_epochs": 7,
    "validation_steps": 441,
    "checkpoints_total_limit": 2,
}


def weaker_layers(config) -> list[tuple[str, dict[str, Any]]]:
    """What decides where command line and --config say nothing: the embedded recipe, the preset, the trained model.

    Raises:
        UsageError: no such preset, or no model to start from.
    """
    embedded = {}
    if config.embedded:
        from .training.setup import cpu_has_bf16

        embedded = {**EMBEDDED_RECIPE, "mixed_precision": "bf16" if cpu_has_bf16() else "no"}
    start = getattr(config, "pretrained_model_name_or_path", None)
    if config.model_config_name_or_path or start:
        embedded.pop("model_preset", None)
    preset = config.model_preset or embedded.get("model_preset")
    if preset is not None and preset not in MODEL_PRESETS:
        raise UsageError(f"--model_preset must be one of {', '.join(MODEL_PRESETS)} (got {preset!r})")
    recipe = MODEL_PRESETS[preset].recipe if preset else {}
    trained = trained_settings(read_source(config)) if start and not _goes_on(config) else {}
    return [("the embedded recipe", embedded), (f"the preset {preset}", recipe), (f"the model {start}", trained)]


def _goes_on(config: TrainingConfig) -> bool:
    """Whether a run is resumed from a checkpoint, which then decides all that the model to start from did."""
    from .training.checkpointing import settings_of

    wanted = config.resume_from_checkpoint
    return wanted is not None and bool(settings_of(Path(config.output_dir), wanted))


def settle_resolution(
    data: DataFlags, sample_size: int | Sequence[int] | None, factor: int, usual: str, trained: bool = False
) -> str | None:
    """Set a --resolution that was not given to the size of the model, or to the usual one.

    Args:
        sample_size: of the UNet, as its config has it: a side, (height, width), or None where nothing is known.
        factor: pixels for each of these in each direction: the autoencoder's, or 1.
        usual: where the model has no size yet.
        trained: whether the model has weights, which learned images of that size.

    Returns:
        A line to log where the size is another than the user expects.

    Raises:
        UsageError: a sample size that is not one.
    """
    own = None
    if sample_size is not None:
        sides = [sample_size] * 2 if isinstance(sample_size, int) else sample_size
        if not (isinstance(sides, (list, tuple)) and len(sides) == 2 and all(type(side) is int for side in sides)):
            raise UsageError(f"the model's config has sample_size {sample_size!r}, which is not a size")
        height, width = (side * factor for side in sides)
        own = str(height) if height == width else f"{height}x{width}"
    if data.resolution is None:
        data.resolution = own or usual
        return None if data.resolution == usual else f"resolution {own}, the size of the model"
    if trained and own and data.size() != (height, width):
        return f"warning: --resolution {data.resolution}: the model was trained at {own} (--resolution {own})"
    return None


def model_size(
    flags: UNetFlags, vae=None, source: Source | None = None, token: str | None = None
) -> tuple[int | Sequence[int] | None, int]:
    """The sample size that the flags name a model of, None where they name none; and the pixels for each of these.

    Raises:
        UsageError: no config there.
    """
    if source is not None:
        return source.size, 1
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    if flags.model_config_name_or_path:
        return _read_unet_config(flags.model_config_name_or_path, token).get("sample_size"), factor
    if flags.model_preset:
        return MODEL_PRESETS[flags.model_preset].unet["sample_size"], factor
    return (None if vae is None else vae.config.sample_size), 1


def advice_on_a_cpu(flags: UNetFlags, sample_size: int | Sequence[int]) -> str:
    """What to do where training this UNet takes too long on a CPU: a small preset that fits its images, if any."""
    sides = [sample_size] if isinstance(sample_size, int) else list(sample_size)
    small = [name for name in MODEL_PRESETS if name.startswith("small-")]  # smallest first
    fitting = [
        name for name in small if all(side % smallest_sample_side(MODEL_PRESETS[name].unet) == 0 for side in sides)
    ]
    large_enough = [name for name in fitting if MODEL_PRESETS[name].unet["sample_size"] >= max(sides)]
    trained = getattr(flags, "pretrained_model_name_or_path", None)  # a preset would not start from its weights
    if trained or flags.model_preset in small or not fitting:
        return SHORTER_TRAINING
    return f"try --model_preset {(large_enough or fitting[::-1])[0]}; or {SHORTER_TRAINING}"


CLASSIFIER_PROGRAM = "ddpm-hf train-classifier"
CLASSIFIER_DESCRIPTION = """Train a classifier of noised images, whose gradient guides sampling towards a class.

    ddpm-hf train-classifier --train_data_dir photos --label_column label --output_dir classifier
    ddpm-hf sample MODEL --class cat --classifier classifier

The images and the noise schedule must be those of the model that it is to guide."""


# Flags that the training scripts have
NO_CLASSIFIER = names_elsewhere("""
a classifier is no pipeline, upload its folder with `hf upload`: push_to_hub hub_model_id hub_private_repo push upload
a classifier is no pipeline, upload its folder with `hf upload`: hub_strategy hub_revision hub_license hub
a classifier has one kind of weights, averaged with --use_ema: save_variants
a classifier samples no grids: save_images_epochs save_images_steps validation_epochs validation_prompts
a classifier samples no grids: ddpm_num_inference_steps num_inference_steps guidance_scale
a classifier uses torch's attention, which is memory-efficient too: enable_xformers_memory_efficient_attention xformers
a classifier predicts classes by cross-entropy: prediction_type variance_type objective loss_type snr_gamma vlb_weight
a classifier sees each image with its class, at uniform timesteps: class_dropout timestep_sampler class_balanced
a classifier reads pixels, not latents: vae_name_or_path cache_latents
a classifier is trained from scratch: pretrained_model_name_or_path
""")


@dataclass
class ClassifierConfig(DataFlags, UNetFlags, ScheduleFlags, TrainingConfig):
    """Flags of `ddpm-hf train-classifier`: those of data, schedule and training that the scripts have too."""

    absent: ClassVar[dict[str, str]] = NO_CLASSIFIER

    def check(self) -> None:
        """Raise UsageError or DataError for a value out of range or a combination that cannot work."""
        super().check()
        self.check_data()
        self.check_unet()
        self.check_schedule()
        if self.label_column is None:
            self.label_column = "label"
        if self.streaming and self.max_train_steps is None:
            raise UsageError("--streaming has no epochs to count: give --max_train_steps")


def parse_classifier_flags(argv: list[str]) -> ClassifierConfig:
    """The settings of `ddpm-hf train-classifier` for a command line; a mistake is one line and exit code 2."""
    return parse_layers(
        ClassifierConfig, argv, weaker_layers, prog=CLASSIFIER_PROGRAM, description=CLASSIFIER_DESCRIPTION
    )


def unet_arguments(
    flags: UNetFlags, data: DataFlags, vae=None, source: Source | None = None, token: str | None = None
) -> dict[str, Any]:
    """The UNet's arguments, fitted to the images' size and channels, or those of their latents.

    Args:
        source: the trained model to start from.
        token: for a private config on the Hub.

    Raises:
        UsageError: a resolution that the UNet cannot halve, or a channel mismatch.
    """
    height, width = data.size()
    if vae is not None:
        if data.channels not in (None, vae.config.in_channels):
            raise UsageError(f"--channels {data.channels}: the autoencoder reads images of {vae.config.in_channels}")
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise UsageError(f"--resolution {data.resolution}: the autoencoder requires multiples of {factor}")
        height, width = height // factor, width // factor
    if source is not None:
        chosen = {**source.unet, "num_class_embeds": None}  # classes are the data's: --label_column
        channels = data.channels or chosen["in_channels"] if vae is None else vae.config.latent_channels
        check_channels(source, channels, "images" if vae is None else "latents")
    elif flags.model_config_name_or_path:
        chosen = dict(_read_unet_config(flags.model_config_name_or_path, token))
        for key in ("num_class_embeds", "class_embed_type"):  # classes are the data's: --label_column
            chosen.pop(key, None)
        own = chosen.get("in_channels", 3)
        channels = vae.config.latent_channels if vae is not None else data.channels or own
        if own != channels:
            raise UsageError(
                f"--model_config_name_or_path has {own} input channels and the"
                f" {'images' if vae is None else 'latents'} {channels}"
                + (
                    f"; pass --channels {own}, or use a config of {channels}"
                    if vae is None
                    else "; use a config of as many"
                )
            )
    else:
        chosen = preset_unet_config(flags.model_preset) if flags.model_preset else dict(DEFAULT_UNET)
        channels = data.channels or (1 if data.embedded else 3)
        channels = channels if vae is None else vae.config.latent_channels
    if vae is None and data.embedded and channels > 4:
        raise UsageError(f"the UNet has {channels} channels, and the embedded digits become up to 4; name your data")
    chosen |= {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
    }
    step = smallest_sample_side(chosen)
    if height % step or width % step:
        raise UsageError(
            f"--resolution {data.resolution}: this UNet halves the {'image' if vae is None else 'latent'}"
            f" {int(math.log2(step))} times, so both sides"
            f" must be multiples of {step * (1 if vae is None else factor)}"
        )
    return chosen


def _read_unet_config(name_or_path: str, token: str | None = None) -> dict[str, Any]:
    from diffusers import UNet2DModel

    try:
        loaded = UNet2DModel.load_config(name_or_path, token=token)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--model_config_name_or_path {name_or_path}: no UNet2DModel config there ({reason})"
        ) from error
    if loaded.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UsageError(f"--model_config_name_or_path {name_or_path}: a {loaded['_class_name']}, not a UNet2DModel")
    return {**stock_unet_defaults(), **{name: value for name, value in loaded.items() if not name.startswith("_")}}


def make_unet(arguments: dict[str, Any], variance_type: str, classes: int | None, config):
    """The UNet, initialised from the seed, with the flags that concern its execution applied.

    Args:
        variance_type: a learned variance doubles the output's channels.
        classes: embeddings to make for classes, with the null class; None for none.
        config: the run's `PipelineConfig`.
    """
    import torch

    from .portable.scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES

    learned = variance_type in LEARNED_VARIANCE_TYPES
    arguments = {**arguments, "out_channels": arguments["in_channels"] * (2 if learned else 1)}
    if classes is not None:
        arguments["num_class_embeds"] = classes
    torch.manual_seed(config.seed)
    try:
        model = build_unet(arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        use_xformers(model)
    return model


def use_xformers(model) -> None:
    """Attention by xFormers.

    Raises:
        UsageError: it is not installed, or has no GPU.
    """
    try:
        model.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as error:
        raise UsageError(
            "--enable_xformers_memory_efficient_attention: xFormers is not installed or has no GPU; leave the flag"
            " out, torch's own attention is memory-efficient"
        ) from error


def make_scheduler(
    schedule: ScheduleFlags, objective: ObjectiveFlags, latents: bool = False, source: Source | None = None
) -> "DDPMScheduler":
    """The diffusion that the flags describe; latents have no range to clip to, and no bytes whose likelihood to bound.

    Args:
        source: the trained model to start from: its diffusion, but for what the flags say of it.

    Raises:
        UsageError: a combination that cannot train or sample.
    """
    from .objectives import check_objective
    from .portable.scheduling_ddpm_hf import DDPMScheduler

    if latents and objective.objective != "simple":
        raise UsageError(
            f"--objective {objective.objective} bounds the likelihood of bytes, and latents are none; use simple"
        )
    trained = source and trained_scheduler(source)
    if trained:
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
        check_objective(scheduler, objective.objective, objective.loss_type, objective.snr_gamma)
        scheduler.check_invertible(range(schedule.ddpm_num_steps))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return scheduler
