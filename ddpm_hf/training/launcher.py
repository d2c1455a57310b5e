"""What Accelerate's launchers and configuration say: which of it sets flags, and which is refused.

`accelerate launch` hands on its own flags and those of `accelerate config` in the environment, all of them each time:
a `no` there may be the user's or the default, so it decides nothing. `notebook_launcher` leaves the precision in a
local variable, which its one process never reads.
"""

import os
import sys
from typing import Any, NamedTuple

from ..common.errors import UsageError

ON = ("1", "true", "yes", "on")


class Precision(NamedTuple):
    """A precision, and what asks for it."""

    name: str
    source: str


def launched_precision() -> Precision | None:
    """The precision that a launcher or `accelerate config` asks for; None where that is none, or the default.

    Raises:
        UsageError: one that is not supported.
    """
    precision = _of_the_notebook() or _of_the_environment()
    if precision is not None and precision.name not in ("fp16", "bf16"):
        raise UsageError(f"{precision.source}: {precision.name} is not supported; use bf16, fp16 or no")
    return precision


def _of_the_environment() -> Precision | None:
    name = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    return Precision(name, f"accelerate's --mixed_precision {name}") if name not in ("", "no") else None


def _of_the_notebook() -> Precision | None:
    launchers = sys.modules.get("accelerate.launchers")  # which imports torch
    frame = sys._getframe() if launchers else None
    while launchers and frame and frame.f_code is not launchers.notebook_launcher.__code__:
        frame = frame.f_back
    name = str(frame.f_locals["mixed_precision"]).lower() if frame else "no"
    return Precision(name, f"notebook_launcher(mixed_precision={name!r})") if name != "no" else None


def launcher_settings() -> list[tuple[str, dict[str, Any]]]:
    """The flags that a launcher or `accelerate config` sets, each with its source.

    Raises:
        UsageError: a value that is not supported.
    """
    layers = []
    precision = launched_precision()
    if precision is not None:
        layers.append((precision.source, {"mixed_precision": precision.name}))
    numbers = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps"}
    if switched_on("ACCELERATE_USE_DEEPSPEED"):
        numbers["ACCELERATE_GRADIENT_CLIPPING"] = "max_grad_norm"
    for variable, flag in numbers.items():
        value = os.environ.get(variable, "").strip()
        if value.lower() not in ("", "auto", "none"):
            layers.append((variable, {flag: value}))
    return layers


def switched_on(variable: str) -> bool:
    """Whether a variable of the environment is true."""
    return os.environ.get(variable, "").strip().lower() in ON


def check_launcher() -> None:
    """Raise UsageError for what divides a run in a way that no batch here is divided."""
    if switched_on("ACCELERATE_USE_MEGATRON_LM"):
        raise UsageError("Megatron-LM is not supported (ACCELERATE_USE_MEGATRON_LM): use FSDP 2 or DeepSpeed")
    for kind in ("TP", "CP", "SP"):
        size = os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1").strip()
        if switched_on("ACCELERATE_USE_PARALLELISM_CONFIG") and size not in ("", "1"):
            raise UsageError(
                f"PARALLELISM_CONFIG_{kind}_SIZE {size} is not supported: each process reads batches of its own"
            )


def unused_settings(mixed_precision: str) -> list[str]:
    """Lines about what a launcher asks for and this run does without.

    Args:
        mixed_precision: what the run computes in.
    """
    lines = []
    precision = _of_the_notebook() or _of_the_environment()
    if precision is not None and precision.name != mixed_precision:
        lines.append(f"mixed precision {mixed_precision}, as the run's settings say; not {precision.source}")
    if switched_on("ACCELERATE_DOWNCAST_BF16"):
        lines.append("accelerate's --downcast_bf16 is for TPUs and has no effect")
    return lines
