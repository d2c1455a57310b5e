"""Nothing trains with gradients that are not the model's own."""

from unittest import mock

import pytest
import torch

from ddpm_hf.common.errors import UsageError
from ddpm_hf.models.acceleration import accelerate_for_training, capture
from ddpm_hf.models.gradient_gate import Call, check_gradients, gradient_error, gradients, recorded_call
from tests.portable.test_acceleration import small_unet


def first_call(unet) -> Call:
    """A call as a training step makes it."""
    with recorded_call(unet) as call:
        unet(torch.randn(2, 1, 8, 8), torch.tensor([3, 700]))
    return call


class WrongBackward(torch.autograd.Function):
    """A kernel whose output is right and whose gradient is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def with_wrong_kernel(unet, factor: float) -> None:
    layer = unet.mid_block.resnets[0]
    layer.forward = lambda *args, own=layer.forward: WrongBackward.apply(own(*args), factor)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.99, float("nan")])
def test_the_gate_catches_a_wrong_kernel(factor, monkeypatch):
    """The output, and so the loss, is the same; gradients are zero, half, 1% too small, or no numbers."""
    unet = small_unet().train()
    call = first_call(unet)
    monkeypatch.setattr(
        "ddpm_hf.portable.acceleration_ddpm_hf.compile_blocks", lambda model: with_wrong_kernel(model, factor)
    )
    with pytest.raises(UsageError, match=r"compiled blocks, gradients differ.*--acceleration none"):
        accelerate_for_training(unet, call, "compile")


def test_the_gate_lets_the_model_itself_pass(monkeypatch):
    """With dropout, which is the same in both."""
    unet = small_unet(dropout=0.3).train()
    call = first_call(unet)
    monkeypatch.setattr("ddpm_hf.portable.acceleration_ddpm_hf.compile_blocks", lambda model: None)
    assert accelerate_for_training(unet, call, "compile") == "compiled blocks, gradients equal to 0e+00"


def test_gradients_leave_no_trace():
    """Neither in the parameters' `grad` nor in the random numbers that follow."""
    unet = small_unet(dropout=0.3).train()
    call, state = first_call(unet), torch.get_rng_state()
    assert gradient_error(gradients(unet, call), gradients(unet, call)) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_errors_are_relative_to_the_parameter_and_never_to_nothing():
    """A gradient that is all but zero counts as 10% of the whole one: its last digits are noise."""
    eager = [torch.tensor([3.0, 4.0]), torch.tensor([1e-9])]
    assert gradient_error([torch.tensor([3.0, 4.5]), eager[1]], eager) == pytest.approx(0.1)
    assert gradient_error([eager[0], torch.tensor([0.0])], eager) < 1e-8


@pytest.mark.parametrize(("reduced", "limit"), [(False, 1e-4), (True, 2e-2)])
def test_limits(reduced, limit):
    """1e-4 in fp32, 2e-2 where products are rounded to fewer digits."""
    eager = [torch.ones(4)]
    assert check_gradients([eager[0] * (1 + 0.9 * limit)], eager, reduced, "x") == pytest.approx(0.9 * limit, rel=1e-2)
    with pytest.raises(UsageError, match="with x, gradients differ"):
        check_gradients([eager[0] * (1 + 1.1 * limit)], eager, reduced, "x")


def test_nothing_is_accelerated_where_it_is_not_wanted():
    """`none`, and a CPU without compiling, leave the network's calls as they are."""
    unet = small_unet()
    own = unet.forward
    assert accelerate_for_training(unet, first_call(unet), "none") == "none"
    assert accelerate_for_training(unet, first_call(unet), "auto") == "attention by size"
    assert unet.forward == own


def test_a_step_that_cannot_be_captured_trains_as_it_is(monkeypatch):
    """Else one operation that CUDA graphs lack ends a run that would train without them."""
    unet = small_unet()
    call, forward = first_call(unet), unet.forward
    refused = RuntimeError("operation not permitted\nwhen stream is capturing")
    monkeypatch.setattr("ddpm_hf.models.cuda_graphs.GraphedTraining", mock.Mock(side_effect=refused))
    assert capture(unet, call, None) == "operation not permitted when stream is capturing"
    assert unet.forward == forward


@pytest.mark.slow
def test_compiled_blocks_pass_the_gate_with_dropout():
    """Their random numbers are those of eager code: else each model with dropout is refused, for no fault."""
    unet = small_unet(dropout=0.1).train()
    assert accelerate_for_training(unet, first_call(unet), "compile").startswith("compiled blocks, gradients equal to")


def test_an_accelerated_model_may_be_nearer_to_the_exact_gradients_than_eager_bf16():
    """Fused operations round less often; one that is further off than eager, and than the limit, is refused."""
    exact = [torch.ones(4)]
    eager = [exact[0] * 1.03]
    assert check_gradients([exact[0] * 0.98], eager, True, "x", exact) == pytest.approx(0.05 / 1.03, rel=1e-5)
    with pytest.raises(UsageError, match="with x, gradients differ"):
        check_gradients([exact[0] * 0.96], eager, True, "x", exact)
    with pytest.raises(UsageError, match="with x, gradients differ"):
        check_gradients([exact[0] * float("nan")], eager, True, "x", exact)


def test_exact_gradients_are_those_without_autocast():
    """Though Accelerate put autocast around the model's `forward`; then it is back."""
    unet = small_unet().train()
    call = first_call(unet)
    expected = gradients(unet, call)
    own = unet.forward

    def autocast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return own(*args, **kwargs)

    unet.forward = autocast
    assert gradient_error(gradients(unet, call, exact=True), expected) == 0
    assert gradient_error(gradients(unet, call), expected) > 1e-4
    assert unet.forward is autocast
