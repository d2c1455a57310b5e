"""UNet presets by name: published architectures with their recipes, and small ones for CPUs.

A preset is one row: the arguments of `UNet2DModel`, and the flags that its paper trained with. A flag given on the
command line or in a `--config` file wins over the preset's. Parameters are counted in `docs/presets.md`.
"""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """What `--model_preset NAME` stands for."""

    description: str
    unet: dict[str, Any]  # arguments of UNet2DModel
    recipe: dict[str, Any]  # training flags and their values
    parameters: int  # for images of three channels, unconditionally


def _blocks(kind: str, resolutions: list[int], attention_at: tuple[int, ...]) -> tuple[str, ...]:
    """Block types, one a level; a level attends if its resolution is in `attention_at`."""
    return tuple(f"{'Attn' if r in attention_at else ''}{kind}Block2D" for r in resolutions)


def _unet(sample_size: int, widths: tuple[int, ...], layers: int, attention_at: tuple[int, ...], **more: Any) -> dict:
    """The arguments that all presets state: block types follow from where the paper puts attention."""
    resolutions = [sample_size // 2**level for level in range(len(widths))]
    return {
        "sample_size": sample_size,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": _blocks("Down", resolutions, attention_at),
        "up_block_types": _blocks("Up", resolutions[::-1], attention_at),
        **more,
    }


# Ho et al.'s code: one attention head over all channels, sin before cos, the finest frequency included
_HO = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
# OpenAI's code: the time embedding scales and shifts, the second half of the output is a variance
_OPENAI = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32, "out_channels": 6}

# the same number of heads at every width: of an `OpenAIUNet2DModel`
_FOUR_HEADS = {"attention_head_dim": None, "num_attention_heads": 4}


def _adm(sample_size: int, widths: tuple[int, ...], layers: int, **more: Any) -> dict:
    """ADM attends at 32, 16 and 8 and resamples within residual blocks."""
    resampling = {"downsample_type": "resnet", "upsample_type": "resnet"}
    unet = _unet(sample_size, widths, layers, (32, 16, 8), **_OPENAI, **resampling, **more)
    for key, plain in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
        unet[key] = tuple(f"Resnet{b.replace('Block', 'sampleBlock')}" if b == plain else b for b in unet[key])
    return unet


def _small(sample_size: int, widths: tuple[int, ...], layers: int, attention_at: tuple[int, ...], **more: Any) -> dict:
    """For CPUs: one attention head (head dim 8 is slow), and at most a quarter as many norm groups as channels."""
    return _unet(sample_size, widths, layers, attention_at, norm_num_groups=8, attention_head_dim=widths[-1], **more)


_CONSTANT_EMA = {"use_ema": True, "ema_max_decay": 0.9999, "ema_min_decay": 0.9999}
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0, "lr_scheduler": "constant_with_warmup"}
_HO_RECIPE = {**_ADAM, **_CONSTANT_EMA, "lr_warmup_steps": 5000, "max_grad_norm": 1.0, "random_flip": True}
_OPENAI_RECIPE = {
    **_ADAM,
    **_CONSTANT_EMA,
    "lr_warmup_steps": 0,
    "max_grad_norm": 0.0,
    "variance_type": "learned_range",
    "objective": "hybrid",
}

# v_prediction: an error of ε at high noise is up to 157 times as large in x̂_0, and shifts the colours of whole images
_SMALL_RECIPE = {
    "prediction_type": "v_prediction",
    "use_ema": True,
    "lr_warmup_steps": 100,
    "adam_beta1": 0.9,
    "adam_weight_decay": 0.0,
}

MODEL_PRESETS: dict[str, Preset] = {
    "small-16": Preset(
        "0.7M parameters for 16×16 on a CPU: the embedded digits' network",
        _small(16, (32, 64), 1, (8,)),
        {**_SMALL_RECIPE, "learning_rate": 2e-3},
        parameters=702_499,
    ),
    "small-32": Preset(
        "2.7M parameters for 32×32 on a CPU",
        _small(32, (32, 64, 128), 1, (8,)),
        {**_SMALL_RECIPE, "learning_rate": 1e-3},
        parameters=2_736_099,
    ),
    "small-64": Preset(
        "11M parameters for 64×64, a GPU's first hour or a CPU's night",
        _small(64, (32, 64, 128, 256), 1, (8,)),
        {**_SMALL_RECIPE, "learning_rate": 5e-4},
        parameters=10_727_267,
    ),
    "large-64": Preset(
        "wider and deeper, for 64×64 photos on a GPU: linear, L2",
        _unet(64, (128, 256, 256, 512), 3, (16, 8), dropout=0.1, attention_head_dim=64),
        {
            **_ADAM,
            **_CONSTANT_EMA,
            "lr_warmup_steps": 1000,
            "learning_rate": 2e-4,
            "train_batch_size": 64,
            "max_train_steps": 100_000,
            "ddpm_beta_schedule": "linear",
            "loss_type": "l2",
        },
        parameters=97_132_419,
    ),
    "ddpm-cifar10": Preset(
        "Ho et al. 2020, CIFAR-10 32×32",
        _unet(32, (128, 256, 256, 256), 2, (16,), dropout=0.1, **_HO),
        {
            **_HO_RECIPE,
            "learning_rate": 2e-4,
            "train_batch_size": 128,
            "max_train_steps": 800_000,
            "variance_type": "fixed_large",
        },
        parameters=35_746_307,
    ),
    "ddpm-256": Preset(
        "Ho et al. 2020, CelebA-HQ and LSUN 256×256 (steps as for CelebA-HQ)",
        _unet(256, (128, 128, 256, 256, 512, 512), 2, (16,), **_HO),
        {
            **_HO_RECIPE,
            "learning_rate": 2e-5,
            "train_batch_size": 64,
            "max_train_steps": 500_000,
            "variance_type": "fixed_small",
        },
        parameters=113_673_219,
    ),
    "iddpm-cifar10": Preset(
        "Nichol & Dhariwal 2021, CIFAR-10 32×32",
        _unet(32, (128, 256, 256, 256), 3, (16, 8), dropout=0.3, attention_head_dim=64, **_OPENAI),
        {
            **_OPENAI_RECIPE,
            "learning_rate": 1e-4,
            "train_batch_size": 128,
            "max_train_steps": 500_000,
            "ddpm_beta_schedule": "cosine",
            "ddpm_num_steps": 4000,
        },
        parameters=52_546_438,
    ),
    "iddpm-imagenet64": Preset(
        "Nichol & Dhariwal 2021, ImageNet 64×64",
        _unet(64, (128, 256, 384, 512), 3, (16, 8), **_FOUR_HEADS, timestep_scale=0.25, **_OPENAI),
        {
            **_OPENAI_RECIPE,
            "learning_rate": 1e-4,
            "train_batch_size": 128,
            "max_train_steps": 1_500_000,
            "ddpm_beta_schedule": "cosine",
            "ddpm_num_steps": 4000,
        },
        parameters=121_063_942,
    ),
    "adm-64": Preset(
        "Dhariwal & Nichol 2021, ImageNet 64×64",
        _adm(64, (192, 384, 576, 768), 3, dropout=0.1, attention_head_dim=64),
        {
            **_OPENAI_RECIPE,
            "learning_rate": 3e-4,
            "train_batch_size": 2048,
            "max_train_steps": 540_000,
            "ddpm_beta_schedule": "cosine",
        },
        parameters=295_136_454,
    ),
    "adm-128": Preset(
        "Dhariwal & Nichol 2021, ImageNet 128×128",
        _adm(128, (256, 256, 512, 768, 1024), 2, **_FOUR_HEADS),
        {
            **_OPENAI_RECIPE,
            "learning_rate": 1e-4,
            "train_batch_size": 256,
            "max_train_steps": 4_360_000,
        },
        parameters=420_505_606,
    ),
    "adm-256": Preset(
        "Dhariwal & Nichol 2021, ImageNet 256×256",
        _adm(256, (256, 256, 512, 512, 1024, 1024), 2, attention_head_dim=64),
        {
            **_OPENAI_RECIPE,
            "learning_rate": 1e-4,
            "train_batch_size": 256,
            "max_train_steps": 1_980_000,
        },
        parameters=552_814_086,
    ),
}


def preset_unet_config(name: str, **overrides: Any) -> dict[str, Any]:
    """The arguments of a preset's UNet, with some replaced.

    Raises:
        ValueError: no such preset.
    """
    if name not in MODEL_PRESETS:
        raise ValueError(f"model_preset {name!r}: must be one of {', '.join(MODEL_PRESETS)}")
    return {**MODEL_PRESETS[name].unet, **overrides}
