"""Building UNets from their configs."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..common.errors import UsageError, one_line

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    from diffusers import UNet2DModel


def make_unet(
    arguments: dict[str, Any],
    variance_type: str,
    classes: int | None,
    seed: int,
    condition_channels: int = 0,
) -> "UNet2DModel":
    """The UNet, initialised from the seed.

    Args:
        variance_type: a learned variance doubles the output's channels.
        classes: embeddings to make for classes, with the null class; None for none.
        condition_channels: that it reads besides x_t.
    """
    import torch

    from ..portable.scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES

    learned = variance_type in LEARNED_VARIANCE_TYPES
    channels = arguments["in_channels"]
    arguments = {**arguments, "in_channels": channels + condition_channels, "out_channels": channels * (1 + learned)}
    if classes is not None:
        arguments["num_class_embeds"] = classes
    torch.manual_seed(seed)
    try:
        return build_unet(arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(one_line(error)) from error


UNETS = ("UNet2DModel", "OpenAIUNet2DModel")  # the classes of UNets without text, by name


def stock_unet_defaults(kind: str = "UNet2DModel") -> dict[str, Any]:
    """The arguments of a `UNet2DModel`, or of another of `UNETS`, whose config does not name them."""
    parameters = inspect.signature(unet_type(kind).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def unet_type(kind: str) -> "type[UNet2DModel]":
    """The class of a UNet by its name in a config, one of `UNETS`."""
    from diffusers import UNet2DModel

    from ..portable.networks_ddpm_hf import OpenAIUNet2DModel

    return OpenAIUNet2DModel if kind == OpenAIUNet2DModel.__name__ else UNet2DModel


def build_unet(config: dict[str, Any]) -> "UNet2DModel":
    """A UNet from its arguments: `portable.networks_ddpm_hf.build_unet`, imported when it is used.

    Raises:
        ValueError: norm groups that do not divide the channels at some width.
    """
    from ..portable import networks_ddpm_hf

    return networks_ddpm_hf.build_unet(config)


def time_blindness(config: Mapping[str, Any]) -> str | None:
    """A warning where a UNet's norm groups hold one channel each, or None.

    The time embedding is added before the norm, which subtracts each group's mean, and so all of the embedding.
    """
    groups = config.get("norm_num_groups", 32)
    widths = [width for width in config["block_out_channels"] if width == groups]
    if not widths or config.get("resnet_time_scale_shift", "default") != "default":
        return None
    return (
        f"warning: norm_num_groups={groups} with {groups} channels: each group holds one channel, so the levels of"
        f" that width do not see the timestep; norm_num_groups={max(1, groups // 4)} trains better"
    )


def text_unet_config(channels: int, size: tuple[int, int], text_width: int) -> dict[str, Any]:
    """A small `UNet2DConditionModel` for latents [channels, *size]; all levels but the finest read the text."""
    from ..portable.sampling_ddpm_hf import downscaling

    height, width = size
    widths = (64, 128) if min(size) < 16 else (64, 128, 256)
    step = downscaling(widths)
    if height % step or width % step:
        raise ValueError(f"latents of {height}x{width}: both sides must be multiples of {step}")
    return {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * (len(widths) - 1)),
        "up_block_types": (*("CrossAttnUpBlock2D",) * (len(widths) - 1), "UpBlock2D"),
        "cross_attention_dim": text_width,
        "attention_head_dim": tuple(max(1, each // 64) for each in widths),  # the number of heads, whatever it says
        "norm_num_groups": 8,
    }
