"""What a training consists of before its first step: model, EMA, optimizer, learning rate, checkpoint."""

from pathlib import Path
from typing import Any

import torch

from ...common.arguments import SECRET_FLAGS
from ...common.files import truncate_jsonl
from ..averaging import make_ema
from ..checkpointing import LOGS, load_checkpoint, set_aside_later
from ..faults import must_write
from ..flags import TrainingConfig
from ..logs import log
from ..meter import Meter
from ..needs import without_effect
from ..plan import StepPlan
from ..sessions import Sessions
from ..sharded import WholeModel
from ..state import TrainingState, register_model_hooks
from .optimizer import make_lr_scheduler, make_optimizer
from .settings import settings_that_go_on


def begin_training(
    config: TrainingConfig,
    accelerator,
    model: torch.nn.Module,
    total_steps: int,
    groups: tuple[str, ...],
    facts: dict[str, Any],
    found: tuple[Path, dict[str, Any]] | None,
    extra: dict[str, Any] | None = None,
    parts: dict[str, torch.nn.Module] | None = None,
) -> TrainingState:
    """All that a run consists of, prepared by Accelerate, with a checkpoint's state if one was found; writes nothing.

    Args:
        parts: what of the model is saved, by the name of its folder; by default the model, as `unet`.
    """
    for line in without_effect(config, accelerator.device.type, SECRET_FLAGS):
        log(accelerator, f"warning: {line}")
    if config.lr_warmup_steps > total_steps and "lr_warmup_steps" in config.given:
        log(accelerator, f"the warm-up of --lr_warmup_steps {config.lr_warmup_steps} takes all {total_steps} steps")
    parts = parts or {"unet": model}
    state = TrainingState(
        model=model,
        parts=parts,
        emas={},
        optimizer=make_optimizer(config, model, accelerator.num_processes),
        lr_scheduler=None,
        meter=Meter(groups, accelerator.device),
        sessions=Sessions(accelerator),
        extra=extra or {},
        facts=facts,
    )
    state.lr_scheduler = make_lr_scheduler(config, state.optimizer, total_steps)
    if accelerator.is_fsdp2:
        state.whole = WholeModel(model, parts)
    state.model, state.optimizer = accelerator.prepare(model, state.optimizer)
    if config.use_ema:
        state.emas = {name: make_ema(config, part, accelerator.device) for name, part in parts.items()}
    register_model_hooks(accelerator, state)
    if found is not None:
        load_checkpoint(accelerator, state, found[0])
        log(accelerator, f"resuming from {found[0]}")
    return state


def forget_later(output_dir: Path, step: int, accelerator) -> None:
    """Let nothing count that an earlier run, which was killed or is resumed before its end, did after a step."""

    def forget():
        for path in set_aside_later(output_dir, step):
            log(accelerator, f"{path.name} is of a later step; it is removed once this run has got there")
        for name in LOGS:
            truncate_jsonl(output_dir / name, step)

    must_write(accelerator, forget, str(output_dir))


def run_facts(
    config: TrainingConfig, samples: int | None, plan: StepPlan, total_steps: int, **more: Any
) -> dict[str, Any]:
    """What a checkpoint tells of its run: what a resumed run must share with it, and what it takes over."""
    return {
        "seed": config.seed,
        "samples": samples,
        "global_batch": plan.global_batch * plan.accumulation,
        "total_steps": total_steps,
        "processes": plan.world,
        "settings": settings_that_go_on(config),
        **more,
    }
