"""Declares a flag: its default, its range, its help, what it requires, and whether a resumed run may change it."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .errors import UsageError

SECRET_FLAGS = ("hub_token",)  # never written, shown or tracked
# How a resumed run treats a flag
START = "start"  # for this start only: neither recorded nor inherited
FREE = "free"  # may change, without effect on the training
APPLIED = "applied"  # may change: applies from the resumed step on, and is logged
FIXED = "fixed"  # must not change


class Range(NamedTuple):
    """The numbers that a flag may be."""

    holds: Callable[[Any], bool]
    says: str  # after "must be"


POSITIVE = Range(lambda value: value > 0, "more than 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "0 or more")
ONE_OR_MORE = Range(lambda value: value >= 1, "1 or more")
SHARE = Range(lambda value: 0 <= value < 1, "at least 0 and less than 1")


def HfArg(
    *,
    help: str,
    aliases: list[str] | None = None,
    group: str | None = None,
    range: Range | None = None,
    resume: str = APPLIED,
    instead_of: str | None = None,
    joins: tuple[str, ...] = (),
    **default: Any,
) -> Any:
    """A field of a dataclass that `transformers.HfArgumentParser` makes a flag of.

    Args:
        help: for `--help`.
        aliases: other spellings.
        group: the title in `--help` of this flag and those after it; by default the dataclass's.
        range: the valid numbers; None is always valid.
        resume: how a resumed run treats the flag, one of the four above.
        instead_of: an alternative flag: given to a resumed run, this one replaces it.
        joins: values that can be combined with that flag, so that neither replaces the other.
        default: `default` or `default_factory` of `dataclasses.field`.
    """
    metadata = {
        "resume": resume, "instead_of": instead_of, "joins": joins, "help": help, "aliases": aliases, "group": group,
        "range": range,
    }  # fmt: skip
    return dataclasses.field(metadata={key: value for key, value in metadata.items() if value is not None}, **default)


def flags_by_resume(fields: Iterable[dataclasses.Field], resume: str) -> list[str]:
    """The names of the flags that are `START`, `FREE`, `APPLIED` or `FIXED`."""
    return [one.name for one in fields if one.metadata.get("resume", APPLIED) == resume]


# Whole numbers are less than 2^31, and these are smaller: more would take the machine down
LARGEST = {"cpu_threads": 1024, "dataloader_num_workers": 1024, "eval_batch_size": 65536, "seed": math.inf}


def check_values(flags: Any) -> None:
    """Raise UsageError for a flag of a dataclass whose value cannot be."""
    for field in dataclasses.fields(flags):
        name, value, allowed = field.name, getattr(flags, field.name), field.metadata.get("range")
        if name in SECRET_FLAGS:
            check_token(name, value)
        elif isinstance(value, str):
            check_word(name, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} {value}: must be a finite number")
        elif isinstance(value, int) and value > LARGEST.get(name, 2**31 - 1):
            raise UsageError(f"--{name} {value}: must be {LARGEST.get(name, 2**31 - 1)} or less")
        if allowed is not None and value is not None and not allowed.holds(value):
            raise UsageError(f"--{name} {value}: must be {allowed.says}")


def check_token(name: str, value: str | None) -> None:
    """Raise UsageError, without showing the value, for a malformed token."""
    if value is not None and not re.fullmatch("[!-~]+", value):
        raise UsageError(f"--{name}: a token has letters and digits only; this one has other characters or is empty")


def check_license(name: str, value: str | None) -> None:
    """Raise UsageError for a license name that the Hub rejects."""
    if value is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", value):
        raise UsageError(f"--{name} {value!r}: give the Hub's lower-case name, such as apache-2.0 or mit")


def check_word(name: str, value: str) -> None:
    """Raise UsageError for a text that can be neither a name nor a path."""
    if not value.strip():
        raise UsageError(f"--{name} {value!r} is empty; leave the flag out, or give a value")
    if "\0" in value or len(value) > 4000 or any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise UsageError(f"--{name} {value!r} is too long for a name or a path, or holds a zero byte")


# Advice for slow training on a CPU
SHORTER_TRAINING = "train for fewer --max_train_steps, at a smaller --resolution, or on a GPU"


def has_grids(config: Any) -> bool:
    """Whether a training samples grids."""
    return bool(getattr(config, "save_images_steps", None) or getattr(config, "save_images_epochs", None))


def synonyms(table: str) -> dict[str, str]:
    """A table of lines "our flag: names in other programs ..." as a mapping from each of these names.

    >>> synonyms("--learning_rate: lr adam_lr")
    {'lr': '--learning_rate', 'adam_lr': '--learning_rate'}
    """
    rows = [line.split(": ") for line in table.strip().splitlines()]
    return {name: here.strip() for here, names in rows for name in names.split()}


class Need(NamedTuple):
    """What a flag requires to have an effect.

    A dataclass of flags has a table `needs`, from the name of a flag to its need; it replaces rows of its bases.

    Args:
        met: whether a config fulfils it; the config then also has `device`, the run's device type ("cpu", "cuda").
        otherwise: the message if not, after the flag's name; flags in braces stand for their values.
    """

    met: Callable[[Any], bool]
    otherwise: str
