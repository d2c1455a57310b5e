"""Pipelines of Diffusers whose weights are pickled (.bin): the same with safetensors."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...common.errors import one_line
from ...common.locations import MODEL_CONFIG, MODEL_INDEX, Location
from ...portable.scheduling_ddpm_hf import DDPMScheduler
from ..sources import unet_config
from ..unet import unet_type
from .conversion import Conversion, Options, make_pipeline
from .reading import read_safetensors, read_torch, tensors_of

PICKLED = ("diffusion_pytorch_model.bin", "diffusion_model.pt", "pytorch_model.bin")
SAFE = "diffusion_pytorch_model.safetensors"


def convert_pickled(place: Location, options: Options) -> Conversion:
    """The pipeline of a folder, or of a repository on the Hub, whose UNet's weights lie in a .bin file.

    Raises:
        ValueError: no UNet2DModel there, or weights that are not tensors alone.
    """
    inner = place / "unet"
    config = inner.json(MODEL_CONFIG)
    folder, config = (inner, config) if config is not None else (place, place.json(MODEL_CONFIG))
    if config is None:
        raise ValueError(f"{place}: no {MODEL_CONFIG} of a UNet there")
    arguments = unet_config(config)  # says so where it is another model
    found = [(name, path) for name in (*PICKLED, SAFE) if (path := folder.file(name)) is not None]
    if not found:
        raise ValueError(f"{place}: no weights there, of {', '.join((*PICKLED, SAFE))}")
    name, path = found[0]
    state = read_safetensors(path) if name == SAFE else tensors_of(read_torch(path))
    unet = _load(config, state)
    scheduler = (place / "scheduler").json("scheduler_config.json") or place.json("scheduler_config.json")
    index = place.json(MODEL_INDEX) or {}
    if isinstance(index.get("vae"), list) and index["vae"][-1:] != [None]:
        raise ValueError(f"{place}: it has an autoencoder; save it with Diffusers' save_pretrained, if you trust it")
    diffusion = DDPMScheduler.from_config(scheduler or {})
    labels = options.labels if options.labels is not None else _labels(index)
    facts = [
        f"{place}: {arguments['block_out_channels']} channels, {name}",
        f"diffusion: {diffusion.config.beta_schedule}, {len(diffusion)} steps"
        + ("" if scheduler else " (none is recorded: Ho et al.'s)"),
    ]
    return Conversion(make_pipeline(unet, diffusion, labels), facts)


def _labels(index: Mapping[str, Any]) -> list[str] | None:
    names = index.get("id2label")
    return [names[str(number)] for number in range(len(names))] if isinstance(names, dict) else None


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
        for value in (*unet.parameters(), *unet.buffers()):
            value.data = value.data.clone()  # the file goes
    return unet
