"""What was fitted to a model's weights stays with these weights, and goes with them."""

import shutil

import pytest

import ddpm_hf
from ddpm_hf.models.fits import FITS, fits_of
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import GRAY, read, train

FLAGS = {**GRAY, "max_train_steps": 2, "save_images_epochs": 0, "ema_snapshot_steps": 1, "use_ema": True}
T = GRAY["ddpm_num_steps"]
FITTED = dict(zip(FITS, ([0.1] * T, {"2": [19, 5]}, {"2": [[1.0], [1.5, -0.5]]}, {"3": [19, 9, 0]}), strict=True))
CONFIG = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A finished run, and one whose model is fitted."""
    from ddpm_hf.few_steps.saving import save_fit

    root = tmp_path_factory.mktemp("fitted")
    write_rows(root / "images", [encoded(pixels) for pixels in random_pixels(12, 8, 8)])
    write_unet(root / "unet", in_channels=1, out_channels=1)
    train(root, root / "run", FLAGS)
    save_fit(str(root / "run"), ddpm_hf.load(root / "run"), FITTED, None)
    assert fits_of(read(root / "run" / CONFIG)) == FITTED
    return root


def test_the_fitted_model_is_sampled_with_its_fits(shop):
    """Else the tests below show nothing."""
    assert ddpm_hf.load(shop / "run").scheduler.variance_type == "fitted"


def test_fine_tuning_starts_without_them(shop, tmp_path):
    """Else other weights are sampled by them, or the fitted variance is refused as a flag that nobody gave."""
    start = {"pretrained_model_name_or_path": "{shop}/run", "model_config_name_or_path": None}
    run = train(shop, tmp_path / "tuned", {**FLAGS, **start, "ddpm_beta_schedule": None, "ddpm_num_steps": None})
    config = read(run.folder / CONFIG)
    assert fits_of(config) == {}
    assert config["variance_type"] == "fixed_small"
    assert config["num_train_timesteps"] == T


def test_a_checkpoint_has_none(shop):
    """Else the weights of an earlier step are sampled by what was fitted to the last ones."""
    assert fits_of(ddpm_hf.load(shop / "run/checkpoint-2").scheduler.config) == {}


def test_another_average_has_none(shop, run, tmp_path):
    """Else the average is sampled by what was fitted to the run's own weights."""
    assert run("ema", shop / "run", "--std", 0.1, "--out", tmp_path / "averaged")[0] == 0
    assert fits_of(read(tmp_path / "averaged" / CONFIG)) == {}
    assert fits_of(read(shop / "run" / CONFIG)) == FITTED


def test_a_finished_run_that_is_resumed_keeps_them(shop, tmp_path):
    """Else a command that trains nothing removes them without a word."""
    shutil.copytree(shop / "run", tmp_path / "run")
    run = train(shop, tmp_path / "run", FLAGS, resume_from_checkpoint="latest")
    assert fits_of(read(run.folder / CONFIG)) == FITTED
    assert "what was fitted" not in run.err


def test_a_run_that_trains_on_says_that_they_go(shop, tmp_path):
    """Else new weights are sampled by them, or they are lost without a word."""
    shutil.copytree(shop / "run", tmp_path / "run")
    run = train(shop, tmp_path / "run", FLAGS, resume_from_checkpoint="latest", max_train_steps=3)
    assert fits_of(read(run.folder / CONFIG)) == {}
    assert "warning: what was fitted for few steps is removed with the weights that it was fitted to" in run.err
