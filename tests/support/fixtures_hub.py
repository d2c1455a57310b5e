"""What the tests of publishing share: processes that talk to a Hub of our own, with and without this package."""

import json
import os
from pathlib import Path

from tests.support import ROOT, warm

TOKEN, STRANGERS, WRONG = "hf_OwnersSecretToken", "hf_AnotherUsersToken", "hf_TokenOfNobody"


def bare_environment(home: Path, **more: str) -> dict[str, str]:
    """That of a process that has no PYTHONPATH, proxy, login, cache or settings of ours; its cache is below `home`."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("PYTHON", "HF_"))}
    kept = {name: value for name, value in kept.items() if not name.upper().endswith("_PROXY")}
    return kept | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def client_environment(hub, home: Path, **more: str) -> dict[str, str]:
    """Such a process's, that knows no Hub but this one."""
    settings = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
    return bare_environment(home, HF_ENDPOINT=hub.url, **settings, **more)


def run(hub, home, code, *arguments, isolated=False, **environment):
    """A process of its own, as the client reads its environment when imported; what `code` prints last, as JSON."""
    settings = client_environment(hub, home, **environment)
    done = warm.run("-c", code, *arguments, cwd=home if isolated else ROOT, env=settings, isolated=isolated)
    assert done.returncode == 0, done.stderr
    for token in (TOKEN, STRANGERS, WRONG):
        assert token not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What a process may begin with: without this package it cannot import it from here
DRAWING = (ROOT / "tests/support/drawing_hub.py").read_text()
WITHOUT = "import sys\nsys.modules['ddpm_hf'] = None  # as where it is not installed\n"
