"""A network's forward and backward pass in training as CUDA graphs: two launches instead of thousands."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ..portable.acceleration_ddpm_hf import GraphedForward, copied_call, signature, tensors_of

WARM_UP = 3  # passes before a capture: kernels choose algorithms and set up what they need in the first ones


class GraphedTraining(GraphedForward):
    """A network's forward and backward pass as CUDA graphs, for calls like a given one; else as `GraphedForward`.

    Args:
        args, kwargs: of a call in a training step.
        dtype: of Accelerate's autocast, which is part of the model's `forward`; None without.
    """

    def __init__(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype | None):
        super().__init__(model)
        self.key, self.dtype = signature(args, kwargs), dtype
        self.step = GraphedStep(NetworkCall(model, *copied_call(args, kwargs), dtype))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self.model.training and signature(args, kwargs) == self.key:
            return UNet2DOutput(sample=self.step(*tensors_of(args, kwargs)))
        return super().__call__(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of `GraphedForward`, with the autocast that Accelerate would enter."""
        with torch.autocast("cuda", self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            return getattr(self.model, "_original_forward", self.forward)(*args, **kwargs).sample.float()


class NetworkCall(torch.nn.Module):
    """A network as a function of its call's tensors alone, which is what a CUDA graph of a training step captures."""

    def __init__(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype | None):
        super().__init__()
        self.model, self.args, self.kwargs, self.dtype = model, args, kwargs, dtype
        layers = (torch.nn.Conv2d, torch.nn.Linear)  # whose weights autocast casts
        first = next((name for name, _ in model.named_parameters()), None)  # what Diffusers calls the model's dtype
        self.cast = [
            f"{name}.{key}"
            for name, module in model.named_modules()
            if dtype is not None and isinstance(module, layers)
            for key, _ in module.named_parameters(recurse=False)
            if f"{name}.{key}" != first
        ]
        self.train(model.training)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The output's `sample`, float32, for tensors in the order of `tensors_of`."""
        given = iter(tensors)
        args = [next(given) if isinstance(value, torch.Tensor) else value for value in self.args]
        kwargs = {
            name: next(given) if isinstance(value, torch.Tensor) else value
            for name, value in sorted(self.kwargs.items())
        }
        weights = [self.model.get_parameter(name) for name in self.cast]
        with torch.autocast(tensors[0].device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            cast = dict(zip(self.cast, CastTogether.apply(self.dtype, *weights))) if weights else {}
            with without_accelerate(self.model):
                return torch.func.functional_call(self.model, cast, tuple(args), kwargs).sample.float()


class GraphedStep:
    """A call's forward and backward pass as one CUDA graph each, with the gradients where the graph writes them.

    torch's `make_graphed_callables` hands gradients on to autograd, which copies each into a `grad` of its own: for a
    small network those hundreds of launches take longer than its backward pass.

    Args:
        call: maps its tensors, whose values are replaced, to a tensor.
    """

    def __init__(self, call: NetworkCall):
        self.inputs = tensors_of(call.args, call.kwargs)
        self.parameters = [parameter for parameter in call.parameters() if parameter.requires_grad]
        sources = [*self.parameters, *(one for one in self.inputs if one.requires_grad)]
        device = self.inputs[0].device
        self.anchor = torch.zeros((), device=device, requires_grad=True)  # makes the output require a gradient

        def gradients(output: torch.Tensor, given: torch.Tensor) -> list[torch.Tensor | None]:
            found = torch.autograd.grad(output, sources, given, allow_unused=True)
            return [None if g is None else in_layout_of(one, g) for one, g in zip(sources, found)]

        with torch.random.fork_rng([device]):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    output = call(*self.inputs)
                    gradients(output, torch.zeros_like(output))
                del output
            torch.cuda.current_stream().wait_stream(side)
            pool = torch.cuda.graph_pool_handle()
            self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.forward_graph, pool=pool):
                output = call(*self.inputs)
            self.given = torch.empty_like(output)
            with torch.cuda.graph(self.backward_graph, pool=pool):
                self.gradients = gradients(output, self.given)
            self.output = output.detach()

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The output for these values of the call's tensors; its backward pass sets the parameters' `grad`."""
        return Replay.apply(self, self.anchor, *tensors)

    def replay_forward(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The output, in memory of its own, so that it can be kept."""
        for static, given in zip(self.inputs, tensors):
            static.copy_(given)
        self.forward_graph.replay()
        return self.output.clone()

    def replay_backward(self, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """Set the parameters' gradients; returns those of the inputs that require one.

        Raises:
            RuntimeError: the gradients of an earlier pass are still there; they are in the same memory.
        """
        if any(parameter.grad is not None for parameter in self.parameters):
            raise RuntimeError("a CUDA graph's gradients cannot be added up: clear the earlier ones before")
        self.given.copy_(gradient)
        self.backward_graph.replay()
        for parameter, found in zip(self.parameters, self.gradients):
            parameter.grad = found
        return list(self.gradients[len(self.parameters) :])


class Replay(torch.autograd.Function):
    """`GraphedStep` as a node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, step: GraphedStep, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """The network's output."""
        ctx.step, ctx.requires = step, [one.requires_grad for one in tensors]
        return step.replay_forward(tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the inputs; the parameters' are set."""
        found = iter(ctx.step.replay_backward(gradient))
        return (None, None, *(next(found) if required else None for required in ctx.requires))


def in_layout_of(tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient with its tensor's strides, which optimizers over many tensors at once need."""
    if gradient.stride() == tensor.stride():
        return gradient
    return torch.empty_like(tensor, dtype=gradient.dtype, requires_grad=False).copy_(gradient)


@contextlib.contextmanager
def without_accelerate(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model's `forward` is its own, without the autocast that Accelerate put around it."""
    patched = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            model.forward = patched


class CastTogether(torch.autograd.Function):
    """Many tensors to another type, and their gradients back, in a few launches."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors as `dtype`."""
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(cast, list(tensors))
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients as what the tensors were."""
        cast = [torch.empty_like(gradient, dtype=dtype) for gradient, dtype in zip(gradients, ctx.dtypes)]
        torch._foreach_copy_(cast, list(gradients))
        return (None, *cast)
