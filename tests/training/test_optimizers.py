"""Other optimizers than AdamW: what each trains, that a run resumes to the bit, and what is sampled and saved."""

import shutil
import sys

import pytest
import torch

from ddpm_hf.common.errors import UsageError
from ddpm_hf.models.unet import build_unet
from ddpm_hf.training.averaging import optimizer_average
from ddpm_hf.training.flags import OPTIMIZERS, TrainingFlags
from ddpm_hf.training.setup.optimizer import COUNTED, MAKERS, check_engine, hidden_matrices, make_optimizer
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import GRAY, assert_same_tensors, attempt, parse, read, records, same, train, weights

library = pytest.importorskip("pytorch_optimizer")
OTHERS = [name for name in OPTIMIZERS if name != "adamw"]
FLAGS = {**GRAY, "max_train_steps": 14, "checkpointing_steps": 12, "learning_rate": 3e-3, "save_images_epochs": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images and a UNet."""
    root = tmp_path_factory.mktemp("world")
    write_rows(root / "images", [encoded(pixels) for pixels in random_pixels(12, 8, 8)])
    write_unet(root / "unet", in_channels=1, out_channels=1)
    return root


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A run with each optimizer, uninterrupted: 14 steps, after more than one renewal of SOAP's bases."""
    root = tmp_path_factory.mktemp("runs")
    for name in OTHERS:
        train(world, root / name, FLAGS, optimizer=name)
    return root


def test_the_names_are_those_of_the_makers():
    """Else --help offers an optimizer that nobody can make."""
    assert list(OPTIMIZERS) == list(MAKERS)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_resumes_to_the_bit(name, world, runs, tmp_path):
    """Else an interrupted run is another run: moments, bases and averaged weights must come back as they were."""
    shutil.copytree(runs / name / "checkpoint-12", tmp_path / "checkpoint-12")
    shutil.copy(runs / name / "metrics.jsonl", tmp_path)
    train(world, tmp_path, FLAGS, resume_from_checkpoint="latest")  # with the optimizer of the checkpoint
    assert read(tmp_path / "training_config.json")["optimizer"] == name
    assert_same_tensors(weights(tmp_path), weights(runs / name))
    assert_same_tensors(weights(tmp_path / "checkpoint-14"), weights(runs / name / "checkpoint-14"))
    assert records(tmp_path) == records(runs / name)
    ours, theirs = (
        torch.load(one / "checkpoint-14" / "optimizer.bin", weights_only=True) for one in (tmp_path, runs / name)
    )
    assert ours["param_groups"] == theirs["param_groups"]


@pytest.mark.parametrize("name", OTHERS)
def test_the_optimizers_learn_and_differ(name, runs):
    """Else a name stands for another one, or an optimizer is wired so that it cannot learn."""
    first, last = records(runs / name)[0]["loss"], records(runs / name)[-1]["loss"]
    assert last < first
    assert not any(same(weights(runs / name), weights(runs / other)) for other in OTHERS if other != name)


def test_looking_changes_nothing(world, runs, tmp_path):
    """Else a schedule-free run that validates, samples and saves more often trains another model."""
    train(
        world, tmp_path, FLAGS, optimizer="schedulefree", save_images_steps=2, save_model_epochs=1,
        validation_steps=None, checkpointing_steps=5,
    )  # fmt: skip
    assert_same_tensors(weights(tmp_path), weights(runs / "schedulefree"))
    assert_same_tensors(weights(tmp_path / "checkpoint-14"), weights(runs / "schedulefree" / "checkpoint-14"))


def test_what_is_saved_is_the_average(runs):
    """Else the pipeline of a schedule-free run holds the weights at which gradients are taken, y and not x."""
    folder = runs / "schedulefree"
    published, trained = weights(folder), weights(folder / "checkpoint-14")
    state = torch.load(folder / "checkpoint-14" / "optimizer.bin", weights_only=True)
    names = [name for name, _ in build_unet(read(folder / "unet" / "config.json")).named_parameters()]
    beta = state["param_groups"][0]["betas"][0]
    for index, name in enumerate(names):
        z = state["state"][index]["z"]
        x = (trained[name] - (1 - beta) * z) / beta  # y = (1 - β) z + β x
        torch.testing.assert_close(published[name], x, rtol=1e-4, atol=1e-6)
    assert not same(published, trained)


def test_the_average_is_that_of_its_steps():
    """Else what is sampled is not the mean of z over the steps, weighted by the learning rate squared."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = library.ScheduleFreeAdamW([weight], lr=0.0, betas=(0.9, 0.99))
    total, mean = 0.0, torch.zeros(2, dtype=torch.float64)
    for rate in (0.01, 0.02, 0.02, 0.02):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = weight.detach() * 2
        optimizer.step()
        total += rate**2
        mean += (optimizer.state[weight]["z"] - mean) * rate**2 / total
    trained = weight.detach().clone()
    with optimizer_average(optimizer):
        torch.testing.assert_close(weight.detach(), mean, rtol=1e-12, atol=1e-12)
        with optimizer_average(optimizer):  # as in an evaluation within a save
            torch.testing.assert_close(weight.detach(), mean, rtol=1e-12, atol=1e-12)
    assert torch.equal(weight, trained)


def test_muon_takes_hidden_weights_and_adamw_the_rest():
    """Else biases and norms are orthogonalized, or kernels are left to AdamW."""
    part = tiny_unet()
    matrices, rest = (
        group["params"] for group in make_optimizer(TrainingFlags(optimizer="muon"), part, 1).param_groups
    )
    names = {id(parameter): name for name, parameter in part.named_parameters()}
    assert {one.ndim for one in matrices} == {2, 4}
    assert {names[id(one)] for one in rest if one.ndim > 1} == {"conv_in.weight", "conv_out.weight"}
    assert len(matrices) + len(rest) == len(names)
    assert [id(one) for one in matrices] == [id(one) for one in hidden_matrices(part)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_is_torchs_on_a_matrix_and_on_a_kernel_as_one():
    """Else --optimizer muon is another algorithm than torch's, or convolutions are flattened in another way."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(6, 4, 3, 3, generator=generator), torch.randn(3, 6, 4, 3, 3, generator=generator)
    kernel, matrix = torch.nn.Conv2d(4, 6, 3, bias=False), torch.nn.Parameter(start.reshape(6, -1).clone())
    kernel.weight.data.copy_(start)
    flags = TrainingFlags(optimizer="muon", learning_rate=0.01, adam_weight_decay=0.1)
    ours = make_optimizer(flags, torch.nn.Sequential(kernel), 1)
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        kernel.weight.grad, matrix.grad = gradient.clone(), gradient.reshape(6, -1).clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(kernel.weight.detach().reshape(6, -1), matrix.detach(), rtol=0, atol=3e-4)
    assert (kernel.weight.detach() - start).abs().mean() > 2e-3


def test_schedulefree_brings_what_it_requires_where_nobody_says_otherwise():
    """Else its average is that of a decayed rate, or a preset's EMA is averaged on top."""
    of_preset = ["--train_data_dir", "x", "--model_preset", "ddpm-cifar10", "--optimizer", "schedulefree"]
    assert parse(of_preset).use_ema is False
    assert parse(["--optimizer", "schedulefree"]).lr_scheduler == "constant_with_warmup"
    assert parse(["--optimizer", "schedulefree", "--lr_scheduler", "cosine"]).lr_scheduler == "cosine"
    assert parse(["--optimizer", "muon"]).use_ema is True


BAD = {
    "unknown": ({"optimizer": "adam"}, ("--optimizer", "schedulefree", "'adam'")),
    "8 bits": ({"optimizer": "soap", "use_8bit_adam": True}, ("--use_8bit_adam", "soap")),
    "EMA": ({"optimizer": "schedulefree", "use_ema": True}, ("averages", "--use_ema")),
    "no momentum": ({"optimizer": "schedulefree", "adam_beta1": 0}, ("--adam_beta1", "0.9")),
}


@pytest.mark.parametrize("case", BAD)
def test_combinations_that_cannot_work_are_refused(case, world, tmp_path):
    """Else the flag is ignored, or a traceback answers it after the data is read."""
    flags, says = BAD[case]
    run = attempt(world, tmp_path, FLAGS, **flags)
    assert run.code == 2
    assert all(word in run.error() for word in says), run.error()


def test_a_missing_library_is_one_line(monkeypatch):
    """Else a traceback instead of what to install."""
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    for name in OTHERS:
        with pytest.raises(UsageError, match=f"--optimizer {name} requires .*optimizers"):
            make_optimizer(TrainingFlags(optimizer=name), tiny_unet(), 1)


def test_engines_that_shard_are_refused():
    """Else SOAP computes bases of a shard, and the average of a shard is saved as the model."""

    class Engine:
        class distributed_type:
            value = "FSDP"

    for name in OTHERS:
        with pytest.raises(UsageError, match=f"{name}.*FSDP"):
            check_engine(TrainingFlags(optimizer=name), Engine())
    check_engine(TrainingFlags(), Engine())


@pytest.mark.parametrize("name", OTHERS)
def test_what_an_optimizer_counts_is_no_setting(name):
    """Else a resumed run begins to count anew: its settings replace the checkpoint's entries of the groups."""
    part = tiny_unet()
    optimizer = make_optimizer(TrainingFlags(optimizer=name), part, 1)

    def entries():
        return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    before = entries()
    for parameter in part.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for old, new in zip(before, entries()):
        assert {key for key in new if old.get(key) != new[key]} <= set(COUNTED)
