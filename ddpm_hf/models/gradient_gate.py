"""The gate in front of an accelerated model: its gradients on one batch are those of the model as it is.

A wrong kernel need not show in the loss: Inductor's layout optimisation gave wrong gradients for this network on CPUs,
some exactly zero, at an equal loss.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..common.errors import UsageError
from ..portable.acceleration_ddpm_hf import copied_call
from .cuda_graphs import without_accelerate

# The greatest relative error of a gradient; reduced: products in bf16, fp16 or TF32, whose last digits differ anyway
LIMITS = {"fp32": 1e-4, "reduced": 2e-2}
SMALL = 0.1  # of the whole gradient's norm: a parameter's gradient below it counts as that large


class Call:
    """The arguments of a network's call."""

    args: tuple = ()
    kwargs: dict[str, Any] = {}


@contextlib.contextmanager
def recorded_call(model: torch.nn.Module) -> Iterator[Call]:
    """Within, keep the arguments of the model's latest call with gradients."""
    call = Call()

    def keep(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            call.args, call.kwargs = args, kwargs

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield call
    finally:
        hook.remove()


def gradients(model: torch.nn.Module, call: Call, exact: bool = False) -> list[torch.Tensor]:
    """The parameters' gradients, float32, of one call's output times fixed random numbers.

    Args:
        exact: compute in float32 throughout, without the autocast and the TF32 that the model trains with.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, before = parameters[0].device, [parameter.grad for parameter in parameters]
    args, kwargs = copied_call(call.args, call.kwargs)
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout is the same each time
        torch.manual_seed(0)
        with in_float32(model) if exact else contextlib.nullcontext():
            output = model(*args, **kwargs)
        output = getattr(output, "sample", output).float()  # a classifier gives its logits alone
        weights = torch.randn(output.shape, generator=torch.Generator(device).manual_seed(0), device=device)
        (output * weights).mean().backward()
    given = [torch.zeros_like(one) if one.grad is None else one.grad.float().clone() for one in parameters]
    for parameter, gradient in zip(parameters, before):
        parameter.grad = gradient
    return given


@contextlib.contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model computes in float32, whatever Accelerate and the user chose."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    allowed = [one.allow_tf32 for one in backends]
    for one in backends:
        one.allow_tf32 = False
    try:
        with without_accelerate(model), torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for one, before in zip(backends, allowed):
            one.allow_tf32 = before


def gradient_error(accelerated: list[torch.Tensor], eager: list[torch.Tensor]) -> float:
    """The greatest relative error of a parameter's gradient in the 2-norm; infinite where one is not finite."""
    norms = torch.stack([one.norm() for one in eager])
    errors = torch.stack([(one - right).norm() for one, right in zip(accelerated, eager, strict=True)])
    return float((errors / norms.clamp(min=SMALL * float(norms.norm()))).nan_to_num(float("inf")).max())


def check_gradients(
    accelerated: list[torch.Tensor],
    eager: list[torch.Tensor],
    reduced: bool,
    what: str,
    exact: list[torch.Tensor] | None = None,
) -> float:
    """The `gradient_error`, if it is small enough to train with.

    Args:
        reduced: whether products are computed in bf16, fp16 or TF32.
        what: names what was done to the model.
        exact: gradients in float32. Fused operations round less often than eager ones, which in bf16 can make more
            than `LIMITS`: an accelerated model that is no further from the exact gradients than the eager one passes.

    Raises:
        UsageError: it is larger than `LIMITS` allows.
    """
    error, limit = gradient_error(accelerated, eager), LIMITS["reduced" if reduced else "fp32"]
    nearer = exact is not None and gradient_error(accelerated, exact) <= gradient_error(eager, exact)
    if not (error <= limit or nearer):
        raise UsageError(
            f"--acceleration: with {what}, gradients differ by {error:.1e} (relative) from those without, more than"
            f" rounding does ({limit:.0e}); train with --acceleration none, and report the versions of torch and"
            " diffusers"
        )
    return error
