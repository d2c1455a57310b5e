"""`ddpm-hf push-space`: publish an app that samples from a model."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import clean_token, quiet, token_to_write
from .exits import reports_stop
from .push import check_hub, list_files

if TYPE_CHECKING:
    from ..publishing.spaces import Model

EPILOG = """Examples:

ddpm-hf push-space user/photos-ddpm

ddpm-hf push-space user/photos-ddpm --restore

ddpm-hf push-space photos-ddpm/checkpoint-5000 --space user/photos-at-5000

ddpm-hf push-space photos-ddpm --out app"""


def push_space(
    model: Annotated[
        str,
        typer.Argument(
            help="A model on the Hub (user/name); or a run's folder or checkpoint-N, whose weights the Space holds."
        ),
    ],
    space: Annotated[
        str | None,
        typer.Option(help="The Space's name (user/name). Default: the model's, with -restore for --restore."),
    ] = None,
    restore: Annotated[
        bool,
        typer.Option(
            "--restore",
            help="An app that restores an upload: inpaint what is painted over, enlarge, colorize, deblur.",
        ),
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make the Space private; a private model's always is.")
    ] = False,
    example: Annotated[
        list[str] | None, typer.Option(help="For text to image: a prompt to offer; repeat it for several.")
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--no-ema", help="For a checkpoint-N: use the EMA weights. Default: if it has them."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the app into this new folder, to run it locally; upload nothing.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files, check Space and token; upload and write nothing.")
    ] = False,
    token: Annotated[str | None, typer.Option(help="Default: your login.", envvar="HF_TOKEN")] = None,
) -> None:
    """Publish an app that samples from a model, as a Space: classes or a prompt, samplers, the chain as it runs.

    With --restore the app restores images with the model. A model of a folder lies in the Space.
    """
    from huggingface_hub.utils import disable_progress_bars

    from ..inference.loading import is_checkpoint
    from ..publishing import spaces
    from ..publishing.files import pipeline_folder
    from ..publishing.hub import check_name
    from ..training.earlier_run import settle

    if space:
        check_name(space)
    folder = Path(model)
    of_run = is_checkpoint(folder)
    if ema is not None and not of_run:
        raise ValueError(f"--{'' if ema else 'no-'}ema: {model} is not a checkpoint-N of a run; leave it out")
    if out and (space or private):
        raise ValueError("--out uploads nothing; leave out --space and --private")
    token = clean_token(token)
    quiet()
    disable_progress_bars()
    examples = example or []
    held = folder.is_dir() and (of_run or out is None)  # else the app reads the model by its name
    if of_run:
        settle(folder.resolve().parent)
    with contextlib.ExitStack() as opened:
        name = str(opened.enter_context(pipeline_folder(folder, ema))) if held else model
        source = spaces.look_up(name, token, examples, restore, held)
        if dry_run:
            show_space(source, space or source.app, token if out is None else None, examples, asks=out is None)
        elif out:
            with reports_stop(lambda: f"{out} was not written"):
                spaces.write_space(out, source, examples)
            typer.echo(
                f"{out}: run it with pip install -r {out}/requirements.txt gradio=={spaces.GRADIO_VERSION},"
                f" then python {out}/app.py"
            )
        else:
            token = token_to_write(token)
            name = space or source.app
            with reports_stop(lambda: f"the upload is one commit: the Space {name} has all of it or nothing"):
                address = spaces.push_space(source, name, token, private, examples)
            typer.echo(f"published at {address}")
            if source.private:
                typer.echo(
                    f"{model} is private: put a token that may read it into the Space's settings, as secret HF_TOKEN"
                )


def show_space(source: "Model", name: str, token: str | None, examples: list[str], asks: bool) -> None:
    """Print what the upload would do; write nothing.

    Args:
        asks: whether to ask the Hub about the Space and the token.
    """
    from ..publishing import spaces

    list_files({name: len(spaces.read(file)) for name, file in spaces.space_files(source, examples).items()})
    for line in check_hub(name, token, "space") if asks else []:
        typer.echo(line)
