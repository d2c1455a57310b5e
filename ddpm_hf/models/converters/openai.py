"""Networks of OpenAI's improved-diffusion and guided-diffusion: their layout by the shapes, and both ways of naming.

Both repositories name their layers alike. One table, made from a UNet's config, names every tensor here and there;
conversion reads it in one direction or the other, so that the way back is exact to the bit.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

State = Mapping[str, torch.Tensor]
RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
BOTH = ("weight", "bias")
ATTENTION_LAYERS = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"


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
        out_channels, positions = len(_get(state, "out.2.weight")), 0
    else:
        levels, layers = _levels_of_encoder(state, inputs)
        updown = levels > 1 and not any("down" in kinds for kinds in inputs)
        if "out.2.positional_embedding" not in state:
            raise ValueError("a classifier whose --classifier_pool is not attention, which is not supported")
        out_channels = len(_get(state, "out.2.c_proj.weight"))
        positions = state["out.2.positional_embedding"].shape[1] - 1
    if layers < 1 or len(inputs) != levels * (layers + 1):
        raise ValueError(
            f"{len(inputs)} input_blocks and {len(outputs)} output_blocks: not a UNet of improved- or guided-diffusion"
            " with learned resampling"
        )
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    residual = _get(state, "middle_block.0.emb_layers.1.weight")
    return Layout(
        channels=_get(state, "time_embed.0.weight").shape[1],
        in_channels=_get(state, "input_blocks.0.0.weight").shape[1],
        out_channels=out_channels,
        widths=tuple(len(_get(state, f"input_blocks.{first}.0.in_layers.2.weight")) for first in firsts),
        layers=layers,
        attention=tuple("attention" in inputs[first] for first in firsts),
        resblock_updown=updown,
        scale_shift=len(residual) == 2 * len(_get(state, "middle_block.0.in_layers.2.weight")),
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


def _get(state: State, name: str) -> torch.Tensor:
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
    if num_head_channels != -1 and any(width % num_head_channels for width in attending):
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
    resample = "resnet" if layout.resblock_updown else "conv"
    return {
        "sample_size": image_size,
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels if not layout.positions else layout.in_channels,
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


def tensor_names(config: Mapping[str, Any], encoder: bool = False) -> Iterator[tuple[str, str]]:
    """(our name, OpenAI's) of each layer of a UNet; of an attention layer, the prefixes.

    Args:
        config: of the UNet, all of it.
        encoder: of the encoder half alone, as a classifier has it.
    """
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    attends = ["Attn" in kind for kind in config["down_block_types"]]
    resnet = config["downsample_type"] == "resnet"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    if config["num_class_embeds"] and not encoder:
        yield "class_embedding", "label_emb"
    yield "conv_in", "input_blocks.0.0"
    number = 1
    for level in range(levels):
        ours = f"down_blocks.{level}"
        for layer in range(layers):
            yield from _residual(f"{ours}.resnets.{layer}", f"input_blocks.{number}.0")
            if attends[level]:
                yield f"{ours}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if level < levels - 1:
            if resnet:
                yield from _residual(f"{ours}.downsamplers.0", f"input_blocks.{number}.0")
            else:
                yield f"{ours}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield from _residual("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _residual("mid_block.resnets.1", "middle_block.2")
    if encoder:
        return
    for number in range(levels * (layers + 1)):
        up, layer = divmod(number, layers + 1)
        ours, attending = f"up_blocks.{up}", attends[levels - 1 - up]
        yield from _residual(f"{ours}.resnets.{layer}", f"output_blocks.{number}.0")
        if attending:
            yield f"{ours}.attentions.{layer}", f"output_blocks.{number}.1"
        if layer == layers and up < levels - 1:
            theirs = f"output_blocks.{number}.{2 if attending else 1}"
            if resnet:
                yield from _residual(f"{ours}.upsamplers.0", theirs)
            else:
                yield f"{ours}.upsamplers.0.conv", f"{theirs}.conv"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for mine, other in RESIDUAL.items():
        yield f"{ours}.{mine}", f"{theirs}.{other}"


def _pairs(model: torch.nn.Module, config: Mapping[str, Any], encoder: bool) -> Iterator[tuple[str, str, int]]:
    """(our tensor, OpenAI's, heads); heads is above 0 for queries, keys and values, which are one tensor there."""
    mine = model.state_dict()
    for ours, theirs in tensor_names(config, encoder):
        if re.fullmatch(ATTENTION_LAYERS, ours):
            heads = model.get_submodule(ours).heads
            for kind in BOTH:
                yield f"{ours}.to_{{}}.{kind}", f"{theirs}.qkv.{kind}", heads  # type: ignore[misc]
                for inner, other in ATTENTION.items():
                    yield f"{ours}.{inner}.{kind}", f"{theirs}.{other}.{kind}", 0
        else:
            yield from ((f"{ours}.{kind}", f"{theirs}.{kind}", 0) for kind in BOTH if f"{ours}.{kind}" in mine)


def split_heads(joined: torch.Tensor, heads: int, legacy: bool) -> list[torch.Tensor]:
    """Queries, keys and values [C, ...] of OpenAI's joined tensor [3C, ...].

    Args:
        legacy: whether each head has its queries, keys and values together, as in improved-diffusion, and in
            guided-diffusion without `use_new_attention_order`.
    """
    if not legacy:
        return list(joined.chunk(3))
    apart = joined.unflatten(0, (heads, 3, -1))  # [heads, 3, C/heads, ...]
    return [apart[:, part].flatten(0, 1) for part in range(3)]


def join_heads(parts: list[torch.Tensor], heads: int, legacy: bool) -> torch.Tensor:
    """The inverse of `split_heads`."""
    if not legacy:
        return torch.cat(parts)
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def load_openai(
    model: torch.nn.Module, config: Mapping[str, Any], state: State, legacy: bool, encoder: bool = False
) -> None:
    """Give our UNet, or classifier, the weights of OpenAI's; both have the same tensors or it is refused.

    Raises:
        ValueError: tensors that are missing, left over, or of another shape.
    """
    mine, given, used = model.state_dict(), {}, set()
    for ours, theirs, heads in _pairs(model, config, encoder):
        value = _get(state, theirs)
        used.add(theirs)
        named = zip(("q", "k", "v"), split_heads(value, heads, legacy)) if heads else [("", value)]
        for letter, part in named:
            name = ours.format(letter)
            if part.numel() != mine[name].numel() or len(part) != len(mine[name]):
                raise ValueError(f"{theirs} has the shape {list(value.shape)}, and {name} {list(mine[name].shape)}")
            given[name] = part.reshape(mine[name].shape)
    if encoder:
        given |= _pool_to_ours(state)
        used |= {name for name in state if name.startswith("out.")}
    left = sorted(set(state) - used)
    missing = sorted(set(mine) - set(given))
    if left or missing:
        raise ValueError(
            f"not the network that its shapes describe: {', '.join((left or missing)[:3])}"
            f"{' ...' if len(left or missing) > 3 else ''} {'left over' if left else 'missing'}"
        )
    model.load_state_dict(given)


def to_openai(
    model: torch.nn.Module, config: Mapping[str, Any], legacy: bool, encoder: bool = False
) -> dict[str, torch.Tensor]:
    """OpenAI's state dict of our UNet, or of a classifier: the way back, to the bit."""
    mine, state = model.state_dict(), {}
    one_dimensional = re.compile(r"\.(qkv|proj_out)\.weight$")  # their attention convolves over positions
    for ours, theirs, heads in _pairs(model, config, encoder):
        parts = [mine[ours.format(letter)] for letter in "qkv"] if heads else [mine[ours]]
        value = join_heads(parts, heads, legacy) if heads else parts[0]
        state[theirs] = (value[..., None] if one_dimensional.search(theirs) else value).clone()
    return {**state, **(_pool_to_openai(mine) if encoder else {})}


def _pool_to_ours(state: State) -> dict[str, torch.Tensor]:
    """The end of a classifier. OpenAI's pooling goes from attention to logits in one layer, ours in two."""
    joined = _get(state, "out.2.qkv_proj.weight")[..., 0]
    width = joined.shape[1]
    return {
        "norm.weight": _get(state, "out.0.weight"),
        "norm.bias": _get(state, "out.0.bias"),
        "pool.position": _get(state, "out.2.positional_embedding").T.contiguous(),
        "pool.attention.in_proj_weight": joined,
        "pool.attention.in_proj_bias": _get(state, "out.2.qkv_proj.bias"),
        "pool.attention.out_proj.weight": torch.eye(width, dtype=joined.dtype),
        "pool.attention.out_proj.bias": torch.zeros(width, dtype=joined.dtype),
        "head.weight": _get(state, "out.2.c_proj.weight")[..., 0],
        "head.bias": _get(state, "out.2.c_proj.bias"),
    }


def _pool_to_openai(mine: State) -> dict[str, torch.Tensor]:
    """The inverse of `_pool_to_ours`: the last two layers become one, exactly where the first is the identity."""
    inner, head = mine["pool.attention.out_proj.weight"], mine["head.weight"]
    weight, bias = head, mine["head.bias"]
    if not torch.equal(inner, torch.eye(len(inner), dtype=inner.dtype)) or mine["pool.attention.out_proj.bias"].any():
        bias = (head.double() @ mine["pool.attention.out_proj.bias"].double() + bias.double()).to(bias.dtype)
        weight = (head.double() @ inner.double()).to(head.dtype)
    return {
        "out.0.weight": mine["norm.weight"].clone(),
        "out.0.bias": mine["norm.bias"].clone(),
        "out.2.positional_embedding": mine["pool.position"].T.contiguous(),
        "out.2.qkv_proj.weight": mine["pool.attention.in_proj_weight"][..., None].clone(),
        "out.2.qkv_proj.bias": mine["pool.attention.in_proj_bias"].clone(),
        "out.2.c_proj.weight": weight[..., None].clone(),
        "out.2.c_proj.bias": bias.clone(),
    }
