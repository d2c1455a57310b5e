"""How a UNet is executed: its memory format, its attention, regional compilation, CUDA graphs.

None of it changes what a model is: weights, config and saved files stay those of stock Diffusers.

This file is copied into published repositories: it imports torch and diffusers alone.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d import UNet2DOutput

PLAIN_POSITIONS = 64  # of an 8×8 feature map
MOST_GRAPHS = 4  # shapes that a network keeps CUDA graphs of; each holds its activations
COMPILED_BLOCKS = ("ResnetBlock2D", "Attention", "BasicTransformerBlock")


class AttentionBySize:
    """An attention processor for CPUs: plain matrix products for one head over few positions, else the fused kernel.

    Both compute the same function. With several heads or more positions than `PLAIN_POSITIONS` the products write
    score matrices that no longer fit into a cache, and take up to four times as long (`benchmarks/attention.py`). The
    choice follows from the shape alone, so that a resumed run makes the same one.
    """

    def __init__(self) -> None:
        self.plain, self.fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [N, C, H, W] or [N, L, C] -> the same shape."""
        positions = hidden_states[0, 0].numel() if hidden_states.ndim == 4 else hidden_states.shape[1]
        process = self.plain if attn.heads == 1 and positions <= PLAIN_POSITIONS else self.fused
        return process(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def choose_attention(model: torch.nn.Module) -> None:
    """Attention by `AttentionBySize` in every layer, for a model on a CPU. Nothing of it is saved."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttentionBySize())


def use_channels_last(model: torch.nn.Module) -> None:
    """Keep the weights of convolutions as NHWC, which tensor cores read without a transposition."""
    model.to(memory_format=torch.channels_last)


def compile_blocks(model: torch.nn.Module) -> None:
    """Compile each residual block and attention layer by itself: seconds a block, where a network takes minutes.

    The layout optimisation is off: with it, gradients of this network were wrong on CPUs. Dropout's random numbers are
    those of eager execution: the same training, and gradients that can be compared.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)  # one a shape of a block
    for module in model.modules():
        if type(module).__name__ in COMPILED_BLOCKS:
            module.compile(options={"layout_optimization": False, "fallback_random": True})


def signature(args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """What a CUDA graph fixes of a call: tensors' shapes, types and layout, other values; None if it cannot be one."""
    parts: list[tuple] = []
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(value, torch.Tensor):
            if not value.is_cuda:
                return None
            parts.append((name, value.shape, value.dtype, value.stride(), value.requires_grad))
        elif name == "return_dict" and not value:  # a tuple is returned as the network returns it
            return None
        elif value is None or isinstance(value, (bool, int, float, str)):
            parts.append((name, value))
        else:
            return None
    return tuple(parts)


class GraphedForward:
    """A network's forward pass as a CUDA graph: one launch instead of one for each kernel.

    The first call of each signature is captured; without gradients only, and where capture fails the network runs as
    it is. The kernels are the same, so the output is equal to the bit.

    Args:
        model: maps tensors and other values to an output whose `sample` is a tensor.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.forward = model, model.forward
        self.captured: dict[tuple, tuple | None] = {}  # None: it cannot be captured

    def __deepcopy__(self, memo: dict) -> Callable[..., Any]:
        return copy.deepcopy(self.forward, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = signature(args, kwargs)
        if key is None or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return self.forward(*args, **kwargs)
        # a graph reads weights where they were: those that were moved or replaced since need another
        key += (
            self.model.training,
            autocast_dtype(),
            *(parameter.data_ptr() for parameter in self.model.parameters()),
        )
        if key not in self.captured:
            if len(self.captured) >= MOST_GRAPHS:
                self.captured.pop(next(iter(self.captured)))
            self.captured[key] = self._capture(args, kwargs)
        captured = self.captured[key]
        if captured is None:
            return self.forward(*args, **kwargs)
        graph, inputs, output = captured
        for static, given in zip(inputs, tensors_of(args, kwargs)):
            static.copy_(given)
        graph.replay()
        return UNet2DOutput(sample=output.clone())

    def _capture(self, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        args, kwargs = copied_call(args, kwargs)
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(2):  # what kernels set up at their first calls
                    self.plain(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                output = self.plain(*args, **kwargs)
        except RuntimeError:  # an operation that cannot be captured
            torch.cuda.synchronize()
            return None
        return graph, tensors_of(args, kwargs), output

    def plain(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output's `sample` without autocast's cache of weights, whose copies would be those of the capture."""
        dtype = autocast_dtype()
        with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            return self.forward(*args, **kwargs).sample


def copied_call(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The call with copies of its tensors."""

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    return tuple(copied(value) for value in args), {name: copied(value) for name, value in kwargs.items()}


def autocast_dtype() -> torch.dtype | None:
    """What autocast computes in on a GPU; None where it is off."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def tensors_of(args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of a call, in the order of `signature`."""
    values = [*args, *(value for _, value in sorted(kwargs.items()))]
    return [value for value in values if isinstance(value, torch.Tensor)]


class AccelerationMixin:
    """`enable_acceleration` of a pipeline with a `unet`, or with several networks."""

    unet: torch.nn.Module

    def networks(self) -> list[torch.nn.Module]:
        """What is accelerated."""
        return [self.unet]

    def enable_acceleration(self) -> str:
        """Sample faster, with images that are equal but for rounding; what is saved stays as it is.

        On a GPU, the UNet's kernels are launched as one CUDA graph for each batch size, to the same bits. On a CPU,
        attention is computed by whichever kernel suits its size. Call it once the pipeline is on its device.

        Returns: what was chosen, in a few words.
        """
        device = next(self.unet.parameters()).device
        if device.type not in ("cpu", "cuda"):
            return f"none on {device.type}"
        for network in self.networks():
            if device.type == "cpu":
                choose_attention(network)
            elif not isinstance(network.forward, GraphedForward):
                network.forward = GraphedForward(network)  # type: ignore[method-assign]
        return "attention by size" if device.type == "cpu" else "CUDA graphs"

    def disable_acceleration(self) -> None:
        """Take back what `enable_acceleration` did."""
        for network in self.networks():
            if isinstance(network.forward, GraphedForward):
                network.forward = network.forward.forward  # type: ignore[method-assign]
            for module in network.modules():
                if isinstance(module, Attention) and isinstance(module.processor, AttentionBySize):
                    module.set_processor(AttnProcessor2_0())
