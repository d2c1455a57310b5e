"""Arrays in npz files."""

import zipfile
import zlib
from collections.abc import Container
from pathlib import Path

import numpy as np

from .errors import one_line


def read_npz(path: Path, names: Container[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name, all or those of `names`.

    Raises:
        ValueError: it cannot be read, is damaged, or holds pickled objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            return {name: archive[name] for name in archive.files if names is None or name in names}
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a complete npz file of arrays ({one_line(error, 120)})") from error
