"""Where this package runs from, and how to install it."""

import os
import re
from pathlib import Path

# The argument of `pip install`: a name on PyPI, or git+https://...; set it once the package is published
PACKAGE_URL = ""


def package_url() -> str:
    """The argument of `pip install`, empty if unknown; the variable DDPM_HF_PACKAGE_URL takes precedence.

    Raises:
        ValueError: not a name or an address.
    """
    url = os.environ.get("DDPM_HF_PACKAGE_URL", PACKAGE_URL).strip()
    if url and not re.fullmatch(r"[\w.+:/@~#=\[\]-]+", url):
        raise ValueError(f"DDPM_HF_PACKAGE_URL={url!r}: must be a name on PyPI or an address such as git+https://...")
    return url


def runs_from_source() -> bool:
    """Whether the package is in a clone of the repository."""
    root = Path(__file__).parents[2]
    return (root / "setup.cfg").is_file() and (root / "pyproject.toml").is_file()


def install_command(extra: str, *packages: str) -> str:
    """How to install the packages of an extra.

    Args:
        packages: the extra's packages, for installations without a clone; PyPI may not have this package.
    """
    return f"pip install '.[{extra}]' (in the clone)" if runs_from_source() else f"pip install {' '.join(packages)}"
