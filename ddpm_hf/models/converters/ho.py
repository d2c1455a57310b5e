"""Ho et al.'s networks: their TensorFlow checkpoints, the same as .npz, and the PyTorch port of them.

All three have one set of layers. TensorFlow's names and layouts become the port's, and those Diffusers'.
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...portable.networks_ddpm_hf import build_unet
from ...portable.scheduling_ddpm_hf import DDPMScheduler
from .conversion import Conversion, Options, State, make_pipeline
from .flags import number, parse_words, whole
from .tensor_bundle import read_bundle

EMA = "/ExponentialMovingAverage"
LEAVES = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}
FIXED = {"temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2",
         "conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}  # fmt: skip
RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
            "nin_shortcut": "conv_shortcut", "conv_shortcut": "conv_shortcut"}  # fmt: skip
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
FLAGS = ("image_size", "model_var_type", "model_mean_type", "beta_schedule", "beta_start", "beta_end",
         "num_diffusion_timesteps", "dropout")  # fmt: skip
VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small", "learned": "learned"}
PREDICTIONS = {"eps": "epsilon", "xstart": "sample", "xprev": "posterior_mean"}
SCHEDULES = ("quad", "linear", "warmup10", "warmup50", "const", "jsd")
# (widths, image size) of the published models, and what they were trained with
PUBLISHED = {
    ((128, 256, 256, 256), 32): ("fixedlarge", 0.1),
    ((128, 128, 256, 256, 512, 512), 256): ("fixedsmall", 0.0),
}


def is_ho(state: State) -> bool:
    """Whether a state dict's names are the port's."""
    return {"temb.dense.0.weight", "conv_in.weight", "mid.block_1.norm1.weight"} <= set(state)


def is_variable(name: str) -> bool:
    """Whether a variable of TensorFlow is a weight, and not of the optimizer."""
    return re.fullmatch(rf"model/.+/({'|'.join(LEAVES)})({EMA})?", name) is not None


def read_tensorflow(path: Path, ema: bool) -> dict[str, torch.Tensor]:
    """The weights of a TensorFlow checkpoint, with the port's names and layout.

    Raises:
        ValueError: what `read_bundle` and `of_tensorflow` raise.
    """
    bundle = read_bundle(path, lambda name: is_variable(name) and name.endswith(EMA) == ema)
    if not bundle:
        raise ValueError(f"{path} has no {'averaged ' if ema else ''}weights of Ho et al.'s networks (model/...)")
    return of_tensorflow(bundle, ema)


def of_tensorflow(variables: Mapping[str, np.ndarray], ema: bool = True) -> dict[str, torch.Tensor]:
    """The port's state dict of TensorFlow's variables: HWIO to OIHW, and [in, out] to [out, in].

    Args:
        ema: whether to take the averaged weights.
    """
    state = {}
    for full, value in variables.items():
        name = full.removesuffix(":0")
        if not is_variable(name) or name.endswith(EMA) != ema:
            continue
        *scopes, leaf = name.removeprefix("model/").removesuffix(EMA).split("/")
        if scopes[0] in ("temb",):
            scopes = ["temb", "dense", scopes[1].removeprefix("dense")]
        elif scopes[0] != "mid":
            scopes = [
                part for scope in scopes for part in re.sub(r"^(down|up|block|attn)_(\d+)$", r"\1 \2", scope).split()
            ]
        tensor = torch.from_numpy(np.array(value))
        if leaf == "W":
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
        state[".".join([*scopes, LEAVES[leaf]])] = tensor.contiguous()
    return state


def diffusers_name(name: str, levels: int) -> str | None:
    """Diffusers' name of a port's tensor; None if it has none."""
    layer, _, leaf = name.rpartition(".")
    if layer in FIXED:
        return f"{FIXED[layer]}.{leaf}"
    middle = re.fullmatch(r"mid\.(block_[12]|attn_1)\.(\w+)", layer)
    if middle and middle[1] == "attn_1" and middle[2] in ATTENTION:
        return f"mid_block.attentions.0.{ATTENTION[middle[2]]}.{leaf}"
    if middle and middle[2] in RESIDUAL:
        return f"mid_block.resnets.{int(middle[1][-1]) - 1}.{RESIDUAL[middle[2]]}.{leaf}"
    match = re.fullmatch(r"(down|up)\.(\d+)\.(?:(block|attn)\.(\d+)\.(\w+)|(downsample|upsample)\.conv)", layer)
    if not match:
        return None
    way, level, kind, number_, part, resample = match.groups()
    blocks = f"{way}_blocks.{int(level) if way == 'down' else levels - 1 - int(level)}"
    if resample:
        return f"{blocks}.{resample}rs.0.conv.{leaf}"
    names, folder = (RESIDUAL, "resnets") if kind == "block" else (ATTENTION, "attentions")
    return f"{blocks}.{folder}.{number_}.{names[part]}.{leaf}" if part in names else None


def read_config(state: State, flags: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(the UNet's arguments, the scheduler's, what was concluded) of a port's state dict.

    Raises:
        ValueError: flags that are missing or that contradict the shapes.
    """
    for name in ("down.0.block.0.conv1.weight", "conv_in.weight", "conv_out.weight"):
        if name not in state:
            raise ValueError(f"no tensor {name}: not a whole network of Ho et al.'s")
    levels = 1 + max(int(name.split(".")[1]) for name in state if re.match(r"down\.\d+\.", name))
    layers = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("down.0.block."))
    first = [state.get(f"down.{level}.block.0.conv1.weight") for level in range(levels)]
    if lacking := [level for level, value in enumerate(first) if value is None]:
        raise ValueError(f"no tensor down.{lacking[0]}.block.0.conv1.weight: not a whole network of Ho et al.'s")
    widths = tuple(len(value) for value in first if value is not None)
    attends = [f"down.{level}.attn.0.q.weight" in state for level in range(levels)]
    in_channels, out_channels = state["conv_in.weight"].shape[1], len(state["conv_out.weight"])
    said = []
    if "image_size" in flags:
        size = whole(flags, "image_size")
    elif sum(attends) == 1:
        size = 16 * 2 ** attends.index(True)
        said.append(f"image size {size}: it attends at 16×16, as all of Ho et al.'s networks")
    else:
        raise ValueError("its shapes do not tell the image size: give --flags '--image_size 32'")
    if size < 1 or size % 2 ** (levels - 1):
        raise ValueError(f"--image_size {size}: the file has {levels} levels: a multiple of {2 ** (levels - 1)}")
    variance, dropout = PUBLISHED.get((widths, size), (None, 0.0))
    variance = flags.get("model_var_type", "learned" if out_channels == 2 * in_channels else variance)
    if variance not in VARIANCES:
        raise ValueError(
            "its shapes do not tell the variance: give --flags '--model_var_type fixedlarge' (or fixedsmall, learned)"
            if variance is None
            else f"--model_var_type {variance}: must be one of {', '.join(VARIANCES)}"
        )
    if (variance == "learned") != (out_channels == 2 * in_channels):
        raise ValueError(f"--model_var_type {variance}: the file has {out_channels} output channels")
    mean, schedule = flags.get("model_mean_type", "eps"), flags.get("beta_schedule", "linear")
    for name, value, known in (("model_mean_type", mean, PREDICTIONS), ("beta_schedule", schedule, SCHEDULES)):
        if value not in known:
            raise ValueError(f"--{name} {value}: must be one of {', '.join(known)}")
    unet = {
        "sample_size": size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": tuple("AttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        "up_block_types": tuple("AttnUpBlock2D" if one else "UpBlock2D" for one in attends[::-1]),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "dropout": number(flags, "dropout", dropout),
    }
    scheduler = {
        "num_train_timesteps": whole(flags, "num_diffusion_timesteps", 1000),
        "beta_schedule": "quadratic" if schedule == "quad" else schedule,
        "beta_start": number(flags, "beta_start", 1e-4),
        "beta_end": number(flags, "beta_end", 0.02),
        "prediction_type": PREDICTIONS[mean],
        "variance_type": VARIANCES[variance],
    }
    said.append(f"variance {VARIANCES[variance]}")
    return unet, scheduler, said


def load_ho(model: torch.nn.Module, state: State) -> None:
    """Give our UNet the port's weights; both have the same tensors or it is refused.

    Raises:
        ValueError: tensors that are missing, left over, or of another shape.
    """
    mine, levels, given = model.state_dict(), len(model.config.block_out_channels), {}
    for theirs, value in state.items():
        ours = diffusers_name(theirs, levels)
        if ours not in mine:
            raise ValueError(f"{theirs} is not of Ho et al.'s networks")
        if value.numel() != mine[ours].numel() or len(value) != len(mine[ours]):
            raise ValueError(f"{theirs} has the shape {list(value.shape)}, and {ours} {list(mine[ours].shape)}")
        given[ours] = value.reshape(mine[ours].shape)
    if missing := sorted(set(mine) - set(given)):
        raise ValueError(f"it has no weights for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}")
    model.load_state_dict(given)


def parse_flags(text: str) -> dict[str, str]:
    """The flags of Ho et al.'s scripts."""
    return parse_words(text, FLAGS, "Ho et al.'s scripts")


def convert_ho(state: State, options: Options) -> Conversion:
    """The pipeline of the port's state dict.

    Raises:
        ValueError: what `read_config` and `load_ho` raise.
    """
    arguments, diffusion, said = read_config(state, parse_flags(options.flags or ""))
    unet = build_unet(arguments).eval()
    load_ho(unet, state)
    widths, size = arguments["block_out_channels"], arguments["sample_size"]

    def original() -> object:
        module = importlib.import_module("pytorch_diffusion.model")
        small = 2 ** max(3, len(widths))  # the comparison's images
        attending = [small // 2**level for level, kind in enumerate(arguments["down_block_types"]) if "Attn" in kind]
        network = module.Model(
            ch=widths[0], out_ch=arguments["out_channels"], ch_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=arguments["layers_per_block"], attn_resolutions=attending,
            in_channels=arguments["in_channels"], resolution=small,
        )  # fmt: skip
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        network.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()})  # 1×1 kernels
        return network

    count = sum(each.numel() for each in unet.parameters())
    facts = [
        f"Ho et al.'s network: {count:,} parameters, {size}×{size}, levels of {', '.join(map(str, widths))}",
        *said,
    ]
    facts.append(f"diffusion: {diffusion['beta_schedule']}, {diffusion['num_train_timesteps']} steps")
    return Conversion(make_pipeline(unet, DDPMScheduler(**diffusion), options.labels), facts, original, unet)
