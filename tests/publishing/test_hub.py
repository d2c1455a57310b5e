"""Publishing and loading with the real client of huggingface_hub: everything goes through a Hub of our own."""

import hashlib
import json
import re
import urllib.error
import urllib.request

import numpy as np
import pytest

from ddpm_hf.common.ownership import MANIFEST
from tests.support.fixtures_hub import ROOT, STRANGERS, TOKEN, WRONG, run
from tests.support.hub_server import ATTRIBUTES, Hub

TINY_UNET = {
    "_class_name": "UNet2DModel",
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}

# Who trains and publishes

TRAINER = """
import json, sys
from pathlib import Path
from tests.support.pictures import random_pixels, write_images
from tests.support import cheap
from tests.support.runs import run_script

cheap.install()

jobs = json.loads(sys.argv[1])
for seed, name in enumerate(("three", "seven")):
    write_images(Path(sys.argv[2]) / name, random_pixels(4, 8, 8, seed))
results = {}
for name, argv in jobs.items():
    folder = Path(argv[argv.index("--output_dir") + 1])
    run = run_script(argv, folder)
    results[name] = {"code": run.code, "out": run.out, "err": run.err}
    for scrap in sys.argv[3:] if run.code else ():
        (folder / scrap).parent.mkdir(exist_ok=True)
        (folder / scrap).write_text("half of a file")
print(json.dumps(results))
"""


def published(name, token=TOKEN):
    """The flags that say where to."""
    return ["--hub_model_id", f"user/{name}", "--hub_token", token]


# What interrupted writes leave behind
SCRAPS = (".saving-x/model_index.json", "checkpoint-2.partial/optimizer.bin", "samples/.step-000002.png.x")


class World:
    """The Hub after all the training, and what each run of the script said."""

    def __init__(self, root, hub):
        self.root, self.hub = root, hub
        (root / "unet").mkdir()
        (root / "unet" / "config.json").write_text(json.dumps(TINY_UNET))
        hub.fail("PUT /lfs/", 500)  # a fault that passes
        hub.fail("POST /api/models/user/mended/commit/", 500)
        hub.fail("POST /api/models/user/cut/commit/", "cut")
        by_class = ["--train_data_dir", root / "images", "--label_column", "label"]
        three = ["--train_data_dir", root / "images" / "three"]
        local = self.flags("local", *three)
        again = [*local, "--resume_from_checkpoint", "latest"]
        jobs = {
            "plain": self.flags("plain", *published("plain"), "--hub_private_repo"),
            "by-class": [*self.flags("by-class", *published("by-class")), "--hub_private_repo", *by_class],
            "faulty": [*local, *published("mended")],
            "cut": [*again, *published("cut")],
            "refused": [*again, *published("refused", WRONG)],
            "others": [*again, *published("plain", STRANGERS)],
            "mended": [*again, *published("mended")],
            "same": [*again, "--hub_token", TOKEN],  # the repository is among the settings of the run
            "unnamed": [*self.flags("unnamed", *three), "--hub_token", TOKEN, "--logging_dir", "tensorboard"],
        }
        jobs = {name: [str(word) for word in words] for name, words in jobs.items()}
        self.runs = run(hub, root / "trainer", TRAINER, json.dumps(jobs), root / "images", *SCRAPS)

    def flags(self, folder, *more):
        """The command line of a tiny run; without more, of the embedded digits."""
        return [
            *["--output_dir", self.root / folder, "--model_config_name_or_path", self.root / "unet", "--seed", "3"],
            *["--resolution", "8", "--channels", "1", "--train_batch_size", "4", "--max_train_steps", "2"],
            *["--eval_batch_size", "9", "--ddpm_num_steps", "10", "--ddpm_num_inference_steps", "2"],
            *["--ddpm_beta_schedule", "cosine", "--mixed_precision", "no", "--cpu_threads", "1", "--use_ema"],
            *["--checkpointing_steps", "1", "--logging_steps", "1", "--push_to_hub", *more],
        ]

    def error(self, name):
        """The one line that says what is wrong."""
        assert self.runs[name]["code"] == 2, self.runs[name]["err"]
        assert "Traceback" not in self.runs[name]["err"]
        lines = [line for line in self.runs[name]["err"].splitlines() if re.match(r"\S+: error: ", line)]
        assert len(lines) == 1, self.runs[name]["err"]
        return lines[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub with what the script published."""
    with Hub({TOKEN: "user", STRANGERS: "stranger"}) as hub:
        yield World(tmp_path_factory.mktemp("world"), hub)


@pytest.mark.parametrize("name", ["plain", "by-class", "mended", "same", "unnamed"])
def test_the_script_publishes(world, name):
    """Else nobody gets the model, though the flags asked for it."""
    assert world.runs[name]["code"] == 0, world.runs[name]["err"]
    assert f"published at {world.hub.url}/user/" in world.runs[name]["err"]


def test_the_repository_is_as_private_as_asked(world):
    """Else a model that was to stay private is open to all."""
    private = {name: repository.private for name, repository in world.hub.repositories.items()}
    assert private.pop("user/plain")
    assert private.pop("user/by-class")
    assert not any(private.values())


def test_each_upload_is_one_commit(world):
    """Else who loads in between gets half a model, and an upload of nothing new makes history."""
    commits = {name: len(repository.commits) - 1 for name, repository in world.hub.repositories.items()}
    assert commits == {"user/plain": 1, "user/by-class": 1, "user/cut": 0, "user/unnamed": 1, "user/mended": 1}


PIPELINE = {
    *{"README.md", "model_index.json", "scheduler/scheduler_config.json"},
    *{"unet/config.json", "unet/diffusion_pytorch_model.safetensors"},
    *{"hub_ddpm_hf.py", "sampling_ddpm_hf.py", "scheduling_ddpm_hf.py"},
}
RUN = {".gitattributes", "metrics.jsonl", "run.json", "assets/samples.png", "assets/chain.png", "assets/loss.png"}


@pytest.mark.parametrize("name", ["plain", "by-class"])
def test_the_pipeline_goes_up_and_nothing_of_the_run(world, name):
    """Else checkpoints, logs, optimizer states and timings are published, or a file is missing."""
    files = world.hub.files(f"user/{name}")
    code = {path for path in files if path.endswith("_ddpm_hf.py")}
    assert set(files) == PIPELINE | code | RUN
    folder = world.root / name
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"timings.jsonl", "checkpoint-2/optimizer.bin"} <= there  # the run had such files
    assert any("events.out.tfevents" in path for path in there)
    for path, content in files.items():
        if path != ".gitattributes":
            assert content == (folder / path).read_bytes()


def test_scraps_of_interrupted_writes_stay(world):
    """Else half-written files are published."""
    assert all((world.root / "local" / scrap).exists() for scrap in SCRAPS[::2])
    files = world.hub.files("user/mended")
    assert [path for path in files if "/." in path or path.startswith((".saving", "checkpoint"))] == []


def test_logs_stay_also_in_a_folder_of_another_name(world):
    """Else `--logging_dir` publishes what the tracker wrote."""
    assert (world.root / "unnamed" / "tensorboard").is_dir()
    assert [path for path in world.hub.files("user/unnamed") if path.startswith("tensorboard/")] == []


def test_no_token_goes_up(world):
    """Else whoever reads the repository can write to all of its owner's."""
    trees = [tree for repository in world.hub.repositories.values() for tree in repository.commits.values()]
    blobs = [blob.data for tree in trees for blob in tree.values()]
    assert len(blobs) > 30
    for blob in [*blobs, *world.hub.large_files.values()]:
        for token in (TOKEN, STRANGERS, WRONG):
            assert token.encode() not in blob


def test_no_path_of_the_machine_goes_up(world):
    """Else the owner's folders, and often their name, are published."""
    naming = [path for path, data in world.hub.files("user/mended").items() if str(world.root).encode() in data]
    assert naming == []


@pytest.mark.parametrize("name", ["plain", "by-class", "unnamed"])
def test_the_card_names_the_repository(world, name):
    """Else the example of the model's own page does not load it."""
    repository = f"user/{name}"
    card = world.hub.files(repository)["README.md"].decode()
    trust = ", trust_remote_code=True" if name == "by-class" else ""
    assert f'DiffusionPipeline.from_pretrained("{repository}"{trust})' in card
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", card)
    assert len(pictures) == 3
    assert set(pictures) <= set(world.hub.files(repository))


@pytest.mark.parametrize("name", ["faulty", "cut"])
def test_a_failed_upload_is_one_line_that_says_the_way_out(world, name):
    """Else a long training ends in a traceback, and its owner thinks that all is lost."""
    line = world.error(name)
    assert "is complete" in line
    assert f"ddpm-hf push {world.root / 'local'} user/" in line


@pytest.mark.parametrize("name", ["refused", "others"])
def test_who_may_not_upload_is_told_before_training(world, name):
    """Else days of training end in the news that the token was wrong."""
    assert "--hub_token" in world.error(name)
    assert "training:" not in world.runs[name]["err"]


def test_a_refused_upload_changes_nothing(world):
    """Else a wrong token leaves an empty repository, or writes into somebody else's."""
    assert "user/refused" not in world.hub.repositories
    assert set(world.hub.files("user/cut")) == {".gitattributes"}


# Who has Diffusers alone

EXAMPLES = """
import re
from pathlib import Path
from huggingface_hub import hf_hub_download

def run_examples(name, wanted):
    card = Path(hf_hub_download(f"user/{name}", "README.md")).read_text()
    examples = [one for one in re.findall("```python\\n(.*?)```", card, re.DOTALL) if wanted(one)]
    for example in examples:
        Path("sample.png").unlink(missing_ok=True)
        try:
            exec(example, {})
        except Exception as error:
            return f"{example}{type(error).__name__}: {error}"
        assert Path("sample.png").is_file()
    return len(examples)
"""
STRANGER = (
    EXAMPLES
    + """
import json, os, sys
sys.modules["ddpm_hf"] = None  # as where it is not installed
import numpy as np, torch
from pathlib import Path
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

out, others = Path(sys.argv[1]), sys.argv[2]
results = {}

def attempt(name, repository, **options):
    try:
        pipeline = DiffusionPipeline.from_pretrained(repository, **options)
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
        return
    results[name] = f"{type(pipeline).__module__}.{type(pipeline).__name__}"
    pipeline.set_progress_bar_config(disable=True)
    what = [0, 1] if hasattr(pipeline, "class_ids") else 2
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5, "output_type": "np"}
    np.save(out / f"{name}.npy", pipeline(what, **options).images)

def attempts(suffix):
    attempt("stock" + suffix, "user/plain")
    attempt("custom" + suffix, "user/plain", custom_pipeline="pipeline_ddpm_hf", trust_remote_code=True)
    attempt("by-class" + suffix, "user/by-class", trust_remote_code=True)
"""
)
ONLINE = """
attempt("no-token", "user/plain", token=False)
attempt("others-token", "user/plain", token=others)
attempt("untrusted", "user/by-class")
attempts("")
attempt("mended", "user/mended", token=False)
attempt("local", sys.argv[3])
os.chdir(out)
for name in ("plain", "by-class"):
    results[f"card-{name}"] = run_examples(name, lambda example: "from ddpm_hf import" not in example)
print(json.dumps(results))
"""
OFFLINE = """
import runpy
attempt("stock-offline", "user/plain")
for name, options in (("plain", {"custom_pipeline": "pipeline_ddpm_hf"}), ("by-class", {})):
    folder = Path(hf_hub_download(f"user/{name}", "model_index.json")).parent
    attempt(f"{name}-offline", str(folder), trust_remote_code=True, **options)
del sys.modules["ddpm_hf"]  # now as where it is installed
sys.path.insert(0, sys.argv[3])
sys.argv = ["ddpm-hf", "sample", "user/plain", "--num-images", "2", "--out", str(out / "cli-offline")]
runpy.run_module("ddpm_hf.cli", run_name="__main__")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def stranger(world):
    """What a process without this package makes of the repositories."""
    world.hub.fail("GET /user/plain/resolve/.*safetensors", "half")  # a download that breaks off
    options = {"isolated": True, "HF_TOKEN": TOKEN}
    arguments = world.root, STRANGERS, world.root / "local"
    return run(world.hub, world.root / "stranger", STRANGER + ONLINE, *arguments, **options)


@pytest.fixture(scope="module")
def offline(world, stranger):
    """The same without a network, from what was downloaded."""
    asked = len(world.hub.requests)
    options = {"isolated": True, "HF_HUB_OFFLINE": "1"}
    results = run(world.hub, world.root / "stranger", STRANGER + OFFLINE, world.root, STRANGERS, ROOT, **options)
    assert len(world.hub.requests) == asked
    return results


def images(world, name):
    """What a process drew: [2, 8, 8, 1]."""
    return np.load(world.root / f"{name}.npy")


def test_without_the_package_stock_loads_the_plain_model(stranger):
    """Else who only has Diffusers cannot use it."""
    assert stranger["stock"].startswith("diffusers.pipelines.")
    assert stranger["stock"].endswith(".DDPMPipeline")


@pytest.mark.parametrize("name", ["custom", "by-class"])
def test_without_the_package_the_repositorys_code_runs(stranger, name):
    """Else the uploaded files are not enough to run our classes."""
    wanted = {"custom": "DDPMPipeline", "by-class": "ClassConditionalDDPMPipeline"}[name]
    assert stranger[name].startswith("diffusers_modules.")
    assert stranger[name].endswith(f"_ddpm_hf.{wanted}")


@pytest.mark.parametrize(("name", "ways"), [("plain", 2), ("by-class", 1)])
def test_the_cards_examples_run(stranger, owner, name, ways):
    """Else the first thing that anyone tries with the model is an error."""
    assert stranger[f"card-{name}"] == ways
    assert owner[f"card-{name}"] == 1


def test_the_repositorys_code_takes_trust(stranger):
    """Else code from a repository runs unasked."""
    assert re.search(r"Error: .*trust_remote_code", stranger["untrusted"], re.DOTALL)


@pytest.mark.parametrize("name", ["no-token", "others-token"])
def test_a_private_repository_is_refused(stranger, name):
    """Else this Hub shows nothing of tokens."""
    assert re.match(r"\w+Error: ", stranger[name])


def test_the_folder_loads_after_the_fault_and_the_second_upload_is_the_same_model(world, stranger):
    """Else a fault of the network costs the model."""
    assert stranger["local"].endswith(".DDPMPipeline")
    np.testing.assert_array_equal(images(world, "local"), images(world, "mended"))


# Who has the package

OWNER = (
    EXAMPLES
    + """
import contextlib, io, json, os, sys
import numpy as np, torch
from pathlib import Path
from huggingface_hub import HfApi
import ddpm_hf
from ddpm_hf import cli

out, root = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, root)
results = {}
for name, cls, what in (
    ("plain", ddpm_hf.DDPMPipeline, 2),
    ("by-class", ddpm_hf.ClassConditionalDDPMPipeline, [0, 1]),
):
    pipeline = cls.from_pretrained(f"user/{name}")
    results[name] = f"{type(pipeline).__module__}.{type(pipeline).__name__}"
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5, "output_type": "np"}
    np.save(out / f"ours-{name}.npy", pipeline(what, **options).images)

api = HfApi()
api.create_tag("user/plain", tag="v1")
api.create_branch("user/plain", branch="try/other", revision="v1")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="model_index.json", repo_id="user/plain", revision="try/other")

def command(name, *words):
    sys.argv = ["ddpm-hf", "sample", *words, "--out", str(out / name), "--num-images", "2"]
    err, code = io.StringIO(), 0
    with contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    results[name] = {"code": code, "err": err.getvalue()}

command("cli", "user/plain")
command("cli-class", "user/by-class", "--class", "seven", "--guidance-scale", "2")
command("cli-tag", "user/plain", "--revision", "v1")
command("cli-branch", "user/plain", "--revision", "try/other")
command("cli-wrong", "user/mended", "--token", "hf_TokenOfNobody")
command("cli-missing", "user/missing")
os.chdir(out)
for name in ("plain", "by-class"):
    results[f"card-{name}"] = run_examples(name, lambda example: "from ddpm_hf import" in example)
results["modules"] = [name for name in sys.modules if name.startswith("diffusers_modules")]
print(json.dumps(results))
"""
)


@pytest.fixture(scope="module")
def owner(world):
    """What a process with this package makes of the repositories."""
    return run(world.hub, world.root / "owner", OWNER, world.root, ROOT, HF_TOKEN=TOKEN)


def test_with_the_package_no_code_of_the_repository_runs(owner):
    """Else the explicit classes would run what was downloaded, unasked."""
    assert owner["modules"] == []
    assert owner["plain"] == "ddpm_hf.portable.pipeline_ddpm_hf.DDPMPipeline"
    assert owner["by-class"].endswith(".pipeline_class_conditional_ddpm_hf.ClassConditionalDDPMPipeline")


@pytest.mark.parametrize(("theirs", "ours"), [("stock", "plain"), ("custom", "plain"), ("by-class", "by-class")])
def test_all_draw_the_same_images(world, stranger, owner, theirs, ours):
    """Else a model is another one where the package is not installed."""
    np.testing.assert_allclose(images(world, theirs), images(world, f"ours-{ours}"), atol=1e-3)


@pytest.mark.parametrize("name", ["cli", "cli-class", "cli-tag"])
def test_the_command_samples_from_the_hub(world, owner, name):
    """Else `ddpm-hf sample user/name` is not what it says."""
    assert owner[name]["code"] == 0, owner[name]["err"]
    written = {path.name for path in (world.root / name).iterdir()}
    assert written == {"grid.png", "0000.png", "0001.png", MANIFEST}


@pytest.mark.parametrize(
    ("name", "says"),
    [("cli-branch", "try/other|user/plain"), ("cli-wrong", "--token"), ("cli-missing", "check the name")],
)
def test_the_command_says_in_a_line_what_is_wrong(owner, name, says):
    """Else a wrong name, token or revision is a traceback, or loads something else."""
    assert owner[name]["code"] == 2
    lines = [line for line in owner[name]["err"].splitlines() if line.startswith("ddpm-hf: error: ")]
    assert len(lines) == 1
    assert re.search(says, lines[0])
    assert "Traceback" not in owner[name]["err"]


# Without a network


@pytest.mark.parametrize("name", ["stock", "plain", "by-class"])
def test_what_was_downloaded_loads_offline(world, stranger, offline, name):
    """Else a model that was used once is of no use on a train. Diffusers runs code from the cache."""
    online = {"plain": "custom"}.get(name, name)
    assert offline[f"{name}-offline"] == stranger[online]
    np.testing.assert_array_equal(images(world, f"{name}-offline"), images(world, online))


def test_the_command_samples_offline(world, owner, offline):
    """Else it asks the Hub though everything is there."""
    for name in ("grid.png", "0000.png", "0001.png"):
        assert (world.root / "cli-offline" / name).read_bytes() == (world.root / "cli" / name).read_bytes()


# The Hub itself


def test_the_faults_happened(world, stranger):
    """Else the tests of faults show nothing."""
    assert [fault for fault in world.hub.faults if fault.times] == []


def test_the_hub_takes_whole_files_and_whole_commits_alone():
    """Else an upload could arrive damaged, or half of it, and the tests would not see."""

    def ask(method, address, *lines, data=None):
        body = "\n".join(map(json.dumps, lines)).encode() if data is None else data
        headers = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(address, body, headers, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    with Hub({TOKEN: "user"}) as hub:
        wanted = {"oid": hashlib.sha256(b"whole").hexdigest(), "size": 5}
        ask("POST", f"{hub.url}/api/repos/create", {"name": "model"})
        assert ask("POST", f"{hub.url}/api/repos/create", {"name": "model"})[0] == 409
        _, batch = ask("POST", f"{hub.url}/user/model.git/info/lfs/objects/batch", {"objects": [wanted]})
        upload, verify = (batch["objects"][0]["actions"][name]["href"] for name in ("upload", "verify"))
        for damaged in (b"whale", b"whol"):
            assert ask("PUT", upload, data=damaged)[0] == 400
        assert ask("PUT", upload.partition("?")[0], data=b"whole")[0] == 403
        assert ask("POST", verify, wanted)[0] == 404
        small = {"key": "file", "value": {"path": "a.json", "content": "e30="}}
        large = {"key": "lfsFile", "value": {"path": "a.safetensors", "algo": "sha256", **wanted}}
        commit = f"{hub.url}/api/models/user/model/commit/main"
        assert ask("POST", commit, small, large)[0] == 400
        assert set(hub.files("user/model")) == {".gitattributes"}
        assert ask("PUT", upload, data=b"whole")[0] == 200
        assert ask("POST", verify, wanted)[0] == 200
        assert ask("POST", commit, small, large)[0] == 200
        assert ask("POST", commit, {"key": "deletedFile", "value": {"path": "a.json"}})[0] == 200
        assert hub.files("user/model") == {".gitattributes": ATTRIBUTES, "a.safetensors": b"whole"}
