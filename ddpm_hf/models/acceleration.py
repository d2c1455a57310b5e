"""How a model is executed in training: its attention, compiled regions, CUDA graphs. What is saved stays stock."""

from typing import TYPE_CHECKING

from ..common.errors import UsageError

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    import torch

    from .gradient_gate import Call

ACCELERATIONS = ("auto", "compile", "none")
# From here on a GPU repays the minute or two that compiling takes
LONG_TRAINING = 5000


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


def prepare_layout(model: "torch.nn.Module", device: "torch.device", acceleration: str) -> None:
    """What is settled before the optimizer is made: attention by size on a CPU, NHWC for compiled regions on a GPU."""
    from ..portable.acceleration_ddpm_hf import choose_attention, use_channels_last

    if acceleration != "none" and device.type == "cpu":
        choose_attention(model)
    if acceleration == "compile" and device.type == "cuda":
        use_channels_last(model)


def accelerate_for_training(
    unet: "torch.nn.Module",
    call: "Call",
    acceleration: str,
    dtype: "torch.dtype | None" = None,
    graphs: bool = True,
    total_steps: int = 0,
) -> str:
    """Let a UNet train faster with the same result, and check that its gradients are the same; says what was chosen.

    Args:
        call: of a training step, as `recorded_call` keeps it.
        acceleration: one of `ACCELERATIONS`.
        dtype: of autocast; None without.
        graphs: whether a CUDA graph can hold a step: one process, one batch a step, no gradient checkpointing.
        total_steps: of the training, for the advice.

    Raises:
        UsageError: gradients differ by more than rounding.
    """
    import torch

    from ..portable.acceleration_ddpm_hf import GraphedTraining, compile_regions
    from .gradient_gate import check_gradients, gradients

    device = next(unet.parameters()).device
    graphs = graphs and device.type == "cuda"
    chosen = ["compiled blocks"] * (acceleration == "compile") + ["CUDA graphs"] * graphs
    if acceleration == "none":
        return "none"
    if not chosen:
        return (
            "attention by size" if device.type == "cpu" else "none: CUDA graphs need one process and one batch a step"
        )
    eager = gradients(unet, call)
    if acceleration == "compile":
        compile_regions(unet)
    if graphs:
        unet.forward = GraphedTraining(unet, call.args, call.kwargs, dtype)
    reduced = dtype is not None or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)
    error = check_gradients(gradients(unet, call), eager, reduced, " and ".join(chosen))
    hint = ""
    if device.type == "cuda" and acceleration == "auto" and total_steps >= LONG_TRAINING:
        hint = "; --acceleration compile is faster still after a minute or two of compiling"
    return f"{' and '.join(chosen)}, gradients equal to {error:.0e}{hint}"
