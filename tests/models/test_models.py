"""Presets are the published architectures and recipes, and every UNet that is built can see the timestep."""

import copy
import re

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from ddpm_hf.data.flags import DataFlags
from ddpm_hf.models.diffusion import make_scheduler
from ddpm_hf.models.flags import UNetFlags
from ddpm_hf.models.presets import MODEL_PRESETS, preset_unet_config
from ddpm_hf.models.recipes import EMBEDDED_RECIPE
from ddpm_hf.models.sizes import DEFAULT_UNET, model_size, settle_resolution
from ddpm_hf.models.unet import build_unet, stock_unet_defaults, time_blindness
from ddpm_hf.objectives.flags import ObjectiveFlags, ScheduleFlags
from ddpm_hf.portable.acceleration_ddpm_hf import AttentionBySize, choose_attention
from ddpm_hf.portable.sampling_ddpm_hf import downscaling
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler
from tests.support import ROOT
from tests.support.runs import parse

SMALL = [name for name in MODEL_PRESETS if name.startswith("small-")]
OURS = ["large-64"]  # after no paper
PUBLISHED = {
    # name: widths, blocks, attention at, dropout, learning rate, warm-up, batch, steps, schedule, T, variance, clip,
    # parameters (the ADM rows with 1000 classes)
    "ddpm-cifar10": ((1, 2, 2, 2), 128, 2, {16}, 0.1, 2e-4, 5000, 128, 800_000, "linear", 1000, "fixed_large", 1,
                     35_746_307),
    "ddpm-256": ((1, 1, 2, 2, 4, 4), 128, 2, {16}, 0, 2e-5, 5000, 64, 500_000, "linear", 1000, "fixed_small", 1,
                 113_673_219),
    "iddpm-cifar10": ((1, 2, 2, 2), 128, 3, {16, 8}, 0.3, 1e-4, 0, 128, 500_000, "cosine", 4000, "learned_range", 0,
                      52_546_438),
    "iddpm-imagenet64": ((1, 2, 3, 4), 128, 3, {16, 8}, 0, 1e-4, 0, 128, 1_500_000, "cosine", 4000, "learned_range", 0,
                         121_063_942),
    "adm-64": ((1, 2, 3, 4), 192, 3, {32, 16, 8}, 0.1, 3e-4, 0, 2048, 540_000, "cosine", 1000, "learned_range", 0,
               295_904_454),
    "adm-128": ((1, 1, 2, 3, 4), 256, 2, {32, 16, 8}, 0, 1e-4, 0, 256, 4_360_000, "linear", 1000, "learned_range", 0,
                421_529_606),
    "adm-256": ((1, 1, 2, 2, 4, 4), 256, 2, {32, 16, 8}, 0, 1e-4, 0, 256, 1_980_000, "linear", 1000, "learned_range",
                0, 553_838_086),
}  # fmt: skip


def on_meta(config: dict) -> UNet2DModel:
    """A UNet without memory for its weights."""
    with torch.device("meta"):
        return build_unet(config)


def parameters(model: torch.nn.Module) -> int:
    """How many weights."""
    return sum(one.numel() for one in model.parameters())


def test_every_published_preset_is_compared_here():
    # Breaks if a preset is added that nobody compared with its paper.
    assert set(MODEL_PRESETS) == {*SMALL, *OURS, *PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_preset_is_its_paper(name):
    # Breaks if `--model_preset` trains another network, or by another recipe, than the paper it is named after.
    (multipliers, width, blocks, attention, dropout, rate, warmup, batch, steps, schedule, T, variance, clip,
     count) = PUBLISHED[name]  # fmt: skip
    unet = preset_unet_config(name)
    assert unet["block_out_channels"] == tuple(width * one for one in multipliers)
    assert unet["layers_per_block"] == blocks
    resolutions = [unet["sample_size"] // 2**level for level in range(len(multipliers))]
    assert {r for r, kind in zip(resolutions, unet["down_block_types"]) if kind == "AttnDownBlock2D"} == attention
    assert {r for r, kind in zip(resolutions[::-1], unet["up_block_types"]) if kind == "AttnUpBlock2D"} == attention
    assert unet.get("dropout", 0) == dropout

    classes = {"num_class_embeds": 1000} if name.startswith("adm") else {}
    assert parameters(on_meta(preset_unet_config(name, **classes))) == count

    config = parse(["--model_preset", name, "--train_data_dir", "data"])
    settle_resolution(config[DataFlags], *model_size(config[UNetFlags]), usual="64")
    assert config.size() == (unet["sample_size"], unet["sample_size"])
    assert config.learning_rate == rate
    assert config.lr_warmup_steps == warmup
    assert config.lr_scheduler in ("constant", "constant_with_warmup")
    assert config.train_batch_size == batch
    assert config.max_train_steps == steps
    assert config.ddpm_beta_schedule == schedule
    assert config.ddpm_num_steps == T
    assert config.variance_type == variance
    assert config.max_grad_norm == clip
    assert config.objective == ("hybrid" if variance == "learned_range" else "simple")
    assert (config.adam_beta1, config.adam_beta2, config.adam_weight_decay) == (0.9, 0.999, 0)
    assert config.use_ema
    assert config.ema_min_decay == config.ema_max_decay == 0.9999
    learned = config.variance_type == "learned_range"
    assert unet["out_channels"] == (6 if learned else 3)


def test_the_class_conditional_row_can_be_expressed():
    # Breaks if the presets' arguments cannot be recombined into the paper's class-conditional ImageNet-64 model.
    unet = preset_unet_config(
        "iddpm-imagenet64", block_out_channels=(192, 384, 576, 768), num_class_embeds=1000
    )  # fmt: skip
    assert parameters(on_meta(unet)) == 273_049_350


@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_says_its_size(name):
    # Breaks if the description of a preset, which users choose by, is of another model.
    said = float(MODEL_PRESETS[name].description.partition("M")[0])
    assert parameters(on_meta(preset_unet_config(name))) == pytest.approx(said * 1e6, rel=0.06)
    side = int(name.partition("-")[2])
    assert preset_unet_config(name)["sample_size"] == side


@pytest.mark.parametrize("name", [name for name in SMALL if MODEL_PRESETS[name].recipe])
def test_a_small_presets_recipe_amplifies_no_error(name):
    # Breaks if an error of the output becomes a larger one of the predicted image, which shifts colours; and if the
    # embedded recipe, which chooses a small preset by itself, is overruled by that preset's.
    config = parse(["--model_preset", name, "--train_data_dir", "data"])
    flags = config[ScheduleFlags], config[ObjectiveFlags]
    times, one = torch.arange(1000), torch.ones(1000, 1)
    _, factors = make_scheduler(*flags).x0_coefficients(times, one)
    assert factors.abs().max() <= 1
    _, of_epsilon = DDPMScheduler().x0_coefficients(times, one)
    assert of_epsilon.abs().max() == pytest.approx(157, abs=1)
    assert config.use_ema
    assert (parse([]).model_preset, parse([]).prediction_type) == ("small-16", "epsilon")
    assert {flag: getattr(parse([]), flag) for flag in EMBEDDED_RECIPE} == EMBEDDED_RECIPE


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_no_preset_is_slow_or_blind(name):
    # Breaks if a preset takes the slow head dim of 8, or norm groups of one channel, which hide the timestep.
    unet = preset_unet_config(name)
    model = on_meta(unet)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert module.num_groups < module.num_channels
        if hasattr(module, "heads"):
            assert module.to_q.out_features // module.heads > 8
    for flag in MODEL_PRESETS[name].recipe:
        assert hasattr(parse(["--train_data_dir", "data"]), flag)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_runs_and_sees_the_timestep(name):
    # Breaks if the network's output does not depend on t: it could not tell little noise from much.
    torch.manual_seed(0)
    model = build_unet(preset_unet_config(name)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
        x = torch.randn(1, 3, model.config.sample_size, model.config.sample_size)
        first, last = (model(x, t).sample for t in (0, len(DDPMScheduler()) - 1))
    assert first.shape == x.shape
    assert bool(first.isfinite().all())
    assert (first - last).abs().mean() > 0.01 * first.abs().mean()


TINY = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def time_dependence(groups: int) -> float:
    """How much the output of a tiny UNet without attention depends on t, as a share of it."""
    torch.manual_seed(0)
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(**{**TINY, **plain, "block_out_channels": (8, 8), "norm_num_groups": groups}).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        first, last = (model(x, t).sample for t in (0, 999))
    return float((first - last).abs().mean() / first.abs().mean())


def test_one_channel_a_group_is_warned_of_because_time_cancels():
    # Breaks if a new UNet that is blind to t is trained without a word, or one of the Hub's is refused.
    assert time_dependence(groups=8) < 1e-4 < 1e-2 < time_dependence(groups=2)
    for width in ((8, 8), (8, 16), (16, 8)):
        config = {**TINY, "block_out_channels": width, "norm_num_groups": 8}
        assert build_unet(config).config.norm_num_groups == 8
        assert "norm_num_groups=8 with 8 channels" in time_blindness(config)
        assert time_blindness({**config, "norm_num_groups": 2}) is None
        # here the embedding scales and shifts what the norm gives, and nothing cancels
        assert time_blindness({**config, "resnet_time_scale_shift": "scale_shift"}) is None


@pytest.mark.parametrize("groups", [3, 16, 0, -1, None, 2.0, "many"])
def test_groups_that_do_not_divide_are_refused_with_some_that_do(groups):
    # Breaks if they end in a traceback of torch's, or the number that the error names does not work.
    with pytest.raises(ValueError, match=f"norm_num_groups={groups} with 8 channels") as caught:
        build_unet({**TINY, "norm_num_groups": groups})
    named = int(re.search(r"for 8 channels, (\d+) is usual", str(caught.value))[1])
    assert time_blindness(build_unet({**TINY, "norm_num_groups": named}).config) is None


def test_what_a_config_leaves_out_is_diffusers_default():
    # Breaks if a config that stock builds a UNet from, such as 32 channels in its 32 groups, is refused here.
    own = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    with torch.device("meta"):
        ours, stock = build_unet(own), UNet2DModel(**own)
    assert {key: each for key, each in ours.config.items() if key[0] != "_"} == {
        key: each for key, each in stock.config.items() if key[0] != "_"
    }
    assert "norm_num_groups=32 with 32 channels" in time_blindness(own)
    assert stock_unet_defaults()["block_out_channels"] == on_meta({}).config.block_out_channels


@pytest.mark.parametrize(("head_dim", "side"), [(None, 8), (8, 8), (None, 16)], ids=["one head", "heads", "large"])
def test_attention_by_size_is_the_fused_attention(head_dim, side):
    # Breaks if training on a CPU computes another attention than whoever loads the model.
    torch.manual_seed(0)
    model = build_unet({**TINY, "attention_head_dim": head_dim}).double()  # so that rounding hides nothing
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    chosen = copy.deepcopy(model)
    choose_attention(chosen)
    processors = {type(m.processor) for m in chosen.modules() if isinstance(m, Attention)}
    assert processors == {AttentionBySize}
    x, t = torch.randn(3, 3, side, side).double(), torch.tensor([0, 500, 999])
    expected, output = model(x, t).sample, chosen(x, t).sample
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6 * float(expected.detach().abs().max()))
    expected.square().sum().backward()
    output.square().sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for (name, a), b in zip(model.named_parameters(), chosen.parameters()):  # the plain softmax is in float32
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize(("heads", "positions", "plain"), [(1, 64, True), (1, 81, False), (2, 16, False)])
def test_only_one_head_over_few_positions_is_plain(heads, positions, plain):
    # Breaks if the slow way is taken for shapes where it takes up to four times as long.
    layer = Attention(16, heads=heads, dim_head=16 // heads)
    choose_attention(layer)
    taken = []
    for name in ("plain", "fused"):
        setattr(layer.processor, name, lambda attn, x, *_, name=name: taken.append(name) or x)
    layer(torch.randn(2, positions, 16))
    side = int(positions**0.5)
    layer(torch.randn(2, 16, side, side))
    assert taken == ["plain" if plain else "fused"] * 2


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_smallest_side_is_what_the_unet_can_halve(levels):
    # Breaks if a resolution passes the check and then fails within the network, or a good one is refused.
    config = {
        **TINY,
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownBlock2D",) * levels,
        "up_block_types": ("UpBlock2D",) * levels,
    }
    side = downscaling(config["block_out_channels"])
    model = build_unet(config).eval()
    with torch.no_grad():
        for height, width in ((side, side), (side, 3 * side)):
            assert model(torch.zeros(1, 3, height, width), 0).sample.shape == (1, 3, height, width)
        if levels > 1:
            with pytest.raises(RuntimeError):
                model(torch.zeros(1, 3, side + side // 2, side), 0)


def test_unknown_presets_are_named():
    # Breaks if a typo in a preset's name ends in a KeyError, or the user is not told the names.
    with pytest.raises(ValueError, match=r"'small'.*small-16.*adm-256"):
        preset_unet_config("small")


def test_the_default_unet_is_the_peers():
    # Breaks if a peer's command line, which names no model, trains another network here.
    unet = on_meta({"sample_size": 64, "in_channels": 3, "out_channels": 3, **DEFAULT_UNET})
    assert unet.config.block_out_channels == (128, 128, 256, 256, 512, 512)
    assert unet.config.layers_per_block == 2
    assert [kind.startswith("Attn") for kind in unet.config.down_block_types] == [False] * 4 + [True, False]
    assert [kind.startswith("Attn") for kind in unet.config.up_block_types] == [False, True] + [False] * 4
    assert parameters(unet) == parameters(on_meta(preset_unet_config("ddpm-256")))


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_a_preset_states_its_parameters(name):
    """Else `ddpm-hf presets` and docs/presets.md advise a model by a size that it does not have."""
    with torch.device("meta"):
        model = build_unet(MODEL_PRESETS[name].unet)
    assert sum(each.numel() for each in model.parameters()) == MODEL_PRESETS[name].parameters
    table = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{name}` .*\| {MODEL_PRESETS[name].parameters:,} \|", table, re.M)
