"""The `ddpm-hf` command line, one module per command.

Heavy libraries are imported when a command runs, so that `--help` is quick.
"""

import sys

import typer

from .._version import __version__
from ..common.machine import accept_any_text, keep_freed_memory
from . import (
    ablate,
    compare,
    convert,
    ema,
    evaluate,
    fit_timesteps,
    fit_variance,
    info,
    presets,
    push,
    push_space,
    restore,
    sample,
    train,
    train_classifier,
)
from .exits import PassThrough, run

app = typer.Typer(
    help="Denoising diffusion in the Hugging Face ecosystem: train, sample, share.",
    epilog="ddpm-hf train --train_data_dir photos, then ddpm-hf sample ddpm-model-64, then ddpm-hf push ddpm-model-64."
    " Each command has its --help.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"ddpm-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """Denoising diffusion in the Hugging Face ecosystem: train, sample, share."""


UNDERSCORES_TOO = {"token_normalize_func": lambda token: token.replace("_", "-")}  # --num_images is --num-images
PASS_ALL_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command(cls=PassThrough, context_settings=PASS_ALL_ARGUMENTS, add_help_option=False)(train.train)
app.command("train-text2image", cls=PassThrough, context_settings=PASS_ALL_ARGUMENTS, add_help_option=False)(
    train.train_text2image
)
app.command("train-classifier", cls=PassThrough, context_settings=PASS_ALL_ARGUMENTS, add_help_option=False)(
    train_classifier.train_classifier
)
app.command(context_settings=UNDERSCORES_TOO, epilog=sample.EPILOG)(sample.sample)
app.command(context_settings=UNDERSCORES_TOO, epilog=convert.EPILOG)(convert.convert)
app.command(context_settings=UNDERSCORES_TOO, epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(context_settings=UNDERSCORES_TOO, epilog=compare.EPILOG)(compare.compare)
app.command(context_settings=UNDERSCORES_TOO, epilog=ablate.EPILOG)(ablate.ablate)
app.command(context_settings=UNDERSCORES_TOO, epilog=ema.EPILOG)(ema.ema)
app.command("fit-variance", context_settings=UNDERSCORES_TOO, epilog=fit_variance.EPILOG)(fit_variance.fit_variance)
app.command("fit-timesteps", context_settings=UNDERSCORES_TOO, epilog=fit_timesteps.EPILOG)(
    fit_timesteps.fit_timesteps
)
app.command(context_settings=UNDERSCORES_TOO, epilog=restore.EPILOG)(restore.restore)
app.command(context_settings=UNDERSCORES_TOO, epilog=push.EPILOG)(push.push)
app.command("push-space", context_settings=UNDERSCORES_TOO, epilog=push_space.EPILOG)(push_space.push_space)
app.command(context_settings=UNDERSCORES_TOO, epilog=info.EPILOG)(info.info)
app.command(epilog=presets.EPILOG)(presets.presets)


def main() -> None:
    """The entry point."""
    accept_any_text()
    keep_freed_memory()  # a network allocates the same tensors at each call
    code = run(app, sys.argv[1:])
    if code:
        raise SystemExit(code)
