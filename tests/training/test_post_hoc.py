"""Power-function averages: their closed form, any width from snapshots, and runs that keep them to the bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import quad

from ddpm_hf.common.errors import UsageError
from ddpm_hf.common.ownership import listed
from ddpm_hf.training.post_hoc import Averages, inner_products, read_snapshots, solve_coefficients
from ddpm_hf.training.power_averages import WIDTHS, PowerAverage, exponent, read_about, relative_std, write_snapshots
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import GRAY, assert_same_tensors, attempt, last_checkpoint, read, train, weights

CPU = torch.device("cpu")
FLAGS = {**GRAY, "max_train_steps": 12, "checkpointing_steps": 8, "ema_snapshot_steps": 3, "save_images_epochs": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, a UNet, and `run`, which has kept snapshots."""
    root = tmp_path_factory.mktemp("world")
    write_rows(root / "images", [encoded(pixels) for pixels in random_pixels(12, 8, 8)])
    write_unet(root / "unet", in_channels=1, out_channels=1)
    train(root, root / "run", FLAGS, use_ema=True)
    return root


def walk(steps):
    """A model's weights after each step: a random walk in float64 [steps, 3]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, 3, generator=generator, dtype=torch.float64).cumsum(0)


def snapshots_of(walked, every, folder):
    """The snapshots that a run with these weights would have written."""
    part = torch.nn.Linear(3, 1, bias=False).double()
    averages = [PowerAverage(std, part.parameters(), CPU) for std in WIDTHS]
    for step, value in enumerate(walked, 1):
        part.weight.data.copy_(value)
        for one in averages:
            one.step(part.parameters())
        if step % every == 0:
            write_snapshots(folder, {"unet": averages}, {"unet": part}, step)
    return part, averages


def exact(walked, gamma):
    """∫ τ^γ θ(τ) dτ / ∫ τ^γ dτ, where θ is what the last step made it, [3]."""
    edges = torch.arange(len(walked) + 1, dtype=torch.float64) ** (gamma + 1)
    return ((edges[1:] - edges[:-1]) / edges[-1]) @ walked


# The averages


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25])
def test_the_width_of_the_profile_is_the_one_asked_for(std):
    """Else --std 0.05 is another width: the profile's standard deviation, by integration."""
    gamma = exponent(std)
    mean, second = (quad(lambda u, k=k: (gamma + 1) * u ** (gamma + k), 0, 1)[0] for k in (1, 2))
    assert np.sqrt(second - mean**2) == pytest.approx(std, rel=1e-9)
    assert relative_std(gamma) == pytest.approx(std, rel=1e-9)


@pytest.mark.parametrize("std", WIDTHS)
def test_an_average_is_the_integral_over_its_steps(std, tmp_path):
    """Else the average has another profile than its snapshots are combined for."""
    walked = walk(60)
    part = torch.nn.Linear(3, 1, bias=False).double()
    average = PowerAverage(std, part.parameters(), CPU)
    for value in walked:
        part.weight.data.copy_(value)
        average.step(part.parameters())
    torch.testing.assert_close(average.shadow_params[0][0], exact(walked, exponent(std)), rtol=1e-12, atol=1e-12)
    average.save("unet", part, tmp_path / "a.safetensors")
    again = PowerAverage(std, torch.nn.Linear(3, 1, bias=False).double().parameters(), CPU)
    again.load(part, tmp_path / "a.safetensors")
    for one in (average, again):
        one.step(part.parameters())
    assert torch.equal(average.shadow_params[0], again.shadow_params[0])


# Any width from snapshots


def test_inner_products_are_integrals():
    """Else the least squares weigh the snapshots by another geometry."""

    def profile(t, gamma):
        return lambda u: (gamma + 1) * u**gamma / t ** (gamma + 1) if u <= t else 0.0

    for t_a, gamma_a, t_b, gamma_b in ((3.0, 6.9, 5.0, 17.0), (5.0, 2.0, 3.0, 0.5), (4.0, 17.0, 4.0, 6.9)):
        both = profile(t_a, gamma_a), profile(t_b, gamma_b)
        integral = quad(lambda u, both=both: both[0](u) * both[1](u), 0, min(t_a, t_b))[0]
        ours = inner_products(*(np.array([[value]]) for value in (t_a, gamma_a, t_b, gamma_b)))
        assert ours.item() == pytest.approx(integral, rel=1e-9)


def test_a_kept_width_is_its_own_snapshot():
    """Else the least squares do not find what is there."""
    stds, steps = [*WIDTHS] * 3, [4, 4, 8, 8, 12, 12]
    np.testing.assert_allclose(solve_coefficients(stds, steps, WIDTHS[1], 8), [0, 0, 0, 1, 0, 0], atol=1e-8)
    assert solve_coefficients(stds, steps, 0.07, 12).sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("std", [0.03, 0.07, 0.15])
def test_any_width_comes_near_the_average_that_was_never_kept(std, tmp_path):
    """Else a width that is made afterwards is not the one that training with it would have given."""
    walked = walk(400)
    part, _ = snapshots_of(walked, 20, tmp_path)
    wanted = exact(walked, exponent(std))
    averages = Averages(tmp_path)
    averages.put({"unet": part}, std)
    error = (part.weight.detach()[0] - wanted).norm()
    nearest = min((exact(walked, exponent(one)) - wanted).norm() for one in WIDTHS)
    assert error < 0.05 * nearest
    other = Averages(tmp_path, step=200)
    other.put({"unet": part}, std)
    middle = exact(walked[:200], exponent(std))
    assert (part.weight.detach()[0] - middle).norm() < 0.05 * (middle - wanted).norm()


@pytest.mark.parametrize("std", [0.03, 0.05, 0.08])
def test_it_is_ema_pytorchs(std, tmp_path):
    """Else "post-hoc EMA" is another one here than in the known implementation."""
    library = pytest.importorskip("ema_pytorch")
    walked, every = walk(60), 10
    (tmp_path / "ours").mkdir()
    ours, _ = snapshots_of(walked, every, tmp_path / "ours")
    model = torch.nn.Linear(3, 1, bias=False).double()
    model.weight.data.copy_(walked[0])
    theirs = library.PostHocEMA(
        model, sigma_rels=WIDTHS, update_every=1, checkpoint_every_num_steps="manual",
        checkpoint_folder=tmp_path / "theirs", checkpoint_dtype=torch.float64,
    )  # fmt: skip
    for one in theirs.ema_models:  # its k-th update has the paper's decay of step k + 1: it begins with the first's
        one.initted.fill_(True)
    for step, value in enumerate(walked[1:], 2):
        model.weight.data.copy_(value)
        theirs.update()
        if step % every == 0:
            theirs.checkpoint()
            for index in range(len(WIDTHS)):
                path = tmp_path / "theirs" / f"{index}.{step - 1}.pt"
                path.rename(path.with_name(f"{index}.{step}.pt"))
    made = theirs.synthesize_ema_model(sigma_rel=std)
    Averages(tmp_path / "ours").put({"unet": ours}, std)
    torch.testing.assert_close(ours.weight, made.ema_model.weight, rtol=1e-6, atol=1e-6)


# A run that keeps them


def test_a_run_lists_its_snapshots_and_trains_as_without(world, tmp_path):
    """Else files nobody owns are left behind, or keeping averages changes the model."""
    names = {f"ema-snapshots/unet-{std:.3f}-{step:08d}.safetensors" for std in WIDTHS for step in (3, 6, 9, 12)}
    assert names <= set(listed(world / "run"))
    assert {one.path.relative_to(world / "run").as_posix() for one in read_snapshots(world / "run")} == names
    train(world, tmp_path, FLAGS, use_ema=True, ema_snapshot_steps=None)
    assert_same_tensors(weights(tmp_path), weights(world / "run"))


def test_a_resumed_run_has_the_same_snapshots(world, tmp_path):
    """Else a run that was interrupted averages from another place; or snapshots of a later step mix with its own."""
    run = world / "run"
    for name in ("checkpoint-8", "ema-snapshots"):
        shutil.copytree(run / name, tmp_path / name)
    for name in ("metrics.jsonl", "ddpm_hf_files.json"):
        shutil.copy(run / name, tmp_path)
    (tmp_path / "ema-snapshots" / "unet-0.050-00000009.safetensors").write_bytes(b"of another future")
    train(world, tmp_path, FLAGS, resume_from_checkpoint="latest", ema_snapshot_steps=4)
    there = {one.path.name: load_file(one.path) for one in read_snapshots(run)}
    ours = {one.path.name: load_file(one.path) for one in read_snapshots(tmp_path)}
    assert sorted(int(name[-20:-12]) for name in ours) == [3, 3, 6, 6, 12, 12]
    for name in ours:
        assert_same_tensors(ours[name], there[name])
    for std in WIDTHS:
        one, other = (last_checkpoint(each) / "unet_power" / f"{std:.3f}.safetensors" for each in (tmp_path, run))
        assert_same_tensors(load_file(one), load_file(other))
        assert read_about(one) == read_about(other)


@pytest.mark.parametrize(("flag", "says"), [(None, "would be lost"), (3, "no power averages")])
def test_a_run_with_averages_goes_on_with_them(flag, says, world, tmp_path):
    """Else averages silently begin in the middle, or are lost."""
    other = {"ema_snapshot_steps": None} if flag else {}
    train(world, tmp_path, FLAGS, max_train_steps=2, **other)
    if flag is None:  # as of a checkpoint whose run's settings are lost
        settings = {
            name: value for name, value in read(tmp_path / "training_config.json").items() if "ema" not in name
        }
        (tmp_path / "training_config.json").write_text(json.dumps(settings))
    run = attempt(world, tmp_path, FLAGS, resume_from_checkpoint="latest", ema_snapshot_steps=flag)
    assert run.code == 2
    assert says in run.error()
    assert "--ema_snapshot_steps" in run.error()


def test_snapshots_that_are_none_are_named(tmp_path):
    """Else a stranger's file is a traceback."""
    with pytest.raises(UsageError, match="--ema_snapshot_steps"):
        read_snapshots(tmp_path)
    (tmp_path / "ema-snapshots").mkdir()
    (tmp_path / "ema-snapshots" / "unet-0.050-00000003.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"00000003\.safetensors is not a snapshot"):
        read_snapshots(tmp_path)
