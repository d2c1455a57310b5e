"""Python programs in processes forked from one that has imported large libraries: seconds faster than new processes.

For tests of what a program does in a process of its own. A program has its own arguments, environment, folder and
streams, and no module of ours or of Hugging Face, which read the environment when they are imported; only a `resident`
program shares those too. That programs start, and what they import, is tested with new processes; with
`NEW_PROCESSES=1` (and `ONEDNN=1`), and where there is no `fork`, all of them are new.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What Diffusers, Transformers and Datasets import first, as far as it reads nothing of their environment
LIBRARIES = (
    "torch._dynamo", "torch._inductor.config", "torch.distributed.tensor", "torch.export", "torch.onnx",
    "torch.testing", "torch.utils.checkpoint", "torch.utils.data", "numpy.testing", "scipy.ndimage", "scipy.stats",
    "pandas", "pyarrow.dataset", "pyarrow.parquet", "PIL.Image", "safetensors.torch", "requests", "jinja2", "dill",
    "multiprocess", "regex", "typer", "matplotlib.figure",
)  # fmt: skip
RESIDENT = ("train_unconditional", "train_text2image", "ddpm_hf.cli.sample", "datasets", "sklearn.model_selection")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Program:
    """A program that runs, in one process or in several side by side.

    Args:
        words: as for `python`: `-c` and code, `-m` and a module, or a script; then its arguments.
        isolated: as with `-I`, where nothing from here can be imported.
        resident: our modules and Hugging Face's are imported already, with the environment of the tests.
        ranks: what the environments of its processes have besides.
    """

    def __init__(
        self,
        *words: Any,
        cwd: str | Path = ROOT,
        env: dict[str, str] | None = None,
        isolated: bool = False,
        resident: bool = False,
        ranks: tuple[dict[str, str], ...] = ({},),
        timeout: float = 300,
    ) -> None:
        self.words, self.timeout = [*map(str, words)], timeout
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err, self._pid = (Path(self._folder.name, name) for name in ("out", "err", "pid"))
        env = {**(os.environ if env is None else env), **ENVIRONMENT}
        asked = {"words": self.words, "cwd": str(cwd), "isolated": isolated, "folder": self._folder.name}
        programs = [{**asked, "env": env | rank} for rank in ranks]
        known = sys.platform == "linux" and not os.environ.get("NEW_PROCESSES")
        self._codes = _server().begin({"resident": resident, "programs": programs}) if known else _begin_new(programs)

    @property
    def pid(self) -> int:
        """Of its process; of the last that began, if there are several."""
        while not (self._pid.is_file() and (text := self._pid.read_text())):
            time.sleep(0.01)
        return int(text)

    def wait(self) -> subprocess.CompletedProcess:
        """What `subprocess.run` returns, with the first exit code that is not 0.

        Raises:
            subprocess.TimeoutExpired: it does not end.
        """
        try:
            codes = self._codes(self.timeout)
        except TimeoutError as error:
            raise subprocess.TimeoutExpired(self.words, self.timeout, *self._said()) from error
        done = subprocess.CompletedProcess(self.words, next((code for code in codes if code), 0), *self._said())
        self._folder.cleanup()
        return done

    def _said(self) -> tuple[str, str]:
        return tuple(path.read_text(encoding="utf-8") for path in (self._out, self._err))


def run(*words: Any, **options: Any) -> subprocess.CompletedProcess:
    """Run a program to its end; options as for `Program`."""
    return Program(*words, **options).wait()


def _begin_new(programs: list[dict[str, Any]]) -> Callable[[float], list[int]]:
    """Begin programs in new processes; what waits for their exit codes."""
    processes = []
    for one in programs:
        command = [sys.executable, *["-I"] * one["isolated"], *one["words"]]
        with open(Path(one["folder"], "out"), "ab") as out, open(Path(one["folder"], "err"), "ab") as err:
            processes.append(
                subprocess.Popen(
                    command, cwd=one["cwd"], env=one["env"], stdin=subprocess.DEVNULL, stdout=out, stderr=err
                )
            )
        Path(one["folder"], "pid").write_text(str(processes[-1].pid))

    def codes(timeout: float) -> list[int]:
        try:
            return [process.wait(timeout) for process in processes]
        except subprocess.TimeoutExpired as error:
            for process in processes:
                process.kill()
            raise TimeoutError from error

    return codes


class _Server:
    """The other end of a process that forks programs, one request at a time."""

    def __init__(self, connection: socket.socket, process: Any) -> None:
        self._connection, self._process = connection, process
        self._lines = connection.makefile("r")

    def begin(self, request: dict[str, Any]) -> Callable[[float], list[int]]:
        self._connection.sendall(json.dumps(request).encode() + b"\n")

        def codes(timeout: float) -> list[int]:
            self._connection.settimeout(timeout)
            try:
                return json.loads(self._lines.readline())
            except TimeoutError:
                _server.cache_clear()  # a line that was half read
                for one in request["programs"]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(Path(one["folder"], "pid").read_text()), signal.SIGKILL)
                raise

        return codes


@functools.cache
def _server() -> _Server:
    """This process's server; it ends with this process."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.shutdown(socket.SHUT_RDWR)
        process.wait()

    atexit.register(end)  # its time is that of the tests
    return _Server(ours, process)


# In the server


def _serve(connection: socket.socket, resident: bool = False) -> None:
    """Answer requests until nobody can send any; a resident server is a fork of the other."""
    if resident:
        sys.path.insert(0, str(ROOT))
    for name in RESIDENT if resident else LIBRARIES:
        importlib.import_module(name)
    if not os.environ.get("ONEDNN"):  # as in the tests themselves
        sys.modules["torch"].backends.mkldnn.enabled = False
    gc.freeze()  # so that forks share the memory
    below = None
    for line in connection.makefile("r"):
        request = json.loads(line)
        if request["resident"] and not resident:
            below = below or _fork_server(connection)
            codes = below.begin(request)(86400)
        else:
            codes = _run(request["programs"], connection)
        connection.sendall(json.dumps(codes).encode() + b"\n")


def _fork_server(connection: socket.socket) -> _Server:
    ours, theirs = socket.socketpair()
    process = os.fork()
    if not process:
        ours.close()
        connection.close()
        _serve(theirs, resident=True)
        os._exit(0)
    theirs.close()
    return _Server(ours, process)


def _run(programs: list[dict[str, Any]], connection: socket.socket) -> list[int]:
    """Run programs side by side: their exit codes."""
    processes = []
    for one in programs:
        process = os.fork()
        if not process:
            connection.close()
            Path(one["folder"], "pid").write_text(str(os.getpid()))
            _become(**one)
            raise SystemExit
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def _become(words: list[str], cwd: str, env: dict[str, str], isolated: bool, folder: str) -> None:
    """Do what `python`, with some words, in a folder and an environment, does."""
    for number, name in enumerate((os.devnull, "out", "err")):
        os.dup2(os.open(Path(folder, name), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if not isolated:
        sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep) if env.get("PYTHONPATH") else []
    kind, *rest = words
    if kind == "-m":
        sys.path[:0] = [] if isolated else [cwd]
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[:0] = [] if isolated else [""]
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.path[:0] = [] if isolated else [str(Path(kind).parent)]
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
