"""The names of OpenAI's tensors and ours, improved- and guided-diffusion's, and both ways between them.

Both repositories name their layers alike. One table, made from a UNet's config, names every tensor here and there;
conversion reads it in one direction or the other, so that the way back is exact to the bit.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .openai_layout import State, get

RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
BOTH = ("weight", "bias")
ATTENTION_LAYERS = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"


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
                yield f"{ours}.to_{{}}.{kind}", f"{theirs}.qkv.{kind}", heads
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
        value = get(state, theirs)
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
    joined = get(state, "out.2.qkv_proj.weight")[..., 0]
    width = joined.shape[1]
    return {
        "norm.weight": get(state, "out.0.weight"),
        "norm.bias": get(state, "out.0.bias"),
        "pool.position": get(state, "out.2.positional_embedding").T.contiguous(),
        "pool.attention.in_proj_weight": joined,
        "pool.attention.in_proj_bias": get(state, "out.2.qkv_proj.bias"),
        "pool.attention.out_proj.weight": torch.eye(width, dtype=joined.dtype),
        "pool.attention.out_proj.bias": torch.zeros(width, dtype=joined.dtype),
        "head.weight": get(state, "out.2.c_proj.weight")[..., 0],
        "head.bias": get(state, "out.2.c_proj.bias"),
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
