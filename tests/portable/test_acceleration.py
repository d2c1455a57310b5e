"""How a UNet is executed changes nothing of what it computes, nor of what is saved."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.models.cuda_graphs import GraphedStep, NetworkCall, Replay
from ddpm_hf.portable.acceleration_ddpm_hf import (
    AttentionBySize,
    GraphedForward,
    compile_blocks,
    signature,
    tensors_of,
)

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA GPU")


def small_unet(**more) -> UNet2DModel:
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        **more,
    }
    return UNet2DModel(**arguments)


def a_call(device: str = "cpu"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 8, 8, generator=generator).to(device)
    return (x, torch.tensor([0, 10, 500, 999], device=device)), {"class_labels": torch.tensor([0, 1, 2, 0]).to(device)}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_cast_together_are_those_that_autocast_casts(dtype):
    """To the bit, outputs and gradients: else a captured step would be another training."""
    unet = small_unet(num_class_embeds=3, dropout=0.1).train()
    args, kwargs = a_call()
    step, results = NetworkCall(unet, args, kwargs, dtype), []
    assert bool(step.cast) == (dtype is not None)

    def stock(*tensors):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return unet(*args, **kwargs).sample.float()

    for call in (step, stock):
        torch.manual_seed(7)  # of dropout
        output = call(*tensors_of(args, kwargs))
        results.append([output, *torch.autograd.grad(output.square().sum(), unet.parameters())])
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


def test_a_captured_step_leaves_accelerates_forward_as_it_was():
    """Accelerate puts autocast around `forward`: within the capture that is left out, and then it is back."""
    unet = small_unet(num_class_embeds=3)
    args, kwargs = a_call()
    unet.forward = lambda *_, **__: pytest.fail("the capture ran Accelerate's autocast")
    patched = unet.forward
    NetworkCall(unet, args, kwargs, None)(*tensors_of(args, kwargs))
    assert unet.forward is patched


class Recomputed(GraphedStep):
    """What a GPU does by graphs, by calls: the same tensors are read and written, in the same order."""

    def __init__(self, call: NetworkCall):
        self.call, self.inputs = call, tensors_of(call.args, call.kwargs)
        self.parameters = list(call.parameters())
        self.sources = [*self.parameters, *(one for one in self.inputs if one.requires_grad)]
        self.anchor, self.given = torch.zeros((), requires_grad=True), torch.empty(4, 1, 8, 8)
        self.forward_graph = self.backward_graph = self

    def replay(self) -> None:
        with torch.enable_grad():
            output = self.call(*self.inputs)
            self.gradients = torch.autograd.grad(output, self.sources, self.given)
        self.output = output.detach()


def test_a_replayed_step_sets_the_gradients_of_parameters_and_inputs():
    """As autograd would, through what comes before and after the network; they cannot be added up unseen."""
    unet = small_unet(num_class_embeds=3)
    args, kwargs = a_call()
    scale = torch.tensor(0.7, requires_grad=True)
    (unet((args[0] * scale), *args[1:], **kwargs).sample.square().mean()).backward()
    expected = [scale.grad, *(parameter.grad for parameter in unet.parameters())]
    unet.zero_grad()
    scale.grad = None
    step = Recomputed(NetworkCall(unet, (args[0].clone().requires_grad_(), *args[1:]), kwargs, None))
    tensors = (args[0] * scale, *tensors_of(args[1:], kwargs))
    Replay.apply(step, step.anchor, *tensors).square().mean().backward()
    torch.testing.assert_close([scale.grad, *(parameter.grad for parameter in unet.parameters())], expected)
    with pytest.raises(RuntimeError, match="cannot be added up"):
        Replay.apply(step, step.anchor, *(one.detach() for one in tensors)).mean().backward()


def test_a_signature_tells_calls_apart_that_a_graph_cannot_serve_alike():
    """On the CPU there is none, so that nothing is captured; other values must be equal, and known."""
    args, kwargs = a_call()
    assert signature(args, kwargs) is None
    assert signature((1, None), {"flag": True}) == signature((1, None), {"flag": True})
    assert signature((1,), {}) != signature((2,), {})
    assert signature(({},), {}) is None
    assert signature((), {"return_dict": False}) is None


def test_acceleration_changes_neither_images_nor_files(tmp_path):
    """Enabled and disabled again, a pipeline samples and saves what it did."""
    pipeline = DDPMPipeline(small_unet(), DDPMScheduler(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)

    def processors() -> list[type]:
        return [type(module.processor) for module in pipeline.unet.modules() if isinstance(module, Attention)]

    given = processors()

    def images():
        return torch.from_numpy(pipeline(2, torch.Generator().manual_seed(3), 5, output_type="np").images)

    def saved(name: str) -> dict[str, bytes]:
        pipeline.save_pretrained(tmp_path / name)
        files = (file for file in (tmp_path / name).rglob("*") if file.is_file())
        return {str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files}

    before, files = images(), saved("before")
    assert pipeline.enable_acceleration() == "attention by size"
    assert set(processors()) == {AttentionBySize}
    torch.testing.assert_close(images(), before, atol=1e-4, rtol=0)
    assert saved("after") == files
    pipeline.disable_acceleration()
    assert processors() == given
    torch.testing.assert_close(images(), before, atol=0, rtol=0)


def test_a_graphed_network_can_be_copied():
    """A copy has no graphs: they read the original's weights."""
    unet = small_unet()
    unet.forward = GraphedForward(unet)
    twin = copy.deepcopy(unet)
    x, t = a_call()[0]
    with torch.no_grad():
        assert torch.equal(unet(x, t).sample, twin(x, t).sample)
        twin.conv_out.weight.zero_()
        assert not torch.equal(unet(x, t).sample, twin(x, t).sample)


def test_blocks_are_compiled_in_place(monkeypatch):
    """Every residual block and attention layer, under its own name: the state keeps stock's keys."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self), options)))
    unet = small_unet()
    keys = list(unet.state_dict())
    compile_blocks(unet)
    names = [kind.__name__ for kind, _ in compiled]
    assert names.count("ResnetBlock2D") == 2 + 2 + 4  # down, middle, up
    assert names.count("Attention") == 1 + 1 + 2
    assert all(
        options == {"options": {"layout_optimization": False, "fallback_random": True}} for _, options in compiled
    )
    assert list(unet.state_dict()) == keys


@gpu
def test_a_graph_gives_the_same_bits_and_sees_new_weights():
    """For each batch size, also after the weights have changed in place."""
    plain = small_unet().cuda().eval()
    graphed = copy.deepcopy(plain)
    graphed.forward = GraphedForward(graphed)
    for count in (2, 3, 2):
        x, t = torch.randn(count, 1, 8, 8, device="cuda"), torch.tensor(5, device="cuda")
        with torch.no_grad():
            assert torch.equal(plain(x, t).sample, graphed(x, t).sample)
            for model in (plain, graphed):
                model.conv_in.weight.mul_(1.1)
    assert len(graphed.forward.captured) == 2
