"""What a script does before the loop: processes and threads, seed, output folder, optimizer, EMA, tracker."""

import dataclasses
import importlib.util
import json
import logging
import os
import secrets
import shutil
import sys
from pathlib import Path
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
    checkpoint_step,
    discard,
    find_checkpoint,
    remove_unfinished,
    set_aside_later,
    truncate_jsonl,
    write_whole,
)
from .config import APPLIED, FIXED, SECRET_FLAGS, START, TrainingConfig, UsageError, flags_that
from .faults import end_together, track
from .launcher import check_launcher, launched_precision, unused_settings
from .loop import LOGS, Meter, StepPlan, TrainingState, let_old_go, load_checkpoint, register_model_hooks
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
    torch.set_num_threads(config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // local))
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
    if kind == DistributedType.FSDP and "non_ema" in config.save_variants:
        raise UsageError("--save_variants non_ema: not with FSDP; the checkpoints' unet/ holds these weights")
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
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(
        flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16")
    )


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.is_file() else ""


# What shows that a folder holds a run, and what else --overwrite_output_dir removes of one: the checkpoints first, so
# that, where that is cut off, those that are left still have all that their run logged
RUN_FILES = (
    "checkpoint-*", "metrics.jsonl", "timings.jsonl", "training_config.json", "model_index.json", "config.json",
    "samples",
)  # fmt: skip
PUBLISHED_FILES = (
    "README.md", "unet", "scheduler", "vae", "text_encoder", "tokenizer", "*_ddpm_hf.py",
    "diffusion_pytorch_model.safetensors", "run.json", "evaluation.json", "assets",
)  # fmt: skip


def find_run(config: TrainingConfig, accelerator) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its state, or None; writes nothing.

    Raises:
        UsageError: an earlier run's files are there and neither resuming nor overwriting was asked for; a checkpoint
            that does not exist or is broken.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file; name a folder")
    if config.overwrite_output_dir and config.resume_from_checkpoint:
        raise UsageError("--overwrite_output_dir would remove what --resume_from_checkpoint wants; give one of them")
    if config.resume_from_checkpoint:
        found = find_checkpoint(folder, config.resume_from_checkpoint, lambda line: log(accelerator, line))
        if found is None:
            log(accelerator, f"no checkpoint in {folder} yet: training from the beginning")
        return found
    there = sorted({path.name for pattern in RUN_FILES for path in folder.glob(pattern)}) if folder.is_dir() else []
    if there and not config.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {folder} holds an earlier run ({', '.join(there[:4])}); go on with"
            " --resume_from_checkpoint latest, replace it with --overwrite_output_dir, or name another folder"
        )
    return None


def _earlier_run(config: TrainingConfig, folder: Path) -> list[Path]:
    """What --overwrite_output_dir removes: a run's own files, and its logs if they lie within the folder."""
    found = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
        found += [path for pattern in PUBLISHED_FILES for path in folder.glob(pattern)]
    logs = (folder / config.logging_dir).resolve()
    if logs.is_dir() and logs.is_relative_to(folder.resolve()) and logs != folder.resolve():
        found.append(logs)
    return found


def claim_output_dir(config: TrainingConfig, accelerator) -> None:
    """Make the output folder this run's, once all else has been checked; an earlier run goes only now.

    Raises:
        UsageError: a folder that cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            write_whole(folder / ".writable", "")
            (folder / ".writable").unlink()
            remove_unfinished(folder)
            for path in _earlier_run(config, folder) if config.overwrite_output_dir else ():
                if checkpoint_step(path) >= 0:
                    discard(path)
                else:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be written: {error.strerror}; name another folder") from error
    accelerator.wait_for_everyone()


def check_unchanged(config: TrainingConfig, resumed: dict[str, Any] | None) -> None:
    """Raise UsageError for a setting that the run to resume was built on, and that is another one now.

    Args:
        resumed: the state of the checkpoint, or None.
    """
    before = (resumed or {}).get("settings", {})
    for name in flags_that(config, FIXED):
        was, now = before.get(name), getattr(config, name)
        if name in before and was != now and not _was_moved(was, now):
            raise UsageError(
                f"--{name} {now}: the run to resume was trained with {was}, which its weights depend on; leave the"
                " flag out, or train anew in another --output_dir"
            )


def _was_moved(was: Any, now: Any) -> bool:
    """Whether two names may be of one local file or folder: of which the first is there no more, or the same."""
    if not (isinstance(was, str) and isinstance(now, str) and os.path.exists(now)):
        return False
    return not os.path.exists(was) or os.path.samefile(was, now)


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
        saved = dict(json.loads((checkpoint / name / "config.json").read_text()))
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
    """The seed given, the resumed run's, or one drawn by the main process: the same on all ranks.

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
    drawn = [config.seed if config.seed is not None else secrets.randbits(31)]
    return broadcast_object_list(drawn)[0]


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
            raise UsageError("--use_8bit_adam wants bitsandbytes: pip install bitsandbytes") from error
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
        UsageError: it does not start, for want of a login for example.
    """
    if config.logger == "none":
        return
    logging.getLogger("torch.utils.tensorboard").setLevel(logging.ERROR)
    settings = {k: v for k, v in public_settings(config).items() if isinstance(v, (int, float, str, bool))}
    reason = None
    try:
        accelerator.init_trackers(config.tracker_project_name or default_project, config=settings)
    except Exception as error:  # of whatever library
        reason = f"{error.__class__.__name__}: {' '.join(str(error).split())[:200]}"
    reasons = gather_object([reason])
    if any(reasons):
        reason = next(one for one in reasons if one)
        error = UsageError(f"--logger {config.logger} does not start ({reason}); mend that, or pass --logger none")
        end_together(accelerator, error if accelerator.is_main_process else None)


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
    """All that a run consists of, prepared by Accelerate, and taken up from a checkpoint if one was found.

    Args:
        parts: what of the model is saved, by the name of its folder; by default the model, as `unet`.
    """
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
    forget_later(Path(config.output_dir), state.step, accelerator)
    if found is not None:  # the run may have been killed before it could
        let_old_go(accelerator, Path(config.output_dir), config.checkpoints_total_limit)
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
