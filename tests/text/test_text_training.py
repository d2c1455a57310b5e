"""What train_text2image.py leaves on disk, from scratch and from a checkpoint."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import train_text2image
from ddpm_hf.common.pictures import image_grid
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.fixtures_text import CAPTIONS
from tests.support.pictures import random_pixels
from tests.support.runs import last_checkpoint, read, records, same, weights
from tests.support.text_runs import DIFFUSION, START, train_text

# What is on disk


def test_from_scratch_all_of_a_pipeline_lies_there(trained):
    """Else a part of the model is missing, or of another's width, and nobody can use it."""
    folder = trained("scratch", checkpointing_steps=4)
    index = read(folder / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
        assert (folder / part).is_dir()
        assert part in index
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    pictures = {f"{kind}-{step:06d}.png" for kind in ("step", "chain") for step in (2, 6)}
    assert {path.name for path in (folder / "samples").iterdir()} == pictures
    assert list((folder / "autoencoder" / "samples").iterdir())
    assert len(records(folder)) == 6
    assert len(records(folder / "autoencoder")) == 4
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]


@pytest.mark.every(2)
@pytest.mark.parametrize("start", START)
def test_stock_loads_the_result_and_draws_our_images(start, trained):
    """Else what was trained here can only be used here."""
    folder = trained(start)
    drawn = []
    for cls in (StableDiffusionPipeline, train_text2image.TextToImageDDPMPipeline):
        pipeline = cls.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
        drawn.append(pipeline(CAPTIONS[:2], generator=torch.Generator().manual_seed(0), **options).images)
    assert drawn[0].shape == (2, 16, 16, 3)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-3)


@pytest.mark.parametrize(("start", "ema"), [("scratch", True), ("checkpoint", False)])
def test_a_checkpoint_loads_by_its_subfolder(start, ema, trained):
    """Else a run's checkpoints are of no use to code written for Diffusers' script."""
    folder = trained(start, checkpointing_steps=4) if start == "scratch" else trained(start)
    loaded = UNet2DConditionModel.from_pretrained(folder, subfolder="checkpoint-6/unet")
    assert same(dict(loaded.state_dict()), weights(folder / "checkpoint-6"))
    saved = weights(folder / "checkpoint-6", "unet_ema" if ema else "unet")
    assert same(weights(folder), saved)  # the pipeline's own is the average, where there is one
    assert (folder / "checkpoint-6" / "unet_ema").is_dir() == ema


def test_the_autoencoder_is_scaled_to_unit_variance_and_frozen(trained, shop):
    """Else the diffusion starts from latents of another variance than its noise, or ruins them as it trains."""
    folder = trained("scratch", checkpointing_steps=4)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    assert same(weights(folder, "vae"), weights(folder / "autoencoder", "."))
    pixels = torch.from_numpy(random_pixels(8, 16, 16)).permute(0, 3, 1, 2) / 127.5 - 1
    posterior = vae.encode(pixels).latent_dist
    deviation = (posterior.mean.var() + posterior.var.mean()).detach() ** 0.5
    assert float(deviation) * vae.config.scaling_factor == pytest.approx(1, abs=0.1)


def test_the_model_card_shows_how_to_ask_for_an_image(trained):
    """Else a stranger who follows the card's code draws nothing, and the Hub lists the model where nobody looks."""
    card = (trained("scratch", checkpointing_steps=4) / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    calls = {line for line in card.splitlines() if line.startswith("image = pipeline(")}
    assert len(calls) == 1  # for each way to load it
    assert calls.pop().startswith('image = pipeline("')


def test_captions_are_the_default_prompts_also_of_cached_latents(shop, tmp_path):
    """Else the first run that a user starts on a folder of captioned pictures dies after its autoencoder."""
    for start, flags in (("checkpoint", {}), ("checkpoint", {"cache_latents": True}), ("scratch", {})):
        folder = tmp_path / f"{start}-{len(flags)}"
        run = train_text(start, shop, folder, validation_prompts=None, eval_batch_size=16, max_train_steps=2, **flags)
        (grid,) = (run.folder / "samples").glob("step-*")
        assert Image.open(grid).height == 2 + 8 * 66  # a row for each of eight captions


def test_a_grid_shows_the_prompts_row_by_row(trained, shop):
    """Else a picture in the grid is of another prompt than its row's."""
    from ddpm_hf.common.randomness import keyed_seed

    folder = trained("checkpoint")
    pipeline = train_text2image.TextToImageDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    own = [torch.Generator().manual_seed(keyed_seed(3, "sample", 0, index)) for index in range(2)]
    images = pipeline(["a red square"] * 2, num_inference_steps=2, generator=own).images
    shown = np.asarray(Image.open(folder / "samples" / "step-000006.png")).astype(int)
    assert np.abs(shown - np.asarray(image_grid(images, 2, scale=4, legend=["a red square"]))).max() <= 2


def test_overwriting_leaves_nothing_of_the_earlier_run(shop, tmp_path):
    """Else the autoencoder's log, or a component, is a mixture of two runs."""
    first = train_text("scratch", shop, tmp_path / "run", seed=1)
    (first.folder / "notes.txt").write_text("mine")
    train_text("scratch", shop, tmp_path / "run", overwrite_output_dir=True, max_train_steps=2, checkpointing_steps=2)
    assert len(records(first.folder / "autoencoder")) == 4
    assert {path.name for path in first.folder.glob("checkpoint-*")} == {"checkpoint-2"}
    assert {path.name for path in (first.folder / "autoencoder").glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
    }
    assert (first.folder / "notes.txt").read_text() == "mine"


# From a checkpoint


def test_what_is_not_trained_stays_as_it_was(trained, shop):
    """Else training on changes the latents or the words, and the checkpoint's sampler is lost."""
    folder = trained("checkpoint")
    for part in ("vae", "text_encoder"):
        assert same(weights(folder, part), weights(shop / "stable", part))
    assert not same(weights(folder), weights(shop / "stable"))
    config, before = (read(one / "scheduler" / "scheduler_config.json") for one in (folder, shop / "stable"))
    assert config["_class_name"] == "PNDMScheduler"
    assert before.items() <= config.items()
    tokens = [read(one / "tokenizer" / "tokenizer.json")["model"] for one in (folder, shop / "stable")]
    assert tokens[0] == tokens[1]
    assert not (last_checkpoint(folder) / "text_encoder").exists()


def test_the_text_encoder_is_trained_along(trained, shop):
    """Else --train_text_encoder trains half of what it says, or saves the raw weights where an average was kept."""
    folder = trained("checkpoint", train_text_encoder=True, use_ema=True, ema_max_decay=0.5, checkpointing_steps=4)
    assert same(weights(folder, "vae"), weights(shop / "stable", "vae"))
    checkpoint = last_checkpoint(folder)
    raw, average = weights(checkpoint, "text_encoder"), weights(checkpoint, "text_encoder_ema")
    before = weights(shop / "stable", "text_encoder")
    assert not same(raw, before)
    assert not same(raw, average)
    assert same(weights(folder, "text_encoder"), average)
    assert same(weights(folder), weights(checkpoint, "unet_ema"))
    assert read(checkpoint / "text_encoder_ema" / "ema.json")["optimization_step"] == 6


def test_zero_terminal_snr_takes_a_sampler_that_can(trained):
    """Else a model of zero terminal SNR is saved with a sampler that divides by zero, or never starts from noise."""
    folder = trained("checkpoint", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    config = read(folder / "scheduler" / "scheduler_config.json")
    assert config["_class_name"] == "DDPMScheduler"
    assert config["rescale_betas_zero_snr"]
    assert config["timestep_spacing"] == "trailing"
    assert config["prediction_type"] == "v_prediction"
    assert not config["clip_sample"]
    assert {name: config[name] for name in DIFFUSION} == DIFFUSION


@pytest.mark.parametrize("cached", [False, True])
def test_grays_are_trained_where_the_autoencoder_has_them(cached, shop, tmp_path):
    """Else an autoencoder of gray images, such as the digits', crashes on the colours that it is given."""
    tiny_vae(scaling_factor=0.5, in_channels=1, out_channels=1).save_pretrained(tmp_path / "gray")
    flags = {"vae_name_or_path": tmp_path / "gray", "max_train_steps": 1, "cache_latents": cached}
    run = train_text("scratch", shop, tmp_path / "run", **flags)
    assert Image.open(run.folder / "samples" / "step-000001.png").mode == "L"


def test_a_chain_shorter_than_the_grids_steps_is_drawn_whole(shop, tmp_path):
    """Else a model of few timesteps dies at its first grid, or its card's code fails."""
    flags = {"ddpm_num_steps": 10, "num_inference_steps": 50, "max_train_steps": 1, "vae_name_or_path": "{shop}/vae"}
    folder = train_text("scratch", shop, tmp_path / "run", **flags).folder
    calls = {line for line in (folder / "README.md").read_text().splitlines() if "image = pipeline(" in line}
    pipeline = train_text2image.TextToImageDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for call in calls:
        exec(call, {"pipeline": pipeline})
    assert any("num_inference_steps=" in call for call in calls)


def test_a_stream_trains_a_new_unet_where_the_rest_is_given(shop, tmp_path):
    """Else the recipe from scratch, which caches latents, forbids a stream to a user who asked for no cache."""
    parts = {"text_encoder_name_or_path": "{shop}/stable", "vae_name_or_path": "{shop}/vae"}
    flags = {"model_config_name_or_path": "{shop}/narrow", "streaming": True, "max_train_steps": 2}
    assert len(train_text("scratch", shop, tmp_path / "run", **flags, **parts).records()) == 2


def test_a_text_encoder_of_ones_own_is_taken_frozen(shop, tmp_path):
    """Else a CLIP text encoder named for a model from scratch is trained, or replaced by a new one."""
    run = train_text(
        "scratch",
        shop,
        tmp_path / "run",
        text_encoder_name_or_path="{shop}/stable",
        vae_name_or_path="{shop}/vae",
        model_config_name_or_path="{shop}/narrow",
        max_train_steps=2,
    )
    assert same(weights(run.folder, "text_encoder"), weights(shop / "stable", "text_encoder"))
    assert same(weights(run.folder, "vae"), weights(shop / "vae", "."))
    assert not (run.folder / "autoencoder").exists()
