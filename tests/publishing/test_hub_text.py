"""Text to image and latents on the Hub: from a training run to a stranger's image, without a word of warning."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.common.ownership import MANIFEST
from tests.support.fixtures_hub import DRAWING, ROOT, TOKEN, WITHOUT, run
from tests.support.hub_server import Hub
from tests.support.runs import words

pytestmark = pytest.mark.slow  # `test_hub.py` does the same for one kind of model

# Who trains and publishes

TRAINER = """
import json, sys
from pathlib import Path
from tests.support.fixtures_text import run_text_script, write_captioned, write_text_unet
from tests.support.pictures import write_unet
from tests.support import cheap
from tests.support.runs import run_script

cheap.install()

root, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
write_captioned(root / "pictures")
write_text_unet(root / "text-unet")
write_unet(root / "plain-unet")
write_unet(root / "latent-unet", in_channels=4, out_channels=4)
results = {}
for name, argv in jobs.items():
    run = (run_text_script if name == "text" else run_script)(argv, root / name)
    results[name] = {"code": run.code, "err": run.err}
print(json.dumps(results))
"""
TINY = {
    "train_data_dir": "{root}/pictures", "resolution": 16, "train_batch_size": 4, "eval_batch_size": 2, "seed": 3,
    "max_train_steps": 2, "lr_warmup_steps": 0, "cpu_threads": 1, "push_to_hub": True, "hub_token": TOKEN,
}  # fmt: skip
JOBS = {
    "text": {
        "model_config_name_or_path": "{root}/text-unet", "vae_widths": "8,16", "vae_train_steps": 2,
        "num_inference_steps": 2, "validation_prompts": "a red square", "use_ema": True,
    },
    "plain": {
        "model_config_name_or_path": "{root}/plain-unet", "ddpm_num_inference_steps": 2, "resolution": 8,
        "ddpm_beta_schedule": "sigmoid",
    },
    "latents": {
        "model_config_name_or_path": "{root}/latent-unet", "ddpm_num_inference_steps": 2,
        "vae_name_or_path": "{root}/text",
    },
}  # fmt: skip


class World:
    """The Hub after the training, and the folder that all processes write to."""

    def __init__(self, root, hub):
        self.root, self.hub = root, hub
        jobs = {}
        for name, flags in JOBS.items():
            flags = {**TINY, **flags, "output_dir": root / name, "hub_model_id": f"user/{name}"}
            jobs[name] = [word.format(root=root) for word in words(flags)]
        self.runs = run(hub, root / "trainer", TRAINER, root, json.dumps(jobs))

    def images(self, name):
        """What a process drew: [2, 16, 16, 3]."""
        return np.load(self.root / f"{name}.npy")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub with what the scripts published."""
    with Hub({TOKEN: "user"}) as hub:
        yield World(tmp_path_factory.mktemp("world"), hub)


@pytest.mark.parametrize("name", JOBS)
def test_the_scripts_publish(world, name):
    """Else nobody gets the model, though the flags asked for it."""
    assert world.runs[name]["code"] == 0, world.runs[name]["err"]
    assert f"published at {world.hub.url}/user/{name}" in world.runs[name]["err"]


CODE = {"hub_ddpm_hf.py", "sampling_ddpm_hf.py", "scheduling_ddpm_hf.py", "guidance_ddpm_hf.py"}
PARTS = {
    "text": ("text_encoder", "tokenizer", "unet", "vae", "scheduler", "pipeline_text2image_ddpm_hf.py"),
    "plain": ("unet", "scheduler", "pipeline_ddpm_hf.py"),
    "latents": ("unet", "vae", "scheduler", "pipeline_ddpm_hf.py"),
}


@pytest.mark.parametrize("name", JOBS)
def test_all_parts_go_up_and_nothing_of_the_run(world, name):
    """Else a part of the model is missing, or the cache of latents and the autoencoder's own run are published."""
    files = world.hub.files(f"user/{name}")
    assert {path.split("/")[0] for path in files} >= {*PARTS[name], *CODE, "model_index.json", "README.md"}
    assert [path for path in files if path.startswith(("autoencoder/", "cache/", "checkpoint-", "logs/"))] == []
    assert all(path.endswith(".safetensors") for path in files if len(files[path]) > 100_000)


@pytest.mark.parametrize("name", JOBS)
def test_neither_a_path_nor_a_token_goes_up(world, name):
    """Else the owner's folders are published, or whoever reads the repository can write to it."""
    for path, data in world.hub.files(f"user/{name}").items():
        for secret in (str(world.root), str(ROOT), TOKEN):
            assert secret.encode() not in data, path
        assert b'"_name_or_path"' not in data or path == "hub_ddpm_hf.py"


# Who has Diffusers alone

ONLINE = """
out = Path(sys.argv[1])
results = {}
for name, options in (("text", {}), ("plain", {}), ("latents", {"trust_remote_code": True})):
    results[name] = attempt(out / f"{name}-theirs.npy", f"user/{name}", **options)[0]
results["untrusted"] = attempt(out / "untrusted.npy", "user/latents")[0]
print(json.dumps(results))
"""
OFFLINE = """
import runpy
from huggingface_hub import hf_hub_download
out = Path(sys.argv[1])
results = {}
for name in ("text", "plain"):
    results[name] = attempt(out / f"{name}-offline.npy", f"user/{name}")[0]
folder = Path(hf_hub_download("user/latents", "model_index.json")).parent
results["latents"] = attempt(out / "latents-offline.npy", str(folder), trust_remote_code=True)[0]
del sys.modules["ddpm_hf"]  # now as where it is installed
sys.path.insert(0, sys.argv[2])
sys.argv = ["ddpm-hf", "sample", "user/text", "--prompt", "a red square", "--prompt", "a blue square"]
sys.argv += ["--num-images", "2", "--steps", "5", "--out", str(out / "cli-offline")]
runpy.run_module("ddpm_hf.cli", run_name="__main__")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def stranger(world):
    """What a process without this package makes of the repositories."""
    return run(world.hub, world.root / "stranger", WITHOUT + DRAWING + ONLINE, world.root, isolated=True)


@pytest.fixture(scope="module")
def offline(world, stranger):
    """The same without a network, from what was downloaded."""
    asked = len(world.hub.requests)
    options = {"isolated": True, "HF_HUB_OFFLINE": "1"}
    results = run(world.hub, world.root / "stranger", WITHOUT + DRAWING + OFFLINE, world.root, ROOT, **options)
    assert len(world.hub.requests) == asked
    return results


STOCK = {"text": ".StableDiffusionPipeline", "plain": ".DDPMPipeline"}


@pytest.mark.parametrize("name", STOCK)
def test_stock_loads_and_draws_without_a_warning(stranger, name):
    """Else a model published from here is second-rate for everyone who only has Diffusers."""
    assert stranger[name]["said"] == ""
    assert "error" not in stranger[name]
    assert stranger[name]["pipeline"].startswith("diffusers.pipelines.")
    assert stranger[name]["pipeline"].endswith(STOCK[name])
    assert stranger[name]["scheduler"].startswith("diffusers.schedulers.")


def test_a_model_of_latents_runs_its_own_code_with_trust(stranger):
    """Else who has Diffusers alone cannot use it, or stock draws its latents as if they were an image."""
    assert "error" not in stranger["latents"]
    assert re.fullmatch(r"diffusers_modules\..*\.pipeline_ddpm_hf\.DDPMPipeline", stranger["latents"]["pipeline"])
    said = [line for line in stranger["latents"]["said"].splitlines() if "`trust_remote_code` is enabled" not in line]
    assert said == []


def test_a_model_of_latents_is_refused_without_trust(stranger):
    """Else code from a repository runs unasked."""
    assert "trust_remote_code=True" in stranger["untrusted"]["error"]


# Who has the package

OWNER = """
import ddpm_hf
from ddpm_hf import cli
out = Path(sys.argv[1])
results = {}
classes = {
    "text": ddpm_hf.TextToImageDDPMPipeline, "plain": ddpm_hf.DDPMPipeline, "latents": ddpm_hf.DDPMPipeline
}
for name, cls in classes.items():
    results[name] = attempt(out / f"{name}-ours.npy", f"user/{name}", cls)[0]
for name, repository, words in (
    ("cli", "user/text", ["--prompt", "a red square", "--prompt", "a blue square"]),
    ("cli-latents", "user/latents", []),
    ("cli-no-prompt", "user/text", []),
):
    sys.argv = ["ddpm-hf", "sample", repository, *words]
    sys.argv += ["--num-images", "2", "--steps", "5", "--out", str(out / name)]
    record = {"code": 0}
    with listening(record):
        try:
            cli.main()
        except SystemExit as end:
            record["code"] = end.code
    results[name] = record
results["modules"] = [name for name in sys.modules if name.startswith("diffusers_modules")]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def owner(world):
    """What a process with this package makes of the repositories."""
    return run(world.hub, world.root / "owner", DRAWING + OWNER, world.root)


OURS = {"text": "text2image_ddpm_hf.TextToImageDDPMPipeline", "plain": "ddpm_hf.DDPMPipeline"}


@pytest.mark.parametrize("name", JOBS)
def test_our_class_loads_without_trust_or_a_warning(owner, name):
    """Else who has the package must trust what was uploaded, or wonders what a warning means."""
    assert owner["modules"] == []
    assert owner[name]["said"] == ""
    assert "error" not in owner[name]
    assert owner[name]["pipeline"] == f"ddpm_hf.portable.pipeline_{OURS.get(name, OURS['plain'])}"
    assert owner[name]["scheduler"] == "ddpm_hf.portable.scheduling_ddpm_hf.DDPMScheduler"


@pytest.mark.parametrize("name", JOBS)
def test_all_draw_the_same_images(world, stranger, owner, name):
    """Else a model is another one where the package is not installed."""
    theirs, ours = world.images(f"{name}-theirs"), world.images(f"{name}-ours")
    np.testing.assert_allclose(theirs, ours, atol=1e-3)
    assert np.abs(ours[0] - ours[1]).max() > 0.05  # two images, of which neither is blank


@pytest.mark.parametrize("name", ["cli", "cli-latents"])
def test_the_command_samples_from_the_hub(world, owner, name):
    """Else `ddpm-hf sample user/name --prompt ...` is not what it says."""
    assert owner[name]["code"] == 0, owner[name]["said"]
    written = {path.name for path in (world.root / name).iterdir()}
    assert written == {"grid.png", "0000.png", "0001.png", MANIFEST}
    assert Image.open(world.root / name / "0000.png").size == (16, 16)


def test_the_command_asks_for_a_prompt(world, owner):
    """Else a text model draws what nobody asked for."""
    assert owner["cli-no-prompt"]["code"] == 2
    assert "--prompt" in owner["cli-no-prompt"]["said"]
    assert not (world.root / "cli-no-prompt").exists()


# Without a network


@pytest.mark.parametrize("name", JOBS)
def test_what_was_downloaded_loads_offline(world, stranger, offline, name):
    """Else a model that was used once is of no use on a train. Diffusers runs code from the cache."""
    assert "error" not in offline[name]
    assert offline[name]["pipeline"].split(".")[-1] == stranger[name]["pipeline"].split(".")[-1]
    np.testing.assert_array_equal(world.images(f"{name}-offline"), world.images(f"{name}-theirs"))


def test_the_command_samples_offline(world, owner, offline):
    """Else it asks the Hub though everything is there."""
    for name in ("grid.png", "0000.png", "0001.png"):
        assert (world.root / "cli-offline" / name).read_bytes() == (world.root / "cli" / name).read_bytes()
