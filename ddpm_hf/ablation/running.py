"""Runs chains of commands, one after another or several at once, each command a process of its own."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from tqdm.auto import tqdm

from ..common.errors import UsageError, one_line
from ..common.layout import METRICS_FILE
from ..common.machine import usable_cores
from .plan import SCRIPTS
from .tasks import LOG, Chain, Task

LOCK = "lock"
TRAININGS = (*SCRIPTS, "train-classifier")
PAUSE = 0.2  # seconds between looks at the processes


class Process(Protocol):
    """What `start` returns: as `subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask it to save and end."""

    def wait(self) -> int:
        """Wait for its end."""


class Failure(NamedTuple):
    """A command that did not succeed."""

    title: str
    reason: str
    log: Path


@dataclasses.dataclass
class _Running:
    chain: Chain
    task: Task
    process: Process
    slot: int


def run_chains(
    chains: Sequence[Chain],
    processes: int,
    start: Callable[[Task, int], Process],
    finished: Callable[[Chain], None] = lambda chain: None,
) -> list[Failure]:
    """Run what is not done of the chains. A chain whose command fails ends there; the others go on.

    Args:
        processes: how many commands run at once.
        start: begins a command in one of so many slots.
        finished: is called after each command that succeeded.

    Raises:
        BaseException: what stopped this process, once the commands have saved and ended.
    """
    waiting, running, failures = deque(chain for chain in chains if not chain.done), list[_Running](), []
    total, done = len(chains), sum(chain.done for chain in chains)
    often, shown = 1.0 if sys.stderr.isatty() else 60.0, -math.inf  # seconds
    with tqdm(total=total, initial=done, unit="cell", desc="cells", disable=total == done) as bar:
        try:
            while waiting or running:
                free = [slot for slot in range(processes) if slot not in {one.slot for one in running}]
                while waiting and free:
                    chain = waiting.popleft()
                    task = next((task for task in chain.tasks if not task.done), None)
                    if task is None:  # another ablation of this folder did it
                        finished(chain)
                        bar.update(1)
                        continue
                    slot = free.pop(0)
                    running.append(_Running(chain, task, start(task, slot), slot))
                if time.monotonic() - shown > often:
                    shown = time.monotonic()
                    bar.set_postfix_str("; ".join(progress(one.task) for one in running)[:150])
                ended = [one for one in running if one.process.poll() is not None]
                for one in ended:
                    running.remove(one)
                    reason = _outcome(one.task, one.process.wait())
                    if reason is not None:
                        failures.append(Failure(one.task.title, reason, one.task.folder / LOG))
                    else:
                        finished(one.chain)
                        if not one.chain.done:
                            waiting.appendleft(one.chain)
                    bar.update(one.chain.done)
                if not ended and running:
                    time.sleep(PAUSE)
        finally:
            for one in running:
                one.process.terminate()
            for one in running:
                one.process.wait()
    return failures


def _outcome(task: Task, code: int) -> str | None:
    """Why a command that has ended did not succeed; None if it did, and its result is written."""
    if code == 0:
        try:
            if not task.done:  # else another ablation of this folder did it
                task.finish()
            return None
        except (ValueError, OSError) as error:
            return one_line(error)
    return f"exit code {code}: {last_line(task.folder / LOG)}"


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    errors = [line for line in lines if "error:" in line.lower()]
    return one_line((errors or [line for line in lines if line] or ["no output"])[-1], 300)


def progress(task: Task) -> str:
    """What a command does, and of a training how far it is."""
    record = _last_record(task.watch) if task.watch else None
    if not record:
        return task.title
    loss = record.get("loss")
    return f"{task.title}, step {record['step']:,}" + (f", loss {loss:.3g}" if isinstance(loss, float) else "")


def _last_record(folder: Path) -> dict[str, Any] | None:
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 4096))
        lines = file.read().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(complete[-1])
    return None


class Nothing:
    """A process that had nothing to do."""

    def poll(self) -> int:
        """Success."""
        return 0

    def wait(self) -> int:
        """Success."""
        return 0

    def terminate(self) -> None:
        """It has ended."""


def with_output(task: Task, folder: Path) -> Task:
    """A training with another output folder."""
    index = task.words.index("--output_dir") + 1
    return dataclasses.replace(task, words=[*task.words[:index], str(folder), *task.words[index + 1 :]])


class Launcher:
    """Starts commands as processes of this machine.

    Args:
        root: the folder of the scripts and the package.
        launch: words for `accelerate launch`; without any, a script is run by Python alone.
        processes: how many run at once: they share the cores, and where there are several GPUs, each has one.
        gpus: of this machine.
        say: shows a line.
    """

    def __init__(
        self,
        root: Path,
        launch: Sequence[str],
        processes: int,
        gpus: int,
        say: Callable[[str], None],
    ):
        self.root, self.launch, self.processes, self.gpus, self.say = root, launch, processes, gpus, say

    @property
    def threads(self) -> int:
        """Cores of each command."""
        return max(1, usable_cores() // self.processes)

    def settled(self, task: Task) -> list[str]:
        """A task's words, with its share of the cores: a training takes all of them unless it is told."""
        told = any(word.partition("=")[0] == "--cpu_threads" for word in task.words)
        share = task.words[0] in TRAININGS and self.processes > 1 and not told
        return [*task.words, *(["--cpu_threads", str(self.threads)] if share else [])]

    def words(self, task: Task) -> list[str]:
        """The command line, after the interpreter."""
        command, *rest = self.settled(task)
        if command in SCRIPTS and not self.launch:
            return [str(self.root / f"{SCRIPTS[command]}.py"), *rest]
        if command in SCRIPTS:
            return ["-m", "ddpm_hf", command, *self.launch, "--", *rest]
        if command == "evaluate" and self.launch:
            return ["-m", "accelerate.commands.launch", *self.launch, "-m", "ddpm_hf", command, *rest]
        return ["-m", "ddpm_hf", command, *rest]

    def rehearse(self, task: Task, folder: Path) -> str:
        """What a training's --dry_run prints.

        Args:
            folder: stands for its output folder.

        Raises:
            UsageError: the script refuses it.
        """
        words = [sys.executable, *self.words(with_output(task, folder)), "--dry_run"]
        done = subprocess.run(words, env=self.environment(0), capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1].partition("error: ")
            raise UsageError(f"{task.title}: {reason[2] or reason[0]}")
        return done.stdout

    def environment(self, slot: int) -> dict[str, str]:
        """Of a command in a slot."""
        environment = dict(os.environ)
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(self.root), *([path] if path else [])])
        if self.processes > 1:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
            if self.gpus > 1:
                visible = environment.get("CUDA_VISIBLE_DEVICES", "") or ",".join(map(str, range(self.gpus)))
                environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % self.gpus]
        return environment

    def __call__(self, task: Task, slot: int) -> Process:
        """Begin a command; it waits for one in the same folder that an earlier ablation left behind."""
        task.folder.mkdir(parents=True, exist_ok=True)
        with _locked(task.folder, self.say) as handles, open(task.folder / LOG, "ab") as log:
            if task.done:  # by the process that this one waited for
                return Nothing()
            log.write(f"\n$ ddpm-hf {' '.join(task.words)}\n".encode())
            log.flush()
            return self.begin(task, slot, log, handles)

    def begin(self, task: Task, slot: int, log: IO[bytes], handles: Sequence[int]) -> Process:
        """A new process.

        Args:
            log: what it prints goes there.
            handles: that it inherits.
        """
        tied = [str(Path(__file__).with_name("tied.py"))] if sys.platform == "linux" else []
        options: dict[str, Any] = {"pass_fds": handles} if handles else {}
        return subprocess.Popen(
            [sys.executable, *tied, *self.words(task)],
            env=self.environment(slot),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **options,
        )


@contextlib.contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[tuple[int, ...]]:
    """The folder's lock, which the process that inherits the handles holds until it ends.

    Without it, a command whose ablation was killed, and which still saves, would write beside its successor.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield ()
        return
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        said = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    say(f"{folder}: waits for the end of an earlier process in it")
                said = True
                time.sleep(PAUSE)
        yield (handle,)
    finally:
        os.close(handle)
