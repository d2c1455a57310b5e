"""The layout of OpenAI's networks, improved- and guided-diffusion's, by the shapes of a checkpoint."""

import re
from typing import Any, NamedTuple

import torch

from .conversion import State


class Layout(NamedTuple):
    """What the shapes of a checkpoint tell of its network.

    Args:
        channels: the width of the sinusoidal embedding, `num_channels` of the flags.
        widths: of the levels, from the full resolution down.
        layers: residual blocks a level.
        attention: for each level, whether it attends.
        resblock_updown: whether residual blocks resample.
        scale_shift: whether the time embedding scales and shifts.
        positions: of a classifier, those that its pooling attends to; 0 for a UNet.
    """

    channels: int
    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    resblock_updown: bool
    scale_shift: bool
    classes: int | None
    positions: int = 0

    @property
    def upsampler(self) -> bool:
        """Whether it also reads an image of lower resolution, enlarged."""
        return self.in_channels == 6 and self.out_channels in (3, 6)

    @property
    def learned_variance(self) -> bool:
        """Whether half of its output is a variance."""
        return self.out_channels == 2 * (self.in_channels // 2 if self.upsampler else self.in_channels)


def is_openai(state: State) -> bool:
    """Whether a state dict's names are those of these repositories."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"} <= set(state)


def read_layout(state: State) -> Layout:
    """What the shapes tell.

    Raises:
        ValueError: another network.
    """
    inputs, outputs = (_children(state, name) for name in ("input_blocks", "output_blocks"))
    if not inputs:
        raise ValueError("it has no input_blocks: not a network of improved- or guided-diffusion")
    if outputs:
        resampling = [number for number, kinds in enumerate(outputs) if "up" in kinds or kinds.count("residual") == 2]
        levels = len(resampling) + 1
        layers, updown = len(outputs) // levels - 1, any(kinds.count("residual") == 2 for kinds in outputs)
        out_channels, positions = len(get(state, "out.2.weight")), 0
    else:
        levels, layers = _levels_of_encoder(state, inputs)
        updown = levels > 1 and not any("down" in kinds for kinds in inputs)
        if "out.2.positional_embedding" not in state:
            raise ValueError("a classifier whose --classifier_pool is not attention, which is not supported")
        out_channels = len(get(state, "out.2.c_proj.weight"))
        positions = state["out.2.positional_embedding"].shape[1] - 1
    if layers < 1 or len(inputs) != levels * (layers + 1):
        raise ValueError(
            f"{len(inputs)} input_blocks and {len(outputs)} output_blocks: not a UNet of improved- or guided-diffusion"
            " with learned resampling"
        )
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    residual = get(state, "middle_block.0.emb_layers.1.weight")
    return Layout(
        channels=get(state, "time_embed.0.weight").shape[1],
        in_channels=get(state, "input_blocks.0.0.weight").shape[1],
        out_channels=out_channels,
        widths=tuple(len(get(state, f"input_blocks.{first}.0.in_layers.2.weight")) for first in firsts),
        layers=layers,
        attention=tuple("attention" in inputs[first] for first in firsts),
        resblock_updown=updown,
        scale_shift=len(residual) == 2 * len(get(state, "middle_block.0.in_layers.2.weight")),
        classes=len(state["label_emb.weight"]) if "label_emb.weight" in state else None,
        positions=positions,
    )


KINDS = {"in_layers.0": "residual", "qkv": "attention", "op": "down", "conv": "up"}


def _children(state: State, name: str) -> list[list[str]]:
    """The kinds of the layers in each of `input_blocks` or `output_blocks`."""
    found: dict[int, list[str]] = {}
    for key in state:
        match = re.fullmatch(rf"{name}\.(\d+)\.\d+\.(?:(in_layers\.0|qkv|op|conv)\.)?weight", key)
        if match:
            found.setdefault(int(match[1]), []).append(KINDS.get(match[2], "convolution"))
    return [found[number] for number in sorted(found)]


def _levels_of_encoder(state: State, inputs: list[list[str]]) -> tuple[int, int]:
    """(levels, residual blocks a level) of a network without output blocks.

    Downsampling residual blocks look like others, but do not attend, and a level has one width.
    """
    downs = sum("down" in kinds for kinds in inputs)
    if downs:
        return downs + 1, len(inputs) // (downs + 1) - 1
    widths = [len(state[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in range(1, len(inputs))] + [0]
    attends = ["attention" in kinds for kinds in inputs[1:]]
    possible = []
    for levels in range(1, len(inputs) // 2 + 1):
        size = len(inputs) // levels
        if len(inputs) % levels:
            continue
        groups = [slice(level * size, (level + 1) * size) for level in range(levels)]
        uniform = all(len(set(widths[group]) - {0}) == 1 for group in groups)
        if (
            uniform
            and all(len(set(attends[group][: size - 1])) == 1 for group in groups)
            and not any(attends[group.stop - 1] for group in groups[:-1])
        ):
            possible.append((levels, size - 1))
    if not possible:
        raise ValueError("its input_blocks are not those of a classifier of guided-diffusion")
    return possible[-1]  # the most levels: fewer would be the same blocks without resampling


def get(state: State, name: str) -> torch.Tensor:
    if name not in state:
        raise ValueError(f"it has no {name}: not a network of improved- or guided-diffusion")
    return state[name]


def unet_config(
    layout: Layout, image_size: int, num_heads: int, num_head_channels: int, timestep_scale: float, dropout: float
) -> dict[str, Any]:
    """The arguments of a UNet of that layout, for `portable.networks_ddpm_hf.build_unet`.

    Args:
        image_size: height and width in pixels.
        num_heads: of each attention layer, where `num_head_channels` is -1.
        num_head_channels: the width of a head, or -1.
        timestep_scale: factor of t, for models of rescaled timesteps.

    Raises:
        ValueError: heads that do not fit.
    """
    widths = layout.widths
    attending = {width for width, attends in zip(widths, layout.attention) if attends} | {widths[-1]}  # and the middle
    if num_head_channels != -1 and (num_head_channels < 1 or any(width % num_head_channels for width in attending)):
        raise ValueError(f"--num_head_channels {num_head_channels} does not divide {sorted(attending)}, its widths")
    if num_head_channels == -1 and any(num_heads < 1 or width % num_heads for width in attending):
        raise ValueError(f"--num_heads {num_heads} does not divide {sorted(attending)}, the widths that attend")
    own: dict[str, Any] = {"timestep_scale": timestep_scale} if timestep_scale != 1.0 else {}
    if layout.channels != widths[0]:  # guided-diffusion's 512×512, whose first level has half the width
        own["timestep_channels"] = layout.channels
    if num_head_channels != -1:
        head_dim: int | None = num_head_channels
    elif num_heads == 1:
        head_dim = None
    elif len(attending) == 1:
        head_dim = widths[-1] // num_heads
    else:
        head_dim, own["num_attention_heads"] = None, num_heads
    plain = "Resnet{}sampleBlock2D" if layout.resblock_updown else "{}Block2D"
    kinds = {
        way: ["Attn" + f"{way}Block2D" if attends else plain.format(way) for attends in layout.attention]
        for way in ("Down", "Up")
    }
    in_channels = layout.in_channels
    if layout.upsampler:
        own["condition_channels"] = in_channels = in_channels // 2
    resample = "resnet" if layout.resblock_updown else "conv"
    return {
        "sample_size": image_size,
        "in_channels": in_channels,
        "out_channels": layout.out_channels if not layout.positions else in_channels,
        "layers_per_block": layout.layers,
        "block_out_channels": widths,
        "down_block_types": tuple(kinds["Down"]),
        "up_block_types": tuple(kinds["Up"][::-1]),
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": dropout,
        "attention_head_dim": head_dim,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if layout.scale_shift else "default",
        "num_class_embeds": layout.classes,
        "time_embedding_dim": 4 * layout.channels if layout.channels != widths[0] else None,
        **own,
    }
