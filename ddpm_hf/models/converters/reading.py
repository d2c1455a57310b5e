"""Reading other programs' checkpoints without executing anything in them."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common import arrays
from ...common.errors import one_line

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
REFUSED = (
    "it holds more than tensors, such as code, and nothing of it was executed; save the state dict alone with the"
    " program that wrote it: torch.save(model.state_dict(), FILE)"
)


def read_torch(path: Path) -> Mapping[str, Any]:
    """The content of a file of torch.save: tensors in dictionaries and lists, and nothing that runs code.

    Raises:
        ValueError: anything else, or a truncated file.
    """
    import pickle

    modern = zipfile.is_zipfile(path)  # its tensors can stay on disk until they are used
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old protocols
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=modern or None)
    except pickle.UnpicklingError as error:
        refused = re.search("unsupported (global|class|operand)|not an allowed global", str(error), re.IGNORECASE)
        raise ValueError(f"{path}: {REFUSED if refused else _damaged(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: {_damaged(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _damaged(error: Exception) -> str:
    said = one_line(error, 120)  # of some, a number alone
    return "not a complete file of torch.save" + (f" ({said})" if re.search("[a-z]", said) else "")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is malformed.
    """
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({one_line(error, 120)})") from error


def read_npz(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a .npz file.

    Raises:
        ValueError: it is malformed, or holds pickled objects.
    """
    try:
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.read_npz(path).items()}
    except TypeError as error:  # such as text
        raise ValueError(f"{path}: not an npz file of numbers ({one_line(error, 120)})") from error


def tensors_of(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict by name, without the prefix of a data-parallel training."""
    named = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if named and all(name.startswith("module.") for name in named):
        return {name.removeprefix("module."): value for name, value in named.items()}
    return named
