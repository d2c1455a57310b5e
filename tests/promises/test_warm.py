"""Programs that tests fork (tests/support/warm.py) are what new processes would be."""

import json
import os

import pytest

from tests.support import warm

SHOW = """
import json, os, sys
names = {"huggingface_hub", "diffusers", "transformers", "datasets", "accelerate", "ddpm_hf", "tests"}
here = [sys.argv, os.getcwd(), dict(os.environ), sorted(names & set(sys.modules)), __name__, sys.stdin.read()]
print(json.dumps([*here, sys.path[0], any(os.path.isdir(f"{one}/ddpm_hf") for one in sys.path)]))
"""


def shown(tmp_path, *words, **options):
    done = warm.run(*words, cwd=tmp_path, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.every(2)
@pytest.mark.parametrize("isolated", [False, True])
def test_a_forked_program_is_as_a_new_one(isolated, tmp_path, monkeypatch):
    """Else a test passes with what an earlier program, or the tests, left in the process."""
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "elsewhere").mkdir()
    env = {"HOME": str(tmp_path), "HF_HOME": "x", "PYTHONPATH": str(tmp_path / "elsewhere"), "LC_CTYPE": "C.UTF-8"}
    for words in (["-c", SHOW, "a", "b"], [tmp_path / "show.py", "c"], *([] if isolated else [["-m", "show", "d"]])):
        options = {"env": env, "isolated": isolated}
        forked = shown(tmp_path, *words, **options)
        monkeypatch.setenv("NEW_PROCESSES", "1")
        new = shown(tmp_path, *words, **options)
        monkeypatch.delenv("NEW_PROCESSES")
        assert forked[:6] == new[:6]
        assert forked[3] == []
        assert isolated or forked[6] == new[6]
        assert not forked[7]


@pytest.mark.slow
def test_it_ends_as_a_new_one_does():
    """Else an error, a signal or a program that hangs is not seen."""
    assert warm.run("-c", "raise SystemExit(3)").returncode == 3
    done = warm.run("-c", "import atexit; atexit.register(print, 'last'); print('first'); 1 / 0")
    assert (done.returncode, done.stdout) == (1, "first\nlast\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert warm.run("-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)").returncode == -15
    ranks = ({"RANK": "0"}, {"RANK": "4"})
    done = warm.run("-c", "import os, sys; print(os.environ['RANK']); sys.exit(int(os.environ['RANK']))", ranks=ranks)
    assert (done.returncode, sorted(done.stdout.split())) == (4, ["0", "4"])
    with pytest.raises(warm.subprocess.TimeoutExpired):
        warm.run("-c", "import time; time.sleep(60)", timeout=0.5)
    assert warm.run("-c", "print(5)").stdout == "5\n"


@pytest.mark.slow
def test_resident_programs_have_our_modules():
    """Else they import them, for seconds."""
    done = warm.run("-c", "import sys; print('ddpm_hf.training.loop' in sys.modules)", resident=True)
    assert done.stdout == "True\n", done.stderr
    assert warm.run("-c", "import sys; print('ddpm_hf' in sys.modules)").stdout == "False\n"
    assert os.environ.get("NEW_PROCESSES") is None
