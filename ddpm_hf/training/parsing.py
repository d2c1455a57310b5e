"""How flags get their values.

What decides, strongest first: the command line, the `--config` file, what a resumed run was trained with, Accelerate's
launcher or configuration, what the optimizer requires, the preset, the recipe for the embedded data, the default.
"""

import argparse
import collections
import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import yaml

from ..common.arguments import APPLIED, FIXED, FREE, SECRET_FLAGS, flags_by_resume
from ..common.errors import UsageError, one_line
from ..common.files import expand_home
from ..common.lazy import load_alone
from ..common.machine import accept_any_text, write_out
from .flags import OPTIMIZERS, Flags
from .help import EPILOG, FlagFormatter, bare_name, grouped, meanings_of, meant

if TYPE_CHECKING:
    from transformers import HfArgumentParser
else:  # `--help` need not wait a second for all of transformers
    HfArgumentParser = load_alone("transformers", "hf_argparser").HfArgumentParser


def _is_like_a_flag(word: str) -> bool:
    """Whether argparse takes a word of a list for a flag: one with a leading dash that is not a number."""
    return word.startswith("-") and not re.fullmatch(r"-(\d+|\d*\.\d+)", word)


class Program(NamedTuple):
    """A program's command line.

    Each dataclass of flags has a `title` for their group in `--help`, and may have `meanings`: what to write here for
    names that its flags have elsewhere.

    Args:
        flags: the dataclasses that declare its flags; `--help` shows them in this order.
        weaker_layers: called with the flags that the stronger layers alone make; returns a list of (source, values),
            weakest first, such as a recipe and a preset.
        defaults: where they are others than those of the dataclasses.
        helps: texts of `--help` that are others than those of the dataclasses.
        spellings: more names of some flags.
        absent: why it lacks flags that similar programs have, by their names.
        stages: the folders within the output folder whose checkpoints tell what a run was trained with; of the first
            that has one.
    """

    flags: tuple[type, ...]
    weaker_layers: Callable[[Flags], list[tuple[str, dict[str, Any]]]]
    description: str
    name: str | None = None
    defaults: Mapping[str, Any] = {}
    helps: Mapping[str, str] = {}
    spellings: Mapping[str, list[str]] = {}
    absent: Mapping[str, str] = {}
    stages: tuple[str, ...] = ("",)


class OneLineParser(HfArgumentParser):
    """Declares the fields of dataclasses as flags; a mistake is one line and exit code 2."""

    def __init__(self, program: Program):
        self.program, self.absent = program, program.absent
        self.fields = {field.name: field for one in program.flags for field in dataclasses.fields(one)}
        self.meanings = meanings_of(program.flags)
        options = {"formatter_class": FlagFormatter, "epilog": EPILOG, "description": program.description}
        super().__init__(
            program.flags, prog=program.name, allow_abbrev=False, usage="%(prog)s [--flag value ...]", **options
        )
        self.set_defaults(**program.defaults)
        self.source = ""  # of the words that are parsed, where that is not the command line

    def print_help(self, file: Any = None) -> None:
        """The flags in groups, on stdout."""
        write_out(self.format_help().rstrip())

    def format_help(self) -> str:
        """The flags in groups."""
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for title, actions in grouped(self._actions, self.program.flags).items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    @staticmethod
    def _parse_dataclass_field(parser: "OneLineParser", field: dataclasses.Field) -> None:
        """Declare a field's flag; argparse takes what it knows of the metadata alone."""
        plain, program, aliases = copy.copy(field), parser.program, field.metadata.get("aliases", [])
        help, spellings = program.helps.get(field.name, field.metadata["help"]), program.spellings.get(field.name, [])
        plain.metadata = MappingProxyType({"help": help, "aliases": [*aliases, *spellings]})
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line."""
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        reason = self.absent.get(bare_name(unknown))
        instead = self.meant(unknown) if unknown and not reason else None
        hint = f"{reason}; " if reason else f"did you mean {instead}? " if instead else ""
        source = f"{self.source}: " if self.source else ""
        print(f"{self.prog}: error: {one_line(f'{source}{message} ({hint}see --help)')}", file=sys.stderr)
        raise SystemExit(2)

    def meant(self, word: str) -> str | None:
        """What to write instead of a word that is no flag; None if nothing comes near."""
        return meant(word, self.flags(), self.meanings)

    def flags(self) -> set[str]:
        """The names that a config file may set: all flags, by any of their spellings."""
        return {option[2:] for option in self._option_string_actions if option.startswith("--")} - {"help", "config"}

    def spelled(self, word: str) -> str:
        """A word of the command line, with a flag's hyphens as underscores where it has no spelling with hyphens."""
        flag, equals, value = word.partition("=")
        underscored = f"--{flag[2:].replace('-', '_')}"
        known = self._option_string_actions
        return underscored + equals + value if flag not in known and underscored in known else word

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse, with hyphens for underscores in any flag, and `~` in any value."""
        return super().parse_known_args([expand_home(self.spelled(word)) for word in args or []], namespace)

    def tokens(self, values: dict[str, Any], source: str) -> list[str]:
        """Values as command-line words, which argparse has checked like the user's own."""
        words = []
        for name, value in values.items():
            flag = self.spelled(f"--{name}")
            if flag[2:] not in self.flags():
                instead, reason = self.meant(f"--{name}"), self.absent.get(bare_name(name))
                if reason:
                    raise UsageError(f"{source}: unknown setting {name!r}; {reason}")
                hint = f"; did you mean {instead if ' ' in instead else repr(instead[2:])}?" if instead else ""
                raise UsageError(f"{source}: unknown setting {name!r}{hint}")
            if isinstance(value, list) and self._option_string_actions[flag].nargs in ("+", "*"):
                if any(isinstance(one, (dict, list)) or _is_like_a_flag(str(one)) for one in value):
                    raise UsageError(
                        f"{source}: {name!r} takes a list of numbers, or of texts that do not begin with a dash"
                    )
                words += [flag, *map(str, value)] if value else []
                continue
            if isinstance(value, (dict, list)):
                raise UsageError(f"{source}: {name!r} takes one value, not a {type(value).__name__}")
            if value not in (None, "", "null", "~"):
                words.append(f"{flag}={ {'on': 'true', 'off': 'false'}.get(value, value) }")  # YAML's booleans
        self.source = source
        self.parse_args(words)
        self.source = ""
        return words

    def parse(self, argv: list[str]) -> Flags:
        """The flags for these words; an unknown word ends with exit code 2."""
        values = vars(self.parse_args(argv))
        parts = (
            one(**{field.name: values[field.name] for field in dataclasses.fields(one)}) for one in self.program.flags
        )
        return Flags(list(parts), absent=list(self.absent))

    def given(self, words: list[str]) -> list[dataclasses.Field]:
        """The fields of the flags that these words set."""
        unset = object()
        parsed = vars(self.parse_args(words, argparse.Namespace(**dict.fromkeys(self.fields, unset))))
        return [one for name, one in self.fields.items() if parsed[name] is not unset]

    def replaced(self, words: list[str]) -> set[str]:
        """The names of the flags that say in another way what these words set."""
        values = vars(self.parse_args(words))
        fields = [one for one in self.given(words) if values[one.name] not in one.metadata.get("joins", ())]
        return {one.metadata["instead_of"] for one in fields if one.metadata.get("instead_of")}

    def below(self, values: dict[str, Any], source: str, words: list[str]) -> list[str]:
        """The words over weaker values: of these, those that the words do not decide."""
        self.tokens(values, source)  # what is wrong is said of all of them
        given, replaced = {one.name for one in self.given(words)}, self.replaced(words)
        weaker = {}
        for name, value in values.items():
            field = self.fields[self._option_string_actions[self.spelled(f"--{name}")].dest]
            if field.name not in given and (field.name not in replaced or value in field.metadata.get("joins", ())):
                weaker[name] = value
        return self.tokens(weaker, source) + words

    def over(self, layers: list[tuple[str, dict]], words: list[str], decided: Iterable[str] = ()) -> list[str]:
        """The words over a launcher's settings and these layers, except for what is `decided`."""
        from .launcher import launcher_settings  # which needs this module's UsageError

        for source, values in reversed([*layers, *launcher_settings()]):
            # a recipe may set flags that only other commands have
            values = {name: values[name] for name in values if name in self.flags() and name not in decided}
            words = self.below(values, source, words)
        return words


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of (key, value) pairs; raises ValueError where the second of two values would quietly win."""
    twice = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def _read_yaml(text: str) -> Any:
    """What YAML says, with the words of a mapping as they stand: no is "no", 1e-4 a number."""
    values = yaml.safe_load(text)
    if isinstance(values, dict):
        node = yaml.compose(text, yaml.SafeLoader)
        _each_key_once([(str(key.value), None) for key, _ in node.value])
        values = yaml.load(text, yaml.BaseLoader)
    return values


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        UsageError: no such file, not readable as either, a key that is there twice, or not a mapping.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(2**20 + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error.__class__.__name__})") from error
    if len(data) > 2**20:
        raise UsageError(f"--config {path}: more than a mebibyte, which no list of flags is")
    try:
        json_given = path.endswith(".json")
        values = json.loads(text, object_pairs_hook=_each_key_once) if json_given else _read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: also an impossible date, or number
        raise UsageError(f"--config {path}: not YAML or JSON ({one_line(error)})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must map flags to values, and is a {type(values).__name__}")
    return values


def _trained_with(flags: Flags, stages: tuple[str, ...]) -> dict[str, Any]:
    """The settings in the checkpoint that --resume_from_checkpoint names: of the program's flags, those that go on."""
    from ..common.checkpoints import recorded_settings  # which needs this module's UsageError
    from ..common.layout import EARLIER
    from .earlier_run import comes_back

    fields = flags.fields()
    names = {name for kind in (FREE, APPLIED, FIXED) for name in flags_by_resume(fields, kind)} - set(SECRET_FLAGS)
    folder = Path(flags.output_dir)
    stages = (EARLIER, *stages) if comes_back(folder) else stages
    settings = (recorded_settings(folder / stage, flags.resume_from_checkpoint) for stage in stages)
    recorded = next(filter(None, settings), {})
    if not flags.knows(recorded):
        return {}  # what is wrong with its checkpoint is said where it is read
    return {name: value for name, value in recorded.items() if name in names}


def weaker_layers(program: Program, flags: Flags) -> list[tuple[str, dict[str, Any]]]:
    """What decides where command line and --config say nothing, weakest first: last, what the optimizer brings."""
    optimizer = flags.optimizer
    return [*program.weaker_layers(flags), (f"the optimizer {optimizer}", OPTIMIZERS.get(optimizer, {}))]


def parse_flags(program: Program, argv: list[str]) -> Flags:
    """Parse `argv` over a `--config` file, over what a resumed run was trained with, over the program's layers."""
    accept_any_text()
    parser = OneLineParser(program)
    try:
        from_file, _ = parser.parse_known_args(argv)
        words = argv
        if from_file.config:
            words = parser.below(read_config_file(from_file.config), f"--config {from_file.config}", words)
        given, typed = parser.given(words), {one.name for one in parser.given(argv)}
        layers = weaker_layers(program, parser.parse(words))
        flags = parser.parse(parser.over(layers, words))
        if flags.resume_from_checkpoint:
            before = _trained_with(flags, program.stages)
            words = parser.below(before, "--resume_from_checkpoint", [f"--output_dir={flags.output_dir}", *words])
            layers = weaker_layers(program, parser.parse(words))
            flags = parser.parse(parser.over(layers, words, decided=set(before)))
        # a file may list all flags, as a run's settings do: there, what they are without it asks for nothing
        flags.given = frozenset(
            one.name
            for one in given
            if one.name in typed
            or getattr(flags, one.name)
            not in (parser.get_default(one.name), *(values.get(one.name) for _, values in layers))
        )
        return flags
    except UsageError as error:
        parser.error(str(error))
