"""A trained network shows that its attention heads, or their order, were mistaken: it denoises worse with them."""

import pytest
import torch

from ddpm_hf import DDPMScheduler
from ddpm_hf.models.converters import Options, attention_check, convert
from ddpm_hf.models.converters.attention_check import noise_error, smooth_images
from ddpm_hf.models.converters.openai_back import export_openai
from ddpm_hf.portable.networks_ddpm_hf import build_unet
from tests.support.openai_networks import UNet, randomized

DIFFUSION = "--diffusion_steps 1000 --noise_schedule linear"


def unet_of_heads(channels):
    """A small UNet with heads of so many channels, as OpenAI's code has them."""
    torch.manual_seed(0)
    return build_unet({
        "sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "attention_head_dim": channels,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attn_norm_num_groups": 32, "resnet_time_scale_shift": "scale_shift", "out_channels": 6,
    })  # fmt: skip


def test_images_are_smooth_and_in_range():
    """Else the networks are asked about images that no model was trained on."""
    images = smooth_images(4, 3, 32, torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 32, 32)
    assert images.abs().max() <= 1
    step = (images[..., 1:] - images[..., :-1]).square().mean()
    assert step < 0.2 * images.var()


def test_the_error_is_that_of_the_noise():
    """Else the figure says nothing: a network that predicts no noise has the error 1, a perfect one 0."""

    class Oracle(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor, self.config = factor, unet_of_heads(16).config

        def forward(self, x_t, t):
            generator = torch.Generator().manual_seed(0)
            smooth_images(2, 3, 16, generator)
            noise = torch.randn(x_t.shape, generator=generator)
            return type("Output", (), {"sample": self.factor * noise})

    scheduler = DDPMScheduler(clip_sample=False)
    assert noise_error(Oracle(1.0), scheduler) == pytest.approx(0, abs=1e-4)
    assert noise_error(Oracle(0.0), scheduler) == pytest.approx(1, abs=0.1)


@pytest.fixture
def untrained(tmp_path):
    network = randomized(UNet(width=32, levels=(1, 2), layers=1, attention={1}, head_channels=16, legacy=True))
    torch.save(network.state_dict(), tmp_path / "x.pt")
    return str(tmp_path / "x.pt")


def test_an_untrained_network_is_not_judged(untrained):
    """Else a network of which nothing is known is refused."""
    facts = convert(
        untrained, Options(f"--image_size 16 --num_head_channels 16 {DIFFUSION}"), "guided-diffusion"
    ).facts
    assert "not checked" in facts[-1]


def test_flags_under_which_it_denoises_worse_are_refused(untrained, monkeypatch):
    """Else a mistaken flag makes a folder that samples noise."""
    right = {"heads": 4, "legacy": True}

    def error(unet, scheduler):
        heads = {module.heads for module in unet.modules() if hasattr(module, "heads")}
        return 0.1 if heads == {right["heads"]} and state["legacy"] == right["legacy"] else 0.3

    state = {}
    load = attention_check.load_openai

    def noted(unet, config, weights, legacy):
        state["legacy"] = legacy
        load(unet, config, weights, legacy)

    monkeypatch.setattr(attention_check, "noise_error", error)
    monkeypatch.setattr(attention_check, "load_openai", noted)

    def facts(flags, legacy=True):
        state["legacy"] = legacy
        return convert(untrained, Options(f"--image_size 16 {flags} {DIFFUSION}"), "guided-diffusion").facts

    assert "error 0.100" in facts("--num_head_channels 16")[-1]
    with pytest.raises(ValueError, match=r"with --num_heads 4 it predicts noise better \(error 0.100\).*\(0.300\)"):
        facts("--num_head_channels 32")
    with pytest.raises(ValueError, match="with --use_new_attention_order False it predicts noise better"):
        facts("--num_head_channels 16 --use_new_attention_order True", legacy=False)
    monkeypatch.setattr(attention_check, "noise_error", lambda unet, scheduler: 0.2 * error(unet, scheduler) + 0.3)
    assert facts("--num_head_channels 32")[-1].startswith(
        "warning: with --num_heads 4 it predicts noise a little better"
    )


@pytest.mark.slow
def test_a_trained_network_tells(tmp_path):
    """The same with a network that has learned to denoise for a minute: mistaken heads and orders are seen.

    So little training uses attention little, so that the mistakes are warned of and not refused.
    """
    unet, scheduler = unet_of_heads(16), DDPMScheduler(1000, variance_type="learned_range")
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    for step in range(400):
        x_start = smooth_images(16, 3, 16, generator)
        noise = torch.randn(x_start.shape, generator=generator)
        t = torch.randint(0, 1000, (16,), generator=generator)
        output = unet(scheduler.add_noise(x_start, noise, t), t).sample[:, :3]
        optimizer.zero_grad()
        (output - noise).square().mean().backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        optimizer.step()
    said = {}
    for order in ("False", "True"):
        path = tmp_path / f"{order}.pt"
        torch.save(export_openai(unet.eval(), f"--use_new_attention_order {order}")[0], path)
        for heads in (16, 32):
            for flag in ("False", "True"):
                flags = f"--image_size 16 --num_head_channels {heads} --use_new_attention_order {flag} {DIFFUSION}"
                said[order, heads, flag] = convert(str(path), Options(flags), "guided-diffusion").facts[-1]
    assert all(said[order, 16, order].startswith("attention checked") for order in ("False", "True"))
    assert all(said[order, 16, other].startswith("warning") for order, other in (("False", "True"), ("True", "False")))
    assert said["False", 32, "False"].startswith("warning: with --num_heads 4")
