"""What several commands share."""

import os


def quiet() -> None:
    """Silence the libraries: errors become one line in `main`, and progress is the command's."""
    import warnings

    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for library in (logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    # Diffusers passes an argument that the Hub's client no longer supports
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")


def check_revision(model: str, revision: str | None) -> None:
    """Raise ValueError for a revision of a folder, which has none."""
    if revision is not None and os.path.isdir(model):
        raise ValueError(f"--revision {revision}: {model} is a folder, which has no revisions; leave it out")


def clean_token(token: str | None) -> str | None:
    """The token, without a newline that a file or a variable may have added.

    Raises:
        ValueError: it is malformed; the message does not show it.
    """
    from ..common.arguments import check_token

    token = token and token.strip()
    check_token("token", token or None)
    return token or None


def token_to_write(token: str | None) -> str:
    """The token to upload with: from --token, HF_TOKEN, or the login.

    Raises:
        ValueError: there is none, or it is malformed.
    """
    from huggingface_hub import get_token

    token = clean_token(token) or get_token()
    if token is None:
        raise ValueError(
            "uploading requires a token with write access: log in with `hf auth login`, set HF_TOKEN, or give --token"
            " (https://huggingface.co/settings/tokens)"
        )
    return token
