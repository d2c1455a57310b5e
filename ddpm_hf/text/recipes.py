"""The settings of a small text-to-image model from scratch, where the user says nothing."""

from typing import Any

from ..training.flags import Flags

# Where no checkpoint is named: a small model from scratch
SCRATCH_RECIPE = {
    "output_dir": "text2image",
    "center_crop": True,
    "cache_latents": True,
    "caption_dropout": 0.1,
    "guidance_scale": 3.0,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 200,
    "adam_weight_decay": 0.0,
    "train_batch_size": 64,
    "eval_batch_size": 64,
    "use_ema": True,
    "ema_max_decay": 0.998,
}
# Where no dataset is named either: the digits
DIGITS_RECIPE = {
    "num_epochs": 32,
    "vae_train_steps": 750,
    "save_images_epochs": 16,
    "checkpoints_total_limit": 2,
}


def weaker_layers(flags: Flags) -> list[tuple[str, dict[str, Any]]]:
    """What decides where command line and --config say nothing."""
    if flags.pretrained_model_name_or_path:
        return []
    recipe = SCRATCH_RECIPE | ({"cache_latents": False} if flags.streaming else {})
    layers: list[tuple[str, dict[str, Any]]] = [("the recipe from scratch", recipe)]
    if flags.embedded:
        from ..common.machine import cpu_has_bf16

        half = {"mixed_precision": "bf16" if cpu_has_bf16() else "no"}
        layers.append(("the embedded recipe", {**DIGITS_RECIPE, **half}))
    return layers
