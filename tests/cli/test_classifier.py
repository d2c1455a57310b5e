"""The classifier of noised images: its training run, and `ddpm-hf sample` guided by it."""

import math
import shutil
import signal
from pathlib import Path
from unittest import mock

import datasets
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, cli
from ddpm_hf.cli import classifier_training as classifier
from ddpm_hf.cli.classifier_training import compute_loss
from ddpm_hf.models.classifier import NoisyClassifier
from tests.support.classifier import NAMES, STEPS, WEIGHTS, tiny_classifier, train_classifier
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.pictures import encoded, image_rows, quiet, write_images, write_unet
from tests.support.runs import GRAY, assert_same_run, attempt, run_script, train

# A training run


def patterns():
    """What the classes look like, [3, 8, 8] of ±1: stripes that lie, stripes that stand, and a checkerboard."""
    stripes = np.where(np.arange(8) // 2 % 2, 1, -1)
    lying = np.repeat(stripes[:, None], 8, axis=1)
    return np.stack([lying, lying.T, lying * lying.T])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images in class folders that a look tells apart, images without classes, and a tiny UNet."""
    root = tmp_path_factory.mktemp("world")
    noise = np.random.default_rng(0).integers(-20, 20, (3, 8, 8, 8, 3))
    for name, pattern, pixels in zip(NAMES, patterns(), noise):
        write_images(root / "photos" / name, (128 + 100 * pattern[:, :, None] + pixels).astype(np.uint8))
    write_images(root / "unsorted", (noise[0] + 128).astype(np.uint8))
    lacking = image_rows([encoded((128 + one).astype(np.uint8)) for one in noise[0]], label=[0, 1] * 4)
    with quiet():
        lacking.cast_column("label", datasets.ClassLabel(names=list(NAMES))).save_to_disk(str(root / "lacking"))
    write_unet(root / "unet", in_channels=1, out_channels=1)
    write_unet(root / "unet-dropout", in_channels=1, out_channels=1, dropout=0.2)
    return root


USUAL = {
    **GRAY, "train_data_dir": "{shop}/photos", "eval_batch_size": 5, "max_train_steps": 8, "learning_rate": 1e-2,
    "lr_warmup_steps": 0, "logging_steps": 2, "ddpm_num_inference_steps": None,
}  # fmt: skip  # half of the images are held out


def test_training_lowers_the_loss_and_leaves_a_classifier(world, tmp_path):
    """Else the flagship command trains nothing, or what it writes cannot be loaded and used."""
    flags = {"max_train_steps": 60, "train_batch_size": 16, "use_ema": True}
    run = train(world, tmp_path / "run", USUAL, train_classifier, validation_split=0.25, validation_steps=20, **flags)
    assert {"config.json", WEIGHTS, "metrics.jsonl", "timings.jsonl", "training_config.json"} <= set(run.files())
    assert not [name for name in run.files() if name.endswith((".bin", ".pt", ".pkl")) and "checkpoint-" not in name]
    assert "3 classes" in run.err
    assert str(run.folder) in run.err

    records = run.records()
    assert [record["step"] for record in records] == list(range(2, 61, 2))
    assert records[0]["loss"] == pytest.approx(math.log(3), abs=0.4)
    last = np.mean([record["loss"] for record in records[-10:]])
    assert last < 0.75 * math.log(3)  # late in the chain nothing tells the classes apart
    quarters = [np.mean([record[name] for record in records if name in record]) for name in ("loss_q1", "loss_q4")]
    assert quarters[0] < quarters[1]  # the more noise, the less is known
    looked = [record for record in records if "accuracy_clean" in record]
    assert [record["step"] for record in looked] == [20, 40, 60]
    for record in looked:  # shares of 6 images
        for name in ("accuracy_clean", "accuracy_noised"):
            assert (record[name] * 6) == pytest.approx(round(record[name] * 6))
            assert 0 <= record[name] <= 1
    assert looked[-1]["accuracy_clean"] == 1

    model = NoisyClassifier.from_pretrained(run.folder, use_safetensors=True).eval()
    assert model.config.id2label == {"0": "cat", "1": "dog", "2": "owl"}
    assert model.config.num_train_timesteps == STEPS
    expected = DDPMScheduler(STEPS, beta_schedule="cosine").exact_tables.betas
    assert torch.equal(torch.tensor(model.config.trained_betas, dtype=torch.float64), expected)
    pictures = [np.asarray(Image.open(world / "photos" / name / "0.png").convert("L")) for name in NAMES]
    x_start = torch.tensor(np.stack(pictures)).float()[:, None] / 127.5 - 1
    with torch.no_grad():
        assert model(x_start, 0).argmax(dim=1).tolist() == [0, 1, 2]
    ema = load_file(run.folder / "checkpoint-60" / "classifier_ema" / WEIGHTS)
    assert all(torch.equal(value, ema[name]) for name, value in load_file(run.folder / WEIGHTS).items())


def test_a_dry_run_writes_nothing(world, tmp_path):
    """Else looking at what would run, or at the flags, starts a run."""
    run = train(world, tmp_path / "run", USUAL, train_classifier, dry_run=True)
    assert "3 classes" in run.out
    assert not (tmp_path / "run").exists()
    listed = run_script(["--help"], tmp_path / "run", train_classifier)
    assert listed.code == 0
    for word in ("ddpm-hf train-classifier", "--label_column", "--ddpm_beta_schedule", "--resume_from_checkpoint"):
        assert word in listed.out
    assert not (tmp_path / "run").exists()


# Resuming


RESUMED = {
    "plain": {},
    "streaming": {"streaming": True},
    "all at once": {
        "model_config_name_or_path": "{shop}/unet-dropout", "use_ema": True, "gradient_accumulation_steps": 2,
        "random_flip": True, "validation_split": 0.25, "validation_steps": 4, "logging_steps": 3,
    },
}  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("case", RESUMED)
def test_resuming_is_never_having_stopped(case, world, tmp_path):
    """Else an interrupted run is another run: other weights, other metrics."""
    flags = {"checkpointing_steps": 3, **RESUMED[case]}
    whole, resumed = train(world, tmp_path / "whole", USUAL, train_classifier, **flags).folder, tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)  # with lines that were logged after the checkpoint
    run = train(world, resumed, USUAL, train_classifier, resume_from_checkpoint="latest", **flags)
    assert "checkpoint-3" in next(line for line in run.err.splitlines() if line.startswith("resuming"))
    assert_same_run(resumed, whole)


def test_classes_without_images_are_no_other_model(world, tmp_path):
    """Else a classifier whose data lack a class, or gain one, can never be trained on."""
    flags = {"checkpointing_steps": 3, "max_train_steps": 3}
    first = train(world, tmp_path / "run", USUAL, train_classifier, train_data_dir="{shop}/lacking", **flags)
    assert NoisyClassifier.from_pretrained(first.folder).config.trained_classes == [0, 1]
    flags |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    train(world, first.folder, USUAL, train_classifier, train_data_dir="{shop}/lacking", **flags)
    flags["max_train_steps"] = 5
    run = train(world, first.folder, USUAL, train_classifier, **flags)
    assert NoisyClassifier.from_pretrained(run.folder).config.get("trained_classes") is None


def test_a_signal_saves_and_ends_and_the_run_goes_on(world, tmp_path):
    """Else a job that its queue ends loses what it trained, or counts as failed."""

    def signalled(model, batch, keys, **more):
        if keys.step == 4:
            assert callable(signal.getsignal(signal.SIGTERM))  # else the signal ends this process
            signal.raise_signal(signal.SIGTERM)
        return compute_loss(model, batch, keys, **more)

    with mock.patch.object(classifier, "compute_loss", signalled):
        stopped = train(world, tmp_path / "stopped", USUAL, train_classifier)
    assert "stopped at step 5" in stopped.err
    assert "--resume_from_checkpoint latest" in stopped.err
    assert [path.name for path in stopped.folder.glob("checkpoint-*")] == ["checkpoint-5"]
    assert not (stopped.folder / WEIGHTS).exists()  # half a training is no classifier
    train(world, stopped.folder, USUAL, train_classifier, resume_from_checkpoint="latest")
    assert_same_run(stopped.folder, train(world, tmp_path / "whole", USUAL, train_classifier).folder)


# What a user can mend


def assert_refused(run, *named):
    """Exit code 2, and one line alone that names what is wrong."""
    assert run.code == 2, run.err
    assert len(run.err.splitlines()) == 1, run.err
    assert run.err.startswith("ddpm-hf train-classifier: error: ")
    for word in named:
        assert str(word) in run.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"train_data_dir": "{shop}/unsorted"}, ("'label'", "image")),
        ({"label_column": "kind"}, ("'kind'", "label")),
        ({"streaming": True, "max_train_steps": None}, ("--streaming", "--max_train_steps")),
        ({"train_data_dir": "{shop}/nothing"}, ("nothing", "--train_data_dir")),
        ({"learning_rate": -1}, ("--learning_rate",)),
        ({"prediction_type": "epsilon"}, ("--prediction_type",)),  # a classifier predicts no noise
        ({"ddpm_num_steps": 0}, ("--ddpm_num_steps",)),
        ({"ema_snapshot_steps": 1}, ("--ema_snapshot_steps", "--use_ema")),
        ({"ddpm_beta_schedule": "straight"}, ("straight", "linear")),
        ({"resolution": 9}, ("--resolution 9", "2")),
        ({"channels": 3}, ("--channels 1",)),
        ({"model_preset": "small-16"}, ("--model_preset", "--model_config_name_or_path")),
        ({"resume_from_checkpoint": "checkpoint-9"}, ("checkpoint-9",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_in_training_are_one_line_and_leave_nothing(flags, named, world, tmp_path):
    """Else a mistake is found after hours, in a traceback, or leaves a folder that the next run refuses."""
    assert_refused(attempt(world, tmp_path / "run", USUAL, train_classifier, **flags), *named)
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_overwritten(world, tmp_path):
    """Else a forgotten flag costs hours of training, or a checkpoint of another kind of run is half loaded."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", WEIGHTS):  # of a model that no training of ours saved
        (tmp_path / "model" / name).write_text("mine")
    for flags in ({}, {"overwrite_output_dir": True}):
        refused = attempt(world, tmp_path / "model", USUAL, train_classifier, **flags)
        assert_refused(refused, tmp_path / "model", "config.json", WEIGHTS, "move them")
        assert [(refused.folder / name).read_text() for name in refused.files()] == ["mine", "mine"]
    train(world, tmp_path / "run", USUAL, train_classifier, max_train_steps=1)
    again = attempt(world, tmp_path / "run", USUAL, train_classifier)
    assert_refused(again, tmp_path / "run", "--overwrite_output_dir")
    run = train(world, tmp_path / "run", USUAL, train_classifier, overwrite_output_dir=True, max_train_steps=2)
    before = run.files()
    longer = attempt(world, run.folder, USUAL, train_classifier, resume_from_checkpoint="latest", ddpm_num_steps=30)
    assert_refused(longer, "--ddpm_num_steps 30", "trained with 20")
    (run.folder / "checkpoint-2" / "classifier").rename(run.folder / "checkpoint-2" / "unet")
    other = attempt(world, run.folder, USUAL, train_classifier, resume_from_checkpoint="checkpoint-2")
    assert_refused(other, "checkpoint-2", "classifier/")
    assert len(other.files()) == len(before)


# Sampling with it


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Tiny models, with and without classes, and classifiers, saved."""
    root = tmp_path_factory.mktemp("shop")
    config = {"num_train_timesteps": STEPS, "beta_schedule": "cosine", "variance_type": "fixed_large"}
    DDPMPipeline(tiny_unet(), DDPMScheduler(**config)).save_pretrained(root / "plain")
    DDPMPipeline(tiny_unet(size=(8, 16)), DDPMScheduler(**config)).save_pretrained(root / "wide")
    unet = tiny_unet(num_class_embeds=4)
    names = dict(enumerate(NAMES))
    ClassConditionalDDPMPipeline(unet, DDPMScheduler(**config), names).save_pretrained(root / "by-class")
    tiny_classifier().save_pretrained(root / "classifier")
    tiny_classifier(size=(8, 16)).save_pretrained(root / "classifier-wide")
    tiny_classifier(size=16).save_pretrained(root / "classifier-16")
    short = tiny_classifier()
    short.register_to_config(num_train_timesteps=10, trained_betas=[0.3] * 10)
    short.save_pretrained(root / "classifier-short")
    tiny_classifier(channels=3).save_pretrained(root / "classifier-rgb")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def sample(monkeypatch, capfd, shop):
    """`ddpm-hf sample` with some words; its exit code, its error and its images [N, H, W]."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the command sets torch's threads for good
    verbosity = diffusers.utils.logging.get_verbosity()

    def call(model, out, *more):
        given = ("sample", shop / model, "--out", out, "--num-images", 3, "--steps", 5, *more)
        monkeypatch.setattr("sys.argv", ["ddpm-hf", *map(str, given)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        paths = sorted(path for path in Path(out).glob("*.png") if path.stem.isdecimal())
        images = np.stack([np.asarray(Image.open(path)).astype(int) for path in paths]) if paths else None
        return code, capfd.readouterr().err, images

    yield call
    diffusers.utils.logging.set_verbosity(verbosity)
    diffusers.utils.logging.enable_progress_bar()


@pytest.fixture
def asked(monkeypatch):
    """What `ddpm-hf sample` asks of the pipelines, call by call."""
    seen = []
    for cls in (DDPMPipeline, ClassConditionalDDPMPipeline):

        def noted(self, *arguments, original=cls.__call__, **options):
            seen.append((arguments, options))
            return original(self, *arguments, **options)

        monkeypatch.setattr(cls, "__call__", noted)
    return seen


@pytest.mark.every(3)
@pytest.mark.parametrize("model", ["plain", "by-class"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_a_classifier_guides_the_command(sampler, model, sample, asked, shop, tmp_path):
    """Else --classifier is read and not used, with some model or some sampler."""
    chosen = ("--sampler", sampler, "--class", "owl")
    guide = ("--classifier", shop / "classifier")
    code, err, guided = sample(model, tmp_path / "guided", *chosen, *guide, "--classifier-scale", 2)
    assert code == 0, err
    assert guided.shape == (3, 8, 8)
    (arguments, options), = asked  # fmt: skip
    assert options["classifier_scale"] == 2
    labels = arguments[0] if model == "by-class" else options["class_labels"]
    assert labels == [2, 2, 2]
    with torch.no_grad():
        expected = tiny_classifier()(torch.zeros(1, 1, 8, 8), 3)
        torch.testing.assert_close(options["classifier"](torch.zeros(1, 1, 8, 8), 3), expected)
    harder = sample(model, tmp_path / "harder", *chosen, *guide, "--classifier-scale", 40)[2]
    assert np.abs(harder - guided).max() > 5


@pytest.mark.parametrize("model", ["plain", "by-class"])
def test_classes_are_given_in_turn_by_name_or_number(model, sample, asked, shop, tmp_path):
    """Else several --class, or none, draw other classes than they say."""
    guide = ("--classifier", shop / "classifier", "--batch-size", 2)
    for given, expected in [
        (("--class", "owl", "--class", "0"), [2, 0, 2]),
        (("--class", "dog"), [1, 1, 1]),
        ((), [0, 1, 2]),
    ]:
        asked.clear()
        assert sample(model, tmp_path, *guide, *given)[0] == 0
        labels = [arguments[0] if model == "by-class" else options["class_labels"] for arguments, options in asked]
        assert labels == [expected[:2], expected[2:]]


def test_a_model_that_is_not_square_is_guided(sample, shop, tmp_path):
    """Else the classifier's size is compared as a list with a tuple, or sides are swapped."""
    code, err, images = sample("wide", tmp_path, "--classifier", shop / "classifier-wide")
    assert code == 0, err
    assert images.shape == (3, 8, 16)


def test_guidance_flags_reach_the_pipeline_in_both_spellings(sample, asked, tmp_path):
    """Else a flag is accepted and has no effect, or works with dashes alone."""
    drawn = {}
    for place, dash in enumerate("-_"):
        given = {"guidance_scale": (2.5,), "guidance_rescale": (0.7,), "guidance_interval": (5, 15)}
        spelt = [word for name, values in given.items() for word in (f"--{name.replace('_', dash)}", *values)]
        code, err, drawn[dash] = sample("by-class", tmp_path / str(place), *spelt)
        assert code == 0, err
        arguments, options = asked[-1]
        assert arguments == ([0, 1, 2],)
        assert options["guidance_scale"] == 2.5
        assert options["guidance_rescale"] == 0.7
        assert tuple(options["guidance_interval"]) == (5, 15)
    np.testing.assert_array_equal(drawn["-"], drawn["_"])
    assert np.abs(drawn["-"] - sample("by-class", tmp_path / "plain")[2]).max() > 5
    assert asked[-1][0] == ([0, 1, 2],)
    assert asked[-1][1]["guidance_scale"] == 1.0
    assert asked[-1][1]["guidance_interval"] is None


@pytest.mark.parametrize(
    ("model", "given", "named"),
    [
        ("plain", ("--classifier", "SHOP/empty"), ("--classifier", "empty")),
        ("plain", ("--classifier", "SHOP/nowhere/at/all"), ("--classifier", "nowhere", "no such folder")),
        ("plain", ("--classifier", "SHOP/plain"), ("--classifier", "plain")),
        ("plain", ("--classifier", "SHOP/plain/unet"), ("--classifier", "unet")),
        ("plain", ("--classifier", "SHOP/classifier-16"), ("classifier-16", "size")),
        ("plain", ("--classifier", "SHOP/classifier-rgb"), ("classifier-rgb", "channels")),
        ("plain", ("--classifier", "SHOP/classifier-short"), ("classifier-short", "another noise schedule", "T=10")),
        ("wide", ("--classifier", "SHOP/classifier"), ("classifier", "size")),
        ("plain", ("--class", "cat"), ("no classes", "--classifier")),
        ("plain", ("--guidance-scale", 2), ("no classes", "--guidance-scale")),
        ("plain", ("--classifier", "SHOP/classifier", "--guidance-scale", 2), ("--guidance-scale",)),
        ("plain", ("--classifier", "SHOP/classifier", "--class", "wolf"), ("wolf", "'cat', 'dog', 'owl'")),
        ("by-class", ("--class", "wolf"), ("wolf", "'cat', 'dog', 'owl'")),
        ("by-class", ("--class", "3"), ("--class", "'3'", "'cat', 'dog', 'owl'")),
        ("by-class", ("--guidance-rescale", 1.5), ("--guidance-rescale", "1")),
        ("by-class", ("--guidance-interval", "5", "x"), ("--guidance-interval", "integer")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_mistakes_in_sampling_are_one_line_and_leave_nothing(model, given, named, sample, shop, tmp_path):
    """Else a classifier that does not fit guides into noise, or the user reads a traceback."""
    given = [str(word).replace("SHOP", str(shop)) for word in given]
    code, err, images = sample(model, tmp_path / "out", *given)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("ddpm-hf: error: ")
    for word in named:
        assert word in lines[0]
    assert images is None
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_null_class_names_the_way_out(sample, shop, tmp_path):
    """Else guidance needs a look into the code to find out what the model lacks."""
    unet, names = tiny_unet(num_class_embeds=3), dict(enumerate(NAMES))
    pipeline = ClassConditionalDDPMPipeline(unet, DDPMScheduler(STEPS, beta_schedule="cosine"), names)
    pipeline.save_pretrained(tmp_path / "model")
    code, err, images = sample(tmp_path / "model", tmp_path / "out", "--guidance-scale", 2)
    assert code == 2, err
    assert "--class_dropout" in err
    assert images is None
    guide = ("--classifier", shop / "classifier", "--precision", "bf16")
    assert sample(tmp_path / "model", tmp_path / "out", *guide)[0] == 0  # the way out


def test_a_damaged_classifier_is_named(sample, shop, tmp_path):
    """Else half a download ends in a traceback, or guides with random weights."""
    shutil.copytree(shop / "classifier", tmp_path / "torn")
    weights = tmp_path / "torn" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    code, err, _ = sample("plain", tmp_path / "out", "--classifier", tmp_path / "torn")
    assert code == 2, err
    assert "Traceback" not in err
    assert "torn" in err
    weights.unlink()
    code, err, _ = sample("plain", tmp_path / "out", "--classifier", tmp_path / "torn")
    assert code == 2, err
    assert not (tmp_path / "out").exists()


def test_a_trained_classifier_guides_towards_its_class(world, sample, shop, tmp_path):
    """From a folder of pictures to a guided picture; else the two commands do not fit together."""
    folder = train(world, tmp_path / "classifier", USUAL, train_classifier, max_train_steps=60).folder
    likeness = []
    for name in NAMES:
        given = ("--classifier", folder, "--classifier-scale", 20, "--class", name)
        code, err, images = sample("plain", tmp_path / name, *given)
        assert code == 0, err
        likeness.append((images[None] * patterns()[:, None]).mean(axis=(1, 2, 3)))
    assert np.argmax(likeness, axis=0).tolist() == [0, 1, 2]  # no class is more like a pattern than its own
