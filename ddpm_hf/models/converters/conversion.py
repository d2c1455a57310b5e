"""What a converter is given and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...common.errors import one_line

State = Mapping[str, torch.Tensor]


class Options(NamedTuple):
    """What a user says of a checkpoint.

    Args:
        flags: the other program's, as one command line; None where none were given.
        labels: the classes' names by id; None for their numbers.
        ema: whether to take averaged weights where the file has both.
        name: the file's name, by which published checkpoints are known.
    """

    flags: str | None = None
    labels: Sequence[str] | None = None
    ema: bool = True
    name: str = ""


class Conversion(NamedTuple):
    """A converted checkpoint.

    Args:
        model: a pipeline, or a classifier of noised images.
        facts: what was read and concluded, in lines.
        original: builds the original network with its weights, or None where there is no package of it.
        network: ours, to compare.
    """

    model: Any
    facts: list[str]
    original: Callable[[], torch.nn.Module] | None = None
    network: torch.nn.Module | None = None


def names_of_classes(labels: Sequence[str] | None, embeddings: int) -> dict[int, str] | None:
    """The classes' names by id for a network of that many embeddings; None for their numbers.

    Raises:
        ValueError: another number of names. One name less than embeddings makes the last one that of no class.
    """
    if labels is None:
        return None
    if len(labels) not in (embeddings, embeddings - 1):
        raise ValueError(
            f"{len(labels)} names of classes, and the network embeds {embeddings}; give one line for each, or one less"
            " where the last embedding stands for no class"
        )
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        lines = " and ".join(str(number) for number, name in enumerate(labels, 1) if name == twice)
        raise ValueError(f"--labels: {twice!r} is on lines {lines}; names must differ")
    return dict(enumerate(labels))


def check_betas(scheduler: Any) -> None:
    """Raise ValueError for a noise schedule that is none."""
    most = float(scheduler.exact_tables.betas.max())
    if most > 1:
        raise ValueError(f"its noise schedule has β up to {most:.3g}, and β is at most 1: another number of steps?")


def make_pipeline(unet: torch.nn.Module, scheduler: Any, labels: Sequence[str] | None) -> Any:
    """The pipeline that a network is for: by class where it embeds classes.

    Raises:
        ValueError: names of classes that do not fit, or a schedule that is none.
    """
    from ...portable.pipeline_class_conditional_ddpm_hf import ClassConditionalDDPMPipeline
    from ...portable.pipeline_ddpm_hf import DDPMPipeline
    from ...portable.pipeline_image_to_image_ddpm_hf import DDPMImageToImagePipeline

    check_betas(scheduler)
    embeddings = unet.config.num_class_embeds or 0
    if unet.config.get("condition_channels"):
        return DDPMImageToImagePipeline(unet, scheduler, None, names_of_classes(labels, embeddings))
    if embeddings:
        return ClassConditionalDDPMPipeline(unet, scheduler, names_of_classes(labels, embeddings))
    if labels is not None:
        raise ValueError("names of classes, and the network has none; leave them out")
    return DDPMPipeline(unet, scheduler)


def parity(conversion: Conversion) -> float | str:
    """The largest difference between the original's output and ours, in units of its deviation, for one random input.

    Where the original cannot be built, why.
    """
    if conversion.original is None or conversion.network is None:
        return "there is no package of the original"
    try:
        original = conversion.original().eval()
    except ImportError:
        return "the original's package is not installed here"
    except Exception as error:  # whatever another version of the package raises
        return f"the original's package that is installed here does not build this network ({one_line(error, 120)})"
    ours = conversion.network.eval()
    config = ours.config.get("unet", ours.config)  # a classifier's encoder
    side = config["sample_size"] if "unet" in ours.config else 2 ** max(3, len(config["block_out_channels"]))
    generator = torch.Generator().manual_seed(0)
    conditioned = config.get("condition_channels", 0)
    x = torch.randn(1, config["in_channels"] + conditioned, side, side, generator=generator)
    t, classes = torch.tensor([321]), config.get("num_class_embeds")
    labels = [torch.tensor([classes - 1])] if classes and "unet" not in ours.config else []
    with torch.no_grad():
        # their diffusion rescales t, our network itself
        theirs, mine = original(x, t * config.get("timestep_scale", 1.0), *labels), ours(x, t, *labels)
        mine = getattr(mine, "sample", mine)
    return float((theirs - mine).abs().max() / theirs.std())
