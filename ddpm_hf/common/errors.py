"""Errors that a user can fix, and one-line messages."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def one_line(message: Any, limit: int = 1000) -> str:
    """A message or an error as one printable line of about `limit` letters, without tokens.

    >>> one_line("no such\\ncolumn, and hf_" + 9 * "a")
    'no such column, and hf_...'
    """
    line = re.sub(r"\bhf_\w{8,}", "hf_...", " ".join(str(message).split()))
    line = re.sub(r"\S{400,}", lambda word: f"{word[0][:100]}...{word[0][-20:]}", line)
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line if len(line) <= limit else f"{line[: limit * 6 // 10]} ... {line[-limit * 3 // 10 :]}"


class DataError(ValueError):
    """A dataset or an image that cannot be used; the message names it and a fix."""

    def __init__(self, message: str):
        if "Original Traceback" in message:  # torch's DataLoader wraps what a worker raised
            message = message.strip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(message)


class ImageMismatchError(DataError):
    """An image that does not fit the settings: the range of values or the channels; never skipped."""


def why_not_loaded(error: Exception) -> str:
    """Why a model cannot be loaded; with a fix for pickled weights, which can run code and are refused."""
    reason = one_line(error, 250)
    if ".safetensors" in reason and "no file" in reason.lower():
        reason += (
            "; weights are read only from safetensors: `ddpm-hf convert MODEL --to FOLDER` makes them of an"
            " unconditional model's or one by class, without executing anything; load others with the library that"
            " wrote them, if you trust them, and save_pretrained(folder, safe_serialization=True)"
        )
    return reason


@contextlib.contextmanager
def readable_load_errors(model: str) -> Iterator[None]:
    """Turn an error of loading a model into a ValueError that names the model and a fix."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError) as error:
        if Path(model).is_dir():
            raise ValueError(f"{model} cannot be loaded: {why_not_loaded(error)}") from error
        raise ValueError(
            f"{model} is neither a folder nor a model that can be reached on the Hub ({error.__class__.__name__});"
            " check the name, your network, and --token for a private one"
        ) from error
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{model} cannot be loaded: {why_not_loaded(error)}") from error


class UsageError(ValueError):
    """An error that the user can fix: a script prints it as one line and ends with exit code 2."""


class RunError(RuntimeError):
    """A failure of the machine, not of the command line: one line and exit code 1."""
