"""Features of real images, computed once: a file for each set of images, network and protocol."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from ...common.files import PARTIAL_SUFFIX, flush
from . import PARTS, Extractor, Features, extract


def cache_folder() -> Path:
    """Where features are kept: `ddpm_hf/features` in Hugging Face's cache folder (`HF_HOME`)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "ddpm_hf" / "features"


def cached_features(
    extractor: Extractor,
    batches: Callable[[], Iterable[torch.Tensor]],
    key: str,
    *,
    keep: Iterable[str] = PARTS,
    progress: str | None = None,
    total: int | None = None,
    folder: Path | None = None,
) -> Features:
    """The features of a set of images, from the cache if they are there, else computed and kept.

    Args:
        batches: the images, as `extract` takes them; called only if the features are not there.
        key: what identifies their pixels and their order.
        keep, progress, total: as in `extract`.
        folder: of the cache; None is `cache_folder()`.
    """
    kept = {part for part in PARTS if part == "pool" or (part in keep and part in extractor.provides)}
    name = hashlib.sha256(f"{extractor.fingerprint} {key}".encode()).hexdigest()[:32]
    path = (folder or cache_folder()) / f"{name}.safetensors"
    known = _read(path) or {}
    if not kept <= set(known):
        features = extract(extractor, batches(), keep=kept, progress=progress, total=total)
        known |= {part: getattr(features, part) for part in kept}
        _write(path, known)
    return Features(**{part: known[part] for part in kept})


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The parts in a file; None if there is none, or it is damaged and must be computed again."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        parts = load_file(path) if path.is_file() else None
    except (OSError, SafetensorError):
        return None
    return parts if parts is None or "pool" in parts else None


def _write(path: Path, parts: dict[str, np.ndarray]) -> None:
    """Write a file completely or not at all."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX)
    os.close(handle)
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in parts.items()}, temporary)
        flush(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
