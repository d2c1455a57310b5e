"""For `python -m tests.support.snippets`: torch's types take mypy over a minute to read, so its names are Any here.

But for the decorator of our public methods, which would hide their types.
"""

from typing import Any, TypeVar

Function = TypeVar("Function")

class no_grad:
    def __call__(self, function: Function) -> Function: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...

def __getattr__(name: str) -> Any: ...
