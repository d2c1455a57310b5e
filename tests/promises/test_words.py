"""Texts for users, comments and docs are plain technical English: phrases that readers had to translate stay out."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# a phrase -> what a reader expects
INSTEAD = {
    r"(is|are|was|were) none of(?! them\b)": "must be one of, is not one of",
    r"wants? (a|an|the|to|its|multiples|more|all)": "requires",
    r"wish(es)?": "request",
    r"for who": "for users that",
    r"for ever": "without end",
    r"nobody (waits|listens|else|can|has)": "no rank, no user",
    r"(?<!there )(is|are) no (image|model|class|classifier|pipeline|run|text|file|number|integer|mapping)s?": "is not",
    r"knows? no (class|classes|diffusion|Accelerate|Hub)": "has no, is independent of",
    r"in the place of": "instead of, replaces",
    r"goes? up": "is uploaded",
    r"the peer": "Diffusers' script",
    r"taken? for the whole": "is loaded although it is incomplete",
    r"(let_old_go|wind_up|write_whole)": "rotate_checkpoints, save_before_exit, write_atomically",
}
FORBIDDEN = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b", re.IGNORECASE)
CODE = [
    *sorted((ROOT / "ddpm_hf").rglob("*.py")),
    *sorted(ROOT.glob("train_*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def texts_of_code(source: str) -> list[tuple[int, str]]:
    """(line, text) of a module's strings, each joined over its lines, of its comments and of its names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.lineno, node.value))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NAME):
            found.append((token.start[0], token.string))
    return found


def violations(texts: list[tuple[int, str]]) -> list[str]:
    """What of the texts is forbidden, with its line."""
    return [f"{line}: {found[0]!r}" for line, text in texts for found in FORBIDDEN.finditer(" ".join(text.split()))]


@pytest.mark.parametrize("path", CODE + PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_that_readers_had_to_translate_stay_out(path):
    """Else an error, a help text, a comment or a page is a riddle for everyone but its author."""
    text = path.read_text("utf-8")
    found = violations(texts_of_code(text) if path.suffix == ".py" else list(enumerate(text.split("\n\n"), 1)))
    assert not found, f"{path.relative_to(ROOT)}: {'; '.join(found)}; see INSTEAD for other words"


@pytest.mark.parametrize(
    "source",
    [
        "# the autoencoder wants multiples of 8",
        'raise ValueError(f"{x!r} is none "\n    f"of {y}")',
        'def f():\n    """A file that is no\n    image."""',
        "def wind_up(): pass",
        '"""Nobody waits here for ever."""',
    ],
)
def test_the_scan_finds(source):
    """Else it passes because it reads nothing."""
    assert violations(texts_of_code(source))


@pytest.mark.parametrize(
    "source", ["# none of them is read", "x = 'is no longer used'", "# there is no file", "upgoes = 1"]
)
def test_the_scan_passes(source):
    """Else plain English is refused."""
    assert not violations(texts_of_code(source))
