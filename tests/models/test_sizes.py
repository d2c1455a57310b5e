"""The size of the images follows the model, and the saved model says the size that it was trained at."""

import json
from types import SimpleNamespace

import pytest
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from ddpm_hf.common.errors import UsageError
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.models.flags import UNetFlags
from ddpm_hf.models.sizes import model_size, settle_resolution
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.fixtures_text import run_text_script, tiny_text_pipeline, write_captioned
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import run_script, words

SHORT = {
    "seed": 0, "cpu_threads": 1, "logger": "none", "max_train_steps": 1, "train_batch_size": 2, "eval_batch_size": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Images with captions, and models that were trained at 16×16: a checkpoint, an autoencoder, a config."""
    root = tmp_path_factory.mktemp("shop")
    write_captioned(root / "captioned", count=4, height=40, width=40)
    write_rows(root / "images", [encoded(pixels) for pixels in random_pixels(4, 40, 40)])
    tiny_text_pipeline().save_pretrained(root / "checkpoint")  # latents of 8×8, an autoencoder that halves once
    vae = tiny_vae()
    vae.register_to_config(sample_size=24)
    vae.save_pretrained(root / "vae")
    write_unet(root / "unet", sample_size=16)
    return root


def grid(folder):
    """The height of the only picture of the last grid."""
    return Image.open(max((folder / "samples").glob("step-*.png"))).height - 4  # a margin of 2 around it


def sample_size(folder):
    return json.loads((folder / "unet/config.json").read_text())["sample_size"]


@pytest.mark.every(3)
@pytest.mark.parametrize(("asked", "trained", "warned"), [(None, 16, False), (16, 16, False), (32, 32, True)])
def test_a_checkpoint_is_trained_at_its_size(asked, trained, warned, shop, tmp_path):
    """Else a model of 16×16 trains at 512×512, which takes a minute a step, and says 16×16 when it is saved."""
    flags = {
        **SHORT, "pretrained_model_name_or_path": shop / "checkpoint", "train_data_dir": shop / "captioned",
        "resolution": asked, "num_inference_steps": 2, "output_dir": tmp_path,
    }  # fmt: skip
    run = run_text_script(words(flags), tmp_path)
    assert run.code == 0, run.err
    assert sample_size(tmp_path) == sample_size(tmp_path / "checkpoint-1") == trained // 2
    assert json.loads((tmp_path / "training_config.json").read_text())["resolution"] == str(trained)
    assert grid(tmp_path) % trained == 0  # small images are shown larger
    assert ("warning: --resolution 32: the model was trained at 16 (--resolution 16)" in run.err) == warned
    assert ("resolution 16, the size of the model" in run.err) == (asked is None)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("named", "latent", "trained"),
    [
        ({"model_config_name_or_path": "unet"}, 16, 16),
        ({"model_config_name_or_path": "unet", "vae_name_or_path": "vae"}, 16, 32),
        ({"model_preset": "small-16"}, 16, 16),
        ({"model_preset": "small-16", "vae_name_or_path": "vae"}, 16, 32),
        ({"model_preset": "small-16", "resolution": 32}, 32, 32),
    ],
    ids=str,
)
def test_a_new_model_is_trained_at_the_size_it_is_made_for(named, latent, trained, shop, tmp_path):
    """Else a config or a preset for 16×16, in pixels or in latents, trains at 64×64 unless told."""
    named = {name: shop / value if name.endswith("path") else value for name, value in named.items()}
    if "vae_name_or_path" in named and "model_config_name_or_path" in named:
        channels = AutoencoderKL.load_config(shop / "vae")["latent_channels"]
        named["model_config_name_or_path"] = write_unet(
            tmp_path / "unet-of-latents", sample_size=16, in_channels=channels, out_channels=channels
        )
    flags = {**SHORT, **named, "train_data_dir": shop / "images", "ddpm_num_inference_steps": 1}
    run = run_script(words({**flags, "output_dir": tmp_path / "run"}), tmp_path / "run")
    assert run.code == 0, run.err
    assert sample_size(run.folder) == latent
    assert grid(run.folder) % trained == 0
    assert run.json("training_config.json")["resolution"] == str(trained)


def settled(sample_size, factor=1, usual="64", resolution=None, trained=False):
    """The resolution that is settled on, and the line about it."""
    data = DataFlags(resolution=resolution)
    line = settle_resolution(data, sample_size, factor, usual, trained)
    return data.resolution, line


def test_the_usual_size_holds_where_the_model_has_none():
    """Else the command lines of Diffusers' scripts, which name no size, train at another."""
    assert settled(*model_size(UNetFlags())) == ("64", None)
    assert settled(None, 8, "512") == ("512", None)
    assert settled(64, 8, "512") == ("512", None)  # Stable Diffusion 1
    assert settled(96, 8, "512")[0] == "768"  # and 2
    assert settled([16, 24], 2)[0] == "32x48"


def test_an_autoencoder_alone_gives_its_size():
    """Else the default UNet, which halves five times, is refused at 64 pixels for an autoencoder of 256."""
    vae = SimpleNamespace(config=FrozenDict(block_out_channels=(1, 2, 3, 4), sample_size=256))
    assert settled(*model_size(UNetFlags(), vae))[0] == "256"
    assert settled(*model_size(UNetFlags(model_preset="small-32"), vae))[0] == "256"


@pytest.mark.parametrize("bad", ["16", [16], [16, "16"], 1.5, True])
def test_a_sample_size_that_is_none_is_refused(bad):
    """Else a config of a stranger's ends in a traceback."""
    with pytest.raises(UsageError, match="sample_size"):
        settled(bad)
