"""The Python snippets of README.md and docs/.

`python -m tests.support.snippets` checks their types, and `tests/promises/test_snippets.py` runs them. The
snippets of a page are one program, read downward.
"""

import re
import sys
import tempfile
from pathlib import Path

from tests.support import ROOT

PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text("utf-8")
]
TYPED_API = ROOT / "tests/support/typed_api.py"


def program(page: Path) -> str:
    """A page's snippets, each at its own lines, so that a message names the line of the page.

    Snippets may be indented within lists; what is not Python is blank.
    """
    lines, inside, margin = [], False, 0
    for line in page.read_text("utf-8").splitlines():
        fence = re.match(r"( *)```(\w*)", line)
        if fence:
            inside, margin = not inside and fence[2] == "python", len(fence[1])
        lines.append(line[margin:] if inside and not fence else "")
    return "\n".join(lines) + "\n"


def check_types() -> int:
    """Print what mypy says of the package, of all pages and of the types of our public names; return its exit code."""
    from mypy import api

    with tempfile.TemporaryDirectory() as folder:
        names = {}
        for page in PAGES:
            path = Path(folder) / f"page_{re.sub(r'[^a-z0-9]', '_', page.stem.lower())}.py"
            path.write_text(program(page), "utf-8")
            names[str(path)] = str(page.relative_to(ROOT))
        config = str(ROOT / "setup.cfg")
        code = [str(ROOT / "ddpm_hf"), *map(str, ROOT.glob("train_*.py")), str(TYPED_API)]
        report, errors, status = api.run(["--config-file", config, *code, *names])
    for path, name in names.items():
        report = report.replace(path, name)
    print(report + errors, end="")
    return status


if __name__ == "__main__":
    sys.exit(check_types())
