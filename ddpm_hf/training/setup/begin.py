"""What a training consists of before its first step: engine, checkpoint, model, EMA, optimizer, learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ...common.layout import Entry
from ..averaging import make_ema
from ..checkpointing import find_checkpoint, load_checkpoint
from ..flags import Flags, GridFlags, TrainingFlags
from ..launcher import unused_settings
from ..meter import Meter
from ..needs import without_effect
from ..plan import StepPlan
from ..power_averages import WIDTHS, PowerAverage
from ..run import Run
from ..sessions import Sessions
from ..sharded import FullModel
from ..state import TrainingState, register_model_hooks
from ..stopping import deadline_of
from .accelerator import start_accelerator
from .claiming import check_unchanged, find_run
from .optimizer import check_engine, make_lr_scheduler, make_optimizer, match_layout
from .settings import agree_on_seed, settings_that_go_on


def start_run(
    settings: Flags,
    entries: Sequence[Entry],
    data: Sequence[str | None] = (),
    stages: Sequence[str] = (),
) -> Run:
    """Accelerate's engine, the checkpoint to go on from, and the seed; nothing is written yet.

    Args:
        settings: all flags of the program; the precision and the seed are settled in them.
        entries: what the run is to write, as `layout` gives it.
        data: the folders that it reads.
        stages: the folders within the output folder of trainings that come before its own: without a checkpoint of
            its own, it goes on from theirs.

    Raises:
        UsageError: an engine, a folder or a checkpoint that cannot be used, or flags that the run to resume lacks.
    """
    flags = settings[TrainingFlags]
    deadline = deadline_of(flags.max_train_hours)
    run = Run(flags, settings, start_accelerator(flags), entries, deadline)
    run.grids = next((part for part in settings if isinstance(part, GridFlags)), None)
    run.log(*unused_settings(flags.mixed_precision))
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # an error is one line, and main says it
    transformers_logging.set_verbosity_error()
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # one for each file that is saved or loaded
    run.resumed = begun = find_run(run, data)
    if flags.resume_from_checkpoint and begun is None:
        checkpoints = (find_checkpoint(run.folder / stage, "latest", lambda line: None) for stage in stages)
        begun = next(filter(None, checkpoints), None)
    flags.seed = run.seed = agree_on_seed(flags.seed, begun and begun.manifest)
    check_unchanged(settings, begun and begun.manifest)
    return run


def begin_training(
    run: Run,
    model: torch.nn.Module,
    plan: StepPlan,
    facts: dict[str, Any],
    parts: dict[str, torch.nn.Module],
    groups: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
) -> TrainingState:
    """All that a run consists of, prepared by Accelerate, with a checkpoint's state if it resumes; writes nothing.

    Args:
        facts: what its checkpoints tell of it.
        parts: what of the model is saved, by the name of its folder.
        groups: names of the groups whose losses are logged.
        extra: more objects with a `state_dict()` that belong to the run.
    """
    flags, accelerator = run.flags, run.accelerator
    check_engine(flags, accelerator)
    if flags is run.settings[TrainingFlags]:  # else it is a stage, whose flags nobody gave
        run.log(*(f"warning: {line}" for line in without_effect(run.settings, run.device.type)))
    if flags.lr_warmup_steps > plan.total and "lr_warmup_steps" in run.settings.given:
        run.log(f"the warm-up of --lr_warmup_steps {flags.lr_warmup_steps} takes all {plan.total} steps")
    state = TrainingState(
        model=model,
        parts=parts,
        emas={},
        optimizer=make_optimizer(flags, model, plan.world),
        lr_scheduler=None,
        meter=Meter(groups, run.device),
        sessions=Sessions(accelerator),
        extra=extra or {},
        facts=facts,
    )
    state.lr_scheduler = make_lr_scheduler(flags, state.optimizer, plan.total)
    if accelerator.is_fsdp2:
        state.full = FullModel(model, parts)
    state.model, state.optimizer = accelerator.prepare(model, state.optimizer)
    if flags.use_ema:
        state.emas = {name: make_ema(flags, part, run.device) for name, part in parts.items()}
    if flags.ema_snapshot_steps:
        where = torch.device("cpu") if flags.offload_ema else run.device
        state.power = {
            name: [PowerAverage(std, part.parameters(), where) for std in WIDTHS] for name, part in parts.items()
        }
    register_model_hooks(accelerator, state)
    if run.resumed is not None:
        load_checkpoint(accelerator, state, run.resumed.checkpoint)
        match_layout(state.optimizer)
        run.log(f"resuming from {run.resumed.checkpoint}")
    if flags.compile and not flags.dry_run:  # compiling takes minutes
        state.model = compiled(state.model)
    return state


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model behind torch.compile; as it is where Accelerate has compiled it."""
    if hasattr(model, "_orig_mod"):
        return model
    # the layout optimization gave wrong gradients for this model on CPUs
    return torch.compile(model, options={"layout_optimization": False})


def run_facts(run: Run, samples: int | None, plan: StepPlan, **more: Any) -> dict[str, Any]:
    """What a checkpoint tells of its run: what a resumed run must share with it, and what it takes over."""
    return {
        "seed": run.seed,
        "samples": samples,
        "global_batch": plan.global_batch * plan.accumulation,
        "total_steps": plan.total,
        "processes": plan.world,
        "settings": settings_that_go_on(run.settings),
        **more,
    }
