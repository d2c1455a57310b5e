"""What cannot train text to image is refused in one line, before any work."""

from typing import NamedTuple
from unittest import mock

import pytest
from diffusers import UNet2DConditionModel

import train_text2image
from ddpm_hf.common.errors import UsageError
from ddpm_hf.inference.components import load_checkpoint_components
from ddpm_hf.latents import training as autoencoder
from tests.support.fixtures_text import (
    parse_text,
    run_text_script,
    tiny_text_pipeline,
)
from tests.support.text_runs import text_command

# Bad input: flags on top of a start, and what the one line must say


class Bad(NamedTuple):
    """Flags that are refused, and the fragments of the line that says so."""

    flags: dict
    says: tuple
    start: str = "checkpoint"


ZERO_SNR = ("zero terminal SNR", "v_prediction")
REFUSED = {
    "no captions": Bad({"train_data_dir": "{shop}/uncaptioned"}, ("'text'", "image, title", "--caption_column")),
    "no such checkpoint": Bad({"pretrained_model_name_or_path": "{shop}/nowhere"}, ("nowhere", "no Stable Diffusion")),
    "an empty checkpoint": Bad({"pretrained_model_name_or_path": "{shop}/no-model"},
                               ("no-model", "no Stable Diffusion")),
    "a checkpoint's part": Bad({"pretrained_model_name_or_path": "{shop}/vae"}, ("vae", "no Stable Diffusion")),
    "endless stream": Bad({"streaming": True, "max_train_steps": None}, ("--streaming", "--max_train_steps")),
    "stream from scratch": Bad({"streaming": True, "vae_name_or_path": "{shop}/vae"},
                               ("--streaming", "--text_encoder_name_or_path"), "scratch"),
    "stream for an autoencoder": Bad(
        {"streaming": True, "cache_latents": "False", "text_encoder_name_or_path": "{shop}/stable",
         "model_config_name_or_path": None}, ("--streaming", "--vae_name_or_path"), "scratch"),
    "cached stream": Bad({"streaming": True, "cache_latents": True}, ("--streaming", "--cache_latents")),
    "by class": Bad({"label_column": "label"}, ("--label_column", "train_unconditional.py")),
    "all dropped": Bad({"caption_dropout": 1}, ("--caption_dropout 1", "less than 1")),
    "nan dropped": Bad({"caption_dropout": "nan"}, ("--caption_dropout nan",)),
    "prediction": Bad({"prediction_type": "noise"}, ("--prediction_type must be one of epsilon", "'noise'")),
    "loss": Bad({"loss_type": "l3"}, ("'l3'", "huber")),
    "min-SNR": Bad({"snr_gamma": 0}, ("snr_gamma", "positive")),
    "offset": Bad({"noise_offset": -1}, ("--noise_offset -1",)),
    "offset nan": Bad({"noise_offset": "nan"}, ("--noise_offset nan",)),
    "endless offset": Bad({"noise_offset": "inf"}, ("--noise_offset inf",)),
    "perturbation": Bad({"input_perturbation": -0.1}, ("--input_perturbation -0.1",)),
    "dream's power": Bad({"dream_detail_preservation": -1}, ("--dream_detail_preservation -1",)),
    "scale": Bad({"guidance_scale": "nan"}, ("--guidance_scale nan",)),
    "steps of grids": Bad({"num_inference_steps": 0}, ("--num_inference_steps 0",)),
    "schedule": Bad({"ddpm_beta_schedule": "nonesuch"}, ("'nonesuch'", "cosine"), "scratch"),
    "epsilon at zero SNR": Bad({"rescale_betas_zero_snr": True}, ZERO_SNR),
    "epsilon at zero SNR from scratch": Bad({"rescale_betas_zero_snr": True}, ZERO_SNR, "scratch"),
    "a model for a checkpoint": Bad({"model_config_name_or_path": "{shop}/unet"},
                                    ("--model_config_name_or_path", "from scratch")),
    "a vae for a checkpoint": Bad({"vae_name_or_path": "{shop}/vae"}, ("--vae_name_or_path", "from scratch")),
    "no such vae": Bad({"vae_name_or_path": "{shop}/nowhere"}, ("nowhere", "no AutoencoderKL"), "scratch"),
    "no such text encoder": Bad({"text_encoder_name_or_path": "{shop}/nowhere"}, ("nowhere", "no CLIP"), "scratch"),
    "no such unet": Bad({"model_config_name_or_path": "{shop}/nowhere"},
                        ("nowhere", "no UNet2DConditionModel config"), "scratch"),
    "another kind of unet": Bad({"model_config_name_or_path": "{shop}/plain"},
                                ("plain", "UNet2DModel", "not a UNet2DConditionModel"), "scratch"),
    "a unet of another text": Bad({"model_config_name_or_path": "{shop}/narrow"}, ("cross_attention_dim", "32", "128"),
                                  "scratch"),
    "a unet of pixels": Bad({"model_config_name_or_path": "{shop}/rgb"}, ("in_channels", "3", "4"), "scratch"),
    "half a pixel of latents": Bad({"resolution": 15}, ("--resolution 15", "multiples of 2"), "scratch"),
    "half a pixel of a checkpoint's": Bad({"resolution": 15}, ("--resolution 15", "multiples of 2")),
    "half a latent": Bad({"resolution": 18, "model_config_name_or_path": None}, ("--resolution 18", "multiples"),
                         "scratch"),
    "half a latent of a ready vae": Bad(
        {"resolution": 18, "model_config_name_or_path": None, "vae_name_or_path": "{shop}/vae"},
        ("--resolution 18", "multiples"), "scratch"),
    "gray for a checkpoint of colours": Bad({"channels": 1}, ("--channels 1", "3")),
    "no vae steps": Bad({"vae_train_steps": 0}, ("--vae_train_steps 0",), "scratch"),
    "vae widths": Bad({"vae_widths": "8,x"}, ("--vae_widths 8,x", "multiples of 8"), "scratch"),
    "odd vae widths": Bad({"vae_widths": "8,12"}, ("--vae_widths 8,12", "multiples of 8"), "scratch"),
    "vae's KL": Bad({"vae_kl_weight": -1}, ("--vae_kl_weight -1",), "scratch"),
    "nothing to resume": Bad({"resume_from_checkpoint": "checkpoint-9"}, ("checkpoint-9", "none")),
    "unknown flag": Bad({"train_text_encode": True}, ("--train_text_encode", "--train_text_encoder")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_in_one_line_before_any_work(name, shop, tmp_path):
    """Else a slip costs hours of an autoencoder's training, or ends in a traceback."""
    flags, says, start = REFUSED[name]
    worked = mock.Mock(side_effect=AssertionError("work was begun"))
    with (
        mock.patch.object(autoencoder, "training_loop", worked),
        mock.patch.object(train_text2image, "training_loop", worked),
    ):
        run = run_text_script(text_command(start, shop, tmp_path / "run", **flags), tmp_path / "run")
    assert run.code == 2
    assert "Traceback" not in run.out + run.err
    line = run.error()
    for fragment in says:
        assert fragment in line, line
    assert not run.folder.is_dir() or not run.files()


def test_a_missing_revision_of_the_raw_weights_is_named(shop, tmp_path):
    """Else training goes on from the averaged weights, although others were asked for."""
    missing = OSError("raw is not a valid git identifier")
    with mock.patch.object(UNet2DConditionModel, "from_pretrained", side_effect=missing):
        config = parse_text(text_command("checkpoint", shop, tmp_path / "run", non_ema_revision="raw"))
        with (
            mock.patch.object(
                train_text2image.TextToImageDDPMPipeline, "from_pretrained", return_value=tiny_text_pipeline()
            ),
            pytest.raises(UsageError, match="raw"),
        ):
            load_checkpoint_components(config.pretrained_model_name_or_path, non_ema_revision=config.non_ema_revision)


def test_latents_of_random_crops_are_not_cached(shop, tmp_path):
    """Else an image is cropped once and for all where the user asked for crops at random."""
    run = run_text_script(
        text_command("checkpoint", shop, tmp_path / "run", train_data_dir="{shop}/large", cache_latents=True),
        tmp_path / "run",
    )
    assert run.code == 2
    for fragment in ("--cache_latents", "--center_crop"):
        assert fragment in run.error()
    assert not (run.folder / "metrics.jsonl").exists()
