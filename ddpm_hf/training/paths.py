"""Paths as the user writes them."""

import os


def expand_home(word: str) -> str:
    """A word of a command line with `~` at the start of its value made the home folder, also after `--flag=`.

    Shells do so for `--flag ~/data` alone, and config files have no shell.

    >>> expand_home("--flag=~/data") == "--flag=" + os.path.expanduser("~/data"), expand_home("--flag")
    (True, '--flag')
    """
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(value)
