"""`ddpm-hf push-space`: publish an app that samples from a model."""

from pathlib import Path
from typing import Annotated

import typer

from .common import own_token, quiet


def push_space(
    model: Annotated[str, typer.Argument(help="A model on the Hub (user/name); with --out also a folder.")],
    space: Annotated[
        str | None, typer.Option(help="The Space's name (user/name); by default the model's own.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="As it always is for a private model.")] = False,
    example: Annotated[
        list[str] | None, typer.Option(help="For text to image: a prompt to offer; repeat it for several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the app into this new folder, to run it here, and upload nothing.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="By default your login.", envvar="HF_TOKEN")] = None,
) -> None:
    """Publish an app that draws with a model, as a Space: classes or a prompt, samplers, the chain as it runs."""
    from huggingface_hub.utils import disable_progress_bars

    from .. import spaces

    quiet()
    disable_progress_bars()
    token = own_token(token)
    if out and (space or private):
        raise ValueError("--out uploads nothing; leave out --space and --private")
    found = spaces.look_up(model, token, example or [])
    if out:
        spaces.write_space(out, found, example or [])
        typer.echo(
            f"{out}: run it with pip install -r {out}/requirements.txt gradio=={spaces.GRADIO_VERSION},"
            f" then python {out}/app.py"
        )
        return
    address = spaces.push_space(found, space or found.name, token, private, example or [])
    typer.echo(f"published at {address}")
    if found.private:
        typer.echo(f"{model} is private: put a token that may read it into the Space's settings, as secret HF_TOKEN")
