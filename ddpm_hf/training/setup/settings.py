"""The settings that a run saves, and its seed."""

import json
import secrets
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ...common.arguments import SECRET_FLAGS, START, flags_by_resume
from ...common.checkpoints import SETTINGS
from ...common.errors import UsageError
from ...common.files import write_atomically
from ..flags import Flags


def agree_on_seed(seed: int | None, resumed: dict[str, Any] | None) -> int:
    """The seed given, the resumed run's, or one chosen by the main process: the same on all ranks.

    Raises:
        UsageError: another seed than the run to resume had.
    """
    if resumed is not None:
        before = resumed.get("seed")
        if type(before) is not int:
            raise UsageError(
                f"--resume_from_checkpoint: the seed in the checkpoint's manifest is not an integer ({before!r})"
            )
        if seed not in (None, before):
            raise UsageError(f"--seed {seed}: the run to resume has seed {before}; leave --seed out")
        return before
    return broadcast_object_list([secrets.randbits(31) if seed is None else seed])[0]


def public_settings(flags: Flags) -> dict[str, Any]:
    """The flags and their values, without secrets."""
    return {name: value for name, value in flags.values().items() if name not in SECRET_FLAGS}


def settings_that_go_on(flags: Flags) -> dict[str, Any]:
    """The settings that a run which is resumed takes over: all but those of a start, and secrets."""
    of_the_start = flags_by_resume(flags.fields(), START)
    return {name: value for name, value in public_settings(flags).items() if name not in of_the_start}


def save_settings(flags: Flags) -> None:
    """Write `training_config.json`, which `--config` reads back."""
    settings = {"output_dir": flags.output_dir, **settings_that_go_on(flags)}
    write_atomically(Path(flags.output_dir) / SETTINGS, json.dumps(settings, indent=2) + "\n")
