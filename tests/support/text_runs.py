"""How runs of train_text2image.py start, for the tests of text to image."""

import train_text2image
from tests.support import runs
from tests.support.runs import Run

DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


SMALL = {
    "train_data_dir": "{shop}/pictures", "resolution": 16, "seed": 3, "train_batch_size": 4, "eval_batch_size": 2,
    "max_train_steps": 6, "learning_rate": 1e-3, "lr_warmup_steps": 2, "num_inference_steps": 2, "cpu_threads": 1,
    "logger": "none", "logging_steps": 1, "validation_prompts": "a red square",
}  # fmt: skip


SCRATCH = {
    **SMALL, "model_config_name_or_path": "{shop}/unet", "vae_widths": "8,16", "vae_train_steps": 4,
}  # fmt: skip


CHECKPOINT = {**SMALL, "pretrained_model_name_or_path": "{shop}/stable"}


START = {"scratch": SCRATCH, "checkpoint": CHECKPOINT}
EMA = {"use_ema": True, "ema_max_decay": 0.8}


def text_command(start: str, shop, folder, **flags) -> list[str]:
    """The command line of a small run, from scratch or from a checkpoint."""
    return runs.command(shop, folder, START[start], **flags)


def train_text(start: str, shop, folder, **flags) -> Run:
    """Such a run, which must succeed."""
    return runs.train(shop, folder, START[start], train_text2image.main, **flags)
