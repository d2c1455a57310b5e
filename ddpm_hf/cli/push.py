"""`ddpm-hf push`: publish a saved pipeline."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from .common import clean_token, quiet, token_to_write
from .exits import reports_stop

EPILOG = """Examples:

ddpm-hf push photos-ddpm user/photos-ddpm --license apache-2.0

ddpm-hf push photos-ddpm --dry-run

ddpm-hf push photos-ddpm user/photos-ddpm --revision v1 --variant fp16

ddpm-hf push photos-ddpm/checkpoint-5000 user/photos-ddpm --revision step-5000"""


class Variant(str, enum.Enum):
    """The weights that `ddpm-hf push` can make."""

    fp16 = "fp16"


def push(
    folder: Annotated[
        Path, typer.Argument(help="A run's output folder or checkpoint-N, or a pipeline saved by ddpm_hf.")
    ],
    repository: Annotated[
        str | None, typer.Argument(help="user/name on the Hub. Default: the folder's name, under your user.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    license_: Annotated[
        str | None, typer.Option("--license", help="License for the model card, such as apache-2.0.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Tag this upload, for from_pretrained(..., revision=TAG).")
    ] = None,
    variant: Annotated[
        Variant | None, typer.Option(help="fp16: also upload weights in half precision, for variant='fp16'.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of additional files in the folder to upload; may be repeated.")
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--no-ema", help="For a checkpoint-N: use the EMA weights. Default: if it has them."),
    ] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload the pipeline",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, repository, token and card; upload and write nothing.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(help="Token with write access. Default: your login (hf auth login).", envvar="HF_TOKEN"),
    ] = None,
) -> None:
    """Publish a saved pipeline: weights, code, pictures and a model card, in one commit.

    Checkpoints, optimizer states, logs and settings are not uploaded. Pushing again keeps your text in the card. For a
    checkpoint-N, its pipeline is published, with the run's card, and with losses and grids up to its step.
    """
    from ..common.arguments import check_license
    from ..inference.loading import is_checkpoint
    from ..publishing.files import has_root_layout, pipeline_folder
    from ..publishing.hub import check_name
    from ..training.earlier_run import settle

    check_license("license", license_)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the --output_dir of a training run")
    token = clean_token(token) if dry_run else token_to_write(token)
    include = tuple(include or ())
    check_patterns(folder, include)
    quiet()
    of_run = is_checkpoint(folder)
    if ema is not None and not of_run:
        raise ValueError(f"--{'' if ema else 'no-'}ema: {folder} is not a checkpoint-N of a run; leave it out")
    if include and of_run:
        raise ValueError("--include is for a run's output folder, and this is a checkpoint; leave it out")
    if include and has_root_layout(folder):
        raise ValueError(f"--include: {folder} has the layout of the Hub's first models; leave it out")
    run = folder.resolve().parent if of_run else folder.resolve()
    name = repository or run.name
    check_name(name)
    settle(run)
    state = [f"nothing was uploaded, and {folder} is complete"]
    with reports_stop(lambda: state[-1]), pipeline_folder(folder, ema) as source:
        if dry_run:
            show_upload(source, name, token, license_, include, variant is not None)
        else:
            upload(source, name, token, private, license_, revision, variant is not None, include, message, state)


def check_patterns(folder: Path, include: tuple[str, ...]) -> None:
    """Raise ValueError for a pattern that leaves the folder or matches no file."""
    for pattern in include:
        inside = not Path(pattern).is_absolute() and ".." not in Path(pattern).parts
        if not (inside and any(path.is_file() for path in folder.glob(pattern))):
            raise ValueError(f"--include {pattern}: no such file in {folder}; for a folder's files, give folder/*")


def upload(
    folder: Path,
    name: str,
    token: str | None,
    private: bool,
    license: str | None,
    tag: str | None,
    half: bool,
    include: tuple[str, ...],
    message: str,
    state: list[str],
) -> None:
    """Upload a folder, and list what was uploaded.

    Args:
        half: whether to make weights in half precision first.
        state: its last entry says what remains if the work stops now.
    """
    from ..inference.studio import Studio
    from ..models.saving import save_half_precision
    from ..publishing.card.facts import read_facts
    from ..publishing.card.merging import make_card
    from ..publishing.files import sample_missing_pictures
    from ..publishing.hub import open_repository, push_folder, read_card, reason_of

    studio = Studio(str(folder))
    facts = read_facts(folder, name, studio.pipeline, license)
    make_card(facts, read_card(folder))  # a card or a record that cannot be read is named before the Hub is asked
    try:
        name = open_repository(name, token, private)
        if half:
            save_half_precision(studio.pipeline, folder)
        sample_missing_pictures(studio, folder)
        state.append(f"the upload is one commit: {name} has all of it or nothing; your files are complete")
        options = {"license": license, "tag": tag, "message": message, "include": include}
        done = push_folder(folder, name, token, studio.pipeline, **options)
    except Exception as error:  # any error of the network
        raise ValueError(f"the upload to {name} failed ({reason_of(error)}); nothing is lost") from error
    list_files(done.files)
    typer.echo(f"published at {done.address}")


def list_files(sizes: dict[str, int]) -> None:
    """Print files with their sizes in bytes."""
    width = max(map(len, sizes))
    for path, size in sorted(sizes.items()):
        typer.echo(f"{path:<{width}}  {size:>14,}")


def show_upload(
    folder: Path, name: str, token: str | None, license: str | None, include: tuple[str, ...], half: bool
) -> None:
    """Print what `upload` would do; write nothing."""
    from ..common.layout import SAMPLES
    from ..inference.kinds import load_pipeline
    from ..publishing.card.facts import read_facts
    from ..publishing.card.merging import make_card
    from ..publishing.files import files_to_publish
    from ..publishing.hub import read_card

    pipeline = load_pipeline(str(folder))
    card = make_card(read_facts(folder, name, pipeline, license), read_card(folder))
    files = {path: file.stat().st_size for path, file in files_to_publish(folder, include).items()}
    list_files({**files, "README.md": len(card.encode())})
    if half:
        typer.echo("and weights in half precision, which are created first")
    if SAMPLES not in files and not (hasattr(pipeline, "tokenizer") or hasattr(pipeline, "conditioning")):
        typer.echo("and pictures for the card, which are sampled first or taken from samples/")
    for line in check_hub(name, token, "model"):
        typer.echo(line)
    typer.echo(f"\nREADME.md:\n\n{card}")


def check_hub(name: str, token: str | None, kind: str) -> list[str]:
    """Lines on the token and on a repository (`kind` is "model" or "space"), as far as the Hub answers."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    from ..publishing.hub import reason_of

    api, lines = HfApi(token=token), []
    try:
        if token or get_token():
            user = api.whoami()["name"]
            lines.append(f"token: valid, belongs to {user}")
            name = name if "/" in name else f"{user}/{name}"
        else:
            lines.append("token: none; log in with `hf auth login`, set HF_TOKEN, or give --token")
        info = api.repo_info(name, repo_type=kind)
        lines.append(f"{kind}: {name} exists, {'private' if info.private else 'public'}; it would get a new commit")
    except RepositoryNotFoundError:
        lines.append(f"{kind}: {name} does not exist, or this token has no access; it would be created")
    except HfHubHTTPError as error:
        lines.append(f"the Hub refuses: {reason_of(error)}")
    except Exception as error:  # any error of the network
        lines.append(f"the Hub does not answer ({reason_of(error)}): token and {kind} {name} are not checked")
    return lines
