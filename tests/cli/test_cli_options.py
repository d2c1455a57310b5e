"""Every option of every `ddpm-hf` command changes what it does, or is refused."""

import functools
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import typer
from safetensors.torch import load_file

from ddpm_hf import (
    ClassConditionalDDPMPipeline,
    DDPMImageToImagePipeline,
    DDPMPipeline,
    DDPMRestorationPipeline,
    DDPMScheduler,
    TextToImageDDPMPipeline,
    cli,
    load,
)
from ddpm_hf.models import converters
from ddpm_hf.portable.conditioning_ddpm_hf import Conditioning
from tests.ablation import test_ablation
from tests.cli import test_ema, test_evaluate, test_few_steps
from tests.support.classifier import tiny_classifier
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import tiny_text_pipeline
from tests.support.flag_rows import fits
from tests.support.ho_network import variables, write_bundle
from tests.support.openai_networks import Classifier, UNet, randomized
from tests.support.pictures import random_pixels, write_images

STEPS = 20  # T
X2 = Conditioning("super-resolution", 2, "bicubic", "bicubic", noise=0.5)
PAINTER = Conditioning("inpaint", masks=("box",))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Tiny saved models by name, a classifier, and two images."""
    root = tmp_path_factory.mktemp("shop")
    scheduler, names = DDPMScheduler(STEPS, beta_schedule="cosine"), dict(enumerate(["cat", "dog", "owl"]))
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(root / "plain")
    ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=4), scheduler, names).save_pretrained(root / "classes")
    TextToImageDDPMPipeline(**tiny_text_pipeline().components, guidance_scale=3.0).save_pretrained(root / "text")
    tiny_classifier().save_pretrained(root / "classifier")
    for number, name in enumerate(("unet", "unet_ema")):
        tiny_unet(seed=number).save_pretrained(root / "checkpoint-2" / name)
    facts = {
        "scheduler": json.loads(scheduler.to_json_string()),
        "classes": [],
        "step": 2,
        "files": {},
        "settings": {},
    }
    (root / "checkpoint-2/manifest.json").write_text(json.dumps(facts))
    write_images(root / "images", random_pixels(2, 8, 8))
    write_images(root / "gray", random_pixels(2, 8, 8)[..., 0])
    write_images(root / "masks", random_pixels(1, 8, 8)[..., 0])
    write_images(root / "small", random_pixels(2, 4, 4)[..., 0])
    write_images(root / "paint", random_pixels(2, 4, 4, seed=1)[..., 0])
    for name, conditioning, size in (("x2", X2, 8), ("painter", PAINTER, 4)):
        unet = tiny_unet(1 + conditioning.extra_channels(1), 1, size=size)
        DDPMImageToImagePipeline(unet, scheduler, conditioning.config()).save_pretrained(root / name)
    DDPMPipeline(tiny_unet(size=4), scheduler).save_pretrained(root / "four")
    (root / "plain/notes.txt").write_text("mine")
    return root


class Seen(NamedTuple):
    """How a command ended, what it said and wrote, and what it handed on."""

    code: int
    out: str
    err: str
    folder: Path
    calls: dict[str, Any]

    def images(self) -> str:
        """The digest of the single images."""
        files = sorted(path for path in self.folder.rglob("*.png") if path.stem.isdecimal())
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()


@pytest.fixture
def observe(shop, tmp_path, run, monkeypatch):
    """Runs a command in a new folder; what would reach the Hub goes nowhere, and is noted."""
    from ddpm_hf.cli import info, restore, sample
    from ddpm_hf.inference import loading as inference
    from ddpm_hf.models import saving
    from ddpm_hf.publishing import files as published_folder
    from ddpm_hf.publishing import hub as publishing
    from ddpm_hf.publishing import spaces

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_login")
    calls = {}

    def noted(name, result):
        def call(*args, **kwargs):
            calls[name] = (args, kwargs)
            return result(*args, **kwargs) if callable(result) else result

        return call

    pushed = SimpleNamespace(files={"a": 1}, address="https://hub/it")
    there = spaces.Model("user/it", "https://hub/user/it")
    on_the_hub = functools.partial(inference.load, shop / "plain")
    load = inference.load
    monkeypatch.setattr(inference, "load", noted("load", lambda name, **options: (
        on_the_hub() if str(name).startswith("user/") else load(name, **options)
    )))  # fmt: skip
    monkeypatch.setattr(publishing, "open_repository", noted("open", lambda name, *more: name))
    monkeypatch.setattr(publishing, "push_folder", noted("push", pushed))
    monkeypatch.setattr(published_folder, "sample_missing_pictures", noted("pictures", None))
    monkeypatch.setattr(saving, "save_half_precision", noted("half", None))
    monkeypatch.setattr(spaces, "push_space", noted("space", "https://hub/space"))
    monkeypatch.setattr(info, "hub_source", noted("info", info.local_source(shop / "plain")))
    monkeypatch.setattr(sample, "autocast", noted("autocast", sample.autocast))
    monkeypatch.setattr(restore, "autocast", noted("autocast_restore", restore.autocast))
    look_up = spaces.look_up
    monkeypatch.setattr(spaces, "look_up", noted("look_up", lambda name, *more: (
        there if name.startswith("user/") else look_up(name, *more)
    )))  # fmt: skip
    made = iter(range(10))

    def call(words: str) -> Seen:
        folder = tmp_path / str(next(made))
        calls.clear()
        monkeypatch.chdir(tmp_path)
        code, out, err = run(*(word.format(shop=shop, out=folder) for word in words.split()))
        return Seen(code, out, err, folder, dict(calls))

    return call


class Row(NamedTuple):
    """An option, given on top of a command, and what it changes from what to what; or the line that refuses it."""

    command: str
    option: str  # as typer calls it
    given: str
    see: Any
    more: str = ""
    model: str = "{shop}/plain"
    before: Any = None  # None: anything
    after: Any = None


def images(seen):
    return seen.images()


def count(seen):
    return len([name for name in seen.files() if name[:4].isdecimal()])


def handed(call, *path):
    """What a spy was given: by position or by name."""

    def read(seen):
        args, kwargs = seen.calls[call]
        return kwargs[path[0]] if isinstance(path[0], str) else args[path[0]]

    return read


def observed(seen):
    return (seen.folder / "observed.png").read_bytes()


def wrote(name):
    return lambda seen: name in seen.files()


def pushed_weight(seen):
    pipeline = seen.calls["push"][0][3]
    return pipeline.unet.conv_in.weight.sum().item()


def held_weight(seen):
    weights = load_file(seen.folder / "ddpm_hf_model/unet/diffusion_pytorch_model.safetensors")
    return weights["conv_in.weight"].sum().item()


CLASSES, TEXT, HUB = (
    {"model": "{shop}/classes"},
    {"model": "{shop}/text", "more": "--prompt red"},
    {"model": "user/it"},
)
READS = "--image {shop}/small/0.png"
BETWEEN = "--interpolate {shop}/images/0.png {shop}/images/1.png"
ROWS = [
    Row("sample", "num_images", "--num-images 3", count, before=2, after=3),
    Row("sample", "class_", "--class dog", images, **CLASSES),
    Row("sample", "prompt", "--prompt blue", images, "", "{shop}/text"),
    Row("sample", "negative_prompt", "--negative-prompt blue", images, **TEXT),
    Row("sample", "interpolate", BETWEEN + " --timestep 5", images),
    Row("sample", "timestep", "--timestep 12", images, BETWEEN + " --timestep 5"),
    Row("sample", "shared_timestep", "--shared-timestep 2", images),
    Row("sample", "sampler", "--sampler ddim", images),
    Row("sample", "steps", "--steps 3", images),
    Row("sample", "eta", "--eta 0.5", images, "--sampler ddim"),
    Row("sample", "guidance_scale", "--guidance-scale 3", images, **CLASSES),
    Row("sample", "guidance_rescale", "--guidance-rescale 0.7", images, "--guidance-scale 3", "{shop}/classes"),
    Row("sample", "guidance_interval", "--guidance-interval 0 5", images, "--guidance-scale 3", "{shop}/classes"),
    Row("sample", "classifier", "--classifier {shop}/classifier", images),
    Row("sample", "classifier_scale", "--classifier-scale 9", images, "--classifier {shop}/classifier"),
    Row("sample", "seed", "--seed 1", images),
    Row("sample", "batch_size", "--batch-size 1", lambda seen: "batches" in seen.err, before=False, after=True),
    Row("sample", "precision", "--precision bf16", handed("autocast", 1), before="fp32", after="bf16"),
    Row("sample", "format", "--format npz", wrote("samples.npz"), before=False, after=True),
    Row("sample", "progressive", "--progressive", wrote("chain.gif"), before=False, after=True),
    Row("sample", "grid_only", "--grid-only", count, before=2, after=0),
    Row("sample", "ema", "--no-ema", images, "", "{shop}/checkpoint-2"),
    Row("sample", "revision", "--revision v1", handed("load", "revision"), after="v1", **HUB),
    Row("sample", "token", "--token hf_mine", handed("load", "token"), after="hf_mine", **HUB),
    Row("sample", "image", "--image {shop}/small/1.png", images, READS, "{shop}/x2"),
    Row("sample", "conditioning_noise", "--conditioning-noise 0.3", images, READS, "{shop}/x2"),
    Row("sample", "mask", "--mask {shop}/paint/1.png", images, READS + " --mask {shop}/paint/0.png", "{shop}/painter"),
    Row("sample", "cascade", "--cascade {shop}/x2", images, "", "{shop}/four"),
    Row("sample", "save_model", "--save-model {out}-model", lambda seen: Path(f"{seen.folder}-model").is_dir(),
        "--cascade {shop}/x2", "{shop}/four", before=False, after=True),
    Row("restore", "task", "--task super-resolution", observed),
    Row("restore", "image", "--image {shop}/gray/1.png", images),
    Row("restore", "mask", "--mask {shop}/masks/0.png", images, "--task inpaint --mask left"),
    Row("restore", "hidden", "--hidden 0.8", images, "--task inpaint --mask box"),
    Row("restore", "factor", "--factor 4", images, "--task super-resolution"),
    Row("restore", "filter", "--filter average", images, "--task super-resolution"),
    Row("restore", "blur", "--blur motion", images, "--task deblur --blur-size 3"),
    Row("restore", "blur_size", "--blur-size 2", images, "--task deblur"),
    Row("restore", "blur_angle", "--blur-angle 90", images, "--task deblur --blur motion --blur-size 3"),
    Row("restore", "sigma_y", "--sigma-y 0.6", images),
    Row("restore", "degrade", "--degrade", lambda seen: "psnr" in seen.out, before=False, after=True),
    Row("restore", "truth", "--truth {shop}/gray", lambda seen: "psnr" in seen.out, before=False, after=True),
    Row("restore", "fit", "--fit", observed, "--task super-resolution"),
    Row("restore", "class_", "--class dog", images, **CLASSES),
    Row("restore", "num_solutions", "--num-solutions 3", count, before=2, after=3),
    Row("restore", "method", "--method pigdm", images),
    Row("restore", "steps", "--steps 3", images),
    Row("restore", "eta", "--eta 0.2", images),
    Row("restore", "weight", "--weight 50", images, "--method diffpir"),
    Row("restore", "iterations", "--iterations 1", images, "--method mmps --task deblur"),
    Row("restore", "start", "--start 0.5", images),
    Row("restore", "time_travel", "--time-travel 1 2", images),
    Row("restore", "seed", "--seed 1", images),
    Row("restore", "batch_size", "--batch-size 1", lambda seen: "solutions:" in seen.err, before=False, after=True),
    Row("restore", "precision", "--precision bf16", handed("autocast_restore", 1), before="fp32", after="bf16"),
    Row("restore", "ema", "--no-ema", images, "", "{shop}/checkpoint-2"),
    Row("restore", "revision", "--revision v1", handed("load", "revision"), after="v1", **HUB),
    Row("restore", "token", "--token hf_mine", handed("load", "token"), after="hf_mine", **HUB),
    Row("push", "private", "--private", handed("open", 2), before=False, after=True),
    Row("push", "license_", "--license mit", handed("push", "license"), after="mit"),
    Row("push", "revision", "--revision v1", handed("push", "tag"), after="v1"),
    Row("push", "variant", "--variant fp16", lambda seen: "half" in seen.calls, before=False, after=True),
    Row("push", "include", "--include notes.txt", handed("push", "include"), before=(), after=("notes.txt",)),
    Row("push", "message", "--message mine", handed("push", "message"), after="mine"),
    Row("push", "ema", "--no-ema", pushed_weight, model="{shop}/checkpoint-2"),
    Row("push", "dry_run", "--dry-run", lambda seen: "push" in seen.calls, before=True, after=False),
    Row("push", "token", "--token hf_mine", handed("push", 2), before="hf_login", after="hf_mine"),
    Row("push-space", "space", "--space user/app", handed("space", 1), before="user/it", after="user/app", **HUB),
    Row("push-space", "private", "--private", handed("space", 3), before=False, after=True, **HUB),
    Row("push-space", "example", "--example red", handed("space", 4), before=[], after=["red"], **HUB),
    Row("push-space", "restore", "--restore", lambda seen: seen.calls["look_up"][0][3], after=True, **HUB),
    Row("push-space", "ema", "--no-ema", held_weight, "--out {out}", "{shop}/checkpoint-2"),
    Row("push-space", "out", "--out {out}", wrote("app.py"), before=False, after=True, **HUB),
    Row("push-space", "dry_run", "--dry-run", lambda seen: "space" in seen.calls, before=True, after=False, **HUB),
    Row("push-space", "token", "--token hf_mine", handed("space", 2), before="hf_login", after="hf_mine", **HUB),
    Row("info", "revision", "--revision v1", handed("info", 1), after="v1", **HUB),
    Row("info", "token", "--token hf_mine", handed("info", 2), after="hf_mine", **HUB),
]  # fmt: skip
# What the rows do not show, and the tests here that do
APART = {
    ("sample", "out"): "test_results_go_where_out_says",
    ("sample", "device"): "test_a_device_is_checked_and_taken",
    ("sample", "acceleration"): "test_sampling_is_accelerated_unless_it_is_turned_off",
    ("restore", "out"): "test_results_go_where_out_says",
    ("restore", "device"): "test_a_device_is_checked_and_taken",
    ("restore", "acceleration"): "test_sampling_is_accelerated_unless_it_is_turned_off",
    ("restore", "features"): "test_features_measure_restored_images",
    **{
        ("convert", option): "test_each_option_of_convert_changes_what_is_written"
        for option in ("to", "from_", "flags", "labels", "classifier", "ema", "token")
    },
    ("ddpm-hf", "version"): "test_the_version",
}
COMPLETION = {("ddpm-hf", "install_completion"), ("ddpm-hf", "show_completion")}  # typer's own
RESTORE = "--steps 2 --num-solutions 2 --image {shop}/gray/0.png --sigma-y 0.2 --out {out}"
QUICK = {"sample": "--steps 2 --num-images 2 --out {out}", "restore": f"{RESTORE} --task denoise"}


def options() -> set[tuple[str, str]]:
    """All options of all commands, from typer."""
    whole = typer.main.get_command(cli.app)
    found = {
        (name, one.name)
        for name, command in {"ddpm-hf": whole, **whole.commands}.items()
        for one in command.params
        if one.param_type_name == "option" and one.name != "help"
    }
    return found - COMPLETION


def test_every_option_has_a_row():
    """Else an option is added that nobody shows to do something; the trainings' flags have tests of their own."""
    evaluated = {("evaluate", name) for name in [*test_evaluate.APART, *(row.option for row in test_evaluate.ROWS)]}
    fitted = {(row.command, row.option) for row in test_few_steps.ROWS} | test_few_steps.APART.keys()
    ablated = {("ablate", name) for name in test_ablation.APART}
    averaged = {("ema", name) for name in [*test_ema.APART, *test_ema.ROWS]}
    assert (
        options()
        == {(row.command, row.option) for row in ROWS} | APART.keys() | evaluated | fitted | averaged | ablated
    )
    commands = typer.main.get_command(cli.app).commands
    assert {name for name in commands if not commands[name].params} == {
        "presets", "train", "train-text2image", "train-classifier"
    }  # fmt: skip
    parts = (
        (APART, globals()),
        *((module.APART, vars(module)) for module in (test_ema, test_evaluate, test_few_steps, test_ablation)),
    )
    for names, tests in parts:
        assert set(names.values()) <= set(tests)


@pytest.mark.every(3)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} {row.given.replace('{shop}/', '')}")
def test_an_option_changes_what_is_seen(row, observe):
    """Else an option is accepted and ignored, or does something else than it says."""
    command = f"{row.command} {row.model} {QUICK.get(row.command, '')} {row.more}"
    prompted = command if row.option != "prompt" else f"{command} --prompt red"
    without, given = observe(prompted), observe(f"{command} {row.given}")
    assert (without.code, given.code) == (0, 0), without.err + given.err
    before, after = row.see(without), row.see(given)
    assert before != after
    assert fits(before, row.before), before
    assert fits(after, row.after), after


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("sample {shop}/plain --revision v1", ("--revision v1", "folder")),
        ("info {shop}/plain --revision v1", ("--revision v1", "folder")),
        ("sample {shop}/plain --ema", ("checkpoint",)),
        ("sample {shop}/plain --shared-timestep 2 --batch-size 2", ("--batch-size 2", "--shared-timestep")),
        ("sample {shop}/classes --guidance-rescale 0.5", ("--guidance-rescale 0.5", "--guidance-scale")),
        ("sample {shop}/classes --guidance-interval 0 5", ("--guidance-interval", "--guidance-scale")),
        ("sample {shop}/text --prompt red --guidance-scale 1 --negative-prompt blue",
         ("--negative-prompt", "--guidance-scale")),
        ("sample {shop}/plain --class cat", ("--class",)),
        ("sample {shop}/plain --prompt cat", ("--prompt",)),
        ("sample {shop}/plain --classifier-scale 2", ("--classifier-scale 2",)),
        ("sample {shop}/plain --eta 0.5", ("--eta 0.5", "ddim")),
        ("sample {shop}/plain --timestep 5", ("--timestep 5", "--interpolate")),
        ("push-space user/it --out app --private", ("--out", "--private")),
        ("push-space {shop}/plain --out app --example red", ("--example red",)),
    ],
)  # fmt: skip
def test_an_option_without_what_it_needs_is_refused(words, named, observe, tmp_path):
    """Else an option is accepted and has no effect."""
    seen = observe(words)
    assert_one_line(seen[:3], *named)
    assert not list(tmp_path.iterdir())


def test_results_go_where_out_says(observe):
    """Else images land in another folder."""
    seen = observe("sample {shop}/plain --steps 2 --num-images 2 --out {out}")
    assert (seen.code, count(seen)) == (0, 2)
    seen = observe(f"restore {{shop}}/plain {RESTORE} --task denoise")
    assert (seen.code, count(seen)) == (0, 2)


def test_a_device_is_checked_and_taken(observe):
    """Else --device is ignored where there is one device only."""
    assert observe("sample {shop}/plain --steps 2 --num-images 1 --out {out} --device cpu").code == 0
    assert_one_line(observe("sample {shop}/plain --device meta")[:3], "--device meta", "cpu")
    assert observe(f"restore {{shop}}/plain {RESTORE} --task denoise --device cpu").code == 0
    refused = observe(f"restore {{shop}}/plain {RESTORE} --task denoise --device meta")
    assert_one_line(refused[:3], "--device meta", "cpu")


def test_sampling_is_accelerated_unless_it_is_turned_off(observe):
    """Else --acceleration none is ignored, or nobody has what is the default."""
    with mock.patch.object(DDPMPipeline, "enable_acceleration") as enabled:
        assert observe("sample {shop}/plain --steps 2 --num-images 1 --out {out} --acceleration none").code == 0
        assert not enabled.called
        assert observe("sample {shop}/plain --steps 2 --num-images 1 --out {out}").code == 0
        assert enabled.called
    with mock.patch.object(DDPMRestorationPipeline, "enable_acceleration") as enabled:
        command = f"restore {{shop}}/plain {RESTORE} --task denoise"
        assert observe(f"{command} --acceleration none").code == 0
        assert not enabled.called
        assert observe(command).code == 0
        assert enabled.called


def test_features_measure_restored_images(observe, monkeypatch):
    """Else --features is accepted and no distance appears."""
    from ddpm_hf.evaluation import features

    loaded = []

    def load(spec, **options):
        loaded.append(spec)
        return lambda images: features.Features(images.flatten(1).float().numpy())

    monkeypatch.setattr(features, "load_extractor", load)
    seen = observe(f"restore {{shop}}/plain {RESTORE} --task denoise --degrade --features pixels")
    assert (seen.code, loaded) == (0, ["pixels"])
    assert "feature_distance" in seen.out


def test_each_option_of_convert_changes_what_is_written(run, tmp_path, monkeypatch):
    """Else an option of a conversion is accepted and ignored."""
    network = randomized(UNet(width=32, levels=(1,), layers=1, attention=set(), heads=1, classes=2))
    classifier = randomized(Classifier(width=64, levels=(1,), layers=1, attention=set(), image_size=8, classes=2))
    for name, one in (("a", network), ("b", classifier)):
        torch.save(one.state_dict(), tmp_path / f"{name}.pt")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    flags = "--num_heads 1 --image_size 8 --diffusion_steps 20 --noise_schedule cosine"
    assert run("convert", tmp_path / "b.pt", "--to", tmp_path / "b", "--flags", flags)[0] == 0

    def written(*more, flags=flags, source="a.pt"):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        code, out, err = run("convert", tmp_path / source, "--to", tmp_path / "x", "--flags", flags, *more)
        assert code == 0, err
        return load(tmp_path / "x"), out

    plain, _ = written("--from", "guided-diffusion")
    assert plain.classifier is None
    assert list(plain.labels) == ["0", "1"]
    assert plain.unet.config.get("timestep_scale") is None
    improved, _ = written("--from", "improved-diffusion")
    assert improved.unet.config.timestep_scale == 50
    longer, _ = written("--from", "guided-diffusion", flags=flags.replace("20", "30"))
    assert (len(plain.scheduler), len(longer.scheduler)) == (20, 30)
    labels = ["--from", "guided-diffusion", "--labels", tmp_path / "labels.txt"]
    assert list(written(*labels)[0].labels) == ["cat", "dog"]
    kept, _ = written("--from", "guided-diffusion", "--classifier", tmp_path / "b")
    assert kept.classifier is not None

    weights = variables(factors=(1,), attends=(True,))
    averaged = {f"{name}/ExponentialMovingAverage": 2 * value for name, value in weights.items()}
    write_bundle(tmp_path / "model", weights | averaged)
    both = [
        written(*more, source="model", flags="--model_var_type fixedlarge")[0].unet.conv_in.weight
        for more in ([], ["--no-ema"])
    ]
    assert torch.equal(both[0], 2 * both[1])

    asked = {}
    monkeypatch.setattr(converters, "find_location", lambda name, token: asked.update({name: token}) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("convert", "user/old", "--to", tmp_path / "y", "--token", "hf_mine")
    assert asked == {"user/old": "hf_mine"}


def test_the_version(observe):
    """Else nobody can say which version they have."""
    assert observe("--version").out.startswith("ddpm-hf ")


def test_presets_lists_all(observe):
    """Else a preset is there that nobody finds."""
    from ddpm_hf.models.presets import MODEL_PRESETS

    shown = observe("presets").out
    assert all(name in shown for name in MODEL_PRESETS)
