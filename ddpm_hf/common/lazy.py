"""Imports that cost no more than what is used: a package's names on first use, a module without its package."""

import importlib.util
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any


def load_alone(package: str, name: str) -> ModuleType:
    """A module of another package, without the package's `__init__`; the package where it has no such module.

    Args:
        name: of a module that imports nothing of its package.
    """
    found = importlib.util.find_spec(package)
    spec = PathFinder.find_spec(f"{package}.{name}", found.submodule_search_locations if found else None)
    if spec is None or spec.loader is None:
        return importlib.import_module(package)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lazy_exports(
    package: str, homes: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562).

    Args:
        package: its `__name__`.
        homes: the names by the module that defines them, as in a relative import.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home_of[name], package), name)

    return get, lambda: sorted(home_of)
