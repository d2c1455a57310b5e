"""Flags that have no effect without others: what they need, and the lines that say so."""

import copy
import dataclasses
from typing import Any

from ..common.arguments import Need


def needs_of(dataclass_type: type) -> dict[str, Need]:
    """The needs of all flags of a dataclass."""
    tables = [one.__dict__.get("needs", {}) for one in reversed(dataclass_type.__mro__)]
    return {name: need for table in tables for name, need in table.items()}


def without_effect(config, device: str, secrets: tuple[str, ...] = ()) -> list[str]:
    """A line for each flag that the user gave and that has no effect, because of other flags or the device.

    Args:
        config: as `parse_layers` gave it: its `given` are the names of the flags that the user set.
        device: the kind of the run's.
        secrets: names of flags whose values are not shown.
    """
    run = copy.copy(config)
    run.device = device
    needs, lines = needs_of(type(config)), []
    for field in dataclasses.fields(config):
        need, value = needs.get(field.name), getattr(config, field.name)
        if need is None or field.name not in config.given or not _asks(field, value) or need.met(run):
            continue
        shown = (
            value if isinstance(value, (list, tuple)) else [] if value is True or field.name in secrets else [value]
        )
        flag = " ".join([f"--{field.name}", *map(str, shown)])
        lines.append(f"{flag} {need.otherwise.format_map(vars(config))}")
    return lines


def _asks(field: dataclasses.Field, value: Any) -> bool:
    """Whether a flag's value asks for something: 0, none and a switch as it is by default do not."""
    return value != field.default if isinstance(value, bool) else bool(value)
