"""Accelerate's engine for a run, with threads and precision set."""

import importlib.util
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration

from ...common.errors import UsageError
from ...common.machine import usable_cores
from ..flags import TrainingFlags
from ..launcher import check_launcher, launched_precision
from ..process import check_accelerator


def start_accelerator(flags: TrainingFlags) -> Accelerator:
    """Accelerate's engine for this run, with threads and precision set."""
    if flags.local_rank != -1 and "WORLD_SIZE" in os.environ:  # an old launcher says it by the flag
        os.environ.setdefault("LOCAL_RANK", str(flags.local_rank))
    tracker = None if flags.logger == "none" else flags.logger
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise UsageError(f"--logger {tracker} is not installed: pip install {tracker}, or --logger none")
    folder = Path(flags.output_dir)
    # torchrun's processes on a machine without accelerators: unless told, Accelerate makes each a run of its own
    ranks_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    check_launcher()
    check_accelerator(flags.mixed_precision)
    try:
        accelerator = Accelerator(
            cpu=ranks_on_cpu,
            mixed_precision=flags.mixed_precision,
            # the loop divides by itself: given here, what the environment says does not divide once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=tracker,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / flags.logging_dir)),
        )
    except ValueError as error:  # a precision, or an engine, that the machine or a package does not have
        raise UsageError(f"Accelerate does not start: {error}") from error
    fit_engine(accelerator, flags)
    flags.mixed_precision = accelerator.mixed_precision  # which a file of DeepSpeed's may set
    if flags.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        launched = launched_precision()
        source = launched.source if launched and launched.name == "fp16" else "--mixed_precision fp16"
        raise UsageError(f"{source} requires a GPU; on a CPU use --mixed_precision bf16 or no")
    # accelerate launch sets OMP_NUM_THREADS=1 on CPUs, which would leave all but one core of each process idle
    local = int(
        os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes if accelerator.device.type == "cpu" else 1)
    )
    torch.set_num_threads(flags.cpu_threads or max(1, usable_cores() // local))
    torch.backends.cuda.matmul.allow_tf32 = flags.allow_tf32  # which Accelerate switches on where it compiles
    torch.backends.cudnn.allow_tf32 |= flags.allow_tf32
    return accelerator


def fit_engine(accelerator: Accelerator, flags: TrainingFlags) -> None:
    """Tell DeepSpeed what Accelerate would take from its own data loaders and leaves to the engine.

    Raises:
        UsageError: an engine that cuts the weights in a way that nothing here puts together again.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError("FSDP 1 is not supported: put `fsdp_version: 2` into Accelerate's config")
    if kind == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            raise UsageError("DeepSpeed's ZeRO stage 3 is not supported: use stage 1 or 2, or FSDP 2")
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = flags.train_batch_size
        plugin.deepspeed_config["gradient_clipping"] = flags.max_grad_norm
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1  # the loop divides by itself
