"""How a model is executed: with another attention."""

from typing import TYPE_CHECKING

from ..common.errors import UsageError

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    import torch
    from diffusers import ModelMixin


def use_xformers(model: "ModelMixin") -> None:
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


def choose_execution(
    model: "ModelMixin", device: "torch.device", gradient_checkpointing: bool, xformers: bool = False
) -> None:
    """How a model of Diffusers is executed where it trains.

    Args:
        gradient_checkpointing: whether to compute activations anew in the backward pass.
        xformers: whether to use xFormers' attention.

    Raises:
        UsageError: xFormers is not installed, or has no GPU.
    """
    from .attention import choose_attention

    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if xformers:
        use_xformers(model)
    if device.type == "cpu":
        choose_attention(model)
