"""`ddpm-hf train` and `ddpm-hf train-text2image`: the training scripts by `accelerate launch`, also after pip install.

Accelerate's flags come first, up to `--`: `ddpm-hf train --num_processes 2 -- --train_data_dir photos`.
"""

import contextlib
import logging
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import typer

ROOT = Path(__file__).parents[2]  # a clone, or site-packages: the scripts are installed next to the package
# The most common flags that only Accelerate has
LAUNCHER_FLAGS = (
    "--multi_gpu", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port",
    "--config_file", "--gpu_ids", "--cpu", "--use_fsdp", "--use_deepspeed", "--deepspeed_config_file",
    "--dynamo_backend", "--num_cpu_threads_per_process",
)  # fmt: skip


def train(context: typer.Context) -> None:
    """Train a model on your images, unconditionally or by class: `train_unconditional.py` by `accelerate launch`."""
    raise typer.Exit(launch("train_unconditional.py", "ddpm-hf train", context.args))


def train_text2image(context: typer.Context) -> None:
    """Train text to image on captioned images: `train_text2image.py` by `accelerate launch`."""
    raise typer.Exit(launch("train_text2image.py", "ddpm-hf train-text2image", context.args))


def launch(script: str, command: str, arguments: list[str]) -> int:
    """Run a script with Accelerate's launcher, in this interpreter's environment; return its exit code.

    Args:
        arguments: the script's; or the launcher's, `--`, the script's.

    Raises:
        ValueError: flags of the launcher without `--`, or a launcher's flag that it refuses.
    """
    launcher_arguments, divided, rest = split_at_dashes(arguments)
    for word in rest:
        if not divided and word.partition("=")[0].replace("-", "_").replace("__", "--", 1) in LAUNCHER_FLAGS:
            raise ValueError(
                f"{word} is a flag of `accelerate launch`: give its flags first, then --, then the script's flags,"
                f" as in `{command} --num_processes 2 -- --train_data_dir photos`"
            )
    path = str(ROOT / script)
    if "--help" in rest or "-h" in rest:
        print(f"{command} [flags of `accelerate launch` --] [flags of {script}, below]\n", flush=True)
        return show_help(path)
    with forward_signals():
        return accelerate_launch([*launcher_arguments, path, *rest])


def show_help(path: str) -> int:
    """Print a script's help; return its exit code."""
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def split_at_dashes(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    """The arguments before and after the first `--`, and whether there is one; without it all are after.

    >>> split_at_dashes(["--cpu", "--", "--seed", "1"]), split_at_dashes(["--seed", "1"])
    ((['--cpu'], True, ['--seed', '1']), ([], False, ['--seed', '1']))
    """
    if "--" not in arguments:
        return [], False, arguments
    index = arguments.index("--")
    return arguments[:index], True, arguments[index + 1 :]


def accelerate_launch(arguments: list[str]) -> int:
    """Run `accelerate launch` in this process; return the script's exit code.

    The launcher's own command always ends with 1 and a traceback if the script fails.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # ten lines of warnings about defaults that are intended
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except CalledProcessError as error:
        return _exit_code(error.returncode)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return _exit_code(-int(error.sigval))
    return 0


def _exit_code(code: int) -> int:
    """The shell's convention: 128 + n for a process that signal n ended."""
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def forward_signals() -> Iterator[None]:
    """Within, SIGINT and SIGTERM are forwarded to the child processes, which save and end."""
    import psutil

    def forward(number: int, frame: Any) -> None:
        for child in psutil.Process(os.getpid()).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # outside of the main thread signals cannot be handled
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
