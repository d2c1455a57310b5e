"""`ddpm-hf convert`: other programs' checkpoints to a pipeline's folder, and back."""

import enum
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import clean_token, quiet

EPILOG = """Examples:

ddpm-hf convert 64x64_diffusion.pt --to adm-64

ddpm-hf convert ema_0.9999_500000.pt --to mine --from improved-diffusion --flags "$MODEL_FLAGS $DIFFUSION_FLAGS"

ddpm-hf convert 64x64_classifier.pt --to adm-64-classifier

ddpm-hf convert 64x64_diffusion.pt --to adm-64 --classifier adm-64-classifier --labels imagenet.txt

ddpm-hf convert diffusion_cifar10_model/model.ckpt-790000 --to ddpm-cifar10

ddpm-hf convert user/old-ddpm --to safe

ddpm-hf convert adm-64 --to back.pt"""


class From(str, enum.Enum):
    """The programs whose checkpoints are converted."""

    guided = "guided-diffusion"
    improved = "improved-diffusion"
    ho = "ho"
    lucidrains = "lucidrains"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A .pt, .ckpt, .safetensors or .npz file, a TensorFlow checkpoint, a folder or model on the Hub with"
            " pickled weights; or, for the way back, a folder of ours."
        ),
    ],
    to: Annotated[Path, typer.Option(help="The folder to write; or a .pt file, for OpenAI's format.")],
    from_: Annotated[
        From | None, typer.Option("--from", help="The program that wrote it. Default: as the tensors' names tell.")
    ] = None,
    flags: Annotated[
        str | None,
        typer.Option(
            help="That program's flags, as its README samples with: what the shapes do not tell is taken from these,"
            " the rest is compared. Published files are known by their names."
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A text file with the classes' names, one a line in the order of their ids.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="The folder of a classifier to keep with a model by class.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Of a file, or of a checkpoint-N, that has both.")
    ] = True,
    token: Annotated[str | None, typer.Option(help="For a private model.", envvar="HF_TOKEN")] = None,
) -> None:
    """Convert a checkpoint of another program into a folder that Diffusers and ddpm_hf load, or ours into a .pt.

    Nothing in a checkpoint is executed. Where the original's package is installed, both networks are compared.
    """
    token = clean_token(token)
    if to.suffix == ".pt":
        if from_ or labels or classifier:
            raise ValueError("--from, --labels and --classifier are not for the way back to a .pt file")
        quiet()
        write_openai(source, to, flags, None if ema else False, token)
        return
    check_target(to)
    names = None if labels is None else read_labels(labels)
    quiet()
    from diffusers import DiffusionPipeline

    from ..models.converters import Options, convert
    from ..models.converters.conversion import parity
    from ..models.saving import save_model, save_pipeline

    show_progress(f"reading {source} ...")
    conversion = convert(source, Options(flags, names, ema), from_.value if from_ else None, token)
    typer.echo("\n".join(conversion.facts))
    beside = Path(source) / "classifier"
    if classifier is None and (beside / "config.json").is_file() and getattr(conversion.model, "has_classes", False):
        classifier = beside
    if classifier is not None:
        conversion.model.register_modules(classifier=fitting_classifier(classifier, conversion.model))
    if conversion.original is not None:
        report_parity(parity(conversion))
    show_progress(f"writing {to} ...")
    if isinstance(conversion.model, DiffusionPipeline):
        save_pipeline(conversion.model, to)
        example = f"{to} --image IMAGE" if hasattr(conversion.model, "conditioning") else to
        typer.echo(f"saved to {to}: `ddpm-hf sample {example}` samples from it")
    else:
        save_model(conversion.model, to, within=to)
        typer.echo(f"saved to {to}: `ddpm-hf sample MODEL --classifier {to}` guides by it")


def show_progress(text: str) -> None:
    """Print what takes a while, for someone who watches."""
    if sys.stderr.isatty():
        typer.echo(text, err=True)


def check_target(folder: Path, flag: str = "to") -> None:
    """Raise ValueError for a folder that cannot be written, before any work."""
    from ..common.checkpoints import SETTINGS
    from ..common.layout import RUN_FILE, holds_run
    from ..common.ownership import may_write

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--{flag} {folder}: a file; name a folder")
    if holds_run(folder) or any((folder / name).exists() for name in (SETTINGS, RUN_FILE)):
        raise ValueError(f"--{flag} {folder}: holds a training run, which stays; name another folder")
    for name in ("model_index.json", "config.json"):
        if not may_write(folder, name):
            raise ValueError(f"--{flag} {folder}: holds a {name} that this command did not write; name another folder")


def read_labels(path: Path) -> list[str]:
    """The lines of a file of class names.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--labels {path}: not a text file that can be read") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise ValueError(f"--labels {path}: give a name in each line")
    return names


def fitting_classifier(folder: Path, pipeline: Any) -> Any:
    """The classifier to keep with a pipeline.

    Raises:
        ValueError: none there, or one that does not fit.
    """
    from .conditions import load_classifier

    if not getattr(pipeline, "has_classes", False):
        raise ValueError("--classifier is kept with a model by class, and this one has no classes; keep it by itself")
    return load_classifier(folder, pipeline)


def report_parity(difference: float | str) -> None:
    """Print how far the original's output is from ours, or why that is not known."""
    if isinstance(difference, str):
        typer.echo(f"not compared: {difference}")
        return
    typer.echo(f"parity: {difference:.1e}, the largest difference from the original's output, over its deviation")
    if not difference < 1e-3:
        raise ValueError("the converted network is not the original: nothing was written")


def write_openai(source: str, target: Path, flags: str | None, ema: bool | None, token: str | None) -> None:
    """The way back: a folder of ours as a .pt file.

    Args:
        ema: False for the weights of a checkpoint-N that are not averaged; None for those that it samples with.

    Raises:
        ValueError: no model there, or one that OpenAI's code does not have.
    """
    import torch

    from ..common.files import PARTIAL_SUFFIX, flush
    from ..models.converters.openai_back import export_openai

    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ValueError(f"--to {target}: not a file in an existing folder")
    if target.exists():
        raise ValueError(f"--to {target}: already exists; name another file, or remove it")
    model, scheduler = load_network(source, ema, token)
    state, build = export_openai(model, flags or "", scheduler)
    handle, temporary = tempfile.mkstemp(
        dir=target.absolute().parent, prefix=f".{target.name}.", suffix=PARTIAL_SUFFIX
    )
    os.close(handle)
    try:
        torch.save(state, temporary)
        flush(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    typer.echo(f"saved to {target}; {build}")


def load_network(source: str, ema: bool | None, token: str | None) -> tuple[Any, Any]:
    """(the UNet or the classifier of a folder, its scheduler)."""
    from ..common.locations import find_location
    from ..inference.loading import load

    config = find_location(source, token=token).json("config.json") or {}
    if config.get("_class_name") == "NoisyClassifier":
        from ..models.classifier import NoisyClassifier

        return NoisyClassifier.from_pretrained(source, use_safetensors=True), None
    pipeline = load(source, ema=ema, token=token)
    if hasattr(pipeline, "tokenizer"):
        raise ValueError(f"{source}: a text-to-image model, which OpenAI's format does not have")
    if getattr(pipeline, "vae", None) is not None:
        raise ValueError(f"{source}: a model of latents, whose autoencoder OpenAI's format does not have")
    if hasattr(pipeline, "conditionings"):
        raise ValueError(f"{source}: a cascade; give one of its models")
    if hasattr(pipeline, "conditioning") and not pipeline.unet.config.get("condition_channels"):
        raise ValueError(f"{source}: a model that reads an image of another task, which OpenAI's format does not have")
    return pipeline.unet, pipeline.scheduler
