"""How a model is executed in training: its attention, compiled blocks, CUDA graphs. What is saved stays stock."""

from typing import TYPE_CHECKING

from ..common.errors import UsageError, one_line

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    import torch
    from diffusers import ModelMixin

    from .gradient_gate import Call


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
    model: "ModelMixin",
    device: "torch.device",
    gradient_checkpointing: bool,
    xformers: bool = False,
    acceleration: str = "auto",
) -> None:
    """How a model of Diffusers is executed where it trains: what is settled before its optimizer is made.

    Args:
        gradient_checkpointing: whether to compute activations anew in the backward pass.
        xformers: whether to use xFormers' attention.
        acceleration: as of `accelerate_for_training`.

    Raises:
        UsageError: xFormers is not installed, or has no GPU.
    """
    from ..portable.acceleration_ddpm_hf import choose_attention, use_channels_last

    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if xformers:
        use_xformers(model)
    if device.type == "cpu" and acceleration != "none":
        choose_attention(model)
    if device.type == "cuda" and acceleration == "compile":
        use_channels_last(model)


def accelerate_for_training(
    unet: "torch.nn.Module",
    call: "Call",
    acceleration: str,
    dtype: "torch.dtype | None" = None,
    graphs: bool = True,
) -> str:
    """Let a UNet train faster with the same result, and check that its gradients are the same; says what was chosen.

    Args:
        call: of a training step, as `recorded_call` keeps it.
        acceleration: `auto`: CUDA graphs on a GPU; `compile`: compiled blocks too; `none`.
        dtype: of autocast; None without.
        graphs: whether a CUDA graph can hold a step: one process, one batch a step, no gradient checkpointing.

    Raises:
        UsageError: gradients differ by more than rounding.
    """
    import torch

    from ..portable.acceleration_ddpm_hf import compile_blocks
    from .gradient_gate import check_gradients, gradients

    device = next(unet.parameters()).device
    if acceleration == "none":
        return "none"
    if acceleration == "auto" and device.type == "cpu":
        return "attention by size"
    if acceleration == "auto" and (device.type != "cuda" or not graphs):
        return "none: CUDA graphs hold a UNet's step on a GPU, with one process and one batch a step"
    reduced = dtype is not None or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)
    eager, exact, chosen = gradients(unet, call), None, []
    if acceleration == "compile":
        exact = gradients(unet, call, exact=True) if reduced else None
        compile_blocks(unet)
        chosen.append("compiled blocks")
    if device.type == "cuda" and graphs:
        reason = capture(unet, call, dtype)
        chosen.append("CUDA graphs" if reason is None else f"no CUDA graphs ({reason})")
    error = check_gradients(gradients(unet, call), eager, reduced, " and ".join(chosen), exact)
    return f"{' and '.join(chosen)}, gradients equal to {error:.0e}"


def capture(unet: "torch.nn.Module", call: "Call", dtype: "torch.dtype | None") -> str | None:
    """Let CUDA graphs run a UNet's training steps; where they cannot, it stays as it is: the reason, in one line."""
    import torch

    from .cuda_graphs import GraphedTraining

    try:
        unet.forward = GraphedTraining(unet, call.args, call.kwargs, dtype)
    except RuntimeError as error:  # an operation that cannot be captured, or no memory for the activations
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return one_line(error, 120)
    return None
