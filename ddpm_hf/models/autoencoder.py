"""Trained autoencoders."""

from typing import TypeVar

import torch
from diffusers import AutoencoderKL

from ..common.errors import UsageError, why_not_loaded

Module = TypeVar("Module", bound=torch.nn.Module)


def load_autoencoder(
    name_or_path: str, revision: str | None = None, variant: str | None = None, token: str | None = None
) -> AutoencoderKL:
    """An autoencoder from a folder or the Hub: by itself, or as the `vae` of a pipeline.

    Raises:
        UsageError: there is none.
    """
    options = {"revision": revision, "variant": variant, "token": token}
    of_config = {"revision": revision, "token": token}
    try:
        try:
            config, options["subfolder"] = AutoencoderKL.load_config(name_or_path, **of_config), None
        except OSError:  # no model by itself: a pipeline
            config = AutoencoderKL.load_config(name_or_path, subfolder="vae", **of_config)
            options["subfolder"] = "vae"
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise ValueError(f"it is a {config['_class_name']}")
        return in_own_memory(AutoencoderKL.from_pretrained(name_or_path, use_safetensors=True, **options))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = why_not_loaded(error)
        raise UsageError(f"--vae_name_or_path {name_or_path}: no AutoencoderKL there ({reason})") from error


def frozen(model: Module, device: torch.device) -> Module:
    """The network on a device, in eval mode, and not to be trained."""
    return model.eval().requires_grad_(False).to(device)


def in_own_memory(model: AutoencoderKL) -> AutoencoderKL:
    """The model with its weights in memory of their own, and no longer where safetensors has mapped the file.

    Kernels round by the alignment of weights: a run that is resumed, and loads what it had trained before, then
    computes the same to the bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
