"""The size of images, latents and UNet, fitted to one another."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import UsageError, one_line
from .flags import UNetFlags
from .presets import MODEL_PRESETS, preset_unet_config
from .pretrained import check_channels
from .sources import Source
from .unet import UNETS, stock_unet_defaults

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    from diffusers import AutoencoderKL

# That of Diffusers' script where neither preset nor config is named, so that its command lines train the same
DEFAULT_UNET = {
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}


def settle_resolution(
    data: Any, sample_size: int | Sequence[int] | None, factor: int, usual: str, trained: bool = False
) -> str | None:
    """Set a --resolution that was not given to the size of the model, or to the usual one.

    Args:
        sample_size: of the UNet, as its config has it: a side, (height, width), or None where nothing is known.
        factor: pixels for each of these in each direction: the autoencoder's, or 1.
        usual: where the model has no size yet.
        trained: whether the model has weights, which learned images of that size.

    Returns:
        A line to log where the size is another than the user expects.

    Raises:
        UsageError: a sample size that is not one.
    """
    trained_size = None
    if sample_size is not None:
        sides = [sample_size] * 2 if isinstance(sample_size, int) else sample_size
        if not (isinstance(sides, (list, tuple)) and len(sides) == 2 and all(type(side) is int for side in sides)):
            raise UsageError(f"the model's config has sample_size {sample_size!r}, which is not a size")
        height, width = (side * factor for side in sides)
        trained_size = str(height) if height == width else f"{height}x{width}"
    if data.resolution is None:
        data.resolution = trained_size or usual
        return None if data.resolution == usual else f"resolution {trained_size}, the size of the model"
    if trained and trained_size and data.size() != (height, width):
        return (
            f"warning: --resolution {data.resolution}: the model was trained at {trained_size} (--resolution"
            f" {trained_size})"
        )
    return None


def model_size(
    flags: UNetFlags, vae: "AutoencoderKL | None" = None, source: Source | None = None, token: str | None = None
) -> tuple[int | Sequence[int] | None, int]:
    """The sample size that the flags name a model of, None where they name none; and the pixels for each of these.

    Raises:
        UsageError: no config there.
    """
    from ..portable.sampling_ddpm_hf import downscaling

    if source is not None:
        return source.size, 1
    factor = 1 if vae is None else downscaling(vae.config.block_out_channels)
    if flags.model_config_name_or_path:
        return read_unet_config(flags.model_config_name_or_path, token).get("sample_size"), factor
    if flags.model_preset:
        return MODEL_PRESETS[flags.model_preset].unet["sample_size"], factor
    return (None if vae is None else vae.config.sample_size), 1


def unet_arguments(
    flags: UNetFlags,
    data: Any,
    vae: "AutoencoderKL | None" = None,
    source: Source | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """The UNet's arguments, fitted to the images' size and channels, or those of their latents.

    Args:
        source: the trained model to start from.
        token: for a private config on the Hub.

    Raises:
        UsageError: a resolution that the UNet cannot halve, or a channel mismatch.
    """
    from ..portable.sampling_ddpm_hf import downscaling

    height, width = data.size()
    if vae is not None:
        if data.channels not in (None, vae.config.in_channels):
            raise UsageError(f"--channels {data.channels}: the autoencoder reads images of {vae.config.in_channels}")
        factor = downscaling(vae.config.block_out_channels)
        if height % factor or width % factor:
            raise UsageError(f"--resolution {data.resolution}: the autoencoder requires multiples of {factor}")
        height, width = height // factor, width // factor
    if source is not None:
        chosen: dict[str, Any] = {**source.unet, "num_class_embeds": None}  # classes are the data's: --label_column
        channels = data.channels or source.channels if vae is None else vae.config.latent_channels
        check_channels(source, channels, "images" if vae is None else "latents")
    elif flags.model_config_name_or_path:
        chosen = read_unet_config(flags.model_config_name_or_path, token)
        for key in ("num_class_embeds", "class_embed_type"):  # classes are the data's: --label_column
            chosen.pop(key, None)
        expected = chosen.get("in_channels", 3)
        channels = vae.config.latent_channels if vae is not None else data.channels or expected
        if expected != channels:
            raise UsageError(
                f"--model_config_name_or_path has {expected} input channels and the"
                f" {'images' if vae is None else 'latents'} {channels}"
                + (
                    f"; pass --channels {expected}, or use a config of {channels}"
                    if vae is None
                    else "; use a config of as many"
                )
            )
    else:
        chosen = preset_unet_config(flags.model_preset) if flags.model_preset else dict(DEFAULT_UNET)
        channels = data.channels or (1 if data.embedded else 3)
        channels = channels if vae is None else vae.config.latent_channels
    if vae is None and data.embedded and channels > 4:
        raise UsageError(f"the UNet has {channels} channels, and the embedded digits become up to 4; name your data")
    chosen |= {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
    }
    step = downscaling(chosen["block_out_channels"])
    if height % step or width % step:
        raise UsageError(
            f"--resolution {data.resolution}: this UNet halves the {'image' if vae is None else 'latent'}"
            f" {int(math.log2(step))} times, so both sides"
            f" must be multiples of {step * (1 if vae is None else factor)}"
        )
    return chosen


def read_unet_config(name_or_path: str, token: str | None = None, kind: str = "UNet2DModel") -> dict[str, Any]:
    """The arguments in the config of a UNet of Diffusers, on the Hub or on disk.

    Raises:
        UsageError: there is none, or one of another kind.
    """
    import diffusers

    cls = getattr(diffusers, kind)
    try:
        try:
            loaded = cls.load_config(name_or_path, token=token)
        except OSError:  # not a UNet by itself: a pipeline
            loaded = cls.load_config(name_or_path, subfolder="unet", token=token)
    except (OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise UsageError(f"--model_config_name_or_path {name_or_path}: no {kind} config there ({reason})") from error
    named = loaded.get("_class_name", kind)
    if named != kind and not (kind in UNETS and named in UNETS):
        raise UsageError(f"--model_config_name_or_path {name_or_path}: a {named}, not a {kind}")
    defaults = stock_unet_defaults(named) if kind in UNETS else {}
    return {**defaults, **{name: value for name, value in loaded.items() if not name.startswith("_")}}
