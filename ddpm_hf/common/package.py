"""Where this package runs from, and where others get it."""

import os
import re
from pathlib import Path

# What follows `pip install` for others: a name on PyPI, or git+https://...; set it once the package is published
PACKAGE_URL = ""


def package_url() -> str:
    """What follows `pip install`, or nothing where it is not known; DDPM_HF_PACKAGE_URL decides.

    Raises:
        ValueError: an address with other signs than addresses have.
    """
    url = os.environ.get("DDPM_HF_PACKAGE_URL", PACKAGE_URL).strip()
    if url and not re.fullmatch(r"[\w.+:/@~#=\[\]-]+", url):
        raise ValueError(f"DDPM_HF_PACKAGE_URL={url!r}: must be a name on PyPI or an address such as git+https://...")
    return url


def runs_from_source() -> bool:
    """Whether the package lies in a clone, with the files that build it."""
    root = Path(__file__).parents[2]
    return (root / "setup.cfg").is_file() and (root / "pyproject.toml").is_file()


def install_command(extra: str, *packages: str) -> str:
    """How to install the packages of an extra.

    Args:
        packages: what it holds, for those who have no clone: an index may not have the package itself.
    """
    return f"pip install '.[{extra}]' (in the clone)" if runs_from_source() else f"pip install {' '.join(packages)}"
