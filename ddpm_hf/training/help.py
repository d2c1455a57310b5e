"""How a script shows its flags: `--help` in groups, each flag once; and the flag that an unknown word means."""

import argparse
import dataclasses
import difflib
import re
import textwrap
from collections.abc import Iterable
from typing import Any

EPILOG = "Hyphens work as well as underscores, and --flag=VALUE as well as --flag VALUE. A switch takes no value."


class FlagFormatter(argparse.HelpFormatter):
    """Shows a flag by its spellings with underscores, what it takes, and its default where that says something."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=30, **options)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = getattr(action, "spellings", None) or spellings_of(action)
        takes = value_of(action)
        return f"{', '.join(spellings)} {takes}" if takes else ", ".join(spellings)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("%", "%%")  # argparse would take train[:80%] for a format
        if action.default is None or action.default is False or action.default in ("", [], argparse.SUPPRESS):
            return text
        return f"{text} (default: {'on' if action.default is True else '%(default)s'})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n[ \t]*\n", text.strip("\n"))
        return "\n\n".join(
            paragraph if paragraph.startswith("    ") else textwrap.fill(" ".join(paragraph.split()), width)
            for paragraph in paragraphs
        )


def spellings_of(action: argparse.Action) -> list[str]:
    """The option's spellings, without those that only replace an underscore by a hyphen."""
    given = action.option_strings
    return [one for one in given if "-" not in one[2:] or f"--{one[2:].replace('-', '_')}" not in given]


def value_of(action: argparse.Action) -> str:
    """What follows the option: nothing for a switch."""
    if action.nargs in (0, "?"):
        return ""
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    value = "N" if action.type is int else "X" if action.type is float else "VALUE"
    return f"{value} ..." if action.nargs in ("+", "*") else value


def grouped(actions: Iterable[Any], flags: Iterable[Any]) -> dict[str, list[argparse.Action]]:
    """The actions of dataclasses' fields by their groups, in the order of the dataclasses.

    A switch that only turns another one off shares its line.
    """
    titles: dict[str, str] = {}
    for one in flags:
        title = one.title
        for field in dataclasses.fields(one):
            title = titles[field.name] = field.metadata.get("group", title)
    groups: dict[str, list[argparse.Action]] = {title: [] for title in ("General", *titles.values())}
    shown: dict[str, Any] = {}
    for action in actions:
        if action.dest in shown:
            shown[action.dest].spellings += spellings_of(action)
            continue
        shown[action.dest] = action
        action.spellings = spellings_of(action)
        groups[titles.get(action.dest, "General")].append(action)
    return {title: members for title, members in groups.items() if members}


def meanings_of(flags: Iterable[type]) -> dict[str, str]:
    """What other programs' flags are called here: from their name to what to write instead."""
    return {name: here for one in flags for name, here in getattr(one, "meanings", {}).items()}


def bare_name(word: str) -> str:
    """A flag's name, without dashes, hyphens and a value.

    >>> bare_name("--Learning-Rate=1")
    'learning_rate'
    """
    return word.lstrip("-").partition("=")[0].replace("-", "_").lower()


def meant(word: str, flags: Iterable[str], meanings: dict[str, str]) -> str | None:
    """What to write instead of an unknown word: by its meaning, else the flag that is spelled like it, else None.

    Args:
        word: as it was given, with or without dashes and a value.
        flags: the names of the flags that there are, without dashes.
        meanings: of `meanings_of`; under "", the flag that a word without dashes is a value of.

    >>> meant("--lr", ["learning_rate"], {"lr": "--learning_rate"})
    '--learning_rate'
    >>> meant("--learning-rat=1", ["learning_rate"], {})
    '--learning_rate'
    """
    name = bare_name(word)
    if not word.startswith("-") and "" in meanings:
        return f"{meanings['']} {word}"
    if name in meanings:
        return meanings[name]
    near = difflib.get_close_matches(name, sorted({flag.replace("-", "_") for flag in flags}), n=1)
    return f"--{near[0]}" if near else None
