"""The flags that every training has."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from ..common.arguments import FIXED, FREE, NOT_NEGATIVE, POSITIVE, SHARE, START, HfArg, Need, check_values, has_grids
from ..common.errors import UsageError
from .meanings import GRIDS, TRAINING

T = TypeVar("T")
# Each optimizer, and the settings that it decides where the user does not
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {},
    "soap": {},
    # it averages the weights by itself, over steps of one learning rate
    "schedulefree": {"lr_scheduler": "constant_with_warmup", "use_ema": False},
}
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass
class TrainingFlags:
    """Flags of the loop, the optimizer, checkpoints and tracking."""

    title: ClassVar[str] = "Run"
    meanings: ClassVar[dict[str, str]] = TRAINING
    needs: ClassVar[dict[str, Need]] = {
        "num_epochs": Need(
            lambda run: run.max_train_steps is None, "has no effect with --max_train_steps {max_train_steps}"
        ),
        "eval_batch_size": Need(
            lambda run: run.validation_steps or has_grids(run),
            "has no effect without sample grids and without --validation_steps",
        ),
        "save_model_epochs": Need(
            lambda run: not getattr(run, "streaming", False),
            "has no effect with --streaming, which has no epochs; checkpoints hold the model (--checkpointing_steps)",
        ),
        "lr_warmup_steps": Need(
            lambda run: run.lr_scheduler != "constant",
            "has no effect with --lr_scheduler constant; constant_with_warmup has a warm-up",
        ),
        **dict.fromkeys(
            ("ema_inv_gamma", "ema_power", "ema_max_decay", "ema_min_decay", "foreach_ema"),
            Need(lambda run: run.use_ema, "has no effect without --use_ema"),
        ),
        "offload_ema": Need(
            lambda run: run.use_ema and run.device == "cuda", "has no effect without --use_ema and a CUDA GPU"
        ),
        "allow_tf32": Need(lambda run: run.device == "cuda", "has no effect without a CUDA GPU"),
        "logging_dir": Need(
            lambda run: run.logger == "tensorboard", "has no effect with --logger {logger}; it is for tensorboard"
        ),
        "tracker_project_name": Need(lambda run: run.logger != "none", "has no effect with --logger none"),
    }

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
        range=NOT_NEGATIVE,
        resume=FIXED,
        default=None,
        help="Random seed. If omitted, one is chosen, logged and saved with the run.",
    )
    train_batch_size: int = HfArg(
        range=POSITIVE, group="Training", default=16, help="Samples a step and process, before accumulation."
    )
    eval_batch_size: int = HfArg(
        range=POSITIVE, resume=FREE, default=16, help="Images in a sample grid; also the batch of the validation."
    )
    gradient_accumulation_steps: int = HfArg(
        range=POSITIVE, default=1, help="Batches that are added up for one optimizer step."
    )
    dataloader_num_workers: int = HfArg(
        range=NOT_NEGATIVE,
        resume=FREE,
        default=0,
        help="Processes that decode images; 0 decodes in the main one. Of no use where the data is cached.",
    )
    num_epochs: int = HfArg(
        range=POSITIVE,
        instead_of="max_train_steps",
        resume=FREE,
        default=100,
        aliases=["--num_train_epochs"],
        help="Times to go through the data.",
    )
    max_train_steps: int | None = HfArg(
        range=POSITIVE,
        instead_of="num_epochs",
        resume=FREE,
        default=None,
        help="Optimizer steps in all; overrides --num_epochs.",
    )
    max_train_hours: float | None = HfArg(
        range=POSITIVE,
        resume=FREE,
        default=None,
        help="After so many hours, counted from the start and with sampling and saving, save a checkpoint and end"
        " (exit code 0). Leave time for the step and the saving that come last.",
    )
    optimizer: str = HfArg(
        group="Optimizer",
        resume=FIXED,
        default="adamw",
        help=f"{', '.join(OPTIMIZERS)}; all but the first require pip install 'ddpm_hf[optimizers]'. The learning rate"
        " and --adam_* are of all of them.",
    )
    learning_rate: float = HfArg(range=POSITIVE, default=1e-4, help="Peak learning rate.")
    scale_lr: bool = HfArg(
        default=False, help="Multiply the learning rate by the processes, the batch size and the accumulation steps."
    )
    lr_scheduler: str = HfArg(
        default="cosine",
        help=f"{', '.join(LR_SCHEDULERS)}.",
    )
    lr_warmup_steps: int = HfArg(
        range=NOT_NEGATIVE, default=500, help="Optimizer steps over which the learning rate rises."
    )
    adam_beta1: float = HfArg(range=SHARE, default=0.95, help="AdamW's first decay rate.")
    adam_beta2: float = HfArg(range=SHARE, default=0.999, help="AdamW's second decay rate.")
    adam_weight_decay: float = HfArg(range=NOT_NEGATIVE, default=1e-6, help="AdamW's weight decay.")
    adam_epsilon: float = HfArg(range=POSITIVE, default=1e-8, help="AdamW's epsilon.")
    use_8bit_adam: bool = HfArg(
        resume=FIXED, default=False, help="Adam with 8-bit moments, from bitsandbytes: less memory."
    )
    max_grad_norm: float = HfArg(
        range=NOT_NEGATIVE, default=1.0, help="Clip the gradient's norm to this; 0 does not clip."
    )
    max_nonfinite_steps: int = HfArg(
        range=POSITIVE,
        resume=FREE,
        default=10,
        help="Stop after this many steps in a row whose loss or gradient is NaN or infinite (each is skipped).",
    )
    use_ema: bool = HfArg(
        group="EMA",
        resume=FIXED,
        default=False,
        help="Keep an exponential moving average of the weights: it is sampled, validated and saved.",
    )
    ema_inv_gamma: float = HfArg(
        range=POSITIVE, default=1.0, help="EMA warm-up: decay = 1 - (1 + step/inv_gamma)^-power."
    )
    ema_power: float = HfArg(range=POSITIVE, default=0.75, help="EMA warm-up's power.")
    ema_max_decay: float = HfArg(range=SHARE, default=0.9999, help="The EMA's decay after its warm-up.")
    ema_min_decay: float = HfArg(
        range=SHARE, default=0.0, help="Minimum EMA decay; if equal to --ema_max_decay, the decay is constant."
    )
    foreach_ema: bool = HfArg(resume=FREE, default=True, help="Update the EMA in a few fused operations.")
    offload_ema: bool = HfArg(
        resume=FREE, default=False, help="Keep the EMA in the CPU's pinned memory: less memory on a GPU."
    )
    ema_snapshot_steps: int | None = HfArg(
        range=POSITIVE,
        resume=FREE,
        default=None,
        help="Also keep two power-function averages (widths 0.05 and 0.10), and write them every so many steps and at"
        " the end: `ddpm-hf ema` makes an average of any width of them, after training.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = HfArg(
        group="Speed and memory",
        default="no",
        help="Autocast the model to half precision; bf16 works on recent CPUs too.",
    )
    allow_tf32: bool = HfArg(default=False, help="TF32 matrix products on Ampere GPUs and later.")
    acceleration: Literal["auto", "compile", "none"] = HfArg(
        resume=FREE,
        default="auto",
        help="How the network is executed; its gradients are checked first. auto: CUDA graphs on a GPU, attention by"
        " size on a CPU. compile: its blocks are compiled, which takes minutes. none: as Diffusers does.",
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
        range=POSITIVE,
        default=None,
        help="torch's threads; by default the machine's cores divided by the processes on it.",
    )
    local_rank: int = HfArg(resume=START, default=-1, help="Set by old launchers; LOCAL_RANK in the environment wins.")
    save_model_epochs: int = HfArg(
        range=POSITIVE,
        group="Samples and logging",
        resume=FREE,
        default=10,
        help="Epochs between saves of the whole pipeline.",
    )
    validation_steps: int | None = HfArg(
        range=POSITIVE,
        resume=FREE,
        default=None,
        help="Optimizer steps between held-out losses (with the EMA weights where there are any).",
    )
    logging_steps: int = HfArg(
        range=POSITIVE,
        resume=FREE,
        default=10,
        help="Optimizer steps between lines of metrics.jsonl and tracker points.",
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
    checkpointing_steps: int = HfArg(
        range=POSITIVE,
        group="Checkpoints",
        resume=FREE,
        default=500,
        help="Optimizer steps between checkpoints (checkpoint-N/).",
    )
    checkpoints_total_limit: int | None = HfArg(
        range=POSITIVE,
        resume=FREE,
        default=None,
        help="Keep this many checkpoints; the oldest go once the new one is safe.",
    )
    resume_from_checkpoint: str | None = HfArg(
        resume=START,
        default=None,
        help="checkpoint-N, a path, or latest: go on from there, exactly as if never stopped.",
    )

    def check(self, flags: "Flags") -> None:
        """Raise UsageError for an unknown name or numbers that do not go together."""
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise UsageError(f"--lr_scheduler must be one of {', '.join(LR_SCHEDULERS)} (got {self.lr_scheduler!r})")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"--optimizer must be one of {', '.join(OPTIMIZERS)} (got {self.optimizer!r})")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise UsageError(f"--use_8bit_adam is AdamW's; leave it or --optimizer {self.optimizer} out")
        if self.use_ema and self.optimizer == "schedulefree":
            raise UsageError("--optimizer schedulefree averages the weights by itself; leave it or --use_ema out")
        if self.adam_beta1 == 0 and self.optimizer == "schedulefree":
            raise UsageError("--optimizer schedulefree requires --adam_beta1 above 0; 0.9 is usual")
        if self.ema_min_decay > self.ema_max_decay:
            raise UsageError(f"--ema_min_decay {self.ema_min_decay} is above --ema_max_decay {self.ema_max_decay}")
        if self.seed is not None and self.seed >= 2**63:
            raise UsageError(f"--seed {self.seed}: must be less than 2^63")


@dataclass
class GridFlags:
    """Flags of the sample grids."""

    title: ClassVar[str] = "Samples and logging"
    meanings: ClassVar[dict[str, str]] = GRIDS
    needs: ClassVar[dict[str, Need]] = {
        "save_images_epochs": Need(
            lambda run: (
                run.save_images_steps is None and not (run.save_images_epochs and getattr(run, "streaming", False))
            ),
            "has no effect with --save_images_steps, nor with --streaming, which has no epochs: --save_images_steps"
            " counts steps",
        )
    }

    save_images_epochs: int = HfArg(
        range=NOT_NEGATIVE,
        instead_of="save_images_steps",
        resume=FREE,
        default=10,
        help="Epochs between sample grids (samples/*.png and the tracker); 0 turns them off.",
    )
    save_images_steps: int | None = HfArg(
        range=POSITIVE,
        instead_of="save_images_epochs",
        resume=FREE,
        default=None,
        help="Optimizer steps between sample grids, instead of --save_images_epochs.",
    )


class Flags:
    """All flags of a program: an instance of each of its dataclasses, and the value of each flag by its name.

    What reads the flags of one dataclass takes that instance. This is for what concerns flags as such: saving and
    resuming them, defaults that follow from others, combinations that cannot work.

    Args:
        parts: the instances; no flag is in two of them.
        given: the names of the flags that the command line or --config sets.
        absent: names of flags that the program lacks for a reason, and which an earlier version may have accepted.
    """

    def __init__(self, parts: Sequence[Any], given: frozenset[str] = frozenset(), absent: Sequence[str] = ()):
        self.parts, self.given, self.absent = tuple(parts), given, frozenset(absent)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __getattr__(self, name: str) -> Any:
        for part in self.__dict__.get("parts", ()):
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(f"no flag is called {name}")

    def __getitem__(self, kind: type[T]) -> T:
        return next(part for part in self.parts if isinstance(part, kind))

    def fields(self) -> list[dataclasses.Field]:
        """The declarations of all flags."""
        return [field for part in self.parts for field in dataclasses.fields(part)]

    def values(self) -> dict[str, Any]:
        """The flags and their values."""
        return {name: value for part in self.parts for name, value in dataclasses.asdict(part).items()}

    def knows(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings are those of a run of this program, in this version or an earlier one."""
        return self.absent.union(self.values()).issuperset(settings)

    def check(self) -> None:
        """Raise UsageError or DataError for a value out of range or a combination that cannot work.

        A dataclass of flags may have a method `check`, which is given all flags of the program.
        """
        for part in self.parts:
            check_values(part)
        for part in self.parts:
            if hasattr(part, "check"):
                part.check(self)
