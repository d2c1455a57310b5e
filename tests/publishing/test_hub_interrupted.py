"""A push that breaks off at any of its requests: what lies on the Hub is what was there, or the whole of the new."""

import copy
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler
from tests.support.fixtures_hub import ROOT, TOKEN, client_environment
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.hub_server import Hub

pytestmark = pytest.mark.slow  # `test_hub.py` does the same for one kind of model

REPOSITORY = "user/model"
SCENARIOS = {"to a new repository": [], "over another version": [], "with a tag": ["--revision", "v1"]}

# What pushes sys.argv[1], a folder, to sys.argv[2], a repository; options follow
COMMAND = """
sys.argv = ["ddpm-hf", "push", *sys.argv[1:]]
ddpm_hf.cli.main()
"""

# Runs COMMAND in a process of its own for each line of input, once it is told to go on; the client's pauses between
# two attempts are left out.
PUSHER = """
import io, json, os, sys, time, traceback
from pathlib import Path
from huggingface_hub.utils import _http
import huggingface_hub.hf_api
import ddpm_hf.cli, ddpm_hf.publishing.hub

class Impatient:
    sleep = staticmethod(lambda seconds: None)

_http.time = Impatient
command = compile(sys.argv[1], "command", "exec")
for line in sys.stdin:
    may_go, go = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(go)
        if not os.read(may_go, 1):
            os._exit(1)
        sys.stdout = sys.stderr = io.StringIO()
        sys.argv, code = ["push", *json.loads(line)], 0
        try:
            exec(command, {"sys": sys, "ddpm_hf": ddpm_hf})
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        os.write(tell, json.dumps({"code": code, "said": sys.stderr.getvalue()[-5000:]}).encode())
        os._exit(0)
    os.close(tell)
    print(child, flush=True)
    os.write(go, b"1")
    heard = b"".join(iter(lambda: os.read(told, 65536), b""))
    os.waitpid(child, 0)
    for end in (may_go, go, told):
        os.close(end)
    print(heard.decode() or json.dumps({"code": "killed", "said": ""}), flush=True)
"""


class Pushes:
    """A Hub, and a process that pushes folders to a repository on it."""

    def __init__(self, hub, home):
        self.hub = hub
        self.client = subprocess.Popen(
            [sys.executable, "-c", PUSHER, COMMAND],
            cwd=ROOT,
            env=client_environment(hub, home, HF_TOKEN=TOKEN),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids = queue.Queue()

    def push(self, folder, options):
        """One push to its end: its exit code or `killed`, and what it said."""
        print(json.dumps([str(folder), REPOSITORY, *options]), file=self.client.stdin, flush=True)
        self.pids.put(int(self.client.stdout.readline()))
        outcome = json.loads(self.client.stdout.readline())
        if outcome["code"] != "killed":
            self.pids.get()
        assert TOKEN not in outcome["said"]
        return outcome

    def kill(self):
        """Kill the process that pushes, at once."""
        os.kill(self.pids.get(timeout=60), signal.SIGKILL)

    def state(self):
        """All that the Hub holds."""
        return copy.deepcopy((self.hub.repositories, self.hub.large_files))

    def restore(self, state):
        """Let the Hub hold this, and do no wrong."""
        self.hub.repositories, self.hub.large_files = copy.deepcopy(state)
        self.hub.requests.clear()
        self.hub.faults.clear()

    def files(self):
        """What the repository holds; nothing where there is none, or one as it was created."""
        found = self.hub.files(REPOSITORY) if REPOSITORY in self.hub.repositories else {}
        return {} if set(found) == {".gitattributes"} else found

    def tags(self):
        """The files that each tag of the repository names."""
        tags = self.hub.repositories[REPOSITORY].tags if REPOSITORY in self.hub.repositories else {}
        return {tag: self.hub.files(REPOSITORY, tag) for tag in tags}

    def commits(self):
        """How many the repository has."""
        return len(self.hub.repositories[REPOSITORY].commits)


class Scenario(NamedTuple):
    """A push that goes well: what the Hub holds before it, what is asked, and what is there afterwards."""

    folder: Path
    state: tuple
    before: dict
    requests: list
    after: dict
    tags: dict
    commits: int


def make_model(folder, seed):
    """A pipeline's folder with pictures, of which the first version has one more."""
    scheduler = DDPMScheduler(num_train_timesteps=10 + seed, prediction_type="posterior_mean")
    DDPMPipeline(tiny_unet(seed=seed), scheduler).save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlibrary_name: diffusers\n---\n\n# Version {seed}\n")
    (folder / "samples").mkdir()
    for name in ("step", "chain")[: max(1, 2 - seed)]:
        Image.new("L", (8, 8), 100 + 50 * seed).save(folder / "samples" / f"{name}-1.png")
    return folder


@pytest.fixture(scope="module")
def pushes(tmp_path_factory):
    """What pushes."""
    with Hub({TOKEN: "user"}) as hub:
        pushes = Pushes(hub, tmp_path_factory.mktemp("home"))
        yield pushes
        pushes.client.kill()
        pushes.client.wait(timeout=60)


def copied(folder):
    """A folder like this one, to push from: the card in it is written anew."""
    copy = folder.with_name(f"{folder.name}-copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


@pytest.fixture(scope="module")
def scenarios(pushes, tmp_path_factory):
    """To a new repository, over another version of the model, and over that with a tag."""
    made, root = {}, tmp_path_factory.mktemp("models")
    for seed, name in enumerate(SCENARIOS):
        folder, state, before = make_model(root / str(seed), seed), pushes.state(), pushes.files()
        for _ in range(2):  # the first fills the client's cache, and so asks for more
            pushes.restore(state)
            outcome = pushes.push(copied(folder), SCENARIOS[name])
            assert outcome["code"] == 0, outcome["said"]
        found = list(pushes.hub.requests), pushes.files(), pushes.tags(), pushes.commits()
        made[name] = Scenario(folder, state, before, *found)
    return made


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_push_is_many_requests_and_changes_the_files_by_one(scenarios, name):
    """Else the tests below interrupt nothing."""
    scenario = scenarios[name]
    assert len(scenario.requests) >= 8
    assert sum("/commit/" in request for request in scenario.requests) == 1
    assert sum(request.startswith("PUT") for request in scenario.requests) >= 2
    assert ("assets/chain.png" in scenario.after) == (name == "to a new repository")  # the other versions have none
    assert scenario.commits == 2 + list(SCENARIOS).index(name)
    assert scenario.tags == ({"v1": scenario.after} if name == "with a tag" else {})
    for path in ("assets/samples.png", "unet/diffusion_pytorch_model.safetensors", "README.md"):
        assert scenario.after[path] != scenario.before.get(path)


ALWAYS = math.inf
FAULTS = {
    "the Hub fails from then on": {"kind": 500, "times": ALWAYS},
    "the Hub fails once": {"kind": 500},
    "the line is cut for good": {"kind": "cut", "times": ALWAYS},
    "an answer is lost": {"kind": "half"},
    "all answers are lost from then on": {"kind": "half", "times": ALWAYS},
    "killed before the request arrives": {"kind": "cut", "then": "kill"},
    "killed before the answer arrives": {"kind": "half", "then": "kill"},
}
QUICK = {
    ("to a new repository", "the Hub fails from then on"),
    ("over another version", "killed before the request arrives"),
    ("with a tag", "an answer is lost"),
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(name, fault, marks=[] if (name, fault) in QUICK else pytest.mark.slow)
        for name in SCENARIOS
        for fault in FAULTS
    ],
)
def test_a_push_that_breaks_off_leaves_the_old_or_the_new(pushes, scenarios, name, fault):
    """Else who loads the model gets half of one and half of another, or the push cannot be repeated."""
    scenario = scenarios[name]
    for index, request in enumerate(scenario.requests):
        where = f"{fault}, at request {index}: {request}"
        pushes.restore(scenario.state)
        killed = "then" in FAULTS[fault]
        pushes.hub.fail("", after=index, **FAULTS[fault] | ({"then": pushes.kill} if killed else {}))
        folder = copied(scenario.folder)
        outcome = pushes.push(folder, SCENARIOS[name])
        assert pushes.hub.faults[0].after == 0, where
        assert (outcome["code"] == "killed") == killed, where
        left = pushes.files()
        assert left in (scenario.before, scenario.after), where
        assert pushes.tags() in ({}, scenario.tags), where
        if outcome["code"] == 0:
            assert (left, pushes.tags()) == (scenario.after, scenario.tags), where
        pushes.hub.faults.clear()
        again = pushes.push(folder, SCENARIOS[name])
        assert again["code"] == 0, (where, again["said"])
        assert (pushes.files(), pushes.tags()) == (scenario.after, scenario.tags), where
        assert pushes.commits() == scenario.commits, where
