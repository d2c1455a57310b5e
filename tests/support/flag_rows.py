"""Rows that say what a flag changes, runs that are watched for it, and what is looked at."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from tests.support.runs import Run


class Row(NamedTuple):
    """A flag, given on top of usual flags and `more`, and what it changes from what to what.

    Rows of one `group` are given in one run: each looks at what no other of them changes.
    """

    flag: str
    value: Any
    see: Callable[["Seen"], Any]
    before: Any = None  # what is seen without, or a predicate; None: anything
    after: Any = None
    more: dict = {}
    start: str = ""  # of which usual flags
    group: str | None = None
    also: dict = {}  # flags to give along, such as one that would say something else


class Seen(NamedTuple):
    """What a run did: what it left on disk and said, and what it handed on."""

    run: Run
    batches: list[dict]  # as compute_loss got them
    calls: list[tuple[str, Any]]  # what the spies saw

    def spied(self, name: str) -> list:
        return [what for who, what in self.calls if who == name]

    def line(self, name: str) -> str:
        """A line of --dry_run."""
        return next(line for line in self.run.out.splitlines() if line.split()[:1] == [name])

    def distinct_images(self) -> int:
        return len({image.numpy().tobytes() for batch in self.batches for image in batch["images"]})


def remembered(observe: Callable[[dict, Path], Seen], root: Path) -> Callable[[dict], Seen]:
    """`observe` of flags and a folder, as a function of the flags that makes no run twice."""

    @functools.cache
    def seen(flags: tuple) -> Seen:
        return observe(dict(flags), root / str(seen.cache_info().misses))

    return lambda flags: seen(tuple(flags.items()))


def fits(got, want) -> bool:
    """Whether a value is what a row says, or satisfies it; None is anything."""
    return want is None or (bool(want(got)) if callable(want) else got == want)


def steps(seen):
    return seen.run.records()[-1]["step"]


def rates(seen):
    return [record["lr"] for record in seen.run.records()]


def digest(part="."):
    def of(seen):
        (path,) = (seen.run.folder / part).glob("*.safetensors")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return of


def checkpoints(seen):
    return sorted(path.name for path in seen.run.folder.glob("checkpoint-*"))


def grids(seen):
    return sorted(path.name for path in seen.run.folder.glob("samples/step-*.png"))


def last_grid(seen):
    return Image.open(seen.run.folder / "samples" / grids(seen)[-1])


def logs(seen):
    return sorted({str(Path(name).parent) for name in seen.run.files() if "tfevents" in name})


def scheduler(key):
    return lambda seen: seen.run.json("scheduler/scheduler_config.json").get(key)


def adam(key):
    def read(seen):
        path = seen.run.folder / checkpoints(seen)[-1] / "optimizer.bin"
        return torch.load(path, weights_only=True)["param_groups"][0][key]

    return read


def has(name):
    return lambda seen: any(name in file for file in seen.run.files())
