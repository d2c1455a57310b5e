"""What must not change a run of train_text2image.py: caches, compilation, ranks, validation images."""

import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import train_text2image
from ddpm_hf.latents.table import TensorTable
from ddpm_hf.training.checkpointing import read_manifest
from tests.support.fixtures_ranks import torchrun
from tests.support.runs import assert_same_tensors, last_checkpoint, losses, records, same, weights
from tests.support.text_runs import EMA, text_command, train_text

# What must not matter


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("start", "flags"),
    [
        ("checkpoint", {"random_flip": True, "caption_dropout": 0.4}),
        ("checkpoint", {"train_data_dir": "{shop}/large", "center_crop": True, "train_text_encoder": True}),
    ],
)
def test_cached_latents_train_as_computed_ones(start, flags, trained):
    """Else the cache holds another image's latent, or another caption's embedding, or no flips."""
    each, once = (trained(start, logging_steps=1, cache_latents=cached, **flags) for cached in (False, True))
    assert losses(once) == pytest.approx(losses(each), rel=1e-4)
    assert_same_tensors(weights(once), weights(each), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_cache_is_used_again_and_never_for_another_model(trained, shop, tmp_path):
    """Else every run encodes all images anew, or trains on the latents of another autoencoder."""
    flags = {"cache_latents": True, "center_crop": True, "cache_dir": tmp_path / "cache", "max_train_steps": 1}
    first = train_text("checkpoint", shop, tmp_path / "first", **flags)
    assert not (first.folder / "cache").exists()
    tables = {path.name for path in (tmp_path / "cache" / "ddpm_hf").iterdir()}
    assert len(tables) == 2
    with mock.patch.object(AutoencoderKL, "encode", autospec=True, side_effect=AutoencoderKL.encode) as encode:
        again = train_text("checkpoint", shop, tmp_path / "again", **flags)
    assert encode.call_count == 1  # the rehearsal's batch
    assert losses(again.folder) == losses(first.folder)
    train_text("scratch", shop, tmp_path / "other", vae_name_or_path="{shop}/vae", **flags)
    assert {path.name for path in (tmp_path / "cache" / "ddpm_hf").iterdir()} == tables  # the same autoencoder
    train_text("checkpoint", shop, tmp_path / "flips", random_flip=True, **flags)
    train_text("scratch", shop, tmp_path / "new", **flags)
    assert len(list((tmp_path / "cache" / "ddpm_hf").iterdir())) == 3


def test_gradient_checkpointing_changes_no_number(trained):
    """Else saving memory trains another model."""
    flags = {"train_text_encoder": True}
    plain, spared = (trained("checkpoint", **flags, gradient_checkpointing=on) for on in (False, True))
    assert losses(spared) == pytest.approx(losses(plain), rel=1e-5)
    assert_same_tensors(weights(spared), weights(plain), rtol=0, atol=1e-4)


def test_compiling_trains_the_compiled_model(shop, tmp_path):
    """Else --compile is accepted and the model runs as it is, or what is saved is the wrapper."""
    made = []

    class Compiled(torch.nn.Module):
        """What torch.compile returns: another module around the model, which it runs."""

        def __init__(self, model, **options):
            super().__init__()
            self._orig_mod, self.options, self.calls = model, options, 0
            made.append(self)

        def forward(self, *args, **kwargs):
            self.calls += self.training
            return self._orig_mod(*args, **kwargs)

    runs = [tmp_path / "plain", tmp_path / "compiled"]
    train_text("checkpoint", shop, runs[0], max_train_steps=2)
    with mock.patch.object(torch, "compile", Compiled):
        train_text("checkpoint", shop, tmp_path / "dry", max_train_steps=2, dry_run=True, compile=True)
        assert not made  # compiling takes minutes
        train_text("checkpoint", shop, runs[1], max_train_steps=2, compile=True)
    (one,) = made
    assert isinstance(one._orig_mod, train_text2image.TextConditioned)
    assert one.calls == 3  # the rehearsal's and two steps'
    assert same(*map(weights, runs))
    assert same(*(weights(last_checkpoint(run)) for run in runs))


def test_looking_changes_nothing(trained):
    """Else drawing, saving or validating in between draws from the training's randomness, or leaves dropout off."""
    shared = {"validation_split": 0.25, "caption_dropout": 0.3, **EMA}
    rarely = trained("checkpoint", validation_steps=100, **shared)
    often = {"save_images_epochs": 1, "save_model_epochs": 1, "validation_steps": 1, "checkpointing_steps": 1}
    often = trained("checkpoint", **often, **shared)
    assert same(weights(often), weights(rarely))
    assert all("validation_loss" in record for record in records(often))
    for ours, theirs in zip(records(rarely), records(often), strict=True):
        assert ours.items() <= theirs.items()


@pytest.fixture(scope="module")
def two_ranks(shop, tmp_path_factory):
    """4 steps of an autoencoder and 4 of a UNet, by two ranks of 4 and by one of 8."""
    root = tmp_path_factory.mktemp("ranks")
    flags = {
        "train_data_dir": "{shop}/seven",  # of which the second rank has three
        "max_train_steps": 4,
        "eval_batch_size": 3,
        "save_images_epochs": 2,
        "adam_epsilon": 1e-2,  # Adam then magnifies no rounding
        "cache_latents": True,
        "caption_dropout": 0.3,
    }
    done = torchrun(train_text2image.__file__, *text_command("scratch", shop, root / "two", **flags))
    assert done.returncode == 0, done.stderr
    return root / "two", train_text("scratch", shop, root / "one", **flags, train_batch_size=8).folder


@pytest.mark.slow
def test_two_ranks_train_as_one_with_twice_the_batch(two_ranks):
    """Else ranks see the same images or noise, train two autoencoders, or cache each other's latents."""
    two, one = two_ranks
    assert read_manifest(two / "checkpoint-4")["processes"] == 2
    for stage in (".", "autoencoder"):
        for ours, theirs in zip(records(two / stage), records(one / stage), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
    for part in ("vae", "unet", "text_encoder"):
        assert_same_tensors(weights(two, part), weights(one, part), rtol=1e-3, atol=1e-4)
    scale = [AutoencoderKL.load_config(folder / "vae")["scaling_factor"] for folder in two_ranks]
    assert scale[0] == pytest.approx(scale[1], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_draw_the_same_grids_and_leave_whole_files(two_ranks):
    """Else an image depends on the rank that drew it, or the ranks write over one another."""
    two, one = two_ranks
    for name in sorted(path.name for path in (one / "samples").iterdir()):
        ours, theirs = (np.asarray(Image.open(run / "samples" / name)).astype(int) for run in two_ranks)
        assert np.abs(ours - theirs).max() <= 2
    assert not [path for path in two.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]


def test_a_rank_that_comes_late_computes_its_share(tmp_path):
    """Else a rank that sees what another has written already shares out the rest anew, and some is never computed."""
    keys = [bytes([number]) * 16 for number in range(8)]
    meeting = threading.Barrier(2, timeout=30)
    found = {}

    def rank(number):
        until = time.monotonic() + 0.5
        while number == 1 and not list(tmp_path.glob("part-*")) and time.monotonic() < until:
            time.sleep(0.01)
        accelerator = SimpleNamespace(
            process_index=number, num_processes=2, is_local_main_process=False, wait_for_everyone=meeting.wait
        )
        table = TensorTable(tmp_path)
        table.fill(keys, lambda places: torch.tensor(places).float()[:, None], accelerator, "")
        found[number] = set(table.row_of)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    assert found == {0: set(keys), 1: set(keys)}
