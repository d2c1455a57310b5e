"""The `ddpm-hf` command: a file for each of its commands.

Heavy libraries are imported when a command runs, so that `--help` is quick.
"""

import sys

import typer

from ..training.machine import accept_any_text
from ..training.paths import expand_home
from . import push, push_space, sample, train_classifier

app = typer.Typer(
    help="Denoising diffusion in the Hugging Face ecosystem: look at what a trained model draws.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
    """Denoising diffusion in the Hugging Face ecosystem: look at what a trained model draws."""


UNDERSCORES_TOO = {"token_normalize_func": lambda token: token.replace("_", "-")}  # --num_images is --num-images
EVERYTHING_AFTER = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command(context_settings=UNDERSCORES_TOO)(sample.sample)
app.command(context_settings=UNDERSCORES_TOO)(push.push)
app.command("push-space")(push_space.push_space)
app.command("train-classifier", context_settings=EVERYTHING_AFTER, add_help_option=False)(
    train_classifier.train_classifier
)


def main() -> None:
    """The entry point: what the user can mend is one line and exit code 2."""
    accept_any_text()
    try:
        app([expand_home(word) for word in sys.argv[1:]], standalone_mode=False)
    except typer.Abort:
        raise SystemExit(130) from None
    except (typer.BadParameter.__mro__[2], ValueError, OSError) as error:  # typer's own ClickException
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message.strip():  # without a command, the help is the message
            from ..training.config import one_line

            print(f"ddpm-hf: error: {one_line(message)} (see --help)", file=sys.stderr)
        raise SystemExit(2) from None
