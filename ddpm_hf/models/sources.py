"""Trained weights, and what is known of their training: of a pipeline, a checkpoint or a UNet.

Only JSON files are read here. Other programs' layouts are understood too: Diffusers' training script leaves
`checkpoint-N/unet`, and old repositories of the Hub hold the UNet at their root.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..common.checkpoints import MANIFEST
from ..common.locations import (
    MODEL_CONFIG,
    MODEL_INDEX,
    OTHER_WEIGHTS,
    UNET_FOLDERS,
    Location,
    find_location,
    name_from_run,
    way_out,
)
from .conditioning import conditioning_of
from .unet import UNETS, stock_unet_defaults


class Source(NamedTuple):
    """Trained weights, and what is known of their training.

    Args:
        place: the folder of the UNet's weights.
        title: what to call them in a message.
        unet: the UNet's config, with defaults filled in.
        scheduler: the diffusion's config; None where nothing is known of it.
        classes: the classes' names by their ids; None where nothing is known of them.
        vae: name of the autoencoder in whose latents it was trained, or of a pipeline with it; None for pixels.
        factor: pixels for each of the UNet's, in each direction; None where that cannot be told.
        conditioning: what the UNet reads besides x_t, as a pipeline's config has it; None for nothing.
    """

    place: Location
    title: str
    unet: dict[str, Any]
    scheduler: dict[str, Any] | None = None
    classes: list[str] | None = None
    vae: str | None = None
    factor: int | None = 1
    conditioning: dict[str, Any] | None = None

    @property
    def channels(self) -> int:
        """Of x_t; the UNet reads more of them where it has a conditioning."""
        from ..portable.conditioning_ddpm_hf import Conditioning

        channels = self.unet["in_channels"]
        if self.conditioning is None or self.unet.get("condition_channels"):
            return channels
        return Conditioning.from_config(self.conditioning).image_channels(channels)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the images that it was trained on; None where that cannot be told."""
        sides = self.unet["sample_size"]
        sides = [sides] * 2 if isinstance(sides, int) else sides
        if self.factor is None or not isinstance(sides, (list, tuple)) or len(sides) != 2:
            return None
        return sides[0] * self.factor, sides[1] * self.factor


def find_source(place: Location) -> Source:
    """The weights of a UNet2DModel in a place.

    Raises:
        ValueError: there are none, or those of another kind of model.
    """
    index = place.json(MODEL_INDEX)
    if index is not None:
        return _of_pipeline(place, index)
    for part in UNET_FOLDERS:
        config = (place / part).json(MODEL_CONFIG)
        if config is not None:
            weights = "the averaged (EMA) weights of " if part == "unet_ema" else ""
            source = Source(place / part, f"{weights}{place}", unet_config(config))
            return source._replace(**_training_of(place))
    config = place.json(MODEL_CONFIG)
    if config is not None:
        source = Source(place, str(place), unet_config(config), place.json("scheduler_config.json"))
        around = place.parent if place.name in UNET_FOLDERS else None
        return source if around is None or source.scheduler else source._replace(**_training_of(around))
    raise ValueError(_nothing_in(place))


def _nothing_in(place: Location) -> str:
    """Why there is no model in a place."""
    if place.unreachable:
        return (
            f"neither a folder nor a model that can be reached on the Hub ({place.unreachable[0]}); check the name and"
            " your network"
        )
    names = sorted(os.listdir(place.root)) if place.local else []
    foreign = next((name for name in names if name.endswith(OTHER_WEIGHTS)), "")
    there = f" (there is {foreign})" if foreign else ""
    return f"no model there{there}; {way_out(foreign)}"


def unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a UNet2DModel, from its config.

    Raises:
        ValueError: another model's.
    """
    kind = config.get("_class_name", "UNet2DModel")
    if kind == "UNet2DConditionModel":
        raise ValueError("a text-to-image model (UNet2DConditionModel); train_text2image.py trains those")
    if kind not in UNETS:
        raise ValueError(f"a {kind}, not a UNet2DModel")
    defaults = stock_unet_defaults(kind)
    return {**defaults, **{name: value for name, value in config.items() if name in defaults}}


def _of_pipeline(place: Location, index: dict[str, Any]) -> Source:
    """The UNet of a pipeline, in its folder or, as in old repositories, at the root."""
    kind = index.get("_class_name")
    kind = kind[-1] if isinstance(kind, list) and kind else kind
    entry = index.get("unet")
    if "vqvae" in index or not (isinstance(entry, list) and entry[-1:] != [None]):
        raise ValueError(f"a {kind}, not a pipeline of a UNet2DModel")
    inner = (place / "unet").json(MODEL_CONFIG)
    config = place.json(MODEL_CONFIG) if inner is None else inner
    if config is None:
        raise ValueError(f"{MODEL_INDEX} names a UNet, and there is no {MODEL_CONFIG} of it")
    source = Source(place if inner is None else place / "unet", str(place), unet_config(config))
    return source._replace(**_pipeline_facts(place, index))


def _pipeline_facts(place: Location, index: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline tells of its model's diffusion, classes and latents."""
    scheduler = (
        (place / "scheduler").json("scheduler_config.json")
        or place.json("scheduler_config.json")
        or (place / "scheduler").json(MODEL_CONFIG)
    )
    names = index.get("id2label")
    classes = None
    if isinstance(names, dict) and set(names) == {str(number) for number in range(len(names))}:
        classes = [str(names[str(number)]) for number in range(len(names))]
    facts: dict[str, Any] = {"scheduler": scheduler, "classes": classes, "conditioning": index.get("conditioning")}
    if isinstance(index.get("vae"), list) and index["vae"][-1:] != [None]:
        facts |= {"vae": place.root, "factor": _factor((place / "vae").json(MODEL_CONFIG))}
    return facts


def _factor(vae: Mapping[str, Any] | None) -> int | None:
    """How many pixels each of an autoencoder's latents stands for, in each direction, by its config."""
    from ..portable.sampling_ddpm_hf import downscaling

    widths = (vae or {}).get("block_out_channels")
    return downscaling(widths) if isinstance(widths, list) else None


def _training_of(place: Location) -> dict[str, Any]:
    """What a folder around a UNet tells of its training: a checkpoint of ours, or a pipeline, or one around it."""
    manifest = place.json(MANIFEST) or {}
    settings = manifest.get("settings")
    if isinstance(settings, dict):
        facts = {
            "scheduler": manifest.get("scheduler") or _scheduler_of(settings),
            "classes": manifest.get("classes") or None,
        }
        conditioning = conditioning_of(settings)
        facts["conditioning"] = conditioning and conditioning.config()
        if settings.get("vae_name_or_path"):
            name = settings["vae_name_or_path"]
            name = name_from_run(name, Path(place.root).parent) if place.local else name
            vae = find_location(name, token=place.token)
            config = (vae / "vae").json(MODEL_CONFIG) or vae.json(MODEL_CONFIG)
            facts |= {"vae": name, "factor": _factor(config)}
        return facts
    for around in (place, place.parent):
        index = around and around.json(MODEL_INDEX)
        if around and index:
            return _pipeline_facts(around, index)
    return {}


def _scheduler_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's config by a run's flags."""
    flags = {
        "num_train_timesteps": "ddpm_num_steps",
        "beta_schedule": "ddpm_beta_schedule",
        "prediction_type": "prediction_type",
        "variance_type": "variance_type",
        "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    }
    config = {key: settings[flag] for key, flag in flags.items() if settings.get(flag) is not None}
    return {**config, "clip_sample": settings.get("vae_name_or_path") is None}
