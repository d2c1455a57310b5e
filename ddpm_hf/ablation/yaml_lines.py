"""YAML whose keys know their lines, so that a mistake in a plan can be found."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UsageError, one_line

MOST_BYTES, MOST_NODES = 2**20, 20_000  # aliases can make a short file long
Keys = tuple[str, ...]  # keys from the top; positions in a list as "0", "1"


class Document:
    """What a YAML file says.

    Args:
        name: of the file, for messages.
        values: mappings, lists, and texts as they stand: `no` is "no", 1e-4 is "1e-4"; None where nothing stands.
        lines: of each key and each entry of a list, from 1, by their path.
        typed: as `values`, with YAML's own types.
    """

    def __init__(self, name: str, values: Any, lines: dict[Keys, int], typed: Any):
        self.name, self.values, self.lines, self.typed = name, values, lines, typed

    def error(self, path: Keys, message: str) -> UsageError:
        """An error at a key: its file, line and name come first."""
        known = next((path[:size] for size in range(len(path), -1, -1) if path[:size] in self.lines), ())
        key = f" {'.'.join(path)}:" if path else ""
        return UsageError(f"{self.name}:{self.lines.get(known, 1)}:{key} {message}")


def read_document(file: Path) -> Document:
    """A YAML file.

    Raises:
        UsageError: it cannot be read, or holds a key twice.
    """
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read as text ({type(error).__name__})") from error
    if len(data) > MOST_BYTES:
        raise UsageError(f"{file}: is larger than a mebibyte")
    document = Document(str(file), {}, {(): 1}, {})
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise UsageError(f"{file}: is empty")
        budget = iter(range(MOST_NODES))
        document.values = _plain(root, (), document, budget)
        document.typed = _typed(root, loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise UsageError(f"{file}{where}: not YAML ({one_line(reason, 200)})") from error
    return document


def _typed(node: yaml.Node, loader: yaml.SafeLoader) -> Any:
    """The value of a node in YAML's types, but for keys, which are texts."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _typed(value, loader) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_typed(entry, loader) for entry in node.value]
    return loader.construct_object(node)


def _plain(node: yaml.Node, path: Keys, document: Document, budget: Iterator[int]) -> Any:
    """The value of a node; notes the lines of its keys."""
    if next(budget, None) is None:
        raise UsageError(f"{document.name}: has more than {MOST_NODES:,} values")
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        found = []
        for index, entry in enumerate(node.value):
            document.lines[(*path, str(index))] = entry.start_mark.line + 1
            found.append(_plain(entry, (*path, str(index)), document, budget))
        return found
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise document.error(path, "has a key that is not a text")
        name = str(key.value)
        document.lines[(*path, name)] = key.start_mark.line + 1
        if name in values:
            raise document.error((*path, name), "is there twice")
        values[name] = _plain(value, (*path, name), document, budget)
    return values
