"""The way back to improved- and guided-diffusion: our network as a state dict of theirs, and what builds it there."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...portable.networks_ddpm_hf import NoisyClassifier
from ...portable.scheduling_ddpm_hf import DDPMScheduler
from .openai import SCHEDULES, build_unet_on_meta, openai_betas
from .openai_flags import GUIDED, IMPROVED, parse_flags, truth
from .openai_names import to_openai

Multiples = dict[int, tuple[float, ...]]
# What their scripts multiply the channels by at each level, by the size of the images
MULTIPLES: dict[str, Multiples] = {
    GUIDED: {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)},
    IMPROVED: {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)},
}
OF_UPSAMPLERS: Multiples = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}
NO_LEVEL = 1  # of an attention resolution: no level of their networks is a single pixel


def export_openai(model: torch.nn.Module, text: str, scheduler: Any = None) -> tuple[dict[str, torch.Tensor], str]:
    """OpenAI's state dict of a UNet or a `NoisyClassifier` of ours, and what builds it there, for people.

    Args:
        text: flags; `--use_new_attention_order True` writes that order.
        scheduler: of the UNet's pipeline.

    Raises:
        ValueError: a network or a diffusion that OpenAI's code does not have.
    """
    flags = parse_flags(text)
    if unused := sorted(set(flags) - {"use_new_attention_order"}):
        raise ValueError(f"--flags: only --use_new_attention_order counts on the way back (got --{unused[0]})")
    legacy = not truth(flags, "use_new_attention_order")
    encoder = isinstance(model, NoisyClassifier)
    config = build_unet_on_meta(dict(model.config.unet)).config if encoder else model.config
    check_expressible(config)
    if config["in_channels"] != 3 or not (encoder or config["out_channels"] in (3, 6)):
        raise ValueError(
            f"the network reads {config['in_channels']} channels and predicts {config['out_channels']}; OpenAI's read"
            " images of 3, and predict 3 or 6"
        )
    if config.get("condition_channels") and not legacy:
        raise ValueError("--use_new_attention_order: OpenAI's upsamplers have the legacy order alone; leave it out")
    if encoder and (config["attention_head_dim"] != 64 or not legacy):
        raise ValueError("OpenAI's classifiers have attention heads of 64 channels in the legacy order, and no others")
    if scheduler is not None:
        check_diffusion(scheduler)
    return to_openai(model, config, legacy, encoder), describe_build(model, config, scheduler, legacy)


def check_expressible(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a UNet's config that OpenAI's code cannot build."""
    kinds = [kind.replace("Resnet", "").replace("sample", "") for kind in config["down_block_types"]]
    up_kinds = [
        kind.replace("Resnet", "").replace("sample", "").replace("Up", "Down") for kind in config["up_block_types"]
    ]
    required = {
        "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
        "time_embedding_type": "positional", "center_input_sample": False, "act_fn": "silu", "add_attention": True,
        "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "class_embed_type": None,
    }  # fmt: skip
    if config["resnet_time_scale_shift"] == "scale_shift" or config["attn_norm_num_groups"] is not None:
        required["attn_norm_num_groups"] = 32
    if not isinstance(config["sample_size"], int):
        raise ValueError(f"the network is for images of {config['sample_size']} pixels, and OpenAI's are square")
    for key, value in required.items():
        if config[key] != value:
            raise ValueError(
                f"the network has {key} {config[key]!r}, and OpenAI's always {value!r}: it has no such network"
            )
    resamples = {config["downsample_type"], config["upsample_type"]}
    mirrored = kinds == up_kinds[::-1] and set(kinds) <= {"DownBlock2D", "AttnDownBlock2D"} and len(resamples) == 1
    types = [*config["down_block_types"], *config["up_block_types"]]
    wrong = [kind for kind in types if ("resnet" in resamples) != kind.startswith("Resnet") and "Attn" not in kind]
    if not mirrored or wrong:
        raise ValueError("the network's blocks are not those that OpenAI's code builds")
    channels = config.get("timestep_channels") or config["block_out_channels"][0]
    if (config["time_embedding_dim"] or 4 * config["block_out_channels"][0]) != 4 * channels:
        raise ValueError("the network's time embedding is not 4 times its channels wide, as OpenAI's")


def check_diffusion(scheduler: Any) -> None:
    """Raise ValueError for a diffusion that OpenAI's scripts cannot be told."""
    config = scheduler.config
    if config.prediction_type not in ("epsilon", "sample"):
        raise ValueError(f"the model predicts {config.prediction_type}, and OpenAI's epsilon or x_0 alone")
    if config.variance_type == "learned":
        raise ValueError("the model's variance is learned, and OpenAI's learned_range or fixed")
    schedule = SCHEDULES.get(config.beta_schedule)
    T = config.num_train_timesteps
    named = schedule and DDPMScheduler(T, beta_schedule=config.beta_schedule, **openai_betas(schedule, T))
    if not named or not np.allclose(named.betas, scheduler.betas, rtol=1e-5):
        raise ValueError("the model's noise schedule is neither OpenAI's linear nor its cosine one")


def describe_build(model: torch.nn.Module, config: Mapping[str, Any], scheduler: Any, legacy: bool) -> str:
    """The repository whose scripts build the network, their flags for it, and what the flags cannot say.

    Raises:
        ValueError: a diffusion that the scripts of neither have for this network.
    """
    small = scheduler is not None and scheduler.config.variance_type.startswith("fixed_small")
    improved = fits_improved(config, legacy) and not isinstance(model, NoisyClassifier)
    size, multiples = config["sample_size"], multiples_of(config)
    if small and not improved:
        raise ValueError(
            "the variance is fixed_small: guided-diffusion has no such, and improved-diffusion no such network"
        )
    of_improved = improved and (small or (size == 32 and multiples == MULTIPLES[IMPROVED][32]))
    repository = IMPROVED if of_improved else GUIDED
    flags = flags_of(model, config, scheduler, legacy, repository)
    lines = [f"{repository}'s scripts build its network with", " ".join(f"--{name} {flags[name]}" for name in flags)]
    known = OF_UPSAMPLERS if config.get("condition_channels") else MULTIPLES[repository]
    told = repository == GUIDED and not config.get("condition_channels") and all(one % 1 == 0 for one in multiples)
    if known.get(size) != multiples and not told:
        sizes = ", ".join(map(str, sorted(known)))
        lines.append(f"(for {sizes} pixels and their own widths; its network itself takes channel_mult={multiples})")
    classes = config["num_class_embeds"]
    if classes and classes != 1000:
        lines.append(f"(with NUM_CLASSES = {classes} in script_util.py)")
    return "\n".join(lines)


def multiples_of(config: Mapping[str, Any]) -> tuple[float, ...]:
    """What the levels' channels are of the network's."""
    channels = config.get("timestep_channels") or config["block_out_channels"][0]
    return tuple(width / channels for width in config["block_out_channels"])


def fits_improved(config: Mapping[str, Any], legacy: bool) -> bool:
    """Whether improved-diffusion has the network."""
    return config["downsample_type"] != "resnet" and legacy and heads_of(config) is not None


def heads_of(config: Mapping[str, Any]) -> int | None:
    """The number of attention heads that all layers have; None where it differs."""
    if config["attention_head_dim"] is None:
        return config.get("num_attention_heads") or 1
    widths = config["block_out_channels"]
    attending = {width for width, kind in zip(widths, config["down_block_types"]) if "Attn" in kind} | {widths[-1]}
    return attending.pop() // config["attention_head_dim"] if len(attending) == 1 else None


def flags_of(
    model: torch.nn.Module, config: Mapping[str, Any], scheduler: Any, legacy: bool, repository: str
) -> dict[str, Any]:
    """The flags with which a repository's scripts build the network."""
    encoder, upsampler = isinstance(model, NoisyClassifier), bool(config.get("condition_channels"))
    size, multiples, prefix = config["sample_size"], multiples_of(config), "classifier_" if encoder else ""
    sides = [size // 2**level for level, kind in enumerate(config["down_block_types"]) if "Attn" in kind]
    flags: dict[str, Any] = {
        **({"large_size": size, "small_size": size // 4} if upsampler else {"image_size": size}),
        "classifier_width" if encoder else "num_channels": round(config["block_out_channels"][-1] / multiples[-1]),
        "classifier_depth" if encoder else "num_res_blocks": config["layers_per_block"],
        f"{prefix}attention_resolutions": ",".join(map(str, sides or [NO_LEVEL])),
        f"{prefix}use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
    }
    if repository == GUIDED:
        flags[f"{prefix}resblock_updown"] = config["downsample_type"] == "resnet"
    if not encoder:
        derived = upsampler or repository == IMPROVED or MULTIPLES[GUIDED].get(size) == multiples
        if not derived:
            flags["channel_mult"] = ",".join(f"{multiple:g}" for multiple in multiples)
        flags["learn_sigma"] = config["out_channels"] == 6
        flags |= {"class_cond": bool(config["num_class_embeds"]), "dropout": config["dropout"]}
        if repository == GUIDED and config["attention_head_dim"] is not None:
            flags["num_head_channels"] = config["attention_head_dim"]
        else:
            flags["num_heads"] = heads_of(config)
        flags |= {} if legacy else {"use_new_attention_order": True}
    if scheduler is not None:
        T = scheduler.config.num_train_timesteps
        flags |= {"diffusion_steps": T, "noise_schedule": SCHEDULES[scheduler.config.beta_schedule]}
        flags |= {"rescale_timesteps": config.get("timestep_scale", 1.0) != 1.0}
        flags |= {"predict_xstart": True} if scheduler.config.prediction_type == "sample" else {}
        flags |= {"sigma_small": True} if scheduler.config.variance_type.startswith("fixed_small") else {}
    return flags
