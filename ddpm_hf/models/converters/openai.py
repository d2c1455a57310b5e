"""Checkpoints of improved- and guided-diffusion: to a pipeline or a classifier, and back."""

import importlib
from typing import Any

import torch

from ...portable.networks_ddpm_hf import NoisyClassifier, build_unet
from ...portable.scheduling_ddpm_hf import DDPMScheduler
from .attention_check import check_attention
from .conversion import Conversion, Options, State, check_betas, make_pipeline, names_of_classes
from .openai_flags import GUIDED, IMPROVED, PUBLISHED, Flags, choose_flags, parse_flags
from .openai_layout import Layout, read_layout, unet_config
from .openai_names import load_openai

SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}  # their names, by ours
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
        timestep_spacing="leading" if flags.timestep_respacing.startswith("ddim") else "linspace",  # as theirs
        **openai_betas(flags.noise_schedule, flags.diffusion_steps),
    )


def openai_betas(schedule: str | None, steps: int) -> dict[str, Any]:
    """The ends of OpenAI's linear schedule, which is scaled to the number of steps."""
    return {"beta_start": 0.1 / steps, "beta_end": 20 / steps} if schedule == "linear" else {}


def make_classifier(config: dict[str, Any], layout: Layout, scheduler: DDPMScheduler, options: Options) -> Any:
    """A classifier without weights."""
    check_betas(scheduler)
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
