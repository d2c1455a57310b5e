"""The flags that every training script has, and how flags get their values.

What decides, strongest first: the command line, the `--config` file, what a resumed run was trained with, Accelerate's
launcher or configuration, the preset, the recipe for the embedded data, the default. A flag is declared once, here or
in the script's class that extends this one.
"""

import argparse
import collections
import copy
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from transformers import HfArgumentParser, hf_argparser

from .help import EPILOG, FlagFormatter, absent_of, bare_name, grouped, meanings_of, meant
from .lines import one_line
from .machine import accept_any_text
from .meanings import ATTENTION, GRIDS, PUBLISHING, TRAINING
from .needs import Need
from .paths import expand_home

SECRET_FLAGS = ("hub_token",)  # never written, shown or tracked


# What becomes of a flag where a run is resumed
START = "start"  # of this start alone: neither recorded nor taken over
FREE = "free"  # may change, and what is learned does not
APPLIED = "applied"  # may change: counts from the resumed step on, and a line says so
FIXED = "fixed"  # may not change: the run was built on it


def HfArg(*, resume: str = APPLIED, instead_of: str | None = None, **options) -> Any:
    """`transformers.HfArg` that also says what becomes of the flag where a run is resumed.

    Args:
        resume: one of the four above.
        instead_of: a flag that says the same in another way: given to a resumed run, this one replaces it.
        options: those of `transformers.HfArg`.
    """
    return hf_argparser.HfArg(metadata={"resume": resume, "instead_of": instead_of}, **options)


def flags_that(config, resume: str) -> list[str]:
    """The names of a config's flags that are `START`, `FREE`, `APPLIED` or `FIXED`."""
    return [one.name for one in dataclasses.fields(config) if one.metadata.get("resume", APPLIED) == resume]


class UsageError(ValueError):
    """Something that the user can mend: a script prints its one line and ends with exit code 2."""


def _is_like_a_flag(word: str) -> bool:
    """Whether argparse takes a word of a list for a flag: one with a dash in front that is no number."""
    return word.startswith("-") and not re.fullmatch(r"-(\d+|\d*\.\d+)", word)


def check_token(name: str, value: str | None) -> None:
    """Raise UsageError, which does not show it, for what cannot be a token."""
    if value is not None and not re.fullmatch("[!-~]+", value):
        raise UsageError(f"--{name}: a token has letters and digits alone, and this has others or none")


def check_license(name: str, value: str | None) -> None:
    """Raise UsageError for what the Hub does not take for a license's name."""
    if value is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", value):
        raise UsageError(
            f"--{name} {value!r}: give the Hub's name for it, in small letters, such as apache-2.0 or mit"
        )


def check_word(name: str, value: str) -> None:
    """Raise UsageError for a text that can be neither a name nor a path."""
    if not value.strip():
        raise UsageError(f"--{name} {value!r} is empty; leave the flag out, or give a value")
    if "\0" in value or len(value) > 4000 or any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise UsageError(f"--{name} {value!r} is too long for a name or a path, or holds a zero byte")


# Whole numbers are less than 2^31, and these are smaller: more would take the machine down
MOST = {"cpu_threads": 1024, "dataloader_num_workers": 1024, "eval_batch_size": 65536}
# What to do where training takes long on a CPU
SHORTER_TRAINING = "train for fewer --max_train_steps, at a smaller --resolution, or on a GPU"
VARIANTS = ("fp16", "non_ema")  # of the weights, in addition to the pipeline's
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def has_grids(config) -> bool:
    """Whether a training samples grids."""
    return bool(getattr(config, "save_images_steps", None) or getattr(config, "save_images_epochs", None))


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
    ema_min_decay: float = HfArg(default=0.0, help="Its least decay; equal to --ema_max_decay the EMA is constant.")

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
    compile: bool = HfArg(resume=FREE, default=False, help="torch.compile the model (needs a C++ compiler or a GPU).")
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


class OneLineParser(HfArgumentParser):
    """Declares a dataclass's fields as flags; a mistake is one line and exit code 2.

    A dataclass, or a base of it, has a `title` for the group of its fields in `--help`, and `meanings`: what to
    write here for names that its fields have elsewhere, and `absent`: why it lacks fields of other programs.
    """

    def __init__(self, dataclass_type, **kwargs):
        options = {"formatter_class": FlagFormatter, "epilog": EPILOG, **kwargs}
        super().__init__(dataclass_type, allow_abbrev=False, usage="%(prog)s [--flag value ...]", **options)
        self.meanings, self.absent = meanings_of(dataclass_type), absent_of(dataclass_type)
        self.source = ""  # of the words that are parsed, where that is not the command line

    def format_help(self) -> str:
        """The flags in groups."""
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for title, actions in grouped(self._actions, self.dataclass_types[0]).items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    @staticmethod
    def _parse_dataclass_field(parser, field):
        """Declare a field's flag; argparse takes what it knows of the metadata alone."""
        plain = copy.copy(field)
        plain.metadata = {name: value for name, value in field.metadata.items() if name in ("help", "aliases")}
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def error(self, message: str):
        """End with exit code 2 and one line."""
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        reason = self.absent.get(bare_name(unknown))
        instead = self.meant(unknown) if unknown and not reason else None
        hint = f"{reason}; " if reason else f"did you mean {instead}? " if instead else ""
        source = f"{self.source}: " if self.source else ""
        self.exit(2, f"{self.prog}: error: {one_line(f'{source}{message} ({hint}see --help)')}\n")

    def meant(self, word: str) -> str | None:
        """What to write instead of a word that is no flag; None if nothing comes near."""
        return meant(word, self.flags(), self.meanings)

    def flags(self) -> set[str]:
        """The names that a config file may set: all flags, by any of their spellings."""
        return {option[2:] for option in self._option_string_actions if option.startswith("--")} - {"help", "config"}

    def spelled(self, word: str) -> str:
        """A word of the command line, with a flag's hyphens as underscores where it has no spelling with hyphens."""
        flag, equals, value = word.partition("=")
        underscored = f"--{flag[2:].replace('-', '_')}"
        known = self._option_string_actions
        return underscored + equals + value if flag not in known and underscored in known else word

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, with hyphens for underscores in any flag, and `~` in any value."""
        return super().parse_known_args([expand_home(self.spelled(word)) for word in args or []], namespace)

    def tokens(self, values: dict[str, Any], source: str) -> list[str]:
        """Values as command-line words, which argparse has checked like the user's own."""
        words = []
        for name, value in values.items():
            flag = self.spelled(f"--{name}")
            if flag[2:] not in self.flags():
                instead, reason = self.meant(f"--{name}"), self.absent.get(bare_name(name))
                if reason:
                    raise UsageError(f"{source}: unknown setting {name!r}; {reason}")
                hint = f"; did you mean {instead if ' ' in instead else repr(instead[2:])}?" if instead else ""
                raise UsageError(f"{source}: unknown setting {name!r}{hint}")
            if isinstance(value, list) and self._option_string_actions[flag].nargs in ("+", "*"):
                if any(isinstance(one, (dict, list)) or _is_like_a_flag(str(one)) for one in value):
                    raise UsageError(
                        f"{source}: {name!r} takes a list of numbers, or of texts that do not begin with a dash"
                    )
                words += [flag, *map(str, value)] if value else []
                continue
            if isinstance(value, (dict, list)):
                raise UsageError(f"{source}: {name!r} takes one value, not a {type(value).__name__}")
            if value not in (None, "", "null", "~"):
                words.append(f"{flag}={ {'on': 'true', 'off': 'false'}.get(value, value) }")  # YAML's booleans
        self.source = source
        self.parse_args(words)
        self.source = ""
        return words

    def parse(self, argv: list[str]):
        """The dataclass's instance for these words; an unknown word ends with exit code 2."""
        return self.dataclass_types[0](**vars(self.parse_args(argv)))

    def given(self, words: list[str]) -> list[dataclasses.Field]:
        """The fields of the flags that these words set."""
        unset = object()
        fields = dataclasses.fields(self.dataclass_types[0])
        parsed = vars(self.parse_args(words, argparse.Namespace(**{one.name: unset for one in fields})))
        return [one for one in fields if parsed[one.name] is not unset]

    def decided(self, words: list[str]) -> set[str]:
        """The names of the flags that these words set, and of those that say the same in another way."""
        return {name for one in self.given(words) for name in (one.name, one.metadata.get("instead_of")) if name}

    def below(self, values: dict[str, Any], source: str, words: list[str]) -> list[str]:
        """The words over weaker values: of these, those that the words do not decide."""
        self.tokens(values, source)  # what is wrong is said of all of them
        decided, actions = self.decided(words), self._option_string_actions
        weaker = {name: values[name] for name in values if actions[self.spelled(f"--{name}")].dest not in decided}
        return self.tokens(weaker, source) + words

    def over(self, layers: list[tuple[str, dict]], words: list[str], decided: Iterable[str] = ()) -> list[str]:
        """The words over a launcher's settings and these layers, except for what is `decided`."""
        from .launcher import launcher_settings  # which needs this module's UsageError

        for source, values in reversed([*layers, *launcher_settings()]):
            # a recipe may set flags that only other commands have
            values = {name: values[name] for name in values if name in self.flags() and name not in decided}
            words = self.below(values, source, words)
        return words


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of (key, value) pairs; raises ValueError where the second of two values would quietly win."""
    twice = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def _read_yaml(text: str) -> Any:
    """What YAML says, with the words of a mapping as they stand: no is "no", 1e-4 a number."""
    values = yaml.safe_load(text)
    if isinstance(values, dict):
        node = yaml.compose(text, yaml.SafeLoader)
        _each_key_once([(str(key.value), None) for key, _ in node.value])
        values = yaml.load(text, yaml.BaseLoader)
    return values


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        UsageError: no such file, not readable as either, a key that is there twice, or not a mapping.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(2**20 + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error.__class__.__name__})") from error
    if len(data) > 2**20:
        raise UsageError(f"--config {path}: more than a mebibyte, which no list of flags is")
    try:
        json_given = path.endswith(".json")
        values = json.loads(text, object_pairs_hook=_each_key_once) if json_given else _read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: also an impossible date, or number
        raise UsageError(f"--config {path}: not YAML or JSON ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must map flags to values, and is a {type(values).__name__}")
    return values


def are_of_program(settings: dict[str, Any], dataclass_type: type) -> bool:
    """Whether settings are those of a run of the program with these flags, in this version or an earlier one.

    Flags that the program lacks for a reason may have been accepted by an earlier version.
    """
    names = {each.name for each in dataclasses.fields(dataclass_type)}
    return names.union(absent_of(dataclass_type)).issuperset(settings)


def _trained_with(config, stages: tuple[str, ...]) -> dict[str, Any]:
    """The settings in the checkpoint that --resume_from_checkpoint names: of this config's flags, those that go on."""
    from .checkpointing import settings_of  # which needs this module's UsageError
    from .ownership import EARLIER, comes_back

    names = {name for kind in (FREE, APPLIED, FIXED) for name in flags_that(config, kind)} - set(SECRET_FLAGS)
    folder = Path(config.output_dir)
    stages = (EARLIER, *stages) if comes_back(folder) else stages
    found = next(filter(None, (settings_of(folder / stage, config.resume_from_checkpoint) for stage in stages)), {})
    if not are_of_program(found, type(config)):
        return {}  # what is wrong with its checkpoint is said where it is read
    return {name: value for name, value in found.items() if name in names}


def parse_layers(
    dataclass_type,
    argv: list[str],
    weaker_layers,
    prog: str | None = None,
    description: str | None = None,
    stages: tuple[str, ...] = ("",),
):
    """Parse `argv` over a `--config` file, over what a resumed run was trained with, over what `weaker_layers` gives.

    Args:
        weaker_layers: called with the instance that the stronger layers alone make; returns a list of
            (source, values), weakest first, such as a recipe and a preset.
        stages: the folders within the output folder whose checkpoints tell what a run was trained with; of the first
            that has one.
    """
    accept_any_text()
    parser = OneLineParser(dataclass_type, prog=prog, description=description)
    try:
        from_file, _ = parser.parse_known_args(argv)
        words = argv
        if from_file.config:
            words = parser.below(read_config_file(from_file.config), f"--config {from_file.config}", words)
        given, typed = parser.given(words), {one.name for one in parser.given(argv)}
        layers = weaker_layers(parser.parse(words))
        config = parser.parse(parser.over(layers, words))
        if config.resume_from_checkpoint:
            before = _trained_with(config, stages)
            words = parser.below(before, "--resume_from_checkpoint", [f"--output_dir={config.output_dir}", *words])
            layers = weaker_layers(parser.parse(words))
            config = parser.parse(parser.over(layers, words, decided=set(before)))
        # a file may list all flags, as a run's settings do: there, what they are without it asks for nothing
        config.given = frozenset(
            one.name
            for one in given
            if one.name in typed
            or getattr(config, one.name) not in (one.default, *(values.get(one.name) for _, values in layers))
        )
        return config
    except UsageError as error:
        parser.error(str(error))
