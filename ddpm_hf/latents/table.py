"""A table of tensors on disk, by key."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..common.files import PARTIAL_SUFFIX, flush, flush_tree
from ..training.reporting import task

ROWS_A_FILE = 2048


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for a content."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.digest()


class TensorTable:
    """float32 tensors of one shape by their keys, in a folder of arrow datasets, each written whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.row_of: dict[bytes, int] = {}
        self.shape: tuple[int, ...] = ()  # of each tensor, once there is one
        self.values: Any = None
        self.read()

    def read(self) -> None:
        """Take in what lies in the folder."""
        import datasets
        import psutil

        parts = [datasets.load_from_disk(str(path)) for path in sorted(self.folder.glob("part-*"))]
        if not parts:
            return
        table = datasets.concatenate_datasets(parts)
        self.row_of = {key: row for row, key in enumerate(table["key"])}
        self.shape = tuple(table[0]["shape"])
        values = table.with_format("numpy", columns=["tensor"])
        small = len(table) * 4 * int(np.prod(self.shape)) < 0.25 * psutil.virtual_memory().available
        self.values = np.asarray(values["tensor"][:]) if small else values

    def __len__(self) -> int:
        return len(self.row_of)

    def add(self, keys: Sequence[bytes], tensors: torch.Tensor) -> None:
        """Write tensors [N, ...] as one more part."""
        import datasets

        self.folder.mkdir(parents=True, exist_ok=True)
        shape = list(tensors.shape[1:])
        flat = tensors.float().cpu().reshape(len(keys), -1).numpy()  # [N, D]
        columns = {"key": list(keys), "shape": [shape] * len(keys), "tensor": list(flat)}
        features = datasets.Features(
            {
                "key": datasets.Value("binary"),
                "shape": datasets.List(datasets.Value("int32")),
                "tensor": datasets.List(datasets.Value("float32"), length=flat.shape[1]),
            }
        )
        final = self.folder / f"part-{digest(*keys).hex()}"
        scratch = tempfile.mkdtemp(dir=self.folder, prefix=".writing-", suffix=PARTIAL_SUFFIX)
        try:
            datasets.Dataset.from_dict(columns, features=features).save_to_disk(scratch, max_shard_size="100GB")
            os.chmod(scratch, 0o755)  # a cache may be shared
            flush_tree(Path(scratch))
            os.replace(scratch, final)
            flush(self.folder)
        except OSError:
            if not final.exists():  # else another run has written the same
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Remove what killed writes left behind; another run may be writing too, but not for an hour at one part."""
        for path in self.folder.glob(".writing-*"):
            with contextlib.suppress(FileNotFoundError):  # another run does the same
                if time.time() - path.stat().st_mtime > 3600:
                    shutil.rmtree(path)

    def look_up(self, keys: Sequence[bytes]) -> torch.Tensor:
        """The tensors [N, ...] of the keys."""
        rows = [self.row_of[key] for key in keys]
        flat = self.values[rows] if isinstance(self.values, np.ndarray) else self.values[rows]["tensor"]
        return torch.from_numpy(np.ascontiguousarray(flat)).reshape(len(rows), *self.shape)

    def fill(
        self,
        keys: Sequence[bytes],
        compute: Callable[[list[int]], torch.Tensor],
        accelerator: Accelerator,
        what: str,
    ) -> None:
        """Compute the tensors that are not there yet, shared out over the ranks; `compute` gets indices."""
        indices = {key: index for index, key in enumerate(keys)}
        if accelerator.process_index == 0:
            self.remove_unfinished()
        # shared out before looking at what is there, which another rank may be writing
        local = sorted(indices.values())[accelerator.process_index :: accelerator.num_processes]
        missing = [index for index in local if keys[index] not in self.row_of]
        with task(what, len(missing), accelerator.is_local_main_process and len(missing) >= 100) as bar:
            for part in _parts(missing, ROWS_A_FILE):
                tensors = []
                for batch in _parts(part, 64):
                    tensors.append(compute(batch).float().cpu())
                    bar.update(len(batch))
                self.add([keys[index] for index in part], torch.cat(tensors))
        accelerator.wait_for_everyone()
        self.read()


def _parts(indices: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(indices), size):
        yield indices[first : first + size]
