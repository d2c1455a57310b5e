"""`ddpm-hf fit-variance` and `fit-timesteps`: each option changes the fit, and the folder stays a model."""

import json
import shutil
from typing import Any, NamedTuple

import datasets
import diffusers
import numpy as np
import pytest

import ddpm_hf
from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.cli.evaluation_samples import fit_of
from ddpm_hf.evaluation.model_bound import ModelBound, even_timesteps
from ddpm_hf.few_steps import refining
from ddpm_hf.inference.samplers import swap_sampler, usable_samplers
from ddpm_hf.portable.multistep_ddpm_hf import FITTED_TIMESTEPS, FITTED_WEIGHTS, LIKELIHOOD_TIMESTEPS
from ddpm_hf.portable.scheduling_ddpm_hf import X_START_VARIANCES
from tests.support import warm
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_hub import WITHOUT, bare_environment
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import stable_diffusion_scheduler, tiny_text_pipeline
from tests.support.pictures import encoded, quiet, random_pixels, write_images

T = 20
CONFIG = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Tiny saved models, and images with classes and captions."""
    root = tmp_path_factory.mktemp("fitted")
    scheduler, names = DDPMScheduler(T, beta_schedule="cosine"), {0: "cat", 1: "dog"}
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(root / "plain")
    learned = DDPMScheduler(T, variance_type="learned_range")
    DDPMPipeline(tiny_unet(out_channels=2), learned).save_pretrained(root / "learned")
    ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=3), scheduler, names).save_pretrained(root / "classes")
    tiny_text_pipeline(stable_diffusion_scheduler(num_train_timesteps=T)).save_pretrained(root / "text")
    fitted = DDPMScheduler.from_config(scheduler.config)
    fitted.use_x_start_variances([0.01 + 0.03 * t for t in range(T)])
    DDPMPipeline(tiny_unet(), fitted).save_pretrained(root / "fitted")
    tiny_unet().save_pretrained(root / "checkpoint-2/unet")
    write_images(root / "images/train", random_pixels(4, 8, 8))
    write_images(root / "images/test", random_pixels(4, 8, 8, seed=3) // 2)
    columns, types = {"text": ["a blue one", "red"] * 2, "other": ["red"] * 4}, {}
    for name in columns:
        types[name] = datasets.Value("string")
    for name, labels in (("label", [0, 0, 1, 1]), ("second_label", [1, 1, 0, 0])):
        columns, types = {**columns, name: labels}, {**types, name: datasets.ClassLabel(names=["cat", "dog"])}
    for seed, name in enumerate(("image", "second")):
        cells = [{"bytes": encoded(one), "path": None} for one in random_pixels(4, 8, 8, seed=5 + seed)]
        columns, types = {**columns, name: cells}, {**types, name: datasets.Image()}
    (root / "table").mkdir()
    with quiet():
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
        rows.to_parquet(str(root / "table/data.parquet"))
    return root


@pytest.fixture(scope="module")
def unchanged():
    """What `call` returned of a command without the option of a row, by the command."""
    return {}


@pytest.fixture
def call(shop, tmp_path, run, monkeypatch):
    """Runs a command in a new folder: (exit code, stdout, stderr), the folder of --out."""
    monkeypatch.chdir(tmp_path)
    made = iter(range(10))

    def call(words):
        folder = tmp_path / str(next(made))
        return run(*words.format(shop=shop, out=folder).split()), folder

    return call


def config(folder):
    return json.loads((folder / CONFIG).read_text())


def variances(result, folder):
    return config(folder)[X_START_VARIANCES]


def timesteps(result, folder):
    return config(folder).get(FITTED_TIMESTEPS)


def said(result, folder):
    return [line for line in result[1].splitlines() if "written to" not in line]


class Row(NamedTuple):
    """An option, given on top of a command, and what it changes."""

    command: str
    option: str
    given: str
    see: Any = variances
    base: str = "{shop}/plain --dataset {shop}/images"


TABLE = "--dataset {shop}/table"
QUICK = {"fit-variance": "--images 2 --out {out}", "fit-timesteps": "--calls 4 --out {out}"}
PICTURES = {"base": "{shop}/plain --trajectories 8"}
ROWS = [
    Row("fit-variance", "dataset", "--dataset {shop}/table"),
    Row("fit-variance", "split", "--split test"),
    Row("fit-variance", "image_column", "--image-column second", base=f"{{shop}}/plain {TABLE} --image-column image"),
    Row("fit-variance", "label_column", "--label-column second_label",
        base=f"{{shop}}/classes {TABLE} --image-column image --label-column label"),
    Row("fit-variance", "caption_column", "--caption-column other",
        base=f"{{shop}}/text {TABLE} --image-column image --caption-column text"),
    Row("fit-variance", "images", "--images 3"),
    Row("fit-variance", "timesteps", "--timesteps 5"),
    Row("fit-variance", "estimate", "--estimate norm"),
    Row("fit-variance", "seed", "--seed 1"),
    Row("fit-variance", "batch_size", "--batch-size 1", lambda result, folder: f"{T}/{T}" in result[2]),
    Row("fit-timesteps", "calls", "--calls 3", lambda result, folder: set(timesteps(result, folder)), **PICTURES),
    Row("fit-timesteps", "objective", "--objective likelihood",
        lambda result, folder: (timesteps(result, folder), config(folder).get(LIKELIHOOD_TIMESTEPS)),
        base="{shop}/fitted"),
    Row("fit-timesteps", "trajectories", "--trajectories 9", said, **PICTURES),
    Row("fit-timesteps", "teacher_steps", "--teacher-steps 9", said, **PICTURES),
    Row("fit-timesteps", "seed", "--seed 1", said, **PICTURES),
    Row("fit-timesteps", "batch_size", "--batch-size 2", lambda result, folder: f"{T}/{T}" in result[2], **PICTURES),
]  # fmt: skip
APART = {
    ("fit-variance", "out"): "test_the_folder_itself_is_fitted_and_stays_a_model",
    ("fit-variance", "device"): "test_what_cannot_be_fitted_is_refused",
    ("fit-variance", "token"): "test_what_cannot_be_fitted_is_refused",
    ("fit-timesteps", "out"): "test_fits_are_added_to_those_there",
    ("fit-timesteps", "device"): "test_what_cannot_be_fitted_is_refused",
    ("fit-timesteps", "token"): "test_what_cannot_be_fitted_is_refused",
}


@pytest.mark.every(3)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} {row.option}")
def test_an_option_changes_the_fit(row, call, unchanged, monkeypatch):
    """Else an option is accepted and ignored."""
    monkeypatch.setattr(refining, "MEASURED", 1)  # a worse fit, and as good a comparison
    command = f"{row.command} {row.base} {QUICK[row.command]}"
    if command not in unchanged:
        unchanged[command] = call(command)
    (without, first), (given, second) = unchanged[command], call(f"{command} {row.given}")
    assert (without[0], given[0]) == (0, 0), without[2] + given[2]
    assert row.see(without, first) != row.see(given, second)


FRESH = """
import sys, warnings
import diffusers, torch
warnings.simplefilter("error")
said = []
diffusers.utils.logging.get_logger("diffusers").addHandler(type("H", (__import__("logging").Handler,), {
    "emit": lambda self, record: said.append(record.getMessage())})())
for folder in sys.argv[1:]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is diffusers.DDPMPipeline
    print(pipe(1, torch.Generator().manual_seed(0), 5, "np").images.sum(), said)
"""


def test_the_folder_itself_is_fitted_and_stays_a_model(shop, call, run, tmp_path):
    """Else a fit damages the model: Diffusers, in a process without this package, samples what it did before."""
    shutil.copytree(shop / "plain", tmp_path / "model")
    (code, said, err), _ = call(f"fit-variance {tmp_path}/model --dataset {{shop}}/images --images 2")
    assert code == 0, err
    assert "2 images" in said
    assert len(config(tmp_path / "model")[X_START_VARIANCES]) == T
    before = config(shop / "plain")
    assert {**before, X_START_VARIANCES: 0} == {**config(tmp_path / "model"), X_START_VARIANCES: 0}
    words, env = (WITHOUT + FRESH, shop / "plain", tmp_path / "model"), bare_environment(tmp_path)
    stranger = warm.run("-c", *words, env=env, cwd=tmp_path, isolated=True)
    assert stranger.returncode == 0, stranger.stderr
    before, after = stranger.stdout.splitlines()
    assert before == after
    assert after.split()[1:] == ["[]"]
    pipeline = ddpm_hf.load(tmp_path / "model")
    assert pipeline.scheduler.variance_type == "fitted"
    assert run("sample", tmp_path / "model", "--steps", 3, "--num-images", 1, "--out", tmp_path / "drawn")[0] == 0
    assert call(f"fit-variance {{shop}}/plain --dataset {{shop}}/images --images 2 --out {tmp_path}/copy")[0][0] == 0
    np.testing.assert_allclose(variances(None, tmp_path / "copy"), variances(None, tmp_path / "model"))


def test_fits_are_added_to_those_there(shop, call, run, tmp_path, monkeypatch):
    """Else a fit for eight calls removes that for five, or sampling does not take it."""
    monkeypatch.setattr(refining, "MEASURED", 1)
    shutil.copytree(shop / "fitted", tmp_path / "model")
    assert call(f"fit-timesteps {tmp_path}/model --calls 3 --calls 5 --trajectories 8")[0][0] == 0
    assert call(f"fit-timesteps {tmp_path}/model --calls 4 --trajectories 8")[0][0] == 0
    (code, printed, err), _ = call(f"fit-timesteps {tmp_path}/model --calls 6 --objective likelihood")
    assert code == 0, err
    assert "bits/dim more than 20" in printed
    saved = config(tmp_path / "model")
    assert set(saved[FITTED_TIMESTEPS]) == {"3", "4", "5"}
    assert len(saved[LIKELIHOOD_TIMESTEPS]["6"]) == 6
    chain = ModelBound(ddpm_hf.load(tmp_path / "model"), None, 0, dict, steps=6).timesteps
    assert chain == saved[LIKELIHOOD_TIMESTEPS]["6"]
    assert ModelBound(ddpm_hf.load(tmp_path / "model"), None, 0, dict, steps=5).timesteps == even_timesteps(T, 5)
    assert saved[X_START_VARIANCES] == config(shop / "fitted")[X_START_VARIANCES]
    pipeline = ddpm_hf.load(tmp_path / "model")
    pipeline.scheduler.set_timesteps(timesteps=saved[LIKELIHOOD_TIMESTEPS]["6"])
    pipeline.use_multistep()
    assert pipeline.scheduler.fitted_calls() == [3, 4, 5]
    assert pipeline.prepare_timesteps(4) == saved[FITTED_TIMESTEPS]["4"]
    words = ("--sampler", "fitted", "--num-images", 1, "--out", tmp_path / "drawn", "--steps")
    assert run("sample", tmp_path / "model", *words, 4)[0] == 0
    words = ("--sampler", "fitted", "--num-images", 1, "--out", tmp_path / "none", "--steps")
    assert_one_line(run("sample", tmp_path / "model", *words, 6), "6 steps", "3, 4, 5", "fit-timesteps")
    assert_one_line(run("sample", shop / "plain", *words, 4), "no fitted steps", "fit-timesteps")
    assert not (tmp_path / "none").exists()
    assert {"fitted": 5}.items() <= usable_samplers(ddpm_hf.load(tmp_path / "model")).items()
    assert "fitted" not in usable_samplers(ddpm_hf.load(shop / "plain"))
    stock = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    stock.set_timesteps(timesteps=saved[FITTED_TIMESTEPS]["5"])
    assert stock.timesteps.tolist() == saved[FITTED_TIMESTEPS]["5"]


def test_samples_of_another_fit_are_other_samples(shop):
    """Else an evaluation measures the images of an earlier fit: what the sampler uses is in their key."""

    def digest(sampler, number=None, **fits):
        pipeline = ddpm_hf.load(shop / "plain")
        pipeline.scheduler = DDPMScheduler.from_config({**pipeline.scheduler.config, **fits})
        swap_sampler(pipeline, sampler)
        pipeline.scheduler.set_timesteps(number or 4)
        return fit_of(pipeline.scheduler)

    timesteps, weights = {"4": [19, 9, 4, 0], "3": [19, 9, 0]}, {"4": [[1.0], [1.0], [1.0], [1.0]]}
    steps = {FITTED_TIMESTEPS: timesteps, FITTED_WEIGHTS: weights}
    others = {"4": [19, 9, 3, 0], "3": [19, 9, 0]}, {"4": [[1.0], [1.0], [1.0], [0.9]]}
    assert {digest("ddpm"), digest("ddpm", **steps), digest("ipndm", **steps), digest("ddim", **steps)} == {""}
    several = [digest("fitted", **steps), digest("fitted", 3, **steps)]
    several += [digest("fitted", **{**steps, key: other}) for key, other in zip(steps, others)]
    several += [digest("ddpm", **{X_START_VARIANCES: [value] * T}) for value in (0.1, 0.2)]
    assert "" not in several
    assert len(set(several)) == 6


def test_a_sampler_without_fits_ignores_them(shop):
    """Else iPNDM in a comparison is what it is compared with."""
    pipeline = ddpm_hf.load(shop / "plain")
    config = {**pipeline.scheduler.config, FITTED_TIMESTEPS: {"4": [19, 9, 4, 0]}, FITTED_WEIGHTS: {"4": [[1.0]] * 4}}
    chains = {}
    for name in ("ipndm", "fitted"):
        pipeline.scheduler = DDPMScheduler.from_config(config)
        swap_sampler(pipeline, name)
        chains[name] = pipeline.prepare_timesteps(4), pipeline.scheduler.weights
    assert chains["fitted"] == ([19, 9, 4, 0], [[1.0]] * 4)
    assert chains["ipndm"] == ([19, 14, 9, 4], None)


def test_a_fitted_copy_tells_nothing_of_an_earlier_model(shop, call, tmp_path):
    """Else figures and the training of the model that was in the folder are published with the fitted one."""
    out = tmp_path / "copy"
    words = f"fit-timesteps {{shop}}/plain --calls 3 --trajectories 8 --teacher-steps 10 --out {out}"
    assert call(words)[0][0] == 0
    ddpm_hf.record_result(out, "FID", 1.2, samples=10, dataset="photos")
    assert (out / "evaluation.json").is_file()
    assert call(words)[0][0] == 0
    assert not (out / "evaluation.json").exists()
    code, _, err = call(words.replace("{shop}/plain", str(out)))[0]
    assert code == 0, err  # the model's own folder is fitted in place
    (out / "notes.md").write_text("mine")
    assert call(words)[0][0] == 0
    assert (out / "notes.md").read_text() == "mine"


REFUSED = {
    "fit-timesteps {shop}/checkpoint-2 --calls 4 --out {shop}/checkpoint-2": ("--out", "checkpoint", "another folder"),
    "fit-timesteps {shop}/classes --calls 4 --out {shop}/plain": ("--out", "is not of a run", "another folder"),
    "fit-variance {shop}/classes --dataset {shop}/table --out {shop}/plain": ("--out", "is not of a run"),
    "fit-timesteps {shop}/plain --calls 4 --trajectories -1": ("--trajectories", "2"),
    "fit-variance {shop}/plain": ("--dataset",),
    "fit-variance {shop}/plain --dataset {shop}/images --estimate mean": ("--estimate mean", "error, norm"),
    "fit-variance {shop}/plain --dataset {shop}/images --timesteps 2": ("--timesteps", "3"),
    "fit-variance {shop}/plain --dataset {shop}/images --device meta": ("--device meta", "cpu"),
    "fit-variance {shop}/plain --dataset {shop}/images --token a~b": ("token",),
    "fit-variance {shop}/plain --dataset {shop}/images --split validation": ("validation", "test"),
    "fit-variance {shop}/plain --dataset {shop}/images --out {shop}/plain/model_index.json": ("--out", "folder"),
    "fit-variance {shop}/learned --dataset {shop}/images": ("learned_range", "fixed"),
    "fit-variance {shop}/checkpoint-2 --dataset {shop}/images": ("checkpoint-2", "--out"),
    "fit-variance user/nothing --dataset {shop}/images": ("user/nothing", "--out"),
    "fit-variance {shop}/classes --dataset {shop}/images": ("label",),
    "fit-variance {shop}/text --dataset {shop}/images": ("caption",),
    "fit-timesteps {shop}/plain": ("--calls",),
    "fit-timesteps {shop}/plain --calls 1": ("--calls", "2"),
    "fit-timesteps {shop}/plain --calls 20": ("--calls 20", "19"),
    "fit-timesteps {shop}/plain --calls 4 --teacher-steps 30": ("--teacher-steps 30", "20"),
    "fit-timesteps {shop}/plain --calls 4 --trajectories 2": ("--trajectories 2", "8"),
    "fit-timesteps {shop}/plain --calls 4 --objective likelihood": ("fit-variance",),
    "fit-timesteps {shop}/fitted --calls 30 --objective likelihood": ("--calls 30", "20"),
    "fit-timesteps {shop}/fitted --calls 4 --objective likelihood --seed 1": ("--seed 1", "pictures"),
    "fit-timesteps {shop}/text --calls 4": ("text",),
    "fit-timesteps {shop}/checkpoint-2 --calls 4": ("checkpoint-2", "--out"),
    "fit-timesteps {shop}/plain --calls 4 --out {shop}": ("--out", "training run"),
    "fit-timesteps {shop}/plain --calls 4 --device meta": ("--device meta", "cpu"),
    "fit-timesteps {shop}/plain --calls 4 --token a~b": ("token",),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_fitted_is_refused(words, shop, run, tmp_path, monkeypatch):
    """Else a model is changed by a command that fails, or a traceback is the answer."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in shop.rglob("*.json")}
    result = run(*(word.replace("~", " ") for word in words.format(shop=shop).split()))
    assert_one_line(result, *REFUSED[words])
    assert {path: path.read_bytes() for path in shop.rglob("*.json")} == before
    assert not list(tmp_path.iterdir())
