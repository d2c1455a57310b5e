"""Latents, and embedded captions, computed once: tables of tensors, looked up by what they were made from.

A row's key is a digest of the image's content (or of the caption), and the table's folder is named after all else that
decides the tensor: the transform, and the weights of the network that computed it. Whatever the order of the data, an
image thus never gets another one's latent.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..common.errors import UsageError
from ..data.dataset import ImageDataset
from ..data.images import augmentation_uniforms, to_model_range
from .table import TensorTable, digest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import CLIPTokenizer

UNAUGMENTED = np.zeros(4)  # crop at the corner, flip if anything is flipped, the first caption
SMALL_FILE, BLOCK, BLOCKS = 2**18, 2**14, 16  # a file of so many bytes is read whole, of a larger one some blocks


def weights_digest(model: torch.nn.Module) -> str:
    """What tells the weights of two networks apart: their values, by name."""
    parts = []
    for name, tensor in sorted(model.state_dict().items()):
        parts += [name.encode(), tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()]
    return digest(*parts).hex()


def network_digest(model: torch.nn.Module) -> bytes:
    """What tells two networks apart: their weights, and how their layers are made."""
    return digest(weights_digest(model).encode(), repr(model).encode())


def file_key(path: Path) -> bytes:
    """A key of a file's content: of all of it, or of a large one its size, time and some blocks, evenly spread."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= SMALL_FILE:
            return digest(file.read())
        blocks = [str((status.st_size, status.st_mtime_ns)).encode()]
        for number in range(BLOCKS):
            file.seek(number * (status.st_size - BLOCK) // (BLOCKS - 1))
            blocks.append(file.read(BLOCK))
        return digest(*blocks)


def image_keys(images: ImageDataset) -> list[bytes]:
    """A key for each image: of its encoded bytes or its file's, or of its pixels."""
    keys = []
    for row in images.rows.dataset.select_columns([images.rows.image_column]).select(images.indices):
        value = row[images.rows.image_column]
        if isinstance(value, dict) and value.get("bytes") is not None:
            keys.append(digest(value["bytes"]))
        elif isinstance(value, dict):
            keys.append(file_key(Path(value["path"])))
        else:
            pixels = np.asarray(value)
            keys.append(digest(pixels.tobytes(), repr((pixels.shape, pixels.dtype)).encode()))
    return keys


class LatentDataset(torch.utils.data.Dataset):
    """Batches as `ImageDataset` gives them, with `moments` [N, 2C, h, w] of the latents instead of the images.

    With `embeddings`, a table of them by caption, also `embeddings` [N, L, D].
    """

    def __init__(self, images: ImageDataset, table: TensorTable, keys: list[bytes], embeddings: TensorTable | None):
        self.images, self.table, self.keys, self.embeddings = images, table, keys, embeddings
        self.labels, self.captions = images.labels, images.captions
        self.cache, self.cached_bytes = True, 0  # nothing is left to decode

    def __len__(self) -> int:
        return len(self.images)

    def name_of(self, row: int) -> str:
        """What to call one of a batch's `index`."""
        return self.images.name_of(row)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        """A batch for keys (epoch, index)."""
        uniforms = [augmentation_uniforms(self.images.seed, epoch, index) for epoch, index in keys]
        chosen = [index for _, index in keys]
        flips = [self.images.transform.random_flip and bool(drawn[2] < 0.5) for drawn in uniforms]
        rows = [flipped(self.keys[index]) if flip else self.keys[index] for index, flip in zip(chosen, flips)]
        batch = {
            "moments": self.table.look_up(rows),
            "index": torch.from_numpy(self.images.indices[chosen]),
            **self.images.described(chosen, uniforms),
        }
        if self.embeddings is not None:
            batch["embeddings"] = self.embeddings.look_up([caption_key(text) for text in batch["captions"]])
        return batch


def flipped(key: bytes) -> bytes:
    """The key of the mirrored image."""
    return digest(key, b"flipped")


def caption_key(caption: str) -> bytes:
    """The key of a caption's embedding."""
    return digest(caption.encode())


RANDOM_CROPS = (
    "--cache_latents computes an image's latent once, and the crops are random: add --center_crop, or leave"
    " --cache_latents out"
)


def prepare_caching(images: ImageDataset, every: bool = False) -> None:
    """Leave out images that cannot be read, if they may be, before the batches are planned.

    Args:
        every: whether to look at images that are not kept decoded, too.

    Raises:
        UsageError: images that are cropped at random, each time elsewhere.
    """
    images.leave_out_broken()
    size = (images.transform.height, images.transform.width)
    if images.transform.center_crop:
        return
    shapes = (pixels.shape[:2] for pixels in (() if images.cache is None else images.cache))
    if images.cache is None and every:
        shapes = (images.read_pixels(index)[1].shape[:2] for index in range(len(images)))
    if any(tuple(shape) != size for shape in shapes):
        raise UsageError(RANDOM_CROPS)


@torch.no_grad()
def cache_latents(
    images: ImageDataset, vae: AutoencoderKL, folder: Path, accelerator: "Accelerator"
) -> tuple[TensorTable, list[bytes]]:
    """The moments of all images' latents, mirrored ones too where images are flipped; and the images' keys.

    Raises:
        UsageError: images that are cropped at random, each time elsewhere.
    """
    images.leave_out_broken()
    transform = images.transform
    name = digest(network_digest(vae), repr(transform._replace(random_flip=False)).encode()).hex()
    table, keys = TensorTable(folder / f"latents-{name}"), image_keys(images)
    size = (transform.height, transform.width)

    def moments(indices: list[int]) -> torch.Tensor:
        pictures = []
        for number in indices:
            index, mirrored = number % len(keys), number >= len(keys)
            pixels = images.read_pixels(index)[1]
            if pixels.shape[:2] != size:
                raise UsageError(RANDOM_CROPS)
            upright = transform._replace(random_flip=mirrored).crop_and_flip(pixels, UNAUGMENTED)
            pictures.append(torch.from_numpy(upright))
        batch = to_model_range(torch.stack(pictures).to(vae.device)).to(vae.dtype)  # [N, C, H, W]
        return vae.encode(batch).latent_dist.parameters

    both = keys + [flipped(key) for key in keys] if transform.random_flip else keys
    table.fill(both, moments, accelerator, "encoding images")
    return table, keys


def cached_latents(
    images: ImageDataset,
    vae: AutoencoderKL,
    folder: Path,
    accelerator: "Accelerator",
    embeddings: TensorTable | None = None,
) -> LatentDataset:
    """The images as their latents, computed once; the pixels that were kept decoded are let go."""
    table, keys = cache_latents(images, vae, folder, accelerator)
    images.cache = None
    return LatentDataset(images, table, keys, embeddings)


@torch.no_grad()
def cache_embeddings(
    captions: list[str],
    text_encoder: torch.nn.Module,
    tokenizer: "CLIPTokenizer",
    encode: Callable,
    folder: Path,
    accelerator: "Accelerator",
) -> TensorTable:
    """The embeddings [L, D] of captions; `encode` makes them of a list of texts."""
    words = tokenizer.backend_tokenizer.to_str() + str(tokenizer.model_max_length)
    name = digest(network_digest(text_encoder), words.encode()).hex()
    table = TensorTable(folder / f"embeddings-{name}")
    keys = [caption_key(caption) for caption in captions]
    table.fill(keys, lambda indices: encode([captions[index] for index in indices]), accelerator, "encoding captions")
    return table
