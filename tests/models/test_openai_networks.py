"""Checkpoints of improved- and guided-diffusion become the same functions, and go back to the bit."""

import pytest
import torch

from ddpm_hf.models.converters.openai_flags import PUBLISHED, choose_flags, parse_flags
from ddpm_hf.models.converters.openai_layout import read_layout, unet_config
from ddpm_hf.models.converters.openai_names import load_openai, to_openai
from ddpm_hf.portable.networks_ddpm_hf import NoisyClassifier, build_unet
from tests.support.openai_networks import Classifier, UNet, randomized

LEVELS = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4),
          512: (0.5, 1, 1, 2, 2, 4, 4)}  # fmt: skip


def original(name, width=None, head_channels=None):
    """(OpenAI's network by the README's flags of a published file, the flags); at another width if one is given."""
    repository, text = PUBLISHED[name]
    flags = parse_flags(text)
    size = int(flags.get("large_size", flags.get("image_size", 256)))
    upsampling = "large_size" in flags or "upsample" in name
    levels = LEVELS[256] if upsampling else LEVELS[size]
    classifier = "classifier_width" in flags
    sides = flags.get("classifier_attention_resolutions" if classifier else "attention_resolutions", "16,8").split(",")
    attention = {levels_down for levels_down in range(len(levels)) if str(size // 2**levels_down) in sides}
    if width and "num_channels" in flags:
        flags["num_channels"] = str(width)
    if head_channels and "num_head_channels" in flags:
        flags["num_head_channels"] = str(head_channels)
    common = {
        "width": int(flags["classifier_width" if classifier else "num_channels"]),
        "levels": levels,
        "attention": attention,
        "layers": int(flags["classifier_depth" if classifier else "num_res_blocks"]),
        "heads": int(flags.get("num_heads", 4)),
        "legacy": flags.get("use_new_attention_order") != "True",
    }
    if classifier:
        if width:  # fewer positions too, to which its pooling is bound
            common["width"], size = width, 16
            flags |= {"image_size": "16", "classifier_attention_resolutions": "8,4,2", "classifier_width": str(width)}
        return Classifier(image_size=size, classes=1000, head_channels=64, **common), flags
    steps = int(flags["diffusion_steps"])
    rescaled = flags.get("rescale_timesteps", str(repository == "improved-diffusion")) == "True"
    return UNet(
        head_channels=int(flags.get("num_head_channels", -1)),
        in_channels=6 if upsampling else 3,
        resnet=flags.get("resblock_updown") == "True",
        scale_shift=flags.get("use_scale_shift_norm", "True") == "True",
        classes=1000 if flags.get("class_cond") == "True" else None,
        t_scale=1000 / steps if rescaled else 1.0,
        **common,
    ), flags  # fmt: skip


def converted(state, flags, repository=None, **changed):
    """Our network of a state dict; (network, the config of its UNet, whether the order is the legacy one)."""
    layout = read_layout(state)
    chosen, _ = choose_flags(flags, layout, repository)
    chosen = chosen._replace(**changed)
    config = unet_config(
        layout, chosen.image_size, chosen.num_heads, chosen.num_head_channels, chosen.timestep_scale, chosen.dropout
    )
    classifier = bool(layout.positions)
    model = NoisyClassifier(unet=config, num_classes=layout.out_channels) if classifier else build_unet(config)
    config = dict(build_unet(config).config) if classifier else model.config
    if next(iter(state.values())).device.type != "meta":
        model.to(next(iter(state.values())).dtype)
        load_openai(model, config, state, chosen.legacy_order, encoder=classifier)
    return model.eval(), config, chosen.legacy_order


def outputs(network, name, dtype, side):
    """The output of a network for one fixed input of a published file's kind."""
    generator = torch.Generator().manual_seed(5)
    channels = 6 if "upsampl" in name else 3
    x = torch.randn(2, channels, side, side, generator=generator, dtype=torch.float64).to(dtype)
    t, labels = torch.tensor([3, 871]), torch.tensor([7, 999])
    conditional = hasattr(network, "label_emb") or getattr(network, "class_embedding", None) is not None
    with torch.no_grad():
        result = network(x, t, labels) if conditional else network(x, t)
    return getattr(result, "sample", result)


def distance(a, b):
    """The largest difference, in units of the values' deviation."""
    return float((a - b).abs().max() / b.std())


ONCE = {name: row for name, row in PUBLISHED.items()
        if "vlb" not in name and name not in ("lsun_uncond_100M_2400K_bs64.pt", "lsun_cat.pt", "lsun_horse.pt",
                                              "lsun_horse_nodropout.pt")}  # fmt: skip


SMALL = {name: 64 if name.startswith("512x512") or "classifier" in name else 32 for name in ONCE}  # their widths


def small(name):
    """(network, flags, side of a test image) of a published file at reduced width, with random weights."""
    network, flags = original(name, SMALL[name], head_channels=16)
    side = 16 if "classifier" in name else 2 ** max(4, len(network.widths) - 1)
    return randomized(network), flags, side


@pytest.mark.every(3)
@pytest.mark.parametrize("name", [name for name in ONCE if "classifier" not in name or name.startswith("64")])
def test_a_converted_network_computes_what_the_original_does_and_goes_back(name):
    # Breaks if any flag of a README is lost on the way: images would be noise, or slightly wrong without a sign.
    network, flags, side = small(name)
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        state = network.to(dtype).state_dict()
        model, config, legacy = converted(state, flags, PUBLISHED[name][0])
        assert distance(outputs(model, name, dtype, side), outputs(network, name, dtype, side)) <= most
        back = to_openai(model, config, legacy, encoder="classifier" in name)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) and back[key].dtype == dtype for key in state)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("64x64_diffusion.pt", {"legacy_order": True}),
        ("256x256_diffusion.pt", {"legacy_order": False}),
        ("128x128_diffusion.pt", {"num_head_channels": 16}),
        ("64x64_diffusion.pt", {"num_head_channels": -1, "num_heads": 4}),
        ("imagenet64_uncond_100M_1500K.pt", {"rescale_timesteps": False}),
    ],
)
def test_the_comparison_sees_a_wrong_flag(name, changed):
    # Breaks if the test above could not tell the right conversion from the likeliest wrong ones.
    network, flags, side = small(name)
    state = network.state_dict()
    model, *_ = converted(state, flags, PUBLISHED[name][0], **changed)
    assert distance(outputs(model, name, torch.float32, side), outputs(network, name, torch.float32, side)) > 1e-2


EXACT = {
    "cifar10_uncond_50M_500K.pt": 52_546_438,
    "imagenet64_uncond_100M_1500K.pt": 121_063_942,
    "imagenet64_cond_270M_250K.pt": 273_049_350,
    "64x64_diffusion.pt": 295_904_454,
    "128x128_diffusion.pt": 421_529_606,
    "256x256_diffusion.pt": 553_838_086,
    "256x256_diffusion_uncond.pt": 552_814_086,
    "lsun_bedroom.pt": 552_814_086,
}
ROUNDED = {
    "upsample_cond_500K.pt": 280,
    "lsun_uncond_100M_1200K_bs128.pt": 114,
}  # millions; of the latter Ho's network


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ONCE)
def test_a_full_size_network_has_the_published_number_of_parameters(name):
    # Breaks if a layer of a published network is missing, or of another width.
    with torch.device("meta"):
        network, flags = original(name)
        model, *_ = converted(network.state_dict(), flags, PUBLISHED[name][0])
    count, ours = (sum(value.numel() for value in one.parameters()) for one in (network, model))
    if "classifier" in name:
        width = network.widths[-1]
        ours -= width * width + width  # our pooling has one more layer, which is the identity
    assert ours == count
    assert count == EXACT.get(name, count)
    assert round(count / 1e6) == pytest.approx(ROUNDED.get(name, count / 1e6), abs=2)
