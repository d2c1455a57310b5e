"""What several commands share."""

import os


def quiet() -> None:
    """Leave it to this command to say what matters."""
    import warnings

    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for library in (logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)  # an error is one line, and main says it
        library.disable_progress_bar()
    # Diffusers hands to the Hub's client an argument that it knows no more
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")


def check_revision(model: str, revision: str | None) -> None:
    """Raise ValueError for a revision of a folder, which has none."""
    if revision is not None and os.path.isdir(model):
        raise ValueError(f"--revision {revision}: {model} is a folder, which has no revisions; leave it out")


def own_token(token: str | None) -> str | None:
    """The token, without the line's end that a file or a variable may have added.

    Raises:
        ValueError: it cannot be one; it is not shown.
    """
    from ..common.arguments import check_token

    token = token and token.strip()
    check_token("token", token or None)
    return token or None


def token_to_write(token: str | None) -> str:
    """The token to upload with: that of --token or HF_TOKEN, or of the login.

    Raises:
        ValueError: there is none, or one that cannot be one.
    """
    from huggingface_hub import get_token

    token = own_token(token) or get_token()
    if token is None:
        raise ValueError(
            "uploading requires a token with write access: log in with `hf auth login`, set HF_TOKEN, or give --token"
            " (https://huggingface.co/settings/tokens)"
        )
    return token
