"""Exit codes, and one-line messages for errors and stops."""

import _thread
import contextlib
import difflib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand

from ..common.arguments import synonyms
from ..common.errors import one_line
from ..common.files import expand_home
from ..common.machine import drop_output

# The names of our options and commands in other tools
OPTIONS = synonyms("""
--num-solutions: solutions
--image: input input-dir
--mask: mask-image
--sigma-y: sigma noise noise-level sigma-noise
--factor: upscale
--num-images: num-samples samples n-samples n count number images num num-images-per-prompt eval-batch-size total
--batch-size: batch bs batchsize train-batch-size per-device-batch-size sample-batch-size
--out: output output-dir out-dir outdir output-path o save-dir save-path dir sample-dir
--steps: num-inference-steps inference-steps num-steps ddim-steps sampling-steps sample-steps timestep-respacing
--sampler: scheduler method solver sampling-method sampler-name
--class: label labels class-label class-labels classes class-id class-name y
--prompt: text prompts caption p
--negative-prompt: negative neg-prompt negative-prompts uncond-prompt
--guidance-scale: guidance cfg cfg-scale scale w guidance-strength
--seed: random-seed manual-seed s
--precision: dtype mixed-precision torch-dtype fp16 bf16 half use-fp16
--device: gpu cuda cpu accelerator no-cuda
--format: npz file-format image-format output-format
--progressive: gif frames chain intermediate save-intermediate
--grid-only: grid no-images only-grid
--token: hub-token hf-token use-auth-token auth-token api-key
--revision: tag branch commit hub-revision
--private: hub-private-repo private-repo
--license: hub-license
--message: commit-message m
--variant: save-variants variants
--dry-run: preview check no-upload
--space: name space-id repo repo-id hub-model-id
--example: examples
--to: dst destination target dump-path
--from: source format original type
--flags: model-flags arguments model-args
--labels: class-names names
""")
COMMANDS = synonyms("""
sample: generate draw infer inference predict image images samples
train: fit train-unconditional finetune fine-tune launch run train-ddpm
train-text2image: train-text-to-image text2image train-text
restore: inpaint inpainting super-resolution superres upscale colorize deblur denoise repaint
push: upload publish push-to-hub share
push-space: space app demo gradio deploy
convert: import export migrate transplant
ablate: ablation ablations grid-search sweep table experiment
info: show describe inspect print summary status
presets: models list list-presets model-presets
--version: version
""")


class PassThrough(TyperCommand):
    """A command that passes all of its arguments on, `--help` and `--` included."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse nothing."""
        return super().parse_args(ctx, ["--", *args])


class Terminated(BaseException):
    """SIGTERM."""


class StoppedError(Exception):
    """The user, or the system, stopped the command.

    Args:
        code: the exit code, 128 and the signal's number.
        remaining: what remains on disk or on the Hub.
    """

    def __init__(self, code: int, remaining: str = ""):
        super().__init__(remaining)
        self.code, self.remaining = code, remaining


@contextlib.contextmanager
def reports_stop(remaining: Callable[[], str]) -> Iterator[None]:
    """Within, Ctrl-C or SIGTERM ends with one line that says what remains of the work."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError(128 + signal.SIGINT, remaining()) from error
    except Terminated as error:
        raise StoppedError(128 + signal.SIGTERM, remaining()) from error


def run(app: typer.Typer, words: list[str]) -> int:
    """Run a command line; return its exit code. An error that the user can fix is one line and exit code 2."""
    try:
        with _terminating(), _never_lost():
            code = app([expand_home(word) for word in words], standalone_mode=False)
            sys.stdout.flush()
    except Terminated:
        return _stopped(StoppedError(128 + signal.SIGTERM))
    except (KeyboardInterrupt, typer.Abort):
        return _stopped(StoppedError(128 + signal.SIGINT))
    except StoppedError as stopped:
        return _stopped(stopped)
    except BrokenPipeError:  # such as `ddpm-hf info FOLDER | head`
        drop_output()
        return 1
    except (ValueError, OSError) as error:
        return _failed(str(error))
    except Exception as error:
        if hasattr(error, "format_message"):  # what typer raises for words that it cannot parse
            return _failed(unknown_name(error) or error.format_message())
        from ..training.faults import out_of_memory

        if not out_of_memory(error):
            raise
        return _failed("out of memory; give a smaller --batch-size, or --precision bf16")
    if code == 128 + signal.SIGINT:  # typer's own answer to KeyboardInterrupt
        return _stopped(StoppedError(code))
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`; without effect outside of the main thread."""

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _never_lost() -> Iterator[None]:
    """Within, a signal whose exception Python drops, as it does in a destructor, is sent again soon after."""
    before, numbers = sys.unraisablehook, {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}
    timers: list[threading.Timer] = []

    def hook(dropped: Any) -> None:
        if number := numbers.get(dropped.exc_type):
            # on Windows, os.kill would end the process at once
            timers.append(threading.Timer(0.1, _thread.interrupt_main, (number,)))
            timers[-1].start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


def _stopped(stopped: StoppedError) -> int:
    by = "SIGTERM" if stopped.code == 128 + signal.SIGTERM else "Ctrl-C"
    print(f"\nddpm-hf: stopped by {by}{stopped.remaining and f'; {stopped.remaining}'}", file=sys.stderr)
    return stopped.code


def _failed(message: str) -> int:
    if not message.strip():  # without a command, the help is the message
        return 2
    print(f"ddpm-hf: error: {one_line(message)} (see --help)", file=sys.stderr)
    return 2


def unknown_name(error: Exception) -> str | None:
    """The message for an unknown option or command, with the closest known one; None for another error."""
    context, message = getattr(error, "ctx", None), getattr(error, "message", "")
    if context is None:
        return None
    option = getattr(error, "option_name", None)
    if option and message.startswith("No such option"):
        known = {one for parameter in context.command.params for one in parameter.opts if one[0] == "-"}
        return f"no such option: {option}.{_hint(option, known, OPTIONS)}"
    command = re.match(r"No such command '(.*?)'", message)
    if command:
        known = {*getattr(context.command, "commands", ()), "--version"}
        return f"no such command: {command[1]}.{_hint(command[1], known, COMMANDS)}"
    return None


def _hint(unknown: str, known: set[str], synonyms: dict[str, str]) -> str:
    """The known name that an unknown one stands for in other tools, or else resembles."""
    word = unknown.lower().replace("_", "-")
    meant = synonyms.get(word.strip("-"))
    near = difflib.get_close_matches(word, sorted(known), n=1)
    meant = meant if meant in known else near[0] if near else None
    return f" Did you mean {meant}?" if meant else ""
