"""Checkpoints of improved- and guided-diffusion: to a pipeline or a classifier, and back."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...portable.networks_ddpm_hf import NoisyClassifier, build_unet
from ...portable.scheduling_ddpm_hf import DDPMScheduler
from .attention_check import check_attention
from .conversion import Conversion, Options, State, make_pipeline, names_of_classes
from .openai_flags import GUIDED, IMPROVED, PUBLISHED, Flags, choose_flags, parse_flags
from .openai_layout import Layout, read_layout, unet_config
from .openai_names import load_openai, to_openai

SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}  # their names, by ours
# What their scripts multiply the channels by at each level, by the size of the images
MULTIPLES = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2),
}  # fmt: skip
MODULES = {IMPROVED: "improved_diffusion.unet", GUIDED: "guided_diffusion.unet"}


def convert_openai(state: State, options: Options, repository: str | None = None) -> Conversion:
    """The pipeline, or the classifier, of a state dict.

    Args:
        repository: `IMPROVED` or `GUIDED`; None to see it from name, shapes and flags.

    Raises:
        ValueError: another network, or flags that are missing or contradict it.
    """
    layout = read_layout(state)
    facts, known = [], PUBLISHED.get(options.name)
    if options.flags is None and known is not None:
        repository, text = repository or known[0], known[1]
        facts.append(f"flags of the published {options.name}: {text}")
    else:
        text = options.flags or ""
    flags, of = choose_flags(parse_flags(text), layout, repository)
    if known is not None:
        check_published(options.name, layout, flags, known)
    config = unet_config(
        layout, flags.image_size, flags.num_heads, flags.num_head_channels, flags.timestep_scale, flags.dropout
    )
    scheduler = make_scheduler(layout, flags)
    if layout.positions:
        model = network = make_classifier(config, layout, scheduler, options)
        whole = dict(build_unet_on_meta(config).config)
    else:
        network = build_unet(config).eval()
        whole = network.config
        model = make_pipeline(network, scheduler, options.labels)
    load_openai(network, whole, state, flags.legacy_order, encoder=bool(layout.positions))
    facts += describe(of, layout, flags, network)
    if not layout.positions and not layout.upsampler:
        facts.append(check_attention(network, whole, state, flags, scheduler))
    return Conversion(model, facts, original_of(of, layout, flags, state), network)


def build_unet_on_meta(config: dict[str, Any]) -> torch.nn.Module:
    """A UNet without memory for its weights, for its config."""
    with torch.device("meta"):
        return build_unet(config)


def make_scheduler(layout: Layout, flags: Flags) -> DDPMScheduler:
    """The diffusion. The linear schedule is scaled to T, as theirs."""
    fixed = "fixed_small" if flags.sigma_small else "fixed_large"
    return DDPMScheduler(
        num_train_timesteps=flags.diffusion_steps,
        beta_schedule=next(ours for ours, theirs in SCHEDULES.items() if theirs == flags.noise_schedule),
        prediction_type="sample" if flags.predict_xstart else "epsilon",
        variance_type="learned_range" if layout.learned_variance and not layout.positions else fixed,
        **openai_betas(flags.noise_schedule, flags.diffusion_steps),
    )


def openai_betas(schedule: str | None, steps: int) -> dict[str, Any]:
    """The ends of OpenAI's linear schedule, which is scaled to the number of steps."""
    return {"beta_start": 0.1 / steps, "beta_end": 20 / steps} if schedule == "linear" else {}


def make_classifier(config: dict[str, Any], layout: Layout, scheduler: DDPMScheduler, options: Options) -> Any:
    """A classifier without weights."""
    names = names_of_classes(options.labels, layout.out_channels)
    if names is not None and len(names) != layout.out_channels:
        raise ValueError(f"{len(names)} names of classes, and the classifier has {layout.out_channels}")
    classifier = NoisyClassifier(
        unet=config,
        num_classes=layout.out_channels,
        num_train_timesteps=len(scheduler),
        trained_betas=scheduler.exact_tables.betas.tolist(),
        id2label=None if names is None else {str(number): name for number, name in names.items()},
    )
    return classifier.eval()


def check_published(name: str, layout: Layout, flags: Flags, known: tuple[str, str]) -> None:
    """Raise ValueError for flags under which a published file would be another network."""
    right, _ = choose_flags(parse_flags(known[1]), layout, known[0])
    for field in ("image_size", "num_heads", "num_head_channels", "legacy_order", "diffusion_steps", "noise_schedule",
                  "rescale_timesteps"):  # fmt: skip
        if field == "num_heads" and right.num_head_channels != -1 and flags.num_head_channels != -1:
            continue  # not read then
        if getattr(flags, field) != getattr(right, field):
            raise ValueError(
                f"--flags: {name} has {field} {getattr(right, field)}, and these flags say {getattr(flags, field)};"
                " leave --flags out, or rename the file if it is another"
            )


def describe(of: str, layout: Layout, flags: Flags, network: torch.nn.Module) -> list[str]:
    """What was read, in lines."""
    kind = "classifier" if layout.positions else "upsampler" if layout.upsampler else "UNet"
    classes = layout.out_channels if layout.positions else layout.classes
    kind += f" of {classes} classes" if classes else ", unconditional"
    heads = (
        f"{flags.num_heads} heads" if flags.num_head_channels == -1 else f"heads of {flags.num_head_channels} channels"
    )
    order = "the legacy" if flags.legacy_order else "the new"
    scaled = ", timesteps rescaled" if flags.timestep_scale != 1 else ""
    return [
        f"{of}: {kind}, {sum(each.numel() for each in network.parameters()):,} parameters,"
        f" {flags.image_size}×{flags.image_size}",
        f"levels of {', '.join(map(str, layout.widths))} channels, {layout.layers} blocks each",
        f"attention: {heads}, in {order} order",
        f"diffusion: {flags.noise_schedule}, {flags.diffusion_steps} steps{scaled}",
    ]


def original_of(of: str, layout: Layout, flags: Flags, state: State) -> Any:
    """A function that builds the original network, from the repository's package."""

    def build() -> torch.nn.Module:
        repository = of if of in MODULES else IMPROVED
        module = importlib.import_module(MODULES[repository])
        arguments: dict[str, Any] = {
            "in_channels": layout.in_channels,
            "model_channels": layout.channels,
            "out_channels": layout.out_channels,
            "num_res_blocks": layout.layers,
            "attention_resolutions": tuple(2**level for level, attends in enumerate(layout.attention) if attends),
            "channel_mult": tuple(width / layout.channels for width in layout.widths),
            "num_heads": flags.num_heads,
            "use_scale_shift_norm": layout.scale_shift,
        }
        if repository == GUIDED:
            arguments |= {
                "image_size": flags.image_size,
                "num_head_channels": flags.num_head_channels,
                "resblock_updown": layout.resblock_updown,
                "use_new_attention_order": not flags.legacy_order,
            }
        else:
            arguments["channel_mult"] = tuple(map(int, arguments["channel_mult"]))
        if layout.positions:
            network = module.EncoderUNetModel(pool="attention", **arguments)
        else:
            network = module.UNetModel(num_classes=layout.classes, **arguments)
        network.load_state_dict(dict(state))
        return network

    return build


def export_openai(model: torch.nn.Module, text: str, scheduler: Any = None) -> tuple[dict[str, torch.Tensor], str]:
    """OpenAI's state dict of a UNet or a `NoisyClassifier` of ours, and the flags that build it there.

    Args:
        text: flags; `--use_new_attention_order True` writes that order.
        scheduler: of the UNet's pipeline.

    Raises:
        ValueError: a network or a diffusion that OpenAI's code does not have.
    """
    flags = parse_flags(text)
    if unused := sorted(set(flags) - {"use_new_attention_order"}):
        raise ValueError(f"--flags: only --use_new_attention_order counts on the way back (got --{unused[0]})")
    legacy = flags.get("use_new_attention_order", "False").lower() not in ("true", "1", "yes", "t", "y")
    encoder = isinstance(model, NoisyClassifier)
    config = build_unet_on_meta(dict(model.config.unet)).config if encoder else model.config
    check_expressible(config)
    if encoder and (config["attention_head_dim"] != 64 or not legacy):
        raise ValueError("OpenAI's classifiers have attention heads of 64 channels in the legacy order, and no others")
    if scheduler is not None:
        check_diffusion(scheduler)
    return to_openai(model, config, legacy, encoder), flags_of(model, scheduler, legacy)


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


def flags_of(model: torch.nn.Module, scheduler: Any, legacy: bool = True) -> str:
    """The flags with which OpenAI's scripts build the network of `export_openai`, as far as they are known here."""
    encoder = isinstance(model, NoisyClassifier)
    config = build_unet_on_meta(dict(model.config.unet)).config if encoder else model.config
    size, widths = config["sample_size"], config["block_out_channels"]
    channels = config.get("timestep_channels") or widths[0]
    sides = [size // 2**level for level, kind in enumerate(config["down_block_types"]) if "Attn" in kind]
    prefix = "classifier_" if encoder else ""
    upsampler = bool(config.get("condition_channels"))
    sizes = {"large_size": size, "small_size": size // 4} if upsampler else {"image_size": size}
    multiples = tuple(width / channels for width in widths)
    flags: dict[str, Any] = {
        **sizes,
        "classifier_width" if encoder else "num_channels": channels,
        "classifier_depth" if encoder else "num_res_blocks": config["layers_per_block"],
        f"{prefix}attention_resolutions": ",".join(map(str, sides)),
        f"{prefix}use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        f"{prefix}resblock_updown": config["downsample_type"] == "resnet",
    }
    if not encoder:
        if multiples != MULTIPLES.get(size) and not upsampler:  # else the scripts derive it
            flags["channel_mult"] = ",".join(f"{multiple:g}" for multiple in multiples)
        flags |= {
            "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
            "class_cond": bool(config["num_class_embeds"]),
            "dropout": config["dropout"],
        }
        if config["attention_head_dim"] is not None:
            flags["num_head_channels"] = config["attention_head_dim"]
        else:
            flags["num_heads"] = config.get("num_attention_heads") or 1
        flags |= {} if legacy else {"use_new_attention_order": True}
    if scheduler is not None:
        T = scheduler.config.num_train_timesteps
        flags |= {"diffusion_steps": T, "noise_schedule": SCHEDULES[scheduler.config.beta_schedule]}
        flags |= {"rescale_timesteps": config.get("timestep_scale", 1.0) != 1.0}
        flags |= {"predict_xstart": True} if scheduler.config.prediction_type == "sample" else {}
        flags |= {"sigma_small": True} if scheduler.config.variance_type.startswith("fixed_small") else {}
    return " ".join(f"--{name} {value}" for name, value in flags.items())
