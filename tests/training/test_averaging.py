"""The moving average of the weights, and the optimizer's variants."""

import sys
import types

import pytest
import torch
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel

from ddpm_hf.common.errors import UsageError
from ddpm_hf.training.averaging import ema_weights, load_ema, make_ema, save_ema, update_ema
from ddpm_hf.training.flags import TrainingFlags
from ddpm_hf.training.setup.optimizer import make_optimizer
from tests.support.fixtures_pipeline import tiny_unet

CPU = torch.device("cpu")


def tiny_text_encoder():
    """A CLIP text encoder of one layer."""
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=6, bos_token_id=18, eos_token_id=19, pad_token_id=19,
        )
    )  # fmt: skip


def walk(ema, part, steps=3):
    """Move the weights, and the average after them."""
    for step in range(steps):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.1 * (step + 1))
        update_ema(ema, part)


MODELS = pytest.mark.parametrize("make", [tiny_unet, tiny_text_encoder], ids=["diffusers", "transformers"])


@MODELS
def test_averages_are_saved_as_models_and_come_back(make, tmp_path):
    """Else a resumed run averages from another place, or the averaged model cannot be loaded by itself."""
    part = make()
    ema = make_ema(TrainingFlags(), part, CPU)
    walk(ema, part)
    before = [parameter.clone() for parameter in part.parameters()]
    save_ema(ema, part, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), before))
    assert all(torch.equal(a, b) for a, b in zip(type(part).from_pretrained(tmp_path).parameters(), ema.shadow_params))
    again = make_ema(TrainingFlags(), make(), CPU)
    load_ema(again, part, tmp_path)
    for one in (ema, again):
        walk(one, make(), steps=2)
    assert again.optimization_step == ema.optimization_step == 5
    assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, ema.shadow_params))


@MODELS
def test_the_model_has_its_own_weights_again(make):
    """Else sampling in between would change what is trained."""
    part = make()
    ema = make_ema(TrainingFlags(), part, CPU)
    walk(ema, part)
    before = [parameter.clone() for parameter in part.parameters()]
    with ema_weights(ema, part):
        assert all(torch.equal(a, b) for a, b in zip(part.parameters(), ema.shadow_params))
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), before))


def test_foreach_is_the_same_average():
    """Else --foreach_ema would choose another average instead of another way to the same one."""
    found = []
    for foreach in (True, False):
        part = tiny_unet()
        ema = make_ema(TrainingFlags(foreach_ema=foreach), part, CPU)
        assert ema.foreach is foreach
        walk(ema, part)
        found.append(ema.shadow_params)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_an_offloaded_average_stays_where_it_is_kept(monkeypatch):
    """Else --offload_ema would be read by nobody, or the average would wander to the model's device."""
    pinned = []
    monkeypatch.setattr(EMAModel, "pin_memory", lambda self: pinned.append(self))
    part = tiny_unet()
    ema = make_ema(TrainingFlags(offload_ema=True), part, torch.device("cuda"))
    assert pinned == [ema]
    update_ema(ema, part.double())  # as from elsewhere: the update must not ask for one place
    assert {parameter.device for parameter in ema.shadow_params} == {CPU}


def test_eight_bit_adam_is_that_of_bitsandbytes(monkeypatch):
    """Else --use_8bit_adam would be ignored, or its absence a traceback."""

    class AdamW8bit(torch.optim.AdamW):
        pass

    optim = types.ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    config = TrainingFlags(use_8bit_adam=True)
    assert type(make_optimizer(config, tiny_unet(), 1)) is AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        make_optimizer(config, tiny_unet(), 1)


def test_frozen_parameters_are_not_optimized():
    """Else a frozen part would be moved by the weight decay."""
    part = tiny_unet()
    part.conv_in.requires_grad_(False)
    optimized = {id(p) for group in make_optimizer(TrainingFlags(), part, 1).param_groups for p in group["params"]}
    assert optimized == {id(parameter) for parameter in part.parameters() if parameter.requires_grad}
