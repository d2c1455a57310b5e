"""The classifier of noised images: its network, its training run, and `ddpm-hf sample` guided by it."""

import contextlib
import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, cli
from ddpm_hf.cli import classifier_training as classifier
from ddpm_hf.cli.classifier_training import compute_loss, validation_accuracy
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.models.classifier import AttentionPool, NoisyClassifier
from ddpm_hf.training.checkpointing import read_manifest
from ddpm_hf.training.flags import TrainingConfig
from ddpm_hf.training.run import Run
from tests.support.fixtures_pipeline import randn, tiny_unet, tiny_unet_config
from tests.support.fixtures_unconditional import run_script, words, write_images, write_unet

NAMES = ("cat", "dog", "owl")
STEPS = 20  # T
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_classifier(channels=1, size=8, classes=3, seed=0, **more):
    """An untrained classifier whose logits are far from equal, so that its gradient shows."""
    torch.manual_seed(seed)
    unet = {**tiny_unet_config(channels, size=size), **more}
    betas = DDPMScheduler(STEPS, beta_schedule="cosine").exact_tables.betas.tolist()
    names = {str(number): name for number, name in enumerate(NAMES[:classes])}
    model = NoisyClassifier(
        unet=unet, num_classes=classes, num_train_timesteps=STEPS, trained_betas=betas, id2label=names
    ).eval()
    with torch.no_grad():
        model.head.weight.mul_(8)
    return model


# The network


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, (8, 16)), (1, (16, 4))], ids=str)
def test_logits_are_one_row_an_image(channels, size):
    """Else height and width are taken for one another, or an image's logits depend on its neighbours."""
    model = tiny_classifier(channels, size)
    height, width = (size, size) if isinstance(size, int) else size
    x_t, t = randn(4, channels, height, width), torch.tensor([0, 3, 10, 19])
    with torch.no_grad():
        logits = model(x_t, t)
        assert logits.shape == (4, 3)
        for index in range(4):
            alone = model(x_t[index : index + 1], t[index : index + 1])
            torch.testing.assert_close(alone, logits[index : index + 1], rtol=0, atol=1e-5)


def test_a_timestep_is_a_number_or_one_for_each_image():
    """Else what calls it as a UNet is called fails, or all images get the first one's timestep."""
    model, x_t = tiny_classifier(), randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = model(x_t, torch.tensor([7, 7, 7]))
        for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7).expand(3), torch.tensor([7] * 3).int()):
            torch.testing.assert_close(model(x_t, t), expected, rtol=0, atol=1e-6)
        mixed = model(x_t, torch.tensor([7, 15, 7]))
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5)
    assert (mixed[1] - expected[1]).abs().max() > 1e-3


def test_the_gradient_reaches_every_pixel_and_every_weight():
    """Else guidance leaves part of the image alone, or a part of the network never learns."""
    model = tiny_classifier(3, (8, 16)).train()
    x_t = randn(2, 3, 8, 16).requires_grad_(True)
    F.cross_entropy(model(x_t, torch.tensor([3, 12])), torch.tensor([0, 2])).backward()
    assert (x_t.grad != 0).float().mean() > 0.99
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert still == []


@pytest.mark.parametrize(("channels", "size", "heads"), [(8, (3, 3), 1), (8, (2, 5), 2), (64, (1, 4), 4)], ids=str)
def test_attention_pool_is_attention_of_the_mean(channels, size, heads):
    """Against the formula (Vaswani et al. 2017, Eq. 1); else it pools something else than its docstring says."""
    torch.manual_seed(0)
    pool = AttentionPool(channels, size[0] * size[1], heads).double()
    features = randn(3, channels, *size).double()
    tokens = torch.cat([features.mean(dim=(2, 3))[:, :, None], features.flatten(2)], dim=2).transpose(1, 2)
    tokens = tokens + pool.position  # [N, 1 + H·W, C]
    weights, biases = pool.attention.in_proj_weight.chunk(3), pool.attention.in_proj_bias.chunk(3)
    q, k, v = (F.linear(tokens, w, b).unflatten(2, (heads, -1)) for w, b in zip(weights, biases))  # [N, L, h, C/h]
    scores = torch.einsum("nhd,nlhd->nhl", q[:, 0], k) / math.sqrt(channels / heads)
    pooled = torch.einsum("nhl,nlhd->nhd", scores.softmax(dim=2), v).flatten(1)
    expected = F.linear(pooled, pool.attention.out_proj.weight, pool.attention.out_proj.bias)
    torch.testing.assert_close(pool(features), expected)
    with torch.no_grad():  # torch then computes it by another way
        torch.testing.assert_close(pool.eval()(features), expected)


@pytest.mark.parametrize("size", [8, (8, 16)], ids=str)
def test_a_saved_classifier_is_the_same_classifier(size, tmp_path):
    """Else guidance after loading is another's, or the folder holds pickled code, or forgets its diffusion."""
    model = tiny_classifier(3, size)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    loaded = NoisyClassifier.from_pretrained(tmp_path, use_safetensors=True)
    x_t = randn(2, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x_t, 4), model(x_t, 4))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    for config in (json.loads((tmp_path / "config.json").read_text()), loaded.config):
        assert config["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
        assert config["num_classes"] == 3
        assert config["num_train_timesteps"] == STEPS
        assert config["unet"]["in_channels"] == 3
        assert torch.equal(
            torch.tensor(config["trained_betas"], dtype=torch.float64),
            DDPMScheduler(STEPS, beta_schedule="cosine").exact_tables.betas,
        )
    again = NoisyClassifier.from_config(loaded.config)
    assert again.config.id2label == loaded.config.id2label
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


# The loss


def loss_at(model, labels, step=0):
    """The training loss of random images at one step."""
    count = len(labels)
    batch = {"images": (randn(count, 1, 8, 8) * 40 + 128).clamp(0, 255).byte(), "labels": torch.tensor(labels)}
    keys = StepKeys(0, step, 0, count)
    return compute_loss(model, batch, keys, scheduler=DDPMScheduler(STEPS), device=torch.device("cpu"))


def test_a_classifier_that_knows_nothing_loses_log_K():
    """ln K nats for equal logits; else the loss is not the mean cross-entropy that is logged as it."""
    model, labels = tiny_classifier(), [0, 1, 2] * 8
    with torch.no_grad():
        model.head.weight.mul_(1 / 8)  # as it is made
        assert loss_at(model, labels).losses.mean().item() == pytest.approx(math.log(3), abs=0.3)
        model.head.weight.zero_()
        model.head.bias.zero_()
        result = loss_at(model, labels)
    torch.testing.assert_close(result.losses, torch.full((24,), math.log(3)))
    assert set(result.groups.tolist()) == {0, 1, 2, 3}  # the quarters of T


def test_the_loss_is_the_cross_entropy_of_the_noised_image():
    """Else the classifier is trained on clean images, or at other timesteps than it is told."""
    labels = [0, 1, 2] * 8
    seen = []
    constant = torch.log(torch.tensor([0.5, 0.3, 0.2]))

    def model(x_t, t):
        seen.append((x_t, t))
        return constant.expand(len(x_t), 3)

    losses = loss_at(model, labels).losses
    torch.testing.assert_close(losses, -constant[torch.tensor(labels)])
    (x_t, t), x_start = seen[0], (randn(24, 1, 8, 8) * 40 + 128).clamp(0, 255).byte().float() / 127.5 - 1
    assert t.min() >= 0
    assert t.max() < STEPS
    assert len(set(t.tolist())) > 5
    alpha_bar = torch.cumprod(1 - DDPMScheduler(STEPS).exact_tables.betas, 0)[t].reshape(-1, 1, 1, 1).float()
    noise = (x_t - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
    assert noise.mean().item() == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))
    assert noise.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / noise.numel()))


class HeldOut:
    """Seven images whose brightness is their class."""

    def __len__(self):
        return 7

    def __getitems__(self, keys):
        labels = torch.tensor([index % 3 for _, index in keys])
        return {"images": (labels * 100 + 20).byte().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8), "labels": labels}


def test_accuracies_are_shares_of_the_held_out_images():
    """Else the metrics count a partial batch twice, or noised images as clean ones."""
    asked = []

    def model(x_t, t):
        asked.append((x_t, t))
        known = (x_t.mean(dim=(1, 2, 3)) * 127.5 + 127.5 - 20) / 100  # the class, where there is no noise
        return -((torch.where(t == 0, known, torch.ones_like(known))[:, None] - torch.arange(3)) ** 2)

    one = {"process_index": 0, "num_processes": 1, "reduce": lambda total, reduction: total}
    engine = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext, **one)
    flags, scheduler = TrainingConfig(eval_batch_size=3), DDPMScheduler(STEPS)
    run = Run(flags, flags, engine, seed=0)
    for _ in range(2):  # the same each time
        found = validation_accuracy(model, run=run, held_out=HeldOut(), scheduler=scheduler)
    clean, noised = ([torch.cat(pair) for pair in zip(*asked[start:6:2])] for start in (0, 1))
    assert len(clean[0]) == len(noised[0]) == 7
    assert (clean[1] == 0).all()
    assert noised[1].max() > 0
    assert all(torch.equal(x, again) for (x, _), (again, _) in zip(asked[:6], asked[6:], strict=True))
    assert (noised[0] - clean[0]).std() > 0.1
    labels = torch.arange(7) % 3
    right = torch.where(noised[1] == 0, True, labels == 1).double().mean().item()  # all others are taken for class 1
    assert found == {"accuracy_clean": 1.0, "accuracy_noised": pytest.approx(right)}


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
    write_unet(root / "unet", in_channels=1, out_channels=1)
    write_unet(root / "unet-dropout", in_channels=1, out_channels=1, dropout=0.2)
    return root


def command(world, output_dir, data="photos", unet="unet", **flags):
    """The command line of a small run, with half of the images held out."""
    settings = {
        "train_data_dir": world / data, "model_config_name_or_path": world / unet, "output_dir": output_dir,
        "resolution": 8, "channels": 1, "seed": 3, "train_batch_size": 4, "eval_batch_size": 5, "max_train_steps": 8,
        "learning_rate": 1e-2, "lr_warmup_steps": 0, "ddpm_num_steps": STEPS, "ddpm_beta_schedule": "cosine",
        "cpu_threads": 1, "logger": "none", "logging_steps": 2,
    }  # fmt: skip
    return words({**settings, **flags})


def run_training(argv, folder):
    """`ddpm-hf train-classifier` in this process."""

    def main(argv):
        with mock.patch("sys.argv", ["ddpm-hf", "train-classifier", *argv]):
            cli.main()

    with mock.patch("train_unconditional.main", main):
        return run_script(argv, folder)


def train(world, output_dir, **flags):
    """Run the command to its end; what it left behind."""
    run = run_training(command(world, output_dir, **flags), output_dir)
    assert run.code == 0, run.err
    return run


def test_training_lowers_the_loss_and_leaves_a_classifier(world, tmp_path):
    """Else the flagship command trains nothing, or what it writes cannot be loaded and used."""
    flags = {"max_train_steps": 60, "train_batch_size": 16, "use_ema": True}
    run = train(world, tmp_path / "run", validation_split=0.25, validation_steps=20, **flags)
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
    run = train(world, tmp_path / "run", dry_run=True)
    assert "3 classes" in run.out
    assert not (tmp_path / "run").exists()
    listed = run_training(["--help"], tmp_path / "run")
    assert listed.code == 0
    for word in ("ddpm-hf train-classifier", "--label_column", "--ddpm_beta_schedule", "--resume_from_checkpoint"):
        assert word in listed.out
    assert not (tmp_path / "run").exists()


# Resuming


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_run(ours, theirs):
    """Two output folders that hold the same run, bit for bit."""
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    assert_same_tensors(load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS))
    checkpoints = [one / "checkpoint-8" for one in (ours, theirs)]
    tensors = [sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors")) for one in checkpoints]
    assert tensors[0] == tensors[1] != []
    for name in tensors[0]:
        assert_same_tensors(*(load_file(one / name) for one in checkpoints))
    moments = [torch.load(one / "optimizer.bin", weights_only=True)["state"] for one in checkpoints]
    for index, state in moments[0].items():
        assert_same_tensors(state, moments[1][index])
    assert read_manifest(checkpoints[0])["meter"] == read_manifest(checkpoints[1])["meter"]


RESUMED = {
    "plain": {},
    "streaming": {"streaming": True},
    "all at once": {
        "unet": "unet-dropout", "use_ema": True, "gradient_accumulation_steps": 2, "random_flip": True,
        "validation_split": 0.25, "validation_steps": 4, "logging_steps": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_is_never_having_stopped(case, world, tmp_path):
    """Else an interrupted run is another run: other weights, other metrics."""
    flags = {"checkpointing_steps": 3, **RESUMED[case]}
    whole, resumed = train(world, tmp_path / "whole", **flags).folder, tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)  # with lines that were logged after the checkpoint
    run = train(world, resumed, resume_from_checkpoint="latest", **flags)
    assert "checkpoint-3" in next(line for line in run.err.splitlines() if line.startswith("resuming"))
    assert_same_run(resumed, whole)


def test_a_signal_saves_and_ends_and_the_run_goes_on(world, tmp_path):
    """Else a job that its queue ends loses what it trained, or counts as failed."""

    def signalled(model, batch, keys, **more):
        if keys.step == 4:
            assert callable(signal.getsignal(signal.SIGTERM))  # else the signal ends this process
            signal.raise_signal(signal.SIGTERM)
        return compute_loss(model, batch, keys, **more)

    with mock.patch.object(classifier, "compute_loss", signalled):
        stopped = train(world, tmp_path / "stopped")
    assert "stopped at step 5" in stopped.err
    assert "--resume_from_checkpoint latest" in stopped.err
    assert [path.name for path in stopped.folder.glob("checkpoint-*")] == ["checkpoint-5"]
    assert not (stopped.folder / WEIGHTS).exists()  # half a training is no classifier
    train(world, stopped.folder, resume_from_checkpoint="latest")
    assert_same_run(stopped.folder, train(world, tmp_path / "whole").folder)


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
        ({"data": "unsorted"}, ("'label'", "image")),
        ({"label_column": "kind"}, ("'kind'", "label")),
        ({"streaming": True, "max_train_steps": None}, ("--streaming", "--max_train_steps")),
        ({"data": "nothing"}, ("nothing", "--train_data_dir")),
        ({"learning_rate": -1}, ("--learning_rate",)),
        ({"prediction_type": "epsilon"}, ("--prediction_type",)),  # a classifier predicts no noise
        ({"ddpm_num_steps": 0}, ("--ddpm_num_steps",)),
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
    assert_refused(run_training(command(world, tmp_path / "run", **flags), tmp_path / "run"), *named)
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_overwritten(world, tmp_path):
    """Else a forgotten flag costs hours of training, or a checkpoint of another kind of run is half loaded."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", WEIGHTS):  # of a model that no training of ours saved
        (tmp_path / "model" / name).write_text("mine")
    for flags in ({}, {"overwrite_output_dir": True}):
        refused = run_training(command(world, tmp_path / "model", **flags), tmp_path / "model")
        assert_refused(refused, tmp_path / "model", "config.json", WEIGHTS, "move them")
        assert [(refused.folder / name).read_text() for name in refused.files()] == ["mine", "mine"]
    train(world, tmp_path / "run", max_train_steps=1)
    again = run_training(command(world, tmp_path / "run"), tmp_path / "run")
    assert_refused(again, tmp_path / "run", "--overwrite_output_dir")
    run = train(world, tmp_path / "run", overwrite_output_dir=True, max_train_steps=2)
    before = run.files()
    longer = run_training(command(world, run.folder, resume_from_checkpoint="latest", ddpm_num_steps=30), run.folder)
    assert_refused(longer, "--ddpm_num_steps 30", "trained with 20")
    (run.folder / "checkpoint-2" / "classifier").rename(run.folder / "checkpoint-2" / "unet")
    other = run_training(command(world, run.folder, resume_from_checkpoint="checkpoint-2"), run.folder)
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
        ("plain", ("--classifier", "SHOP/nowhere/at/all"), ("--classifier", "nowhere")),
        ("plain", ("--classifier", "SHOP/plain"), ("--classifier", "plain")),
        ("plain", ("--classifier", "SHOP/plain/unet"), ("--classifier", "unet")),
        ("plain", ("--classifier", "SHOP/classifier-16"), ("classifier-16", "size")),
        ("plain", ("--classifier", "SHOP/classifier-rgb"), ("classifier-rgb", "channels")),
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
    pipeline = ClassConditionalDDPMPipeline(unet, DDPMScheduler(STEPS), names)
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
    folder = train(world, tmp_path / "classifier", max_train_steps=60).folder
    likeness = []
    for name in NAMES:
        given = ("--classifier", folder, "--classifier-scale", 20, "--class", name)
        code, err, images = sample("plain", tmp_path / name, *given)
        assert code == 0, err
        likeness.append((images[None] * patterns()[:, None]).mean(axis=(1, 2, 3)))
    assert np.argmax(likeness, axis=0).tolist() == [0, 1, 2]  # no class is more like a pattern than its own
