"""What a script does before the loop: processes and threads, seed, output folder, optimizer, EMA, tracker."""

import dataclasses
import importlib.util
import json
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from diffusers.optimization import get_scheduler

from .averaging import make_ema
from .checkpointing import (
    SETTINGS,
    find_checkpoint,
    list_checkpoints,
    made_by_diffusers,
    set_aside_later,
    truncate_jsonl,
    write_whole,
)
from .config import APPLIED, FIXED, SECRET_FLAGS, START, TrainingConfig, UsageError, are_of_program, flags_that
from .faults import end_together, track
from .launcher import check_launcher, launched_precision, unused_settings
from .loop import LOGS, Meter, StepPlan, TrainingState, let_old_go, load_checkpoint, register_model_hooks
from .machine import usable_cores
from .needs import without_effect
from .ownership import (
    AUTOENCODER,
    KEPT_IN_PLACE,
    STEPS,
    TIMINGS,
    TRAINING_CONFIG,
    Entry,
    cannot_be_moved,
    claim_files,
    forget_removed_checkpoints,
    has_manifest,
    in_the_way,
    remove_unfinished,
    run_files,
    set_aside,
    settle,
    some,
    waiting,
)
from .process import check_accelerator
from .sessions import Sessions
from .sharded import WholeModel


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate's engine for this run, with threads and precision set."""
    if config.local_rank != -1 and "WORLD_SIZE" in os.environ:  # an old launcher says it by the flag
        os.environ.setdefault("LOCAL_RANK", str(config.local_rank))
    tracker = None if config.logger == "none" else config.logger
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise UsageError(f"--logger {tracker} is not installed: pip install {tracker}, or --logger none")
    folder = Path(config.output_dir)
    # torchrun's processes on a machine without accelerators: unless told, Accelerate makes each a run of its own
    ranks_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    check_launcher()
    check_accelerator(config.mixed_precision)
    try:
        accelerator = Accelerator(
            cpu=ranks_on_cpu,
            mixed_precision=config.mixed_precision,
            # the loop divides by itself: given here, what the environment says does not divide once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=tracker,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / config.logging_dir)),
        )
    except ValueError as error:  # a precision, or an engine, that the machine or a package does not have
        raise UsageError(f"Accelerate does not start: {error}") from error
    fit_engine(accelerator, config)
    config.mixed_precision = accelerator.mixed_precision  # which a file of DeepSpeed's may set
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        launched = launched_precision()
        source = launched.source if launched and launched.name == "fp16" else "--mixed_precision fp16"
        raise UsageError(f"{source} requires a GPU; on a CPU use --mixed_precision bf16 or no")
    for line in unused_settings(config.mixed_precision):
        log(accelerator, line)
    # accelerate launch sets OMP_NUM_THREADS=1 on CPUs, which would leave all but one core of each process idle
    local = int(
        os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes if accelerator.device.type == "cpu" else 1)
    )
    torch.set_num_threads(config.cpu_threads or max(1, usable_cores() // local))
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32  # which Accelerate switches on where it compiles
    torch.backends.cudnn.allow_tf32 |= config.allow_tf32
    return accelerator


def fit_engine(accelerator, config: TrainingConfig) -> None:
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
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.train_batch_size
        plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1  # the loop divides by itself


def cpu_has_bf16() -> bool:
    """Whether bf16 is fast here: on the GPU if there is one, else on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    if not torch.backends.mkldnn.is_available():  # as on macOS
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(
        flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16")
    )


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8") if info.is_file() else ""


def find_run(
    config: TrainingConfig, accelerator, entries: Sequence[Entry], data: Sequence[str | None] = ()
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its state, or None; an earlier run that waits for one that ended comes back.

    Args:
        entries: what this run is to write, as `ownership.layout` gives it.
        data: the folders that it reads.

    Raises:
        UsageError: the folder holds an earlier run and neither resuming nor overwriting was asked for, or files that
            this run would replace; a checkpoint that does not exist or is broken.
    """
    folder = Path(config.output_dir)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        what = "is a file" if there == folder.absolute() else f"lies in {there}, which is a file"
        raise UsageError(f"--output_dir {folder} {what}; name a folder")
    if config.overwrite_output_dir and config.resume_from_checkpoint:
        raise UsageError(
            "--overwrite_output_dir would remove the run that --resume_from_checkpoint goes on from; give one of them"
        )
    if not config.dry_run:
        settle_earlier_run(folder, accelerator)
    ours = [*run_files(folder), *waiting(folder)]
    if not ours:
        refuse_other_runs(folder)
    refuse_foreign_files(config, entries, ours)
    if config.resume_from_checkpoint:
        found = find_checkpoint(folder, config.resume_from_checkpoint, lambda line: log(accelerator, line))
        if found is None:
            log(accelerator, f"no checkpoint in {folder} yet: training from the beginning")
        return found
    if ours and not config.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {folder} holds an earlier run ({some(ours)}); go on with"
            " --resume_from_checkpoint latest, replace it with --overwrite_output_dir, or name another folder"
        )
    refuse_to_remove_data(folder, ours, data)
    return None


def settle_earlier_run(folder: Path, accelerator) -> None:
    """Complete what a program that was killed left half done in the folder. All ranks take part."""
    error = None
    if accelerator.is_main_process:
        try:
            settle(folder, training=True)
        except (UsageError, OSError) as problem:
            error = problem
    if any(gather_object([error is not None])):
        end_together(accelerator, error)


def refuse_other_runs(folder: Path) -> None:
    """Raise UsageError for a folder with a run of Diffusers' scripts."""
    for checkpoint in reversed(list_checkpoints(folder)):
        line = made_by_diffusers(checkpoint)
        if line is not None:
            raise UsageError(line)


def refuse_foreign_files(config: TrainingConfig, entries: Sequence[Entry], ours: Sequence[str]) -> None:
    """Raise UsageError for files that the run would replace and that are not of an earlier one."""
    folder, resuming = Path(config.output_dir), config.resume_from_checkpoint
    if resuming and ours and not has_manifest(folder):  # of a version without manifests, which wrote over such files
        return
    foreign = in_the_way(folder, entries, ours)
    if resuming and ours:  # a card that a person began is completed
        foreign = [name for name in foreign if name not in KEPT_IN_PLACE]
    if config.overwrite_output_dir:
        foreign += cannot_be_moved(folder, entries, ours)
    if foreign:
        raise UsageError(
            f"--output_dir {folder} holds files that training would replace and that are not of an earlier run"
            f" ({some(foreign)}); move them, or name another folder"
        )


def refuse_to_remove_data(folder: Path, ours: Sequence[str], data: Sequence[str | None]) -> None:
    """Raise UsageError for files of an earlier run that lie in a folder of training data within the output folder."""
    for name in data:
        path = Path(name or "")
        if not name or not path.is_dir() or path.resolve() not in map(Path.resolve, _folders_within(folder, ours)):
            continue
        raise UsageError(
            f"--overwrite_output_dir would remove the training data in {path}, which an earlier run wrote; copy them"
            " to another folder, or name another --output_dir"
        )


def _folders_within(folder: Path, names: Sequence[str]) -> set[Path]:
    """All folders between a folder and files within it."""
    return {folder / parent for name in names for parent in Path(name).parents if parent != Path(".")}


def describe_start(config: TrainingConfig, found: tuple[Path, dict[str, Any]] | None) -> str:
    """What a start would do with the output folder, for --dry_run."""
    folder = Path(config.output_dir)
    if found is not None:
        line = f"goes on from {found[0]}, step {found[1].get('step', 0):,}"
    elif earlier := [*run_files(folder), *waiting(folder)]:
        line = f"replaces the earlier run in {folder} ({some(earlier)}) once there is a checkpoint"
    else:
        line = "from the beginning"
    return f"     start  {line}; the first batch has been through the model and back"


def claim_output_dir(config: TrainingConfig, accelerator, entries: Sequence[Entry], step: int = 0) -> None:
    """Make the output folder this run's, once all else has been checked; an earlier run is set aside.

    Args:
        step: the one that the run goes on from: what was done in the folder after it counts no more.

    Raises:
        UsageError: a folder that cannot be written.
    """
    folder = Path(config.output_dir)
    error = None
    if accelerator.is_main_process:
        try:
            _claim(folder, config, entries)
        except OSError as problem:
            error = UsageError(f"--output_dir {folder} cannot be written: {problem.strerror}; name another folder")
    if any(gather_object([error is not None])):
        end_together(accelerator, error)
    forget_later(folder, step, accelerator)
    if step:  # the run may have been killed before it could
        let_old_go(accelerator, folder, config.checkpoints_total_limit)


def _claim(folder: Path, config: TrainingConfig, entries: Sequence[Entry]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # or it cannot be written, and nothing is moved
        ours = run_files(folder)
    if ours and config.overwrite_output_dir:
        set_aside(folder, ours)
    elif ours and not has_manifest(folder):  # a run of a version without manifests goes on
        ours += in_the_way(folder, entries, ours)
        claim_files(folder, [name for name in ours if not name.startswith(f"{AUTOENCODER}/")])
    remove_unfinished(folder)
    forget_removed_checkpoints(folder)
    claim_files(folder, [entry.pattern for entry in (TRAINING_CONFIG, STEPS, TIMINGS)])


def check_unchanged(config: TrainingConfig, resumed: dict[str, Any] | None) -> None:
    """Raise UsageError for a setting that the run to resume was built on, and that is another one now.

    Args:
        resumed: the state of the checkpoint, or None.
    """
    before = (resumed or {}).get("settings", {})
    if not are_of_program(before, type(config)):
        return  # `check_resumable` refuses the checkpoint
    for name in flags_that(config, FIXED):
        was, now = before.get(name), getattr(config, name)
        if name in before and was != now and not _was_moved(was, now):
            raise UsageError(
                f"--{name} {now}: the run to resume was trained with {was}, which its weights depend on; leave the"
                " flag out, or train anew in another --output_dir"
            )


def _was_moved(was: Any, now: Any) -> bool:
    """Whether two names may be of one local file or folder: of which the first is there no more, or the same.

    A name that is not absolute may be a relative path or one of the Hub: it moves to one that ends alike.
    """
    if not (isinstance(was, str) and isinstance(now, str) and os.path.exists(now)):
        return False
    if os.path.exists(was):
        return os.path.samefile(was, now)
    path = PureWindowsPath(was)  # which divides at either slash
    absolute = os.path.isabs(was) or path.is_absolute()
    return absolute or path.name in ("", "..", Path(now).resolve().name)


def check_resumable(
    found: tuple[Path, dict[str, Any]] | None,
    config: TrainingConfig,
    model,
    facts: dict[str, Any],
    accelerator,
    name: str = "unet",
) -> None:
    """Say what is another than in the run to resume, and counts from here on.

    Args:
        model: the one to train, of Diffusers.
        facts: what `run_facts` gave.
        name: the model's folder in a checkpoint.

    Raises:
        UsageError: a checkpoint of another model.
    """
    if found is None:
        return
    checkpoint, manifest = found
    if not (checkpoint / name / "config.json").is_file():
        raise UsageError(f"{checkpoint} is of another kind of run: it has no {name}/")
    try:
        saved = dict(json.loads((checkpoint / name / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{checkpoint}: {name}/config.json is no model's config") from error
    own = json.loads(model.to_json_string())
    for key in own:
        if not key.startswith("_") and own[key] != saved.get(key):
            raise UsageError(
                f"{checkpoint} is of another model: its {key} is {saved.get(key)}, this run's {own[key]}; resume with"
                " the flags that it was trained with"
            )
    counts = {*facts, *flags_that(config, APPLIED)} - {"settings"}
    flat, before = ({**each, **each.get("settings", {})} for each in (facts, manifest))
    for name in (name for name in flat if name in counts and name in before and before[name] != flat[name]):
        log(accelerator, f"warning: {name} was {before[name]} and is {flat[name]}: not an exact continuation")
    if facts["processes"] != before["processes"] and facts["global_batch"] != before["global_batch"]:
        log(
            accelerator,
            f"each step saw {before['global_batch']} images and sees {facts['global_batch']}; the order goes on where"
            " it was if processes × --train_batch_size × --gradient_accumulation_steps stays the same",
        )


def agree_on_seed(config: TrainingConfig, resumed: dict[str, Any] | None) -> int:
    """The seed given, the resumed run's, or one chosen by the main process: the same on all ranks.

    Raises:
        UsageError: another seed than the run to resume had.
    """
    if resumed is not None:
        seed = resumed.get("seed")
        if type(seed) is not int:
            raise UsageError(f"--resume_from_checkpoint: the checkpoint's manifest has seed {seed!r}, which is none")
        if config.seed not in (None, seed):
            raise UsageError(f"--seed {config.seed}: the run to resume has seed {seed}; leave --seed out")
        return seed
    chosen = [config.seed if config.seed is not None else secrets.randbits(31)]
    return broadcast_object_list(chosen)[0]


def log(accelerator, line: str | None) -> None:
    """A line on stderr, from the main process; None is nothing to say."""
    if line is not None and accelerator.is_main_process:
        print(line, file=sys.stderr, flush=True)


def public_settings(config: TrainingConfig) -> dict[str, Any]:
    """The flags and their values, without secrets."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in SECRET_FLAGS}


def settings_that_go_on(config: TrainingConfig) -> dict[str, Any]:
    """The settings that a run which is resumed takes over: all but those of a start, and secrets."""
    return {name: value for name, value in public_settings(config).items() if name not in flags_that(config, START)}


def save_settings(config: TrainingConfig) -> None:
    """Write `training_config.json`, which `--config` reads back."""
    settings = {"output_dir": config.output_dir, **settings_that_go_on(config)}
    write_whole(Path(config.output_dir) / SETTINGS, json.dumps(settings, indent=2) + "\n")


def make_optimizer(config: TrainingConfig, model: torch.nn.Module, world: int) -> torch.optim.Optimizer:
    """AdamW with the config's settings, over what of the model is trained."""
    scale = world * config.train_batch_size * config.gradient_accumulation_steps if config.scale_lr else 1
    make, options = torch.optim.AdamW, {"fused": True}
    if config.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UsageError("--use_8bit_adam requires bitsandbytes: pip install bitsandbytes") from error
        make, options = AdamW8bit, {}
    return make(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate * scale,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        **options,
    )


def make_lr_scheduler(config: TrainingConfig, optimizer, total_steps: int):
    """The learning rate's schedule over optimizer steps, whatever the processes and the accumulation."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=min(config.lr_warmup_steps, total_steps),
        num_training_steps=total_steps,
    )


def start_trackers(config: TrainingConfig, accelerator, default_project: str) -> None:
    """Open the tracker, with the settings that it can show (scalars; no secrets).

    Raises:
        UsageError: it does not start, without a login for example.
    """
    if config.logger == "none":
        return
    logging.getLogger("torch.utils.tensorboard").setLevel(logging.ERROR)
    settings = {k: v for k, v in public_settings(config).items() if isinstance(v, (int, float, str, bool))}
    project, reason = config.tracker_project_name or default_project, None
    before = log_files(config, project)
    try:
        accelerator.init_trackers(project, config=settings)
    except Exception as error:  # of whatever library
        reason = f"{error.__class__.__name__}: {' '.join(str(error).split())[:200]}"
    reasons = gather_object([reason])
    if any(reasons):
        reason = next(one for one in reasons if one)
        error = UsageError(f"--logger {config.logger} does not start ({reason}); mend that, or pass --logger none")
        end_together(accelerator, error if accelerator.is_main_process else None)
    if accelerator.is_main_process:
        claim_files(config.output_dir, sorted(log_files(config, project) - before))


def log_files(config: TrainingConfig, project: str) -> set[str]:
    """The files in a tracker's folder for a project, where that lies within the output folder; relative to it."""
    folder = Path(config.output_dir).resolve()
    logs = (folder / config.logging_dir / project).resolve()
    if not logs.is_relative_to(folder):
        return set()
    return {path.relative_to(folder).as_posix() for path in logs.rglob("*") if path.is_file()}


def track_image(accelerator, name: str, image, step: int) -> None:
    """A PIL picture in whatever tracker there is."""
    import numpy as np

    def show(tracker):
        if tracker.name == "tensorboard":
            pixels = np.asarray(image.convert("RGB"))
            tracker.writer.add_image(name, pixels, step, dataformats="HWC")
        else:  # wandb and trackio share this interface
            module = importlib.import_module(tracker.name)
            tracker.log({name: module.Image(image)}, step=step)

    track(accelerator, show)


def end_training(accelerator) -> None:
    """Close the trackers, and the connection of the processes."""
    track(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()
    accelerator.end_training()


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
    if accelerator.is_main_process:
        for path in set_aside_later(output_dir, step):
            log(accelerator, f"{path.name} is of a later step; it is removed once this run has got there")
        for name in LOGS:
            truncate_jsonl(output_dir / name, step)
    accelerator.wait_for_everyone()


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
