"""The settings that a preset, the embedded data or a trained model decide where the user says nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.arguments import SHORTER_TRAINING
from ..common.errors import UsageError
from .flags import StartFlags
from .presets import MODEL_PRESETS
from .pretrained import read_source, trained_settings

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


def weaker_layers(flags: Any) -> list[tuple[str, dict[str, Any]]]:
    """What decides where command line and --config say nothing: the embedded recipe, the preset, the trained model.

    Args:
        flags: all of a program's, each by its name.

    Raises:
        UsageError: no such preset, or no model to start from.
    """
    embedded = {}
    if flags.embedded:
        from ..common.machine import cpu_has_bf16

        embedded = {**EMBEDDED_RECIPE, "mixed_precision": "bf16" if cpu_has_bf16() else "no"}
    start = getattr(flags, "pretrained_model_name_or_path", None)
    if flags.model_config_name_or_path or start:
        embedded.pop("model_preset", None)
    preset = flags.model_preset or embedded.get("model_preset")
    if preset is not None and preset not in MODEL_PRESETS:
        raise UsageError(f"--model_preset must be one of {', '.join(MODEL_PRESETS)} (got {preset!r})")
    # the embedded recipe takes its preset's UNet alone
    recipe = MODEL_PRESETS[flags.model_preset].recipe if flags.model_preset else {}
    trained = {}
    if start and not _goes_on(flags):
        trained = trained_settings(read_source(flags[StartFlags], flags.hub_token))
    return [("the embedded recipe", embedded), (f"the preset {preset}", recipe), (f"the model {start}", trained)]


def _goes_on(flags: Any) -> bool:
    """Whether a run is resumed from a checkpoint, which then decides all that the model to start from did."""
    from ..common.checkpoints import recorded_settings

    wanted = flags.resume_from_checkpoint
    return wanted is not None and bool(recorded_settings(Path(flags.output_dir), wanted))


def advice_on_a_cpu(preset: str | None, sample_size: int | Sequence[int], trained: bool = False) -> str:
    """What to do where training this UNet takes too long on a CPU: a small preset that fits its images, if any.

    Args:
        preset: that of the UNet, if it has one.
        trained: whether the UNet starts from trained weights, from which no preset would start.
    """
    from ..portable.sampling_ddpm_hf import downscaling

    sides = [sample_size] if isinstance(sample_size, int) else list(sample_size)
    small = [name for name in MODEL_PRESETS if name.startswith("small-")]  # smallest first
    steps = {name: downscaling(MODEL_PRESETS[name].unet["block_out_channels"]) for name in small}
    fitting = [name for name in small if not any(side % steps[name] for side in sides)]
    large_enough = [name for name in fitting if MODEL_PRESETS[name].unet["sample_size"] >= max(sides)]
    if trained or preset in small or not fitting:
        return SHORTER_TRAINING
    return f"try --model_preset {(large_enough or fitting[::-1])[0]}; or {SHORTER_TRAINING}"
