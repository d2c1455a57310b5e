"""Nothing that is loaded is executed, nothing leaves its folder, and no token is written.

Each attack would leave a marker: a pickle opens a file when it is read, a module when it is imported.
"""

import ast
import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from unittest import mock

import diffusers
import huggingface_hub.constants
import pytest
import torch

import train_text2image
import train_unconditional
from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, cli
from ddpm_hf.common.errors import UsageError, one_line
from tests.publishing.test_hub import TRAINER, run
from tests.support import ROOT
from tests.support.classifier import tiny_classifier
from tests.support.fixtures_generated import ended
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import tiny_text_pipeline
from tests.support.hub_server import Hub
from tests.support.pictures import encoded, random_pixels, write_images, write_rows, write_unet
from tests.support.runs import BASE, attempt, defaults

SOURCES = [*sorted((ROOT / "ddpm_hf").rglob("*.py")), *sorted(ROOT.glob("train_*.py"))]


class Attack:
    """What a pickle runs when it is read: it opens the marker, which then exists."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    """The file that shows, afterwards, whether something was executed."""
    place = tmp_path / "executed"
    yield place
    assert not place.exists()


def test_the_attack_works(tmp_path):
    """Else the tests below pass whatever the loaders do."""
    pickle.loads(pickle.dumps(Attack(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Tiny models of each kind, whole, and data."""
    root = tmp_path_factory.mktemp("shop")
    scheduler = DDPMScheduler(num_train_timesteps=20)
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(root / "plain")
    names = dict(enumerate("abc"))
    ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=4), scheduler, names).save_pretrained(root / "by-class")
    text = tiny_text_pipeline()
    text.save_pretrained(root / "stable")
    text.vae.save_pretrained(root / "vae")
    text.text_encoder.save_pretrained(root / "text")
    text.tokenizer.save_pretrained(root / "text")
    tiny_classifier().save_pretrained(root / "classifier")
    files = [encoded(one) for one in random_pixels(8)]
    write_rows(root / "photos", files, label=[0, 1] * 4, text=list("abcdefgh"))
    write_unet(root / "tiny")
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Without a Hub, and quiet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    verbosity = diffusers.utils.logging.get_verbosity()
    yield
    diffusers.utils.logging.set_verbosity(verbosity)


TEXT = {
    "train_data_dir": "{shop}/photos", "resolution": 16, "train_batch_size": 4, "max_train_steps": 1, "dry_run": True,
    "eval_batch_size": 1, "cpu_threads": 1, "seed": 0, "logger": "none", "center_crop": True,
}  # fmt: skip


def trained(script, shop, folder: Path, **flags):
    """A run of a script on the tiny data."""
    base = TEXT if script is train_text2image else {**BASE, "max_train_steps": 2, "ddpm_num_steps": 20}
    return attempt(shop, folder, base, script.main, **flags)


def sampled(*argv):
    """A run of `ddpm-hf sample`."""
    given = ["ddpm-hf", "sample", *map(str, argv), "--steps", "2", "--num-images", "1"]
    with mock.patch.object(sys, "argv", given):
        return ended(cli.main)


def the_line(end) -> str:
    """The one line of a command that refused."""
    assert end.code == 2, end
    assert "Traceback" not in end.err
    lines = [line for line in end.err.splitlines() if ": error: " in line]
    assert len(lines) == 1, end.err
    return lines[0]


# Weights


def pickled(folder: Path, marker: Path) -> None:
    """Put pickles that attack in the place of all safetensors below a folder."""
    for path in list(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save({"x": Attack(marker)}, path.with_name(name))
        path.unlink()


TO_LATENTS = {"vae_name_or_path": "{shop}/vae"}


def sampling(*more):
    """`ddpm-hf sample` of the bad model."""
    return lambda shop, bad, out: sampled(bad, "--out", out, *more)


def training(script, name: str, **more):
    """A script that is given the bad model by a flag."""
    return lambda shop, bad, out: trained(script, shop, out, **{name: bad}, **more)


# What is attacked: a model, a part of it, and what loads it
PLACES = {
    "sample": ("plain", "", sampling()),
    "sample by class": ("by-class", "unet", sampling()),
    "sample by prompt": ("stable", "unet", sampling("--prompt", "a")),
    "sample, its text encoder": ("stable", "text_encoder", sampling("--prompt", "a")),
    "sample, its autoencoder": ("stable", "vae", sampling("--prompt", "a")),
    "classifier": (
        "classifier", "", lambda shop, bad, out: sampled(shop / "plain", "--classifier", bad, "--out", out),
    ),
    "checkpoint's UNet": ("stable", "unet", training(train_text2image, "pretrained_model_name_or_path")),
    "checkpoint's autoencoder": ("stable", "vae", training(train_text2image, "pretrained_model_name_or_path")),
    "checkpoint's text": ("stable", "text_encoder", training(train_text2image, "pretrained_model_name_or_path")),
    "autoencoder": ("vae", "", training(train_unconditional, "vae_name_or_path")),
    "autoencoder of a pipeline": ("stable", "vae", training(train_text2image, "vae_name_or_path")),
    "text encoder": ("text", "", training(train_text2image, "text_encoder_name_or_path", **TO_LATENTS)),
    "text encoder of a pipeline": (
        "stable", "text_encoder", training(train_text2image, "text_encoder_name_or_path", **TO_LATENTS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_pickled_weights_are_refused_with_the_way_out(place, shop, tmp_path, marker, capfd):
    """Else a model from a stranger runs their code here, or its user learns of no other way."""
    whole, part, call = PLACES[place]
    bad = shutil.copytree(shop / whole, tmp_path / "bad")
    pickled(bad / part, marker)
    capfd.readouterr()
    line = the_line(call(shop, bad, tmp_path / "out"))
    for fragment in (str(bad), "only from safetensors", "safe_serialization=True"):
        assert fragment in line
    assert not (tmp_path / "out").exists()
    assert "error" not in capfd.readouterr().err.lower()  # of a library that logs past us


# Checkpoints: whoever hands over a whole one has written its manifest too


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory):
    """A finished run with a checkpoint of all there can be in one."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    end = trained(train_unconditional, shop, folder, **RICH)
    assert end.code == 0, end.err
    return folder


RICH = {"use_ema": True, "timestep_sampler": "loss_second_moment", "checkpointing_steps": 2}


def resealed(checkpoint: Path) -> None:
    """Write the manifest anew, as an attacker would."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    digests = {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": digests}))


def manifest_says(checkpoint: Path, **changed) -> None:
    """Change what a manifest says, or leave it out (None)."""
    manifest = {**json.loads((checkpoint / "manifest.json").read_text()), **changed}
    left = {name: value for name, value in manifest.items() if value is not None}
    (checkpoint / "manifest.json").write_text(json.dumps(left))


def torch_pickle(name):
    """A file that torch pickled."""
    return lambda checkpoint, marker: torch.save({"x": Attack(marker)}, checkpoint / name)


def plain_pickle(name):
    """A file that pickle wrote, without torch's archive around it."""
    return lambda checkpoint, marker: (checkpoint / name).write_bytes(pickle.dumps(Attack(marker)))


def junk(name):
    """A file of something else."""
    return lambda checkpoint, marker: (checkpoint / name).write_bytes(b"junk")


def says(**changed):
    """A manifest that says something else."""
    return lambda checkpoint, marker: manifest_says(checkpoint, **changed)


CHECKPOINTS = {
    "optimizer": torch_pickle("optimizer.bin"),
    "optimizer, plain": plain_pickle("optimizer.bin"),
    "optimizer of nothing": lambda checkpoint, marker: torch.save({}, checkpoint / "optimizer.bin"),
    "optimizer of a list": lambda checkpoint, marker: torch.save([1], checkpoint / "optimizer.bin"),
    "no optimizer": lambda checkpoint, marker: (checkpoint / "optimizer.bin").unlink(),
    "random states": torch_pickle("random_states_0.pkl"),
    "random states, plain": plain_pickle("random_states_0.pkl"),
    "custom part": torch_pickle("custom_checkpoint_0.pkl"),
    "UNet": lambda checkpoint, marker: pickled(checkpoint / "unet", marker),
    "EMA": lambda checkpoint, marker: pickled(checkpoint / "unet_ema", marker),
    "junk for a UNet": junk("unet/diffusion_pytorch_model.safetensors"),
    "junk for an EMA": junk("unet_ema/diffusion_pytorch_model.safetensors"),
    "junk for a UNet's config": junk("unet/config.json"),
    "junk for an EMA's config": junk("unet_ema/config.json"),
    "junk for a sampler": junk("timestep_sampler.safetensors"),
    "a step that is a text": says(step="2"),
    "a step that is none": says(step=True),
    "no step": says(step=None),
    "no meter": says(meter=None),
    "a meter of texts": says(meter="abc"),
    "no seed": says(seed=None),
    "a seed that is a text": says(seed="0"),
    "no learning rates": says(lr_scheduler=None),
    "learning rates of a list": says(lr_scheduler=[1]),
    "settings of a list": says(settings=[1]),
    "skipped steps of a text": says(nonfinite_steps="many"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_an_attacker_is_refused_in_one_line(name, shop, finished, tmp_path, marker):
    """Else resuming what somebody else trained runs their code, or ends in a traceback."""
    folder = shutil.copytree(finished, tmp_path / "run")
    CHECKPOINTS[name](folder / "checkpoint-2", marker)
    resealed(folder / "checkpoint-2")
    before = (folder / "metrics.jsonl").read_bytes()
    flags = {**RICH, "max_train_steps": 3, "resume_from_checkpoint": "checkpoint-2"}
    assert "checkpoint" in the_line(trained(train_unconditional, shop, folder, **flags))
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["scheduler.bin", "sampler.bin", "scaler.pt", "pytorch_model.bin"])
def test_what_no_checkpoint_of_ours_holds_is_not_read(name, shop, finished, tmp_path, marker):
    """Else a file laid beside a checkpoint's own is loaded."""
    folder = shutil.copytree(finished, tmp_path / "run")
    torch_pickle(name)(folder / "checkpoint-2", marker)
    resealed(folder / "checkpoint-2")
    flags = {**RICH, "max_train_steps": 3, "resume_from_checkpoint": "checkpoint-2"}
    assert trained(train_unconditional, shop, folder, **flags).code == 0


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link", "unet/../../outside", 5, ""])
def test_a_manifest_cannot_name_files_elsewhere(name, shop, finished, tmp_path):
    """Else a checkpoint tells, by whether it is whole, what a file elsewhere holds."""
    folder = shutil.copytree(finished, tmp_path / "run")
    checkpoint = folder / "checkpoint-2"
    (folder / "outside").write_text("private")
    (checkpoint / "link").symlink_to(folder / "outside")
    manifest_says(checkpoint, files={name: hashlib.sha256(b"private").hexdigest()})
    flags = {**RICH, "max_train_steps": 3, "resume_from_checkpoint": "checkpoint-2"}
    assert "checkpoint-2" in the_line(trained(train_unconditional, shop, folder, **flags))


def test_checkpoints_of_other_scripts_are_named(shop, finished, tmp_path):
    """Else the state of another model is half loaded."""
    for script, flags in (
        (train_text2image, {"pretrained_model_name_or_path": "{shop}/stable", "dry_run": None}),
        (train_unconditional, {"model_config_name_or_path": None, "model_preset": "small-16"}),
    ):
        folder = shutil.copytree(finished, tmp_path / script.__name__)
        end = trained(script, shop, folder, resume_from_checkpoint="checkpoint-2", max_train_steps=3, **flags)
        assert "checkpoint-2" in the_line(end)


# Code


def code(marker: Path, name: str) -> str:
    """A module that opens the marker when it is imported, and has a class of a name."""
    return f"open({str(marker)!r}, 'w')\nimport diffusers\nclass {name}(diffusers.DDPMPipeline): pass\n"


INDICES = {
    "a file of its own": {"_class_name": ["attack", "Pipeline"], "scheduler": ["diffusers", "DDPMScheduler"]},
    "a component's file": {"_class_name": "DDPMPipeline", "scheduler": ["attack", "Pipeline"]},
    "a module of Python": {"_class_name": "DDPMPipeline", "scheduler": ["os", "system"]},
    "a function": {"_class_name": "DDPMPipeline", "unet": ["subprocess", "Popen"]},
    "our class, with a file": {
        "_class_name": ["attack", "DDPMPipeline"], "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["attack", "Pipeline"],
    },
    "an attribute": {"_class_name": "__init__"},
    "no class": {},
    "a list": [],
    "a text": "DDPMPipeline",
    "a number": {"_class_name": 5},
    "an empty list": {"_class_name": []},
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_a_model_cannot_name_code(name, shop, tmp_path, marker):
    """Else a model's folder, or a repository of the Hub, executes what it likes when it is sampled."""
    bad = shutil.copytree(shop / "plain", tmp_path / "bad")
    index = INDICES[name]
    own = json.loads((bad / "model_index.json").read_text())
    changed = {**own, **index} if isinstance(index, dict) and index else index
    (bad / "model_index.json").write_text(json.dumps(changed))
    for place in (bad, bad / "scheduler", bad / "unet"):
        (place / "attack.py").write_text(code(marker, "Pipeline"))
    assert str(bad) in the_line(sampled(bad, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


SCHEDULERS = {
    "junk": b"junk",
    "a list": b"[]",
    "unknown schedule": b'{"_class_name": "DDPMScheduler", "beta_schedule": "attack"}',
    "no steps": b'{"_class_name": "DDPMScheduler", "num_train_timesteps": 0}',
    "steps of a text": b'{"_class_name": "DDPMScheduler", "num_train_timesteps": "many"}',
    "betas of a text": b'{"_class_name": "DDPMScheduler", "trained_betas": "many"}',
    "betas of nothing": b'{"_class_name": "DDPMScheduler", "trained_betas": []}',
    "betas of NaN": b'{"_class_name": "DDPMScheduler", "num_train_timesteps": 2, "trained_betas": [NaN, 0.1]}',
    "a beta of a text": b'{"_class_name": "DDPMScheduler", "beta_end": "0.1"}',
    "unknown prediction": b'{"_class_name": "DDPMScheduler", "prediction_type": "attack"}',
    "unknown spacing": b'{"_class_name": "DDPMScheduler", "timestep_spacing": "attack"}',
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_garbage_is_one_line(name, shop, tmp_path):
    """Else a model whose diffusion is damaged ends in a traceback, or draws noise."""
    bad = shutil.copytree(shop / "plain", tmp_path / "bad")
    (bad / "scheduler" / "scheduler_config.json").write_bytes(SCHEDULERS[name])
    the_line(sampled(bad, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


OTHER_KINDS = {
    "sample a checkpoint's unet for its average": lambda shop, run, out: sampled(
        run / "checkpoint-2" / "unet", "--ema", "--out", out),
    "sample a classifier": lambda shop, run, out: sampled(shop / "classifier", "--out", out),
    "sample an autoencoder": lambda shop, run, out: sampled(shop / "vae", "--out", out),
    "sample a UNet": lambda shop, run, out: sampled(shop / "plain" / "unet", "--out", out),
    "sample a file": lambda shop, run, out: sampled(shop / "plain" / "model_index.json", "--out", out),
    "sample data": lambda shop, run, out: sampled(shop / "photos", "--out", out),
    "an autoencoder for a UNet": lambda shop, run, out: trained(
        train_unconditional, shop, out, model_config_name_or_path=shop / "vae"),
    "a classifier for a UNet": lambda shop, run, out: trained(
        train_unconditional, shop, out, model_config_name_or_path=shop / "classifier"),
    "a UNet for an autoencoder": lambda shop, run, out: trained(
        train_unconditional, shop, out, vae_name_or_path=shop / "plain" / "unet"),
    "an unconditional model for an autoencoder": lambda shop, run, out: trained(
        train_unconditional, shop, out, vae_name_or_path=shop / "plain"),
    "an unconditional model for Stable Diffusion": lambda shop, run, out: trained(
        train_text2image, shop, out, pretrained_model_name_or_path=shop / "plain"),
    "a model by class for Stable Diffusion": lambda shop, run, out: trained(
        train_text2image, shop, out, pretrained_model_name_or_path=shop / "by-class"),
    "a text encoder for Stable Diffusion": lambda shop, run, out: trained(
        train_text2image, shop, out, pretrained_model_name_or_path=shop / "text"),
    "an autoencoder for a text encoder": lambda shop, run, out: trained(
        train_text2image, shop, out, vae_name_or_path=shop / "vae", text_encoder_name_or_path=shop / "vae"),
    "an unconditional model for a text encoder": lambda shop, run, out: trained(
        train_text2image, shop, out, vae_name_or_path=shop / "vae", text_encoder_name_or_path=shop / "plain"),
    "a UNet of pixels for one of latents": lambda shop, run, out: trained(
        train_text2image, shop, out, vae_name_or_path=shop / "vae", model_config_name_or_path=shop / "plain" / "unet"),
    "a classifier of another kind": lambda shop, run, out: sampled(
        shop / "plain", "--classifier", shop / "vae", "--out", out),
    "data for a classifier": lambda shop, run, out: sampled(
        shop / "plain", "--classifier", shop / "photos", "--out", out),
    "a model for data": lambda shop, run, out: trained(train_unconditional, shop, out, train_data_dir=shop / "plain"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_model_of_another_kind_is_named(name, shop, finished, tmp_path):
    """Else a folder given for another is a traceback deep in a library."""
    the_line(OTHER_KINDS[name](shop, finished, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# What the package itself calls

FORBIDDEN = {"eval", "exec", "compile", "__import__"}  # as functions of Python


def calls(path: Path):
    """All calls of a file: (what is called, as written; its keywords; its line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), keywords, [ast.unparse(each) for each in node.args], node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_read_can_execute(path):
    """Else a line added later loads a stranger's pickle, or runs a text."""
    for name, keywords, arguments, line in calls(path):
        where = f"{path.name}:{line}: {name}"
        assert name not in FORBIDDEN, where
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "joblib.", "os.system", "os.popen")), (
            where
        )
        # an ablation starts this package's own commands, each word of a plan being one argument
        assert not name.startswith("subprocess.") or path.parent.name == "ablation", where
        assert keywords.get("shell", "False") == "False", where
        assert keywords.get("allow_pickle", "False") == "False", where
        assert keywords.get("trust_remote_code", "False") in ("False", "trust_remote_code"), where  # as the user says
        assert name != "torch.jit.load" or path.name == "torchscript.py", where  # which asks for that trust
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", where
        if name.startswith("yaml.") and name.rpartition(".")[2] in ("load", "load_all", "full_load", "unsafe_load"):
            assert name == "yaml.load", where
            assert [*arguments[1:], *keywords.values()] == ["yaml.BaseLoader"], where  # words, and nothing else


LOADERS = ("AutoencoderKL", "UNet2DConditionModel", "UNet2DModel", "CLIPTextModel", "NoisyClassifier",
           "TextToImageDDPMPipeline", "cls", "model_class", "type(part)", "unet_class(source.unet)")  # fmt: skip


def test_every_model_is_loaded_from_safetensors():
    """Else one place of many reads pickles."""
    seen = 0
    for path in SOURCES:
        for name, keywords, _, line in calls(path):
            if name == "super().from_pretrained":  # its callers are seen here
                continue
            if name.endswith(".from_pretrained") and "Tokenizer" not in name:
                assert name.removesuffix(".from_pretrained") in LOADERS, f"{path.name}:{line}: {name}"
                unpacked = keywords.get(None) in ("options", "options | given")
                assert unpacked or keywords.get("use_safetensors") == "True", f"{path.name}:{line}: {name}"
                seen += 1
    assert seen >= 8


def test_accelerate_loads_data_alone():
    """Else a newer Accelerate reads the optimizer's state or the random states as programs."""
    import inspect

    from accelerate.utils import other

    assert 'kwargs["weights_only"] = True' in inspect.getsource(other.load)


# Tokens

TOKEN, AMBIENT = "hf_OwnersSecretToken1", "hf_AmbientSecretToken2"


def test_a_line_shows_no_token():
    """Else a typing mistake beside a token writes it into a log."""
    for text in (f"unrecognized arguments: --hub_tokn {TOKEN}", f"a {TOKEN}, b", f"'{TOKEN}'", f"--x={TOKEN}"):
        assert TOKEN not in one_line(text)
    assert one_line("the file pipeline_ddpm_hf_something.py") == "the file pipeline_ddpm_hf_something.py"


@pytest.mark.parametrize("argv", [["--hub_tokn", TOKEN], ["--hub_token", TOKEN, "--seed", TOKEN], [TOKEN],
                                  ["--hub_token", f"{TOKEN} with spaces"]])  # fmt: skip
def test_a_refused_command_line_shows_no_token(argv):
    """Else the line that says what is wrong is pasted into an issue with the token in it."""
    end = ended(train_unconditional.main, argv)
    assert TOKEN not in the_line(end)


def test_a_token_that_is_none_is_refused_before_training():
    """Else hours of training end in an upload that could never work."""
    for value in ("", "two words", "line\nbreak", "é"):
        config = defaults(train_unconditional.PROGRAM, hub_token=value)
        with pytest.raises(UsageError, match="--hub_token"):
            config.check()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Runs with a token by flag, by file and by environment, that publish, fail to, or only say what they would do."""
    root = tmp_path_factory.mktemp("published")
    write_unet(root / "unet", in_channels=1, out_channels=1)
    write_images(root / "images" / "three", random_pixels(4, 8, 8))
    base = [
        *["--train_data_dir", root / "images" / "three", "--model_config_name_or_path", root / "unet", "--seed", "3"],
        *["--resolution", "8", "--channels", "1", "--train_batch_size", "4", "--max_train_steps", "2", "--use_ema"],
        *["--eval_batch_size", "4", "--ddpm_num_steps", "10", "--ddpm_num_inference_steps", "2", "--push_to_hub"],
        *["--cpu_threads", "1", "--checkpointing_steps", "1", "--logging_steps", "1", "--logger", "tensorboard"],
    ]
    (root / "run.yaml").write_text(f"hub_token: {TOKEN}\nhub_model_id: user/by-file\n")
    ways = {
        "by-flag": ["--hub_token", TOKEN, "--hub_model_id", "user/by-flag"],
        "by-file": ["--config", root / "run.yaml"],
        "by-environment": ["--hub_model_id", "user/by-environment"],
        "failing": ["--hub_token", TOKEN, "--hub_model_id", "user/failing"],
        "refused": ["--hub_token", "hf_NobodysSecretToken3", "--hub_model_id", "user/refused"],
        "dry": ["--hub_token", TOKEN, "--dry_run"],
        "misspelt": ["--hub_tokn", TOKEN],
    }
    jobs = {name: [str(word) for word in [*base, "--output_dir", root / name, *more]] for name, more in ways.items()}
    with Hub({TOKEN: "user", AMBIENT: "user"}) as hub:
        hub.fail("POST /api/models/user/failing/commit/", 500, times=100)
        runs = run(hub, root / "home", TRAINER, json.dumps(jobs), root / "made", HF_TOKEN=AMBIENT)
        yield root, runs, hub


def test_runs_with_tokens_end_as_they_should(published):
    """Else the test below looks at runs that never used a token."""
    root, runs, hub = published
    assert {name: end["code"] for name, end in runs.items()} == {
        **dict.fromkeys(("by-flag", "by-file", "by-environment", "dry"), 0),
        **dict.fromkeys(("failing", "refused", "misspelt"), 2),
    }
    assert {"user/by-flag", "user/by-file", "user/by-environment"} <= set(hub.repositories)
    assert list((root / "by-flag").rglob("events.out.tfevents*"))


def test_no_token_is_in_anything_that_a_run_wrote_or_said(published):
    """Else a token is published with the model, or stays in a log that others can read."""
    root, runs, hub = published
    tokens = [token.encode() for token in (TOKEN, AMBIENT, "hf_NobodysSecretToken3")]
    searched = 0
    for path in root.rglob("*"):
        if path.is_file() and path != root / "run.yaml":
            data, searched = path.read_bytes(), searched + 1
            assert not any(token in data for token in tokens), path
    assert searched > 100
    said = json.dumps(runs).encode()
    assert not any(token in said for token in tokens)
    trees = [tree for repository in hub.repositories.values() for tree in repository.commits.values()]
    blobs = [blob.data for tree in trees for blob in tree.values()] + list(hub.large_files.values())
    assert len(blobs) > 30
    assert not any(token in blob for token in tokens for blob in blobs)


def test_settings_that_are_written_hold_no_secret(published):
    """Else a new secret flag is written, because nobody added it to the list."""
    root, _, _ = published
    for name in ("by-flag", "by-file"):
        written = json.loads((root / name / "training_config.json").read_text())
        assert not [flag for flag in written if "token" in flag or "secret" in flag or "password" in flag]
    assert os.environ.get("HF_TOKEN") != AMBIENT
