"""Pipelines of Diffusers whose weights are pickled (.bin): the same with safetensors."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler as StockDDPMScheduler

from ...common.errors import one_line
from ...common.locations import MODEL_CONFIG, MODEL_INDEX, Location
from ...portable.scheduling_ddpm_hf import DDPMScheduler
from ..sources import Source, find_source
from ..unet import unet_type
from .conversion import Conversion, Options, make_pipeline
from .reading import read_safetensors, read_torch, tensors_of

PICKLED = ("diffusion_pytorch_model.bin", "diffusion_model.pt", "pytorch_model.bin")
SAFE = "diffusion_pytorch_model.safetensors"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ClassConditionalDDPMPipeline")


def convert_pickled(place: Location, options: Options) -> Conversion:
    """The pipeline of a folder, or of a repository on the Hub, whose UNet's weights lie in a .bin file.

    Raises:
        ValueError: no UNet2DModel there, or weights that are not tensors alone.
    """
    try:
        source = find_source(place)  # says so where it is another model
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    folder, config = source.place, source.place.json(MODEL_CONFIG)
    assert config is not None  # `find_source` has read it
    check_diffusion(place, source)
    found = [(name, path) for name in (*PICKLED, SAFE) if (path := folder.file(name)) is not None]
    if not found:
        raise ValueError(f"{place}: no weights there, of {', '.join((*PICKLED, SAFE))}")
    name, path = found[0]
    state = read_safetensors(path) if name == SAFE else tensors_of(read_torch(path))
    unet = _load(config, state)
    diffusion = make_diffusion(place, source)
    labels = options.labels if options.labels is not None else source.classes
    facts = [
        f"{place}: {source.unet['block_out_channels']} channels, {name}",
        f"diffusion: {diffusion.config.beta_schedule}, {len(diffusion)} steps"
        + ("" if source.scheduler else " (none is recorded: Ho et al.'s)"),
    ]
    return Conversion(make_pipeline(unet, diffusion, labels), facts)


def check_diffusion(place: Location, source: Source) -> None:
    """Raise ValueError for a pipeline of another kind of model, and for one of latents."""
    if source.vae is not None:
        raise ValueError(f"{place}: it has an autoencoder; save it with Diffusers' save_pretrained, if you trust it")
    kind = (place.json(MODEL_INDEX) or {}).get("_class_name")
    kind = kind[-1] if isinstance(kind, list) and kind else kind
    if kind is not None and kind not in PIPELINES:
        raise ValueError(f"{place}: a {kind}, which samples otherwise; only {', '.join(PIPELINES)} are converted")
    sampler = (source.scheduler or {}).get("_class_name", "DDPMScheduler")
    if sampler not in ("DDPMScheduler", "EpsilonMultistepScheduler", *StockDDPMScheduler._compatibles):
        raise ValueError(f"{place}: its diffusion is that of a {sampler}, and not DDPM's")
    if source.unet["time_embedding_type"] != "positional":
        raise ValueError(
            f"{place}: its network reads noise levels ({source.unet['time_embedding_type']}), not timesteps"
        )


def make_diffusion(place: Location, source: Source) -> DDPMScheduler:
    """The scheduler of a pipeline, also of one that an old version of Diffusers saved.

    Raises:
        ValueError: settings that no diffusion has.
    """
    try:
        return DDPMScheduler.from_config(dict(source.scheduler or {}))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{place}: the scheduler: {one_line(error)}") from error


def _load(config: dict[str, Any], state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The UNet, loaded by Diffusers from safetensors: it knows the names that its old versions gave to layers."""
    from safetensors.torch import save_file

    if not state:
        raise ValueError("the file of weights holds no tensors")
    cls = unet_type(config.get("_class_name", "UNet2DModel"))
    with tempfile.TemporaryDirectory(prefix="ddpm_hf-") as scratch:
        save_file({name: value.contiguous().clone() for name, value in state.items()}, Path(scratch) / SAFE)
        (Path(scratch) / MODEL_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            unet, info = cls.from_pretrained(scratch, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ValueError(f"the weights are not those of its config ({one_line(error, 200)})") from error
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(
                f"the weights are incomplete: {(info['missing_keys'] or info['mismatched_keys'])[0]} missing"
            )
        if info["unexpected_keys"]:
            raise ValueError(
                f"{len(info['unexpected_keys'])} of the weights are not in the network of its config, such as"
                f" {sorted(info['unexpected_keys'])[0]}"
            )
        for value in (*unet.parameters(), *unet.buffers()):
            value.data = value.data.clone()  # the file goes
    return unet
