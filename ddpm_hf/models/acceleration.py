"""How a model is executed: compiled, or with another attention."""

from typing import TYPE_CHECKING

from ..common.errors import UsageError

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    import torch


def use_xformers(model) -> None:
    """Attention by xFormers.

    Raises:
        UsageError: it is not installed, or has no GPU.
    """
    try:
        model.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as error:
        raise UsageError(
            "--enable_xformers_memory_efficient_attention: xFormers is not installed or has no GPU; leave the flag"
            " out, torch's own attention is memory-efficient"
        ) from error


def compiled(model: "torch.nn.Module") -> "torch.nn.Module":
    """The model behind torch.compile; as it is where Accelerate has compiled it."""
    import torch

    if hasattr(model, "_orig_mod"):
        return model
    # the layout optimization gave wrong gradients for this model on CPUs
    return torch.compile(model, options={"layout_optimization": False})
