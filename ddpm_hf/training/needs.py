"""Flags that have no effect without others: what they need, and the lines that say so."""

import dataclasses
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ..common.arguments import SECRET_FLAGS, Need
from .flags import Flags


def needs_of(parts: Iterable[Any]) -> dict[str, Need]:
    """The needs of all flags of dataclasses, or of their instances; where two say one, the first."""
    tables = [getattr(one, "needs", {}) for one in parts]
    return {name: need for table in reversed(tables) for name, need in table.items()}


def without_effect(flags: Flags, device: str) -> list[str]:
    """A line for each flag that the user gave and that has no effect, because of other flags or the device.

    Args:
        device: the kind of the run's.
    """
    values, needs, lines = flags.values(), needs_of(flags), []
    run = SimpleNamespace(**values, device=device)
    for field in flags.fields():
        need, value = needs.get(field.name), values[field.name]
        if need is None or field.name not in flags.given or not _asks(field, value) or need.met(run):
            continue
        secret = field.name in SECRET_FLAGS
        shown = value if isinstance(value, (list, tuple)) else [] if value is True or secret else [value]
        flag = " ".join([f"--{field.name}", *map(str, shown)])
        lines.append(f"{flag} {need.otherwise.format_map(values)}")
    return lines


def _asks(field: dataclasses.Field, value: Any) -> bool:
    """Whether a flag's value asks for something: 0, none and a switch as it is by default do not."""
    return value != field.default if isinstance(value, bool) else bool(value)
