"""`ddpm-hf push`: publish a saved pipeline."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from .common import own_token, quiet


class Variant(str, enum.Enum):
    """The weights that `ddpm-hf push` can make."""

    fp16 = "fp16"


def push(
    folder: Annotated[Path, typer.Argument(help="A training run's output folder, or any saved pipeline of ours.")],
    repository: Annotated[
        str | None, typer.Argument(help="user/name on the Hub; by default the folder's name, under your user.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    license_: Annotated[
        str | None, typer.Option("--license", help="License for the model card, such as apache-2.0.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Tag this upload: from_pretrained(..., revision=TAG) goes on loading it.")
    ] = None,
    variant: Annotated[
        Variant | None, typer.Option(help="fp16 also makes and uploads weights in half precision, for variant='fp16'.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of more files of the folder to upload; repeat it for several.")
    ] = None,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload the pipeline",
    token: Annotated[
        str | None, typer.Option(help="To write with; by default your login (hf auth login).", envvar="HF_TOKEN")
    ] = None,
) -> None:
    """Publish a saved pipeline: weights, code, pictures and a model card, in one commit.

    Checkpoints, optimizer states, logs and settings stay. Pushing again keeps what you wrote into the card.
    """
    from ..publishing import draw_missing_pictures, open_repository, push_folder, reason_of
    from ..saving import save_half_precision
    from ..space.drawing import Studio
    from ..training.config import check_license
    from ..training.ownership import settle

    quiet()
    token = own_token(token)
    check_license("license", license_)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the --output_dir of a training run")
    settle(folder)
    studio = Studio(str(folder))
    pipeline = studio.pipeline
    for pattern in include or ():
        if (
            Path(pattern).is_absolute()
            or ".." in Path(pattern).parts
            or not any(path.is_file() for path in folder.glob(pattern))
        ):
            raise ValueError(f"--include {pattern}: no such file in {folder}; of a folder, give folder/*")
    name = repository or folder.resolve().name
    try:
        name = open_repository(name, token, private)
        if variant is not None:
            save_half_precision(pipeline, folder)
        draw_missing_pictures(studio, folder)
        options = {"license": license_, "tag": revision, "message": message, "include": tuple(include or ())}
        upload = push_folder(folder, name, token, pipeline, **options)
    except Exception as error:  # whatever the network does
        raise ValueError(f"the upload to {name} failed ({reason_of(error)}); nothing of {folder} is lost") from error
    width = max(map(len, upload.files))
    for path, size in sorted(upload.files.items()):
        typer.echo(f"{path:<{width}}  {size:>14,}")
    typer.echo(f"published at {upload.address}")
