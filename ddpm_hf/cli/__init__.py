"""The `ddpm-hf` command: a file for each of its commands.

Heavy libraries are imported when a command runs, so that `--help` is quick.
"""

import typer

from . import push, push_space, sample, train_classifier
from .endings import run

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

app.command(context_settings=UNDERSCORES_TOO, epilog=sample.EPILOG)(sample.sample)
app.command(context_settings=UNDERSCORES_TOO)(push.push)
app.command("push-space")(push_space.push_space)
app.command("train-classifier", context_settings=EVERYTHING_AFTER, add_help_option=False)(
    train_classifier.train_classifier
)


def main() -> None:
    """The entry point."""
    raise SystemExit(run(app))
