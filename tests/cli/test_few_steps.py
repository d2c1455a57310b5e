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
from ddpm_hf.few_steps.saving import LIKELIHOOD_TIMESTEPS
from ddpm_hf.portable.multistep_ddpm_hf import FITTED_TIMESTEPS
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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} {row.option}")
def test_an_option_changes_the_fit(row, call):
    """Else an option is accepted and ignored."""
    command = f"{row.command} {row.base} {QUICK[row.command]}"
    (without, first), (given, second) = call(command), call(f"{command} {row.given}")
    assert (without[0], given[0]) == (0, 0), without[2] + given[2]
    assert row.see(without, first) != row.see(given, second)


FRESH = """
import sys, warnings
import diffusers, torch
warnings.simplefilter("error")
said = []
diffusers.utils.logging.get_logger("diffusers").addHandler(type("H", (__import__("logging").Handler,), {
    "emit": lambda self, record: said.append(record.getMessage())})())
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
assert type(pipe) is diffusers.DDPMPipeline
print(pipe(1, torch.Generator().manual_seed(0), 5, "np").images.sum(), said)
"""


def test_the_folder_itself_is_fitted_and_stays_a_model(shop, call, run, tmp_path):
    """Else a fit damages the model: Diffusers, in a process without this package, samples what it did before."""
    shutil.copytree(shop / "plain", tmp_path / "model")
    printed = []

    def stranger():
        code, env = WITHOUT + FRESH, bare_environment(tmp_path)
        result = warm.run("-c", code, tmp_path / "model", env=env, cwd=tmp_path, isolated=True)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)

    stranger()
    (code, said, err), _ = call(f"fit-variance {tmp_path}/model --dataset {{shop}}/images --images 2")
    assert code == 0, err
    assert "2 images" in said
    assert len(config(tmp_path / "model")[X_START_VARIANCES]) == T
    before = config(shop / "plain")
    assert {**before, X_START_VARIANCES: 0} == {**config(tmp_path / "model"), X_START_VARIANCES: 0}
    stranger()
    assert printed[0] == printed[1]
    assert printed[0].split()[1:] == ["[]"]
    pipeline = ddpm_hf.load(tmp_path / "model")
    assert pipeline.scheduler.variance_type == "fitted"
    assert run("sample", tmp_path / "model", "--steps", 3, "--num-images", 1, "--out", tmp_path / "drawn")[0] == 0
    assert call(f"fit-variance {{shop}}/plain --dataset {{shop}}/images --images 2 --out {tmp_path}/copy")[0][0] == 0
    np.testing.assert_allclose(variances(None, tmp_path / "copy"), variances(None, tmp_path / "model"))


def test_fits_are_added_to_those_there(shop, call, run, tmp_path):
    """Else a fit for eight calls removes that for five, or sampling does not take it."""
    shutil.copytree(shop / "fitted", tmp_path / "model")
    assert call(f"fit-timesteps {tmp_path}/model --calls 3 --calls 5 --trajectories 8")[0][0] == 0
    assert call(f"fit-timesteps {tmp_path}/model --calls 4 --trajectories 8")[0][0] == 0
    (code, printed, err), _ = call(f"fit-timesteps {tmp_path}/model --calls 6 --objective likelihood")
    assert code == 0, err
    assert "bits/dim more than 20" in printed
    saved = config(tmp_path / "model")
    assert set(saved[FITTED_TIMESTEPS]) == {"3", "4", "5"}
    assert len(saved[LIKELIHOOD_TIMESTEPS]["6"]) == 6
    assert saved[X_START_VARIANCES] == config(shop / "fitted")[X_START_VARIANCES]
    pipeline = ddpm_hf.load(tmp_path / "model")
    pipeline.scheduler.set_timesteps(timesteps=saved[LIKELIHOOD_TIMESTEPS]["6"])
    pipeline.use_multistep()
    assert pipeline.scheduler.fitted_calls() == [3, 4, 5]
    assert pipeline.prepare_timesteps(4) == saved[FITTED_TIMESTEPS]["4"]
    words = ("--sampler", "ipndm", "--num-images", 1, "--out", tmp_path / "drawn", "--steps", 4)
    assert run("sample", tmp_path / "model", *words)[0] == 0
    stock = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    stock.set_timesteps(timesteps=saved[FITTED_TIMESTEPS]["5"])
    assert stock.timesteps.tolist() == saved[FITTED_TIMESTEPS]["5"]


REFUSED = {
    "fit-variance {shop}/plain": ("--dataset",),
    "fit-variance {shop}/plain --dataset {shop}/images --estimate mean": ("--estimate mean", "error, norm"),
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
