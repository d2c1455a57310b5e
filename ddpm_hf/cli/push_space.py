"""`ddpm-hf push-space`: publish an app that samples from a model."""

from pathlib import Path
from typing import Annotated

import typer

from .common import clean_token, quiet, token_to_write
from .exits import reports_stop
from .push import check_hub, list_files

EPILOG = """Examples:

ddpm-hf push-space user/photos-ddpm

ddpm-hf push-space photos-ddpm --out app"""


def push_space(
    model: Annotated[str, typer.Argument(help="A model on the Hub (user/name); with --out also a folder.")],
    space: Annotated[str | None, typer.Option(help="The Space's name (user/name). Default: the model's name.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the Space private; a private model's always is.")
    ] = False,
    example: Annotated[
        list[str] | None, typer.Option(help="For text to image: a prompt to offer; repeat it for several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the app into this new folder, to run it locally; upload nothing.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files, check Space and token; upload and write nothing.")
    ] = False,
    token: Annotated[str | None, typer.Option(help="Default: your login.", envvar="HF_TOKEN")] = None,
) -> None:
    """Publish an app that samples from a model, as a Space: classes or a prompt, samplers, the chain as it runs."""
    from huggingface_hub.utils import disable_progress_bars

    from ..inference.loading import is_checkpoint
    from ..publishing import spaces

    if is_checkpoint(Path(model)):
        raise ValueError(
            f"{model} is a checkpoint, and an app shows a published pipeline: `ddpm-hf push {model} user/name`, then"
            " `ddpm-hf push-space user/name`"
        )
    if out and (space or private):
        raise ValueError("--out uploads nothing; leave out --space and --private")
    token = clean_token(token)
    quiet()
    disable_progress_bars()
    examples = example or []
    source = spaces.look_up(model, token, examples)
    if dry_run:
        files = {name: len(text.encode()) for name, text in spaces.space_files(source, examples).items()}
        list_files(files)
        for line in [] if out or source.address is None else check_hub(space or source.name, token, "space"):
            typer.echo(line)
        return
    if out:
        with reports_stop(lambda: f"{out} was not written"):
            spaces.write_space(out, source, examples)
        typer.echo(
            f"{out}: run it with pip install -r {out}/requirements.txt gradio=={spaces.GRADIO_VERSION},"
            f" then python {out}/app.py"
        )
        return
    token = token_to_write(token)
    name = space or source.name
    with reports_stop(lambda: f"the upload is one commit: the Space {name} has all of it or nothing"):
        address = spaces.push_space(source, name, token, private, examples)
    typer.echo(f"published at {address}")
    if source.private:
        typer.echo(f"{model} is private: put a token that may read it into the Space's settings, as secret HF_TOKEN")
