"""What the generated tests of bad input share: words that no flag was made for, how many cases there are, a count."""

import contextlib
import io
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, settings

# Ten times as many cases: GENERATED_TIMES=10
TIMES = int(os.environ.get("GENERATED_TIMES", "1"))

# Out of range, of another type, empty, endless, of other scripts, paths and what a shell or a terminal would act upon
HOSTILE = (
    "", " ", "\t", "nan", "-nan", "inf", "-inf", "1e400", "-1", "0", "-0.0", "1e-400", "1e308", "9" * 30, "9" * 5000,
    "-" + "9" * 5000, "1000000000000", "4294967296", "2147483648", "0x10", "1_000", "１２", "²", "true", "None",
    "null", "[]", "{}", "../../x", "/etc/passwd", "/dev/null", "a" * 300, "a" * 5000, "\x00", "\udcff", "é🦊",
    "line\nbreak", "\x1b[31mred", "-", "%s%d", "{0}", "~", "$HOME", "1,2", "64x", "8x8x8", "1.5", "1e3", "--seed",
    "hf_notForAnyLog1",
)  # fmt: skip


def generated(count: int) -> settings:
    """Hypothesis' settings for a test of so many cases: the same ones each time."""
    unhurried = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=count * TIMES, derandomize=True, database=None, deadline=None, suppress_health_check=unhurried
    )


class End(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def ended(call, *arguments) -> End:
    """Call a command's `main` in this process; what is neither a return nor an exit goes through, as a traceback."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            call(*arguments)
        except SystemExit as end:
            code = end.code or 0
    return End(code, out.getvalue(), err.getvalue())


def files_below(*folders: Path) -> list[tuple]:
    """What lies in folders, with times, to see that nothing was written."""
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return [(str(path), path.stat().st_mtime_ns if path.is_file() else 0) for path in found]


class Tally(Counter):
    """Cases by how they ended. `check` is the property that all of them have."""

    def check(self, end: End, *names: str) -> bool:
        """Whether the case was accepted; else it was refused by one line of bearable length that has one of the names.

        Warnings may stand above it. A name of several words is as good with dashes, underscores or spaces.
        """
        if end.code == 0:
            self["accepted"] += 1
            return True
        assert end.code == 2, end
        assert "Traceback" not in end.err + end.out
        lines = [line for line in end.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, end.err
        assert ": error: " in lines[0]
        assert len(lines[0]) < 1200
        assert lines[0].isprintable(), repr(lines[0])
        assert "hf_notForAnyLog1" not in lines[0]
        said = lines[0].replace("-", "_").replace(" ", "_")
        assert not names or any(name.replace("-", "_") in said for name in names), (names, lines[0])
        self["refused with one line"] += 1
        return False

    def __str__(self):
        return f"{sum(self.values())} cases: {', '.join(f'{n} {how}' for how, n in sorted(self.items()))}"


def report(request, tally: Tally, what: str) -> None:
    """Say how many cases a module went through, where there is a terminal of one's own."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if terminal is not None and capture is not None:
        with capture.global_and_fixture_disabled():
            terminal.write_line(f"\n{what}: {tally}")
