"""The loss of train_text2image.py is stock's, and its captions are left out as often as asked."""

from types import SimpleNamespace
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_dream_and_update_latents

import train_text2image
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.portable.text_encoding_ddpm_hf import encode_texts, tokenize
from ddpm_hf.text.flags import TextObjectiveFlags
from ddpm_hf.training.flags import Flags
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.fixtures_text import (
    CAPTIONS,
    parse_text,
    stable_diffusion_scheduler,
    tiny_text_encoder,
    tiny_text_unet,
)
from tests.support.pictures import random_pixels
from tests.support.runs import training_run, words

# The loss


class Bench(NamedTuple):
    """What `compute_loss` is called with, outside of a run."""

    flags: Flags
    components: train_text2image.Components
    model: train_text2image.TextConditioned
    batch: dict
    keys: StepKeys

    def losses(self, keys=None, **batch):
        """The losses [N] of the batch, with some of it replaced."""
        found = train_text2image.compute_loss(
            self.model,
            {**self.batch, **batch},
            keys or self.keys,
            run=training_run(SimpleNamespace(device=torch.device("cpu"))),
            components=self.components,
            null_embedding=None,
            caption_dropout=self.flags.caption_dropout,
            learns=self.flags.trains_text_encoder,
            objective=self.flags[TextObjectiveFlags],
        )
        return found.losses.detach()

    def drawn(self):
        """(x_0, noise, t, embeddings): what the keys stand for."""
        vae = self.components.vae
        pixels = self.batch["images"].float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        x_start = (posterior.mean + posterior.std * self.keys.normal_like(posterior.mean, "posterior")) * (
            vae.config.scaling_factor
        )
        timesteps = (self.keys.uniform("timestep") * 1000).long()
        ids = tokenize(self.components.tokenizer, self.batch["captions"])[0]
        with torch.no_grad():
            text = self.components.text_encoder(ids)[0]
        return x_start, self.keys.normal_like(x_start), timesteps, text


def bench(count=6, prediction_type="epsilon", **flags):
    """A bench around the tiny models; flags as on the command line."""
    config = parse_text(words({"pretrained_model_name_or_path": "x", "train_data_dir": "x", **flags}))
    tokenizer, text_encoder = tiny_text_encoder()
    scheduler = stable_diffusion_scheduler(prediction_type=prediction_type)
    components = train_text2image.Components(
        tiny_vae(scaling_factor=0.5), text_encoder, tokenizer, tiny_text_unet(), scheduler, {}
    )
    model = train_text2image.TextConditioned(components.unet, text_encoder if config.trains_text_encoder else None)
    images = torch.from_numpy(random_pixels(count, 16, 16)).permute(0, 3, 1, 2).contiguous()
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]
    return Bench(config, components, model, {"images": images, "captions": captions}, StepKeys(5, 2, 0, count))


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_a_few_lines_of_stock(prediction_type, along):
    """Else what is minimised is not the objective that a Stable Diffusion checkpoint was trained by."""
    one = bench(prediction_type=prediction_type, train_text_encoder=along)
    x_start, noise, timesteps, text = one.drawn()
    stock = diffusers.DDPMScheduler(prediction_type=prediction_type)
    x_t = stock.add_noise(x_start, noise, timesteps)
    with torch.no_grad():
        output = one.components.unet(x_t, timesteps, text).sample
    velocity = stock.get_velocity(x_start, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x_start}[prediction_type]
    expected = torch.nn.functional.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_dream_is_diffusers_own(power):
    """Else --dream_training moves noise and target otherwise than Diffusers' script (Zhou et al. 2023)."""
    one = bench(dream_training=True, dream_detail_preservation=power)
    x_start, noise, timesteps, text = one.drawn()
    stock = diffusers.DDPMScheduler()
    noisy, target = compute_dream_and_update_latents(
        one.components.unet,
        stock,
        timesteps,
        noise,
        stock.add_noise(x_start, noise, timesteps),
        noise.clone(),
        text,
        power,
    )
    with torch.no_grad():
        output = one.components.unet(noisy, timesteps, text).sample
    expected = ((output - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-3, atol=1e-4)
    assert (expected - bench().losses()).abs().max() > 1e-3


def test_dream_is_one_thing_whatever_is_predicted():
    """Else DREAM of a v-prediction, which Diffusers' script refuses, trains on noise that no epsilon stands for."""
    one = bench(prediction_type="v_prediction", dream_training=True)
    x_start, noise, timesteps, text = one.drawn()
    x_t = one.components.scheduler.add_noise(x_start, noise, timesteps)
    with torch.no_grad():
        v = one.components.unet(x_t, timesteps, text).sample
    alpha_bar = one.components.scheduler.alphas_cumprod[timesteps].float()[:, None, None, None]
    epsilon = alpha_bar**0.5 * v + (1 - alpha_bar) ** 0.5 * x_t
    moved = noise + (1 - alpha_bar) ** 0.5 * (noise - epsilon)
    with torch.no_grad():
        output = one.components.unet(one.components.scheduler.add_noise(x_start, moved, timesteps), timesteps, text)
    target = alpha_bar**0.5 * moved - (1 - alpha_bar) ** 0.5 * x_start
    expected = ((output.sample - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-3, atol=1e-4)


def test_offset_noise_is_shared_by_a_channel():
    """Else --noise_offset adds noise that averages out, or adds it to the target alone."""
    one = bench(noise_offset=0.3)
    x_start, noise, timesteps, text = one.drawn()
    noise = noise + 0.3 * one.keys.normal_like(x_start[:, :, :1, :1].clone(), "noise_offset")
    with torch.no_grad():
        output = one.components.unet(one.components.scheduler.add_noise(x_start, noise, timesteps), timesteps, text)
    expected = ((output.sample - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-4, atol=1e-5)


def test_a_perturbed_input_is_predicted_unperturbed():
    """Else --input_perturbation changes the target too, and is but larger noise (Ning et al. 2023)."""
    one = bench(input_perturbation=0.3)
    x_start, noise, timesteps, text = one.drawn()
    added = noise + 0.3 * one.keys.normal_like(x_start, "input_perturbation")
    with torch.no_grad():
        output = one.components.unet(one.components.scheduler.add_noise(x_start, added, timesteps), timesteps, text)
    expected = ((output.sample - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one.losses(), expected, rtol=1e-4, atol=1e-5)


def test_min_snr_weights_are_the_peers():
    """Else --snr_gamma weighs the noise levels otherwise than a peer's run with the same flag."""
    for prediction_type, offset in (("epsilon", 0), ("v_prediction", 1)):
        plain, weighed = bench(prediction_type=prediction_type), bench(prediction_type=prediction_type, snr_gamma=5)
        timesteps = plain.drawn()[2]
        snr = diffusers.training_utils.compute_snr(diffusers.DDPMScheduler(), timesteps)
        expected = plain.losses() * snr.clamp(max=5.0) / (snr + offset)
        torch.testing.assert_close(weighed.losses(), expected, rtol=1e-3, atol=1e-6)


PERTURBED = {"noise_offset": 0.3, "input_perturbation": 0.3, "dream_training": True, "caption_dropout": 0.9}


@pytest.mark.parametrize("flag", PERTURBED)
def test_validation_is_never_perturbed(flag):
    """Else validation losses of two settings cannot be compared."""
    keys = StepKeys(5, 0, 0, 6, validation=True)
    torch.testing.assert_close(bench(**{flag: PERTURBED[flag]}).losses(keys), bench().losses(keys))
    assert not torch.allclose(bench(**{flag: PERTURBED[flag]}).losses(), bench().losses())


# Captions


def text_input(one: Bench, keys: StepKeys, null=None):
    """What the model is given to read."""
    share, learns, device = one.flags.caption_dropout, one.flags.trains_text_encoder, torch.device("cpu")
    return train_text2image.caption_input(one.batch, keys, one.components, null, device, share, learns)


@pytest.mark.parametrize("how", ["ids", "embedded", "cached"])
def test_captions_are_left_out_as_often_as_asked(how):
    """Else classifier-free guidance has another unconditional model than the flag says."""
    count, share = 2000, 0.15
    one = bench(2, caption_dropout=share, train_text_encoder=how == "ids")
    tokenizer, encoder = one.components.tokenizer, one.components.text_encoder
    one.batch["captions"] = ["a red square"] * count
    null = tokenize(tokenizer, [""])[0]
    if how != "ids":
        null = encode_texts(encoder, tokenizer, [""], torch.device("cpu")).detach()
    if how == "cached":
        embedding = encode_texts(encoder, tokenizer, ["a red square"], torch.device("cpu")).detach()
        one.batch["embeddings"] = embedding.expand(count, -1, -1)
    keys = StepKeys(7, 0, 0, count)
    found = text_input(one, keys, null)
    dropped = torch.isclose(found.float(), null.float(), atol=1e-4).flatten(1).all(dim=1)
    assert abs(float(dropped.float().mean()) - share) < 4 * (share * (1 - share) / count) ** 0.5
    assert torch.equal(dropped, keys.uniform("caption_dropout") < share)  # the same ones, whatever is cached
    held_out = text_input(one, keys._replace(validation=True), null)
    assert not torch.isclose(held_out.float(), null.float(), atol=1e-4).flatten(1).all(dim=1).any()


def test_one_of_several_captions_is_drawn_each_epoch():
    """Else all but one of an image's captions are never read."""
    from ddpm_hf.data.images import augmentation_uniforms, choose_caption

    several = ["one", "two", "three"]
    drawn = [choose_caption(several, augmentation_uniforms(3, epoch, 5)[3], "it") for epoch in range(60)]
    assert set(drawn) == set(several)
