"""What the tests of publishing share: processes that talk to a Hub of our own, with and without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKEN, STRANGERS, WRONG = "hf_OwnersSecretToken", "hf_AnotherUsersToken", "hf_TokenOfNobody"


def client_environment(hub, home, **environment):
    """The environment of a process that knows no Hub but this one, and has no login, cache or settings of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("PYTHON", "HF_"))}
    kept = {name: value for name, value in kept.items() if not name.upper().endswith("_PROXY")}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", **environment}
    home.mkdir(exist_ok=True)
    return kept


def run(hub, home, code, *arguments, isolated=False, **environment):
    """A fresh process, because the client reads its environment when imported; what `code` prints last, as JSON."""
    settings = client_environment(hub, home, **environment)
    command = [sys.executable, *["-I"] * isolated, "-c", code, *map(str, arguments)]
    where = home if isolated else ROOT
    done = subprocess.run(command, cwd=where, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for token in (TOKEN, STRANGERS, WRONG):
        assert token not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What a process may begin with: without this package it cannot import it from here
DRAWING = (ROOT / "tests/support/drawing_hub.py").read_text()
WITHOUT = "import sys\nsys.modules['ddpm_hf'] = None  # as where it is not installed\n"
