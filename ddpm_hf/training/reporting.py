"""What a training says while it runs and at its end: on stderr, from the main process alone.

In a terminal or a notebook a progress bar; elsewhere, as in a file or under a batch system, a line for each logged
step, picture and checkpoint.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm.auto import tqdm

from ..common.arguments import SHORTER_TRAINING
from .plan import StepPlan
from .run import Run
from .sessions import hardware
from .state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

FEW_STEPS, FEW_SECONDS = 10, 5.0  # what is measured before the time of a step is said
LONG_ON_A_CPU = 12 * 3600  # seconds of a training after which another model is suggested
NAMES = {"validation_loss": "held-out loss"}


def duration(seconds: float) -> str:
    """A length of time in its two largest units.

    >>> [duration(seconds) for seconds in (0.4, 75, 7300, 200_000)]
    ['0 s', '1 min 15 s', '2 h 1 min', '2 days 7 h']
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} days {seconds % 86400 // 3600} h"


def pace(seconds: float, steps: int) -> str:
    """The time of a step, and of a training.

    >>> pace(0.25, 1000)
    '0.25 s a step, 4 min 10 s for 1,000 steps'
    """
    return f"{seconds:.2g} s a step, {duration(seconds * steps)} for {steps:,} steps"


def table(lines: dict[str, str]) -> str:
    """Names and values as aligned lines."""
    width = max(10, *map(len, lines))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in lines.items())


def precision(accelerator: "Accelerator") -> str:
    """What the model computes in."""
    tf32 = accelerator.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    half = accelerator.mixed_precision
    return f"float32, autocast to {half}" if half != "no" else "tf32" if tf32 else "float32"


def run_lines(run: Run, plan: StepPlan, parameters: int, image_bytes: int = 0) -> dict[str, str]:
    """What every training says at its start: steps, batch, device, output, and memory before its activations.

    Args:
        parameters: how many are trained.
        image_bytes: of those that are kept decoded.
    """
    flags = run.flags
    moments = {"muon": 1}.get(flags.optimizer, 2)  # of the weights' size; without SOAP's bases
    averages = flags.use_ema + 2 * bool(flags.ema_snapshot_steps)
    kept, name = 2 + moments + averages, "Adam" if flags.optimizer == "adamw" else flags.optimizer
    lines = {}
    if flags.optimizer != "adamw":
        waits = "; steps wait for the GPU, without a CUDA graph of the update" * (run.device.type == "cuda")
        lines["optimizer"] = f"{flags.optimizer}{waits}"
    epochs = "" if plan.samples is None else f" ({plan.steps_per_epoch:,} an epoch)"
    return {
        "batch": f"{plan.batch_size} × {plan.world} process{'es' if plan.world > 1 else ''} × {plan.accumulation}"
        f" accumulated = {plan.global_batch * plan.accumulation}",
        "steps": f"{plan.total:,}{epochs}",
        "device": f"{hardware(run.accelerator)}, {precision(run.accelerator)}",
        "output": f"{run.folder.resolve()}, tracker {flags.logger}, seed {run.seed}",
        **lines,
        "memory": f"{kept * parameters * 4 / 2**20:,.0f} MiB for weights, gradients, {name}"
        f"{' and EMA' if averages else ''}, {image_bytes / 2**20:,.0f} MiB for images; activations on top",
    }


def parameter_count(model: torch.nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def ending(
    run: Run,
    state: TrainingState,
    program: str,
    finished: bool,
    sample: Sequence[str] | None = None,
    looks: str | None = None,
) -> str:
    """The last lines of a training: what came of it, how to look at it, and how to go on.

    Args:
        program: the command that goes on with it, without flags.
        finished: whether all steps were trained.
        sample: the command that samples from the folder that follows it, and options for after that.
        looks: what else there is to do with a finished model.
    """
    folder = run.folder
    seconds = sum(session.get("seconds", 0) for session in state.sessions.until(state.step))
    losses = ", ".join(f"{NAMES.get(name, name)} {value:.4g}" for name, value in state.figures.items())
    where = folder if finished else folder / f"checkpoint-{state.step}"
    lines = {"trained": f"{state.step:,} steps in {duration(seconds)}{': ' if losses else ''}{losses}"}
    if finished or where.is_dir():
        lines["saved in" if finished else "checkpoint"] = str(where)
        if sample:
            lines["sample"] = shlex.join([*sample[:2], str(where), *sample[2:]])
        go_on = [*program.split(), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        more = twice_as_long(run, state) if finished else []
        lines["train on" if finished else "go on"] = shlex.join([*go_on, *more])
    return table(lines | ({"use": looks} if looks and finished else {}))


def twice_as_long(run: Run, state: TrainingState) -> list[str]:
    """The flags of a training of twice the steps, also where fewer were asked for than the resumed run had."""
    flags, before = run.flags, run.resumed and run.resumed.manifest["step"]
    if flags.max_train_steps or state.step == before:
        return ["--max_train_steps", str(2 * max(flags.max_train_steps or 0, state.step))]
    return ["--num_epochs", str(2 * flags.num_epochs)]


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes, that this process has used: of a GPU its tensors', else all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def shows_bars() -> bool:
    """Whether stderr shows a progress bar in place: a terminal, or a notebook."""
    return sys.stderr.isatty() or any("notebook" in base.__module__ for base in tqdm.__mro__)


def task(what: str, total: int, speaks: bool) -> tqdm:
    """The progress of a task before training: a bar, or a line that it has begun.

    Args:
        speaks: whether this process says anything of it.
    """
    bars = shows_bars()
    if speaks and not bars:
        print(f"{what}: {total:,}", file=sys.stderr, flush=True)
    return tqdm(total=total, desc=what, disable=not speaks or not bars)


class Progress:
    """A training's progress: a bar, or lines; and once, after a few steps, how long it will take.

    Args:
        first_step: where the training begins, or goes on.
        advice: what to do where this is long on a CPU.
    """

    def __init__(self, accelerator: "Accelerator", total_steps: int, first_step: int, advice: str = SHORTER_TRAINING):
        self.speaks, self.on_cpu = accelerator.is_main_process, accelerator.device.type == "cpu"
        self.total, self.step, self.advice = total_steps, first_step, advice
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True,
            disable=not (self.speaks and shows_bars()),
        )  # fmt: skip
        self.shown: dict[str, str] = {}
        self.measured = 0  # steps after the first, which also warms up
        self.since = time.perf_counter()  # the end of the first step
        self.paused = 0.0  # seconds since then that went into pictures and files
        self.said_pace = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def done(self, step: int) -> None:
        """A step has been trained."""
        if self.measured == 0:
            self.since, self.paused = time.perf_counter(), 0.0
        self.measured, self.step = self.measured + 1, step
        self.bar.update(1)
        training = time.perf_counter() - self.since - self.paused
        steps = self.measured - 1
        if not self.said_pace and steps and (steps >= FEW_STEPS or training >= FEW_SECONDS):
            self.said_pace = True
            self.say_pace(training / steps)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Within, time is not that of steps."""
        begin = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begin

    def say_pace(self, seconds: float) -> None:
        """How long it will take, and what else to do where that is long."""
        left = seconds * (self.total - self.step)
        self.say(pace(seconds, self.total))
        if self.on_cpu and left > LONG_ON_A_CPU:
            self.say(f"warning: this takes long on a CPU: {self.advice}")

    def time_left(self) -> str:
        """How long the remaining steps take, with pictures and files, as far as is known."""
        steps = self.measured - 1
        if steps < 1 or self.step >= self.total:
            return ""
        return f"{duration((time.perf_counter() - self.since) / steps * (self.total - self.step))} left"

    def figures(self, epoch: int, record: dict[str, Any], lr: float, images_per_second: float) -> None:
        """Show the losses and the like of this step."""
        self.shown |= {name: f"{value:.3g}" for name, value in record.items() if "loss" in name}
        self.bar.set_postfix(epoch=epoch, **self.shown, lr=f"{lr:.1e}")
        said = [f"{NAMES.get(name, name)} {value:.4g}" for name, value in record.items()]
        rate = f"{images_per_second:.3g} images/s"
        parts = [f"epoch {epoch}", *said, f"lr {lr:.1e}", rate, self.time_left()]
        self.note("  ".join(part for part in parts if part))

    def note(self, what: str) -> None:
        """A line about this step, where no bar is shown."""
        if self.bar.disable:
            self.say(f"step {self.step:>{len(f'{self.total:,}')},}/{self.total:,}  {what}")

    def say(self, line: str) -> None:
        """A line, above the bar where there is one."""
        if self.speaks:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()
