"""`ddpm-hf push RUN/checkpoint-N`: the pipeline of a checkpoint is published, with what its run knew at that step."""

import json

import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.publishing import hub as publishing
from ddpm_hf.publishing.card.facts import read_facts
from ddpm_hf.publishing.card.merging import make_card
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_pipeline import tiny_unet

SETTINGS = {"ddpm_num_steps": 20}
RUN = {
    "step": 6,
    "seed": 7,
    "batch": 8,
    "parameters": 10,
    "dataset": {"name": "photos", "images": 8, "on_hub": False, "fingerprint": "1a2b"},
    "held_out": 0,
    "rows": [],
    "settings": {"learning_rate": 0.1},
    "sessions": [
        {
            "first_step": 0,
            "last_step": 6,
            "date": "2026-01-01",
            "hardware": "CPU",
            "processes": 1,
            "precision": "no",
            "seconds": 6.0,
            "versions": {"torch": "2.6"},
        }
    ],
}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of step 4 in the folder of a run that has saved its pipeline at step 6."""
    folder = tmp_path / "photos-ddpm"
    DDPMPipeline(tiny_unet(seed=6), DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    for part, seed in (("unet", 0), ("unet_ema", 1)):
        tiny_unet(seed=seed).save_pretrained(folder / "checkpoint-4" / part)
    state = {
        "settings": SETTINGS,
        "step": 4,
        "files": {},
        "sessions": [{**RUN["sessions"][0], "last_step": 4}],
        "optimizer": "private",
    }
    (folder / "checkpoint-4" / "manifest.json").write_text(json.dumps(state))
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": n, "epoch": 1, "loss": 1.0 / n, "validation_loss": 2.0 / n}) + "\n"
            for n in range(1, 7)
        )
    )
    result = {"metric": "FID", "dataset": "photos", "split": "test", "settings": None, "step": 4, "value": 12.5}
    (folder / "evaluation.json").write_text(json.dumps([{**result, "samples": 100}]))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nHer words.\n")
    (folder / "LICENSE.txt").write_text("MIT")
    for step, shade in ((2, 20), (6, 60)):
        (folder / "samples").mkdir(exist_ok=True)
        Image.new("L", (8, 8), shade).save(folder / f"samples/step-{step:06d}.png")
    return folder / "checkpoint-4"


@pytest.fixture
def pushed(monkeypatch):
    """What would be uploaded, by name, and to where."""
    seen = {}

    def push_folder(folder, repository, token, pipeline, **options):
        with publishing.publishable(folder, options.pop("include", ())) as files:
            seen.update({name: path.read_bytes() for name, path in files.items()})
        facts = read_facts(folder, repository, pipeline, options["license"])
        seen.update(
            {"to": repository, "card": make_card(facts, publishing.read_card(folder)), "weights": pipeline.unet}
        )
        return publishing.Upload(f"https://hub/{repository}", dict.fromkeys(seen, 1))

    monkeypatch.setenv("HF_TOKEN", "hf_notused")
    monkeypatch.setattr(publishing, "open_repository", lambda name, token, private: f"user/{name}")
    monkeypatch.setattr(publishing, "push_folder", push_folder)
    return seen


def files_of(folder):
    """All files below, with their content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("option", "seed"), [((), 1), (("--ema",), 1), (("--no-ema",), 0)])
def test_a_checkpoint_is_published_as_it_was(option, seed, checkpoint, pushed, run):
    # Breaks if other weights go up, or losses, pictures and a step count from after the checkpoint.
    before = files_of(checkpoint.parent)
    code, out, err = run("push", checkpoint, *option)
    assert code == 0, err
    assert "published at https://hub/user/photos-ddpm" in out
    assert pushed["to"] == "user/photos-ddpm"
    assert torch.equal(pushed["weights"].conv_in.weight, tiny_unet(seed=seed).conv_in.weight)
    assert {"model_index.json", "pipeline_ddpm_hf.py", "unet/config.json"} <= set(pushed)
    assert not [name for name in pushed if name.startswith("checkpoint") or "manifest" in name or "files.json" in name]
    assert json.loads(pushed["run.json"])["step"] == 4
    assert [json.loads(line)["step"] for line in pushed["metrics.jsonl"].splitlines()] == [1, 2, 3, 4]
    raw = "--no-ema" in option  # the run's figures and pictures are of the averaged weights
    assert (pushed["assets/samples.png"] == before[checkpoint.parent / "samples/step-000002.png"]) != raw
    assert ("12.5" in pushed["card"]) != raw
    assert (b"validation_loss" in pushed["metrics.jsonl"]) != raw
    assert ("the weights are not averaged" in pushed["card"]) == raw
    assert "Her words." in pushed["card"]
    assert pushed["LICENSE.txt"] == b"MIT"
    assert "| steps | 4 |" in pushed["card"]
    assert files_of(checkpoint.parent) == before


@pytest.mark.parametrize(("option", "seed"), [((), 1), (("--no-ema",), 0)])
def test_an_app_of_a_checkpoint_holds_its_weights(option, seed, checkpoint, run, tmp_path):
    # Breaks if the app shows the run's last weights, or refers to a folder that is gone.
    before, app = files_of(checkpoint.parent), tmp_path / "app"
    code, out, err = run("push-space", checkpoint, "--out", app, "--restore", *option)
    assert code == 0, err
    assert str(app) in out
    settings = json.loads((app / "space.json").read_text())
    assert settings["title"] == "photos-ddpm-restore"
    pipeline = DDPMPipeline.from_pretrained(app / settings["model"])
    assert torch.equal(pipeline.unet.conv_in.weight, tiny_unet(seed=seed).conv_in.weight)
    assert "license: mit" in (app / "README.md").read_text()
    assert files_of(checkpoint.parent) == before


def test_an_app_of_a_run_has_no_other_weights(checkpoint, run, tmp_path):
    # Breaks if an option is passed over.
    result = run("push-space", checkpoint.parent, "--no-ema", "--out", tmp_path / "app")
    assert_one_line(result, "--no-ema", "not a checkpoint-N")
    assert not (tmp_path / "app").exists()


def test_a_checkpoint_of_a_run_without_a_pipeline_is_published(checkpoint, pushed, run):
    # Breaks if a stopped run, which has no run.json and no card, cannot be shared.
    for name in ("model_index.json", "run.json", "README.md", "metrics.jsonl"):
        (checkpoint.parent / name).unlink()
    code, _, err = run("push", checkpoint, "mine")
    assert code == 0, err
    assert pushed["to"] == "user/mine"
    assert "run.json" not in pushed


def test_dry_run_shows_the_checkpoints_files(checkpoint, pushed, run, monkeypatch):
    # Breaks if --dry-run shows the run's files, or uploads.
    monkeypatch.setattr("ddpm_hf.cli.push.check_hub", lambda *_: [])
    before = files_of(checkpoint.parent)
    code, out, err = run("push", checkpoint, "--dry-run")
    assert code == 0, err
    assert "unet/diffusion_pytorch_model.safetensors" in out
    assert "checkpoint-4" not in out
    assert not pushed
    assert files_of(checkpoint.parent) == before


@pytest.mark.parametrize("name", ["run.json", "checkpoint-4/manifest.json"])
@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_a_malformed_file_of_the_run_is_named(name, text, checkpoint, pushed, run):
    # Breaks if a damaged file is a traceback.
    (checkpoint.parent / name).write_text(text)
    assert_one_line(run("push", checkpoint), name.rpartition("/")[2], "JSON")
    assert not pushed


def test_what_a_checkpoint_cannot_do_is_one_line(checkpoint, pushed, run):
    # Breaks if an option is passed over.
    assert_one_line(run("push", checkpoint.parent, "--no-ema"), "--no-ema", "not a checkpoint-N")
    assert_one_line(run("push", checkpoint, "--include", "*.txt"), "--include", "checkpoint")
    (checkpoint / "unet_ema" / "config.json").unlink()
    (checkpoint / "unet_ema" / "diffusion_pytorch_model.safetensors").unlink()
    (checkpoint / "unet_ema").rmdir()
    assert_one_line(run("push", checkpoint, "--ema"), "no averaged (EMA) weights")
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert_one_line(run("push", checkpoint), "checkpoint-4 cannot be loaded")
    assert not pushed


@pytest.mark.parametrize(
    "words",
    [("push", "{run}", "me/photos/extra", "--dry-run"), ("push", "{run}", "my photos"),
     ("push-space", "{run}", "--space", "me/my app", "--dry-run"), ("push-space", "{run}", "--space", "a--b")],
)  # fmt: skip
def test_a_malformed_name_is_refused_before_the_hub_is_asked(words, checkpoint, pushed, run, monkeypatch):
    # Breaks if a name that the Hub would refuse passes a dry run, or is found out after the pictures are sampled.
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *_, **__: pytest.fail("the Hub was asked"))
    code, _, err = run(*(word.format(run=checkpoint.parent) for word in words))
    assert code == 2
    assert "cannot be the name of a repository; give user/name" in err
    assert not pushed
