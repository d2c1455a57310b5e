"""Networks that transformers loads, from a local folder or the Hub; from safetensors only."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ...common.errors import UsageError, readable_load_errors


def load_pretrained(model_class: Any, name: str, features: str) -> Any:
    """A model of transformers.

    Args:
        model_class: its class.
        name: a local folder, or a name on the Hub.
        features: as in `--features`, for the message.

    Raises:
        UsageError: it cannot be loaded; the message says which ways are left.
    """
    try:
        with readable_load_errors(name), _quiet():
            return model_class.from_pretrained(name, use_safetensors=True)
    except ValueError as error:
        raise UsageError(
            f"features {features!r}: {error}; or name a local folder after a colon, or features that need no download:"
            " efficientnet-lite0 or classifier:FOLDER"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of weights that are not needed (a CLIP model also holds a text encoder) and of retries."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    libraries = (logging, hub_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before):
            library.set_verbosity(verbosity)
