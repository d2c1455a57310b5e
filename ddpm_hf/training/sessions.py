"""A run's history: one session from each start to the next stop, kept in its checkpoints and told by its card."""

import datetime
import functools
import importlib.metadata
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "datasets")


def hardware(accelerator: "Accelerator") -> str:
    """What computes, such as `2 × NVIDIA A100-SXM4-80GB` or `CPU, 2 threads of Intel(R) Xeon(R) Processor`."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} × {torch.cuda.get_device_name(accelerator.device)}"
    threads = torch.get_num_threads() * accelerator.num_processes
    return f"{accelerator.device.type.upper()}, {threads} thread{'s' if threads > 1 else ''} of {processor()}"


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the packages that a training rests on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


class Sessions:
    """The sessions of a run; the last is this process's."""

    def __init__(self, accelerator: "Accelerator"):
        self.before: list[dict[str, Any]] = []
        self.started = time.perf_counter()
        self.current = {
            "first_step": 0,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "hardware": hardware(accelerator),
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
            "versions": dict(versions()),
        }

    def note(self, **facts: Any) -> None:
        """Add to what is told of this session."""
        self.current |= facts

    def since(self, fact: str) -> int:
        """The step after which a fact, as `note` has it, has been what it is now; -1 for the whole run."""
        since = self.current["first_step"]
        for session in reversed(self.before):
            if session.get(fact) != self.current.get(fact):
                return since
            since = session["first_step"]
        return -1

    def resume(self, before: list[dict[str, Any]], step: int) -> None:
        """Follow those that a checkpoint at `step` tells of."""
        self.before, self.current["first_step"] = before, step

    def until(self, step: int) -> list[dict[str, Any]]:
        """All sessions that trained, up to a step, with the seconds that each took."""
        current = {**self.current, "last_step": step, "seconds": round(time.perf_counter() - self.started, 1)}
        return [*self.before, current] if step > current["first_step"] or not self.before else self.before
