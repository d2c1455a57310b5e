"""Other programs' command lines, as `--flags` has them."""

import shlex
from collections.abc import Collection, Mapping


def parse_words(text: str, known: Collection[str], program: str) -> dict[str, str]:
    """A command line of flags with values as a mapping.

    >>> parse_words("--image_size 64 --learn_sigma=True", ["image_size", "learn_sigma"], "theirs")
    {'image_size': '64', 'learn_sigma': 'True'}

    Raises:
        ValueError: a flag that is not known, or one without a value.
    """
    try:
        words = [part for word in shlex.split(text) for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    except ValueError as error:
        raise ValueError(f"--flags {text!r}: {error}") from error
    flags = {}
    for name, value in zip(words[::2], [*words[1::2], "--"]):
        if not name.startswith("--") or name[2:] not in known:
            raise ValueError(f"--flags: {name} is not a flag of {program}")
        if value.startswith("--"):
            raise ValueError(f"--flags: {name} has no value")
        flags[name[2:]] = value
    return flags


def whole(given: Mapping[str, str], name: str, default: int = 0) -> int:
    """A flag's value as a whole number.

    Raises:
        ValueError: it is none.
    """
    value = number(given, name, default)
    if value != int(value):
        raise ValueError(f"--{name} {given[name]}: must be a whole number")
    return int(value)


def number(given: Mapping[str, str], name: str, default: float = 0) -> float:
    """A flag's value as a finite number.

    Raises:
        ValueError: it is none.
    """
    try:
        value = float(given.get(name, default))
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e12:
        raise ValueError(f"--{name} {given[name]}: must be a number")
    return value
