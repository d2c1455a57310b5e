"""Whether a network denoises better with other attention heads, or another order, than its flags say.

The shapes of queries, keys and values are the same for any number of heads and for both orders, so a mistaken flag
makes a network that loads and samples noise. A trained one tells: it predicts the noise of an image worse then.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from ...portable.networks_ddpm_hf import set_heads
from ...portable.scheduling_ddpm_hf import DDPMScheduler
from .conversion import State
from .openai_flags import Flags
from .openai_names import load_openai

REFUSED, WARNED = 0.8, 0.97  # another layout's error, over that of the given one, below which it is one or the other
TRAINED = 0.5  # above this error the network has not learned to denoise
LEVELS_OF_NOISE = (0.1, 0.3)  # t/T
SIZE, IMAGES = 64, 2  # of the test images; the networks are convolutional


def smooth_images(count: int, channels: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random images [N, C, H, W] in [-1, 1] with the 1/f spectrum of photographs, mostly grey."""
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().clamp(min=1 / size)
    noise = torch.randn(count, channels + 1, size, size, generator=generator)
    fields = torch.fft.ifft2(torch.fft.fft2(noise) / radius**1.6).real
    fields = fields / fields.std(dim=(2, 3), keepdim=True)
    return ((fields[:, :1] + 0.3 * fields[:, 1:]) * 0.4).clamp(-1, 1)  # [N, C, H, W]


@torch.no_grad()
def noise_error(unet: torch.nn.Module, scheduler: DDPMScheduler) -> float:
    """The mean squared error of the noise that a network predicts for smooth images; 1 is that of predicting none."""
    generator = torch.Generator().manual_seed(0)
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    size = max(step, min(SIZE, unet.config.sample_size) // step * step)
    x_start = smooth_images(IMAGES, unet.config.in_channels, size, generator)
    noise = torch.randn(x_start.shape, generator=generator)
    classes = unet.config.num_class_embeds
    labels = {"class_labels": torch.arange(IMAGES) % classes} if classes else {}
    errors = []
    for level in LEVELS_OF_NOISE:
        t = torch.full((IMAGES,), int(level * len(scheduler)))
        x_t = scheduler.add_noise(x_start, noise, t)
        output = unet(x_t, t, **labels).sample  # [N, C or 2C, H, W]
        predicted = scheduler.predict_epsilon(scheduler.predict_original_sample(output, t, x_t), t, x_t)
        errors.append(float((predicted - noise).square().mean()))
    return sum(errors) / len(errors)


def other_layouts(flags: Flags, widths: set[int]) -> Iterator[tuple[str, dict[int, int], bool]]:
    """(the flags that say so, heads by width, whether the order is the legacy one) of the likeliest mistakes."""

    def heads(number: int, channels: int) -> dict[int, int]:
        return {width: number if channels == -1 else width // channels for width in widths}

    given = heads(flags.num_heads, flags.num_head_channels)
    if max(given.values()) > 1:
        yield f"--use_new_attention_order {flags.legacy_order}", given, not flags.legacy_order
    for number, channels in ((4, -1), (1, -1), (-1, 64), (-1, 32)):
        fits = all(width % (number if channels == -1 else channels) == 0 for width in widths)
        if fits and heads(number, channels) != given:
            text = f"--num_heads {number}" if channels == -1 else f"--num_head_channels {channels}"
            yield text, heads(number, channels), flags.legacy_order


def check_attention(
    unet: torch.nn.Module, config: Mapping[str, Any], state: State, flags: Flags, scheduler: DDPMScheduler
) -> str:
    """Compare the given heads and order with the likeliest others; a line on the outcome. The network stays as it is.

    Raises:
        ValueError: the weights denoise better otherwise.
    """
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    before = {id(layer): layer.heads for layer in layers}
    error = noise_error(unet, scheduler)
    others = {}
    try:
        for text, heads, legacy in other_layouts(flags, {layer.inner_dim for layer in layers}):
            for layer in layers:
                set_heads(layer, heads[layer.inner_dim])
            load_openai(unet, config, state, legacy)
            others[text] = noise_error(unet, scheduler)
    finally:
        for layer in layers:
            set_heads(layer, before[id(layer)])
        load_openai(unet, config, state, flags.legacy_order)
    best = min(others, key=lambda text: others[text], default=None)
    if best is not None and others[best] < min(REFUSED * error, TRAINED):
        raise ValueError(
            f"with {best} it predicts noise better (error {others[best]:.3f}) than with the given flags ({error:.3f}):"
            " they are of another network"
        )
    if error >= TRAINED:
        return f"attention: not checked, since the network does not denoise (error {error:.2f})"
    shown = ", ".join(f"{value:.3f} with {text}" for text, value in others.items())
    if best is not None and others[best] < WARNED * error:
        return (
            f"warning: with {best} it predicts noise a little better (error {others[best]:.3f}) than with the given"
            f" flags ({error:.3f}): compare samples of both"
        )
    return f"attention checked: noise is predicted with error {error:.3f}" + (f"; {shown}" if shown else "")
