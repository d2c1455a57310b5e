"""The flags that every training script has, each declared once, here or in the script's class that extends this."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..common.arguments import (
    FIXED,
    FREE,
    SECRET_FLAGS,
    START,
    HfArg,
    Need,
    check_license,
    check_token,
    check_word,
    has_grids,
)
from ..common.errors import UsageError
from .meanings import ATTENTION, GRIDS, PUBLISHING, TRAINING

# Whole numbers are less than 2^31, and these are smaller: more would take the machine down
MOST = {"cpu_threads": 1024, "dataloader_num_workers": 1024, "eval_batch_size": 65536}
VARIANTS = ("fp16", "non_ema")  # of the weights, in addition to the pipeline's
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass
class RunFlags:
    """Flags of the run: its settings' file, its folder, its seed."""

    title: ClassVar[str] = "Run"

    config: str | None = HfArg(
        resume=START,
        default=None,
        help="A YAML or JSON file that sets any of these flags; the command line wins over it.",
    )
    dry_run: bool = HfArg(
        resume=START,
        default=False,
        help="Check all that a run checks before it starts, the first batch included; print what would run, and stop.",
    )

    output_dir: str = HfArg(
        resume=START,
        default="ddpm-model-64",
        help="Where the pipeline, its pictures, metrics.jsonl and the checkpoints go. All paths below are within it.",
    )
    overwrite_output_dir: bool = HfArg(
        resume=START,
        default=False,
        help="Train anew in the folder of an earlier run, which is removed once this one has its first checkpoint.",
    )
    seed: int | None = HfArg(
        resume=FIXED,
        default=None,
        help="Random seed. If omitted, one is chosen, logged and saved with the run.",
    )


@dataclass
class StepFlags:
    """Flags of the training's length and batches."""

    title: ClassVar[str] = "Training"
    needs: ClassVar[dict[str, Need]] = {
        "num_epochs": Need(
            lambda run: run.max_train_steps is None, "has no effect with --max_train_steps {max_train_steps}"
        ),
        "eval_batch_size": Need(  # it is also the batch in which the latents of a new autoencoder are measured
            lambda run: run.validation_steps or has_grids(run) or hasattr(run, "vae_train_steps"),
            "has no effect without sample grids and without --validation_steps",
        ),
    }

    train_batch_size: int = HfArg(default=16, help="Samples a step and process, before accumulation.")
    eval_batch_size: int = HfArg(
        resume=FREE, default=16, help="Images in a sample grid; also the batch of the validation."
    )
    gradient_accumulation_steps: int = HfArg(default=1, help="Batches that are added up for one optimizer step.")
    dataloader_num_workers: int = HfArg(
        resume=FREE,
        default=0,
        help="Processes that decode images; 0 decodes in the main one. Of no use where the data is cached.",
    )
    num_epochs: int = HfArg(
        instead_of="max_train_steps",
        resume=FREE,
        default=100,
        aliases=["--num_train_epochs"],
        help="Times to go through the data.",
    )
    max_train_steps: int | None = HfArg(
        instead_of="num_epochs", resume=FREE, default=None, help="Optimizer steps in all; overrides --num_epochs."
    )

    max_train_hours: float | None = HfArg(
        resume=FREE,
        default=None,
        help="After so many hours, counted from the start and with sampling and saving, save a checkpoint and end"
        " (exit code 0). Leave time for the step and the saving that come last.",
    )


@dataclass
class OptimizerFlags:
    """Flags of the optimizer and its learning rate."""

    title: ClassVar[str] = "Optimizer"
    needs: ClassVar[dict[str, Need]] = {
        "lr_warmup_steps": Need(
            lambda run: run.lr_scheduler != "constant",
            "has no effect with --lr_scheduler constant; constant_with_warmup has a warm-up",
        )
    }

    learning_rate: float = HfArg(default=1e-4, help="Peak learning rate.")
    scale_lr: bool = HfArg(
        default=False, help="Multiply the learning rate by the processes, the batch size and the accumulation steps."
    )
    lr_scheduler: str = HfArg(
        default="cosine",
        help=f"{', '.join(LR_SCHEDULERS)}.",
    )
    lr_warmup_steps: int = HfArg(default=500, help="Optimizer steps over which the learning rate rises.")
    adam_beta1: float = HfArg(default=0.95, help="AdamW's first decay rate.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW's second decay rate.")
    adam_weight_decay: float = HfArg(default=1e-6, help="AdamW's weight decay.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW's epsilon.")
    use_8bit_adam: bool = HfArg(
        resume=FIXED, default=False, help="Adam with 8-bit moments, from bitsandbytes: less memory."
    )
    max_grad_norm: float = HfArg(default=1.0, help="Clip the gradient's norm to this; 0 does not clip.")
    max_nonfinite_steps: int = HfArg(
        resume=FREE,
        default=10,
        help="Stop after this many steps in a row whose loss or gradient is NaN or infinite (each is skipped).",
    )


@dataclass
class EMAFlags:
    """Flags of the exponential moving average of the weights."""

    title: ClassVar[str] = "EMA"
    needs: ClassVar[dict[str, Need]] = {
        **dict.fromkeys(
            ("ema_inv_gamma", "ema_power", "ema_max_decay", "ema_min_decay", "foreach_ema"),
            Need(lambda run: run.use_ema, "has no effect without --use_ema"),
        ),
        "offload_ema": Need(
            lambda run: run.use_ema and run.device == "cuda", "has no effect without --use_ema and a CUDA GPU"
        ),
    }

    use_ema: bool = HfArg(
        resume=FIXED,
        default=False,
        help="Keep an exponential moving average of the weights: it is sampled, validated and saved.",
    )
    ema_inv_gamma: float = HfArg(default=1.0, help="EMA warm-up: decay = 1 - (1 + step/inv_gamma)^-power.")
    ema_power: float = HfArg(default=0.75, help="EMA warm-up's power.")
    ema_max_decay: float = HfArg(default=0.9999, help="The EMA's decay after its warm-up.")
    ema_min_decay: float = HfArg(
        default=0.0, help="Minimum EMA decay; if equal to --ema_max_decay, the decay is constant."
    )

    foreach_ema: bool = HfArg(resume=FREE, default=True, help="Update the EMA in a few fused operations.")
    offload_ema: bool = HfArg(
        resume=FREE, default=False, help="Keep the EMA in the CPU's pinned memory: less memory on a GPU."
    )


@dataclass
class HardwareFlags:
    """Flags of speed, memory and hardware."""

    title: ClassVar[str] = "Speed and memory"
    needs: ClassVar[dict[str, Need]] = {
        "allow_tf32": Need(lambda run: run.device == "cuda", "has no effect without a CUDA GPU")
    }

    mixed_precision: Literal["no", "fp16", "bf16"] = HfArg(
        default="no", help="Autocast the model to half precision; bf16 works on recent CPUs too."
    )
    allow_tf32: bool = HfArg(default=False, help="TF32 matrix products on Ampere GPUs and later.")
    acceleration: Literal["auto", "compile", "none"] = HfArg(
        default="auto",
        help="How the UNet is executed; its gradients are checked first. auto: CUDA graphs on a GPU, attention by size"
        " on a CPU. compile: also compiles its blocks, which takes minutes. none: as Diffusers does.",
    )
    compile: bool = HfArg(
        resume=FREE,
        default=False,
        help="torch.compile the whole model (needs a C++ compiler or a GPU), without --acceleration.",
    )
    gradient_checkpointing: bool = HfArg(
        resume=FREE, default=False, help="Recompute activations in the backward pass: less memory."
    )
    cpu_threads: int | None = HfArg(
        default=None, help="torch's threads; by default the machine's cores divided by the processes on it."
    )
    local_rank: int = HfArg(resume=START, default=-1, help="Set by old launchers; LOCAL_RANK in the environment wins.")


@dataclass
class CheckpointFlags:
    """Flags of the checkpoints."""

    title: ClassVar[str] = "Checkpoints"

    checkpointing_steps: int = HfArg(
        resume=FREE, default=500, help="Optimizer steps between checkpoints (checkpoint-N/)."
    )
    checkpoints_total_limit: int | None = HfArg(
        resume=FREE, default=None, help="Keep this many checkpoints; the oldest go once the new one is safe."
    )
    resume_from_checkpoint: str | None = HfArg(
        resume=START,
        default=None,
        help="checkpoint-N, a path, or latest: go on from there, exactly as if never stopped.",
    )


@dataclass
class LoggingFlags:
    """Flags of pictures, figures and trackers."""

    title: ClassVar[str] = "Samples and logging"
    needs: ClassVar[dict[str, Need]] = {
        "logging_dir": Need(
            lambda run: run.logger == "tensorboard", "has no effect with --logger {logger}; it is for tensorboard"
        ),
        "tracker_project_name": Need(lambda run: run.logger != "none", "has no effect with --logger none"),
    }

    save_model_epochs: int = HfArg(resume=FREE, default=10, help="Epochs between saves of the whole pipeline.")
    validation_steps: int | None = HfArg(
        resume=FREE,
        default=None,
        help="Optimizer steps between held-out losses (with the EMA weights where there are any).",
    )
    logging_steps: int = HfArg(
        resume=FREE, default=10, help="Optimizer steps between lines of metrics.jsonl and tracker points."
    )
    logger: Literal["tensorboard", "wandb", "trackio", "none"] = HfArg(
        resume=FREE,
        default="tensorboard",
        aliases=["--report_to"],
        help="Tracker; metrics.jsonl is written in any case.",
    )
    logging_dir: str = HfArg(resume=FREE, default="logs", help="The tracker's folder.")
    tracker_project_name: str | None = HfArg(
        resume=FREE, default=None, help="The tracker's project; by default the script's name."
    )


USES_OF_THE_TOKEN = (
    "push_to_hub", "dataset_name", "pretrained_model_name_or_path", "model_config_name_or_path", "vae_name_or_path",
    "text_encoder_name_or_path",
)  # fmt: skip


@dataclass
class HubFlags:
    """Flags of access to the Hub."""

    title: ClassVar[str] = "Hugging Face Hub"
    needs: ClassVar[dict[str, Need]] = {
        "hub_token": Need(
            lambda run: any(getattr(run, name, None) for name in USES_OF_THE_TOKEN),
            "has no effect: nothing is read from the Hub, as by --dataset_name, or uploaded to it",
        )
    }

    hub_token: str | None = HfArg(
        resume=FREE,
        default=None,
        help="Token for private datasets and models, and for uploads; by default your login (hf auth login).",
    )


@dataclass
class TrainingConfig(
    RunFlags, StepFlags, OptimizerFlags, EMAFlags, HardwareFlags, LoggingFlags, CheckpointFlags, HubFlags
):
    """Flags of the loop, the optimizer, checkpoints and tracking; `--help` groups them in the order of the bases."""

    meanings: ClassVar[dict[str, str]] = TRAINING
    given: ClassVar[frozenset[str]] = frozenset()  # of an instance: what the command line or --config sets

    def check(self) -> None:
        """Raise UsageError for a value out of range."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in SECRET_FLAGS:
                check_token(each.name, value)
            elif isinstance(value, str):
                check_word(each.name, value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{each.name} {value}: must be a finite number")
            elif isinstance(value, int) and each.name != "seed" and value > MOST.get(each.name, 2**31 - 1):
                raise UsageError(f"--{each.name} {value}: must be {MOST.get(each.name, 2**31 - 1)} or less")
        positive = [
            "train_batch_size", "eval_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps",
            "max_train_hours", "learning_rate", "adam_epsilon", "ema_inv_gamma", "ema_power", "checkpointing_steps",
            "checkpoints_total_limit", "save_model_epochs", "validation_steps", "logging_steps", "cpu_threads",
            "max_nonfinite_steps",
        ]  # fmt: skip
        not_negative = ["dataloader_num_workers", "lr_warmup_steps", "adam_weight_decay", "max_grad_norm", "seed"]
        self.check_numbers(positive, not_negative)
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise UsageError(f"--lr_scheduler must be one of {', '.join(LR_SCHEDULERS)} (got {self.lr_scheduler!r})")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay", "ema_min_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: must be at least 0 and less than 1")
        if self.ema_min_decay > self.ema_max_decay:
            raise UsageError(f"--ema_min_decay {self.ema_min_decay} is above --ema_max_decay {self.ema_max_decay}")
        if self.seed is not None and self.seed >= 2**63:
            raise UsageError(f"--seed {self.seed}: must be less than 2^63")

    def check_numbers(self, positive: Iterable[str], not_negative: Iterable[str]) -> None:
        """Raise UsageError for one of these flags whose number is too small; None is left out."""
        for name in (*positive, *not_negative):
            value, least = getattr(self, name), "more than 0" if name in positive else "0 or more"
            if value is not None and not (value > 0 if name in positive else value >= 0):
                raise UsageError(f"--{name} {value}: must be {least}")


@dataclass
class GridFlags:
    """Flags of the sample grids."""

    title: ClassVar[str] = "Samples and logging"
    meanings: ClassVar[dict[str, str]] = GRIDS
    needs: ClassVar[dict[str, Need]] = {
        "save_images_epochs": Need(
            lambda run: run.save_images_steps is None, "has no effect with --save_images_steps {save_images_steps}"
        )
    }

    save_images_epochs: int = HfArg(
        instead_of="save_images_steps",
        resume=FREE,
        default=10,
        help="Epochs between sample grids (samples/*.png and the tracker); 0 turns them off.",
    )
    save_images_steps: int | None = HfArg(
        instead_of="save_images_epochs",
        resume=FREE,
        default=None,
        help="Optimizer steps between sample grids, instead of --save_images_epochs.",
    )


@dataclass
class AttentionFlags:
    """Flags of the UNet's attention."""

    title: ClassVar[str] = "Speed and memory"
    meanings: ClassVar[dict[str, str]] = ATTENTION

    enable_xformers_memory_efficient_attention: bool = HfArg(
        default=False, help="xFormers' attention; torch's own is memory-efficient too."
    )


@dataclass
class PublishingFlags:
    """Flags of what is saved and published."""

    title: ClassVar[str] = "Hugging Face Hub"
    meanings: ClassVar[dict[str, str]] = PUBLISHING
    needs: ClassVar[dict[str, Need]] = dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_revision"),
        Need(lambda run: run.push_to_hub, "uploads nothing without --push_to_hub"),
    )

    push_to_hub: bool = HfArg(resume=FREE, default=False, help="Upload the pipeline and its card when training ends.")
    hub_model_id: str | None = HfArg(
        resume=FREE,
        default=None,
        help="user/name of the repository; by default the output folder's name, under your user.",
    )
    hub_private_repo: bool = HfArg(resume=FREE, default=False, help="Make the repository private.")
    hub_strategy: Literal["end", "checkpoint", "best"] = HfArg(
        resume=FREE,
        default="end",
        help="What is saved and uploaded: the model at the end; also at each checkpoint, in the background; or the"
        " checkpoint with the lowest held-out loss (requires --validation_steps).",
    )
    hub_revision: str | None = HfArg(
        resume=FREE,
        default=None,
        help="Tag of the last upload: from_pretrained(..., revision=TAG) goes on loading it.",
    )
    hub_license: str | None = HfArg(
        resume=FREE, default=None, help="License that the model card names, such as apache-2.0."
    )
    save_variants: list[str] = HfArg(  # noqa: RUF009
        resume=FREE,
        default_factory=list,
        help="Additional weights, for from_pretrained(..., variant=NAME): fp16, or with --use_ema"
        " non_ema, those that are not averaged.",
    )


@dataclass
class PipelineConfig(TrainingConfig, GridFlags, AttentionFlags, PublishingFlags):
    """Flags of a training whose result is a pipeline: it is sampled from, saved in variants, and published."""

    def check(self) -> None:
        """Raise UsageError for a value out of range."""
        super().check()
        self.check_numbers(["save_images_steps"], ["save_images_epochs"])
        check_license("hub_license", self.hub_license)
        unknown = [name for name in self.save_variants if name not in VARIANTS]
        if unknown:
            raise UsageError(f"--save_variants: each must be one of {', '.join(VARIANTS)} (got {unknown[0]!r})")
        if "non_ema" in self.save_variants and not self.use_ema:
            raise UsageError("--save_variants non_ema requires --use_ema: without, there is one kind of weights")
        if self.hub_strategy == "best" and (
            not self.validation_steps or self.checkpointing_steps % self.validation_steps
        ):
            raise UsageError(
                "--hub_strategy best requires the held-out loss of each checkpoint: give --validation_steps, of which"
                f" --checkpointing_steps {self.checkpointing_steps} is a multiple"
            )
