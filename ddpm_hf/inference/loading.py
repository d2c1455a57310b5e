"""Loading a trained model of any kind: a pipeline, a checkpoint of a run, or a model on the Hub."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.checkpoints import MANIFEST
from ..common.errors import why_not_loaded
from ..common.locations import MODEL_CONFIG, MODEL_INDEX, UNET_FOLDERS, find_location
from ..models.sources import find_source
from . import kinds

if TYPE_CHECKING:
    from typing import TypeAlias

    from ..portable.pipeline_cascade_ddpm_hf import DDPMCascadePipeline
    from ..portable.pipeline_class_conditional_ddpm_hf import ClassConditionalDDPMPipeline
    from ..portable.pipeline_ddpm_hf import DDPMPipeline
    from ..portable.pipeline_image_to_image_ddpm_hf import DDPMImageToImagePipeline
    from ..portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline

    Pipeline: TypeAlias = (
        DDPMPipeline
        | ClassConditionalDDPMPipeline
        | DDPMImageToImagePipeline
        | DDPMCascadePipeline
        | TextToImageDDPMPipeline
    )


def load(
    name_or_path: str | os.PathLike, *, ema: bool | None = None, revision: str | None = None, token: str | None = None
) -> "Pipeline":
    """Load a model as the pipeline that it is for; no code of a repository is executed.

    Args:
        name_or_path: a pipeline's folder, a `checkpoint-N` of a run, or a name on the Hub. A checkpoint of a
            text-to-image run holds what was trained; the rest is taken from the run's folder, or from the model that
            it started from.
        ema: of a checkpoint, whether to take the averaged weights; by default where it has them.
        revision: branch, tag or commit on the Hub.
        token: for a private model on the Hub, also that which a run started from; by default your login.

    Raises:
        ValueError: no model there, one of another kind, no such weights, or a revision of a folder.
    """
    path = Path(name_or_path)
    if revision is not None and path.is_dir():
        raise ValueError(f"revision={revision!r}: {path} is a folder, which has no revisions; leave it out")
    if is_checkpoint(path):
        return _load_checkpoint(path, ema, token)
    if ema is not None:
        raise ValueError(
            f"ema={ema}: {name_or_path} is not a checkpoint-N folder, and only those hold both weights; leave ema out"
        )
    return kinds.load_pipeline(str(name_or_path), revision, token)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds the UNet of a run's checkpoint, and no pipeline."""
    has_unet = any(os.path.isfile(folder / part / MODEL_CONFIG) for part in UNET_FOLDERS)
    return has_unet and not os.path.isfile(folder / MODEL_INDEX)


def _load_checkpoint(checkpoint: Path, ema: bool | None, token: str | None) -> Any:
    """The pipeline of a run's checkpoint."""
    from ..models.autoencoder import load_autoencoder
    from ..models.fits import without_fits
    from ..portable.networks_ddpm_hf import unet_class
    from ..portable.pipeline_class_conditional_ddpm_hf import ClassConditionalDDPMPipeline
    from ..portable.pipeline_ddpm_hf import DDPMPipeline
    from ..portable.pipeline_image_to_image_ddpm_hf import DDPMImageToImagePipeline
    from ..portable.scheduling_ddpm_hf import DDPMScheduler

    if ema and not (checkpoint / "unet_ema").is_dir():
        raise ValueError(
            f"{checkpoint} has no averaged (EMA) weights, since it was trained without --use_ema; give ema=False"
            " (--no-ema)"
        )
    place = find_location(str(checkpoint), token=token)
    config = next(filter(None, ((place / part).json(MODEL_CONFIG) for part in UNET_FOLDERS)))
    if config.get("_class_name") == "UNet2DConditionModel":
        return _load_text_checkpoint(checkpoint, (place.json(MANIFEST) or {}), ema, token)
    try:
        source = find_source(place)
    except ValueError as error:
        raise ValueError(f"{checkpoint} cannot be loaded: {error}") from error
    if source.scheduler is None:
        raise ValueError(f"{checkpoint} cannot be loaded: nothing says which diffusion it was trained with")
    folder = checkpoint / ("unet" if ema is False else source.place.name)
    try:
        unet = unet_class(source.unet).from_pretrained(folder, use_safetensors=True)
        scheduler = DDPMScheduler.from_config(without_fits(source.scheduler))
        vae = load_autoencoder(source.vae, token=token) if source.vae else None
        if source.conditioning:
            names = dict(enumerate(source.classes or ()))
            return DDPMImageToImagePipeline(unet, scheduler, source.conditioning, names)
        if source.classes:
            return ClassConditionalDDPMPipeline(unet, scheduler, dict(enumerate(source.classes)), vae)
        return DDPMPipeline(unet, scheduler, vae)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} cannot be loaded: {why_not_loaded(error)}") from error


def _load_text_checkpoint(checkpoint: Path, manifest: dict[str, Any], ema: bool | None, token: str | None) -> Any:
    """The pipeline of a text-to-image run's checkpoint, which holds what was trained alone.

    The other components are those of the pipeline that the run has saved, or else those that it started from or made.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from ..models.fits import use_fits
    from ..portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline
    from .components import assemble, components_of_run

    run = checkpoint.resolve().parent
    averaged = "_ema" if (ema is not False and (checkpoint / "unet_ema").is_dir()) else ""
    try:
        given = {"unet": UNet2DConditionModel.from_pretrained(checkpoint / f"unet{averaged}", use_safetensors=True)}
        if (checkpoint / "text_encoder").is_dir():
            folder = checkpoint / f"text_encoder{averaged}"
            given["text_encoder"] = CLIPTextModel.from_pretrained(folder, use_safetensors=True)
        if (run / MODEL_INDEX).is_file():
            pipeline = TextToImageDDPMPipeline.from_pretrained(run, use_safetensors=True, **given)
            use_fits(pipeline, {})  # fits in the run's folder are of its last weights
            return pipeline
        if not isinstance(manifest.get("settings"), dict):
            raise ValueError(f"nothing says which model the rest is of, and {run} holds no pipeline")
        return assemble(components_of_run(manifest["settings"], run, manifest.get("scheduler"), given, token))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        resume = f"ddpm-hf train-text2image --output_dir {shlex.quote(str(run))} --resume_from_checkpoint latest"
        way = (
            f"`{resume}` ends with a complete pipeline"
            if manifest
            else "TextToImageDDPMPipeline.from_pretrained(BASE, unet=UNet2DConditionModel.from_pretrained("
            f"{str(checkpoint / 'unet')!r})) takes the rest of the model that it was trained from"
        )
        raise ValueError(
            f"{checkpoint} holds what was trained of a text-to-image model, and the rest cannot be loaded"
            f" ({why_not_loaded(error)}); {way}"
        ) from error
