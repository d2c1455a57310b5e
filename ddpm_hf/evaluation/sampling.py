"""Samples for an evaluation: N images keyed by their index, in files, shared by the ranks and resumable.

A file holds consecutive images, uint8 [n, C, H, W]; its name says which. What is missing is sampled, whatever is there
already: a killed run continues, another batch size or number of ranks continues it too, and more images are added to
those that exist. Nothing here holds more than one file's images.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..common.arrays import read_npz
from ..common.errors import DataError
from ..common.files import PARTIAL_SUFFIX, read_json, write_atomically
from .features import PARTS, Extractor, Features, extract
from .ranks import Ranks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

AT_ONCE = 32  # images that a network of features reads at once
SETTINGS = "settings.json"  # what determines the images of a store
_NAME = re.compile(r"(\d{8})-(\d{8})\.npy")


@dataclass(frozen=True)
class SampleStore:
    """Sampled images in a folder, by index.

    Args:
        folder: of the files.
        shape: (C, H, W) of an image.
    """

    folder: Path
    shape: tuple[int, int, int]

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, and remove what a killed run left half written. The main process calls it.

        Raises:
            DataError: it holds the images of other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))
        before = read_json(self.folder / SETTINGS)
        if before not in (None, settings):
            raise DataError(f"{self.folder} holds images that were sampled otherwise; move it, or remove it")
        write_atomically(self.folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
        for path in self.folder.rglob(f".*{PARTIAL_SUFFIX}"):
            path.unlink()

    def spans(self) -> list[range]:
        """The indices of each file, ascending."""
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        found = [match for name in names if (match := _NAME.fullmatch(name))]
        return [range(int(match[1]), int(match[2])) for match in found]

    def missing(self, count: int, batch_size: int) -> list[range]:
        """The indices below `count` that no file has, in batches."""
        batches, first = [], 0
        for span in [*self.spans(), range(count, count)]:
            end = min(span.start, count)
            batches += [range(at, min(at + batch_size, end)) for at in range(first, end, batch_size)]
            first = max(first, span.stop)
        return batches

    def path(self, span: range, folder: str = "", suffix: str = ".npy") -> Path:
        """The file of a span, or of what was computed from it."""
        return self.folder / folder / f"{span.start:08d}-{span.stop:08d}{suffix}"

    def write(self, span: range, images: np.ndarray) -> None:
        """Write the images of a span, uint8 [n, C, H, W]."""
        write_atomically(self.path(span), array_bytes(images))

    def read(self, span: range) -> np.ndarray:
        """The images of a file, uint8 [n, C, H, W], mapped from the disk.

        Raises:
            DataError: the file is damaged, or of another model.
        """
        path = self.path(span)
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove it, and its images are sampled anew") from error
        if images.dtype != np.uint8 or images.shape != (len(span), *self.shape):
            raise DataError(f"{path} holds {images.dtype} {images.shape}; remove it, and its images are sampled anew")
        return images

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        """The first `count` images, uint8 [n, C, H, W], file by file."""
        for span in self.spans():
            if span.start < count:
                yield torch.from_numpy(np.array(self.read(span)[: count - span.start]))

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """Some of the images, uint8 [n, C, H, W], in the order asked for."""
        spans = self.spans()
        chosen = [next(span for span in spans if index in span) for index in indices]
        images = [self.read(span)[index - span.start] for span, index in zip(chosen, indices)]
        return np.stack(images) if images else np.empty((0, *self.shape), np.uint8)


def array_bytes(array: np.ndarray) -> bytes:
    """An array as the content of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def fill(
    store: SampleStore,
    count: int,
    batch_size: int,
    sample: Callable[[range], np.ndarray],
    ranks: Ranks | None = None,
    title: str = "sampling",
) -> int:
    """Sample what a store lacks of `count` images; all ranks call it, and it returns once all are there.

    Args:
        sample: indices -> uint8 [n, C, H, W]; image i must depend on i alone.

    Returns: how many images there were already.
    """
    ranks = ranks or Ranks()
    ranks.wait()  # until the main process has opened it
    missing = store.missing(count, batch_size)
    ranks.wait()  # until all have seen what is missing
    there = count - sum(map(len, missing))
    with tqdm(total=count, initial=there, desc=title, unit="image", disable=not (ranks.is_main and missing)) as bar:
        for number, batch in enumerate(missing):
            if number % ranks.world == ranks.rank:
                store.write(batch, sample(batch))
            bar.update(len(batch))
    ranks.wait()
    return there


def as_bytes(images: torch.Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [0, 1] as uint8, rounded as a saved PNG is.

    Raises:
        DataError: they are not finite.
    """
    if not torch.isfinite(images).all():
        raise DataError("the model sampled NaN or infinity; is it trained, and does --precision suit it?")
    return (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def pipeline_sampler(
    pipeline: "DiffusionPipeline", seed: int, call: Callable[..., Any], **options: Any
) -> Callable[[range], np.ndarray]:
    """A function from indices to images: image i depends on the seed and i alone, as in `ddpm-hf sample`.

    Args:
        call: (pipeline, indices, **options) -> the pipeline's output for their conditions.
        options: for the call, such as `num_inference_steps`.
    """
    from ..inference.studio import keyed_generators

    def sample(indices: range) -> np.ndarray:
        generators = keyed_generators(pipeline.device, seed, indices)
        return as_bytes(call(pipeline, indices, generator=generators, output_type="pt", **options).images)

    return sample


def network_calls(pipeline: "DiffusionPipeline", steps: int | None, guided: bool) -> int:
    """How often the network is evaluated for an image; with classifier-free guidance twice a step."""
    return len(pipeline.prepare_timesteps(steps)) * (2 if guided else 1)


def stored_features(
    store: SampleStore, count: int, extractor: Extractor, keep: frozenset[str], ranks: Ranks
) -> Features:
    """The features of the first `count` images of a store; each file's are computed by one rank, and kept beside it.

    Args:
        keep: parts of `Features`.
    """
    spans = [span for span in store.spans() if span.start < count]
    folder = f"features-{extractor.fingerprint}"
    local = ranks.share(spans)
    (store.folder / folder).mkdir(exist_ok=True)
    for span in tqdm(local, desc="features of the samples", unit="file", disable=not ranks.is_main):
        path = store.path(span, folder, ".npz")
        if _read_features(path, len(span), keep) is None:
            features = extract(extractor, torch.from_numpy(np.array(store.read(span))).split(AT_ONCE), keep=keep)
            write_atomically(path, _features_bytes(features))
    ranks.wait()
    parts = [_read_features(store.path(span, folder, ".npz"), len(span), keep) for span in spans]
    return Features(**{name: np.concatenate([getattr(part, name) for part in parts])[:count] for name in keep})


def _features_bytes(features: Features) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value for name, value in vars(features).items() if value is not None})
    return buffer.getvalue()


def _read_features(path: Path, count: int, keep: frozenset[str]) -> Features | None:
    """The features in a file; None if there is none, or if it lacks a part."""
    if not path.is_file():
        return None
    try:
        columns = read_npz(path, PARTS)
    except ValueError:  # damaged: computed anew
        return None
    complete = keep <= set(columns) and all(len(column) == count for column in columns.values())
    return Features(**columns) if complete else None
