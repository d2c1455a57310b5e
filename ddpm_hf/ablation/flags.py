"""The flags of a plan's cells, checked by the parser of the script that they are for."""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.arguments import FREE, SECRET_FLAGS, START, flags_by_resume
from ..common.errors import UsageError
from ..common.files import write_atomically
from ..training.flags import Flags
from ..training.parsing import OneLineParser, Program, parse_flags
from .plan import Plan

MODEL_CONFIG = "model_config_name_or_path"
UNETS = "unets"  # of the output folder: models that the plan describes itself
# Free to change in a resumed run, and yet they decide what is trained
DECISIVE = {"num_epochs", "max_train_steps", "model_preset", MODEL_CONFIG, "validation_steps"}
INCIDENTAL = {"cpu_threads"}  # applied to a resumed run, and yet without effect on what is trained
DECIDED_HERE = {"seed", "push_to_hub"}  # by the plan's seeds; a table's cells are not published
# Where neither plan nor preset says otherwise: nobody watches a cell while it trains
CELL_DEFAULTS = {"logger": "none", "save_images_epochs": "0", "checkpoints_total_limit": "1"}


class CellFlags:
    """Reads the flags of cells as their script would.

    Args:
        program: of the script.
        out: the ablation's folder, which keeps the UNets that the plan describes.
        check_more: raises ValueError for flags that only the script's own work refuses.
    """

    def __init__(self, program: Program, out: Path, check_more: Callable[[Flags], Any] = lambda flags: None):
        self.program, self.out, self.check_more = program, out, check_more
        self.parser = OneLineParser(program)
        fields = list(self.parser.fields.values())
        free = set(flags_by_resume(fields, FREE)) - DECISIVE
        self.start = set(flags_by_resume(fields, START))
        self.without_effect = free | self.start | INCIDENTAL | set(SECRET_FLAGS)

    def check(self, plan: Plan) -> None:
        """Raise UsageError for a flag that the script lacks or refuses; the message names its line in the plan."""
        seen = set()
        for cell in plan.cells:
            for name, value in cell.flags.items():
                path = cell.paths[name]
                if (path, str(value)) not in seen:
                    seen.add((path, str(value)))
                    self._check_one(plan, path, name, value)
            self._check_together(plan, cell.flags, cell.paths, f"cell {cell.name!r}: ")

    def check_mapping(self, plan: Plan, path: tuple[str, ...], flags: dict[str, Any]) -> None:
        """The same for a mapping of flags that is not of a cell."""
        paths = {name: (*path, name) for name in flags}
        for name, value in flags.items():
            self._check_one(plan, paths[name], name, value)
        self._check_together(plan, flags, paths, "")

    def _check_together(
        self, plan: Plan, flags: dict[str, Any], paths: dict[str, tuple[str, ...]], title: str
    ) -> None:
        try:
            parsed = self.parse(self.words(flags))
            parsed.check()
            self.check_more(parsed)
        except ValueError as error:
            named = [flag for flag in paths if re.search(rf"\b{re.escape(flag)}\b", str(error))]
            at = paths[named[0]] if named else ("flags",)
            raise plan.document.error(at, f"{title}{error}") from error

    def _check_one(self, plan: Plan, path: tuple[str, ...], name: str, value: Any) -> None:
        flag = self.parser.spelled(f"--{name}")[2:]
        if flag in self.start | DECIDED_HERE or flag in SECRET_FLAGS:
            instead = "seeds" if flag == "seed" else "the command"
            raise plan.document.error(path, f"is decided by {instead}, and not a flag of cells; leave it out")
        if flag == MODEL_CONFIG and isinstance(value, dict):
            return
        try:
            self._words({name: value})
        except ValueError as error:
            raise plan.document.error(path, str(error).removeprefix(": ")) from error

    def _words(self, values: Mapping[str, Any]) -> list[str]:
        with _no_exit():
            return self.parser.tokens(dict(values), "")

    def words(self, flags: Mapping[str, Any]) -> list[str]:
        """Flags as words of the command line, over what cells have by default."""
        settled = {name: self._settled(name, value) for name, value in flags.items()}
        fitting = {name: value for name, value in CELL_DEFAULTS.items() if name in self.parser.fields}
        if {"save_images_steps", "save_images_epochs"} & set(settled):
            fitting.pop("save_images_epochs", None)
        return self._words({**fitting, **settled})

    def _settled(self, name: str, value: Any) -> Any:
        """A UNet that the plan describes becomes a file."""
        if not (name == MODEL_CONFIG and isinstance(value, dict)):
            return value
        return str(self._unet_folder(value))

    def _unet_folder(self, config: dict[str, Any]) -> Path:
        return self.out / UNETS / digest(config)

    def write_unets(self, cells: Sequence[tuple[dict[str, Any], dict[str, tuple[str, ...]]]], typed: Any) -> None:
        """Write the UNets that the plan describes.

        Args:
            cells: flags, and where each stands in the plan.
            typed: the plan with YAML's types.
        """
        for flags, paths in cells:
            value = flags.get(MODEL_CONFIG)
            if not isinstance(value, dict):
                continue
            config = typed
            for key in paths[MODEL_CONFIG]:
                config = config[key]
            folder = self._unet_folder(value)
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"_class_name": "UNet2DModel", **config}, indent=1) + "\n"
            if not (folder / "config.json").is_file():
                write_atomically(folder / "config.json", text)

    def parse(self, words: list[str]) -> Flags:
        """All flags of the script for these words.

        Raises:
            UsageError: it refuses them.
        """
        with _no_exit():
            return parse_flags(self.program, words)

    def decisive(self, words: list[str]) -> dict[str, Any]:
        """The settings that decide what is trained, where they are not the defaults."""
        values = self.parse(words).values()
        found = {
            name: value
            for name, value in values.items()
            if name not in self.without_effect and value != self.parser.get_default(name)
        }
        config = Path(str(found.get(MODEL_CONFIG))) / "config.json"
        if config.is_file():
            found[MODEL_CONFIG] = json.loads(config.read_text(encoding="utf-8"))
        return found


def digest(value: Any) -> str:
    """A short name for a value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@contextlib.contextmanager
def _no_exit() -> Any:
    """Within, what a parser prints before it ends the process becomes a UsageError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        message = said.getvalue().strip().splitlines()[-1].partition(": error: ")[2]
        raise UsageError(message.replace(" (see --help)", "")) from end
