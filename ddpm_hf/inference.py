"""Loading a trained model of any kind: a pipeline, a checkpoint of a run, or a model on the Hub."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import why_not_loaded
from .sources import MODEL_CONFIG, MODEL_INDEX, UNET_FOLDERS, find_place, find_source
from .space import drawing

if TYPE_CHECKING:
    from .portable.pipeline_class_conditional_ddpm_hf import ClassConditionalDDPMPipeline
    from .portable.pipeline_ddpm_hf import DDPMPipeline
    from .portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline


def load(
    name_or_path: str | os.PathLike, *, ema: bool | None = None, revision: str | None = None, token: str | None = None
) -> "DDPMPipeline | ClassConditionalDDPMPipeline | TextToImageDDPMPipeline":
    """Load a model as the pipeline that it is for; no code of a repository is executed.

    Args:
        name_or_path: a pipeline's folder, a `checkpoint-N` of an unconditional or class-conditional run, or a name on
            the Hub.
        ema: of a checkpoint, whether to take the averaged weights; by default where it has them.
        revision: branch, tag or commit on the Hub.
        token: for a private model on the Hub; by default your login.

    Raises:
        ValueError: no model there, one of another kind, or no such weights.
    """
    path = Path(name_or_path)
    of_a_run = any(os.path.isfile(path / part / MODEL_CONFIG) for part in UNET_FOLDERS)
    if of_a_run and not os.path.isfile(path / MODEL_INDEX):
        return _load_checkpoint(path, ema)
    if ema is not None:
        raise ValueError(
            f"ema={ema}: {name_or_path} is not a checkpoint-N folder, and only those hold both weights; leave ema out"
        )
    return drawing.load_pipeline(str(name_or_path), revision, token)


def _load_checkpoint(checkpoint: Path, ema: bool | None) -> Any:
    """The pipeline of a run's checkpoint, of the checkpoint alone."""
    from diffusers import UNet2DModel

    from .autoencoder import load_autoencoder
    from .portable.pipeline_class_conditional_ddpm_hf import ClassConditionalDDPMPipeline
    from .portable.pipeline_ddpm_hf import DDPMPipeline
    from .portable.scheduling_ddpm_hf import DDPMScheduler

    if ema and not (checkpoint / "unet_ema").is_dir():
        raise ValueError(
            f"{checkpoint} has no averaged (EMA) weights, since it was trained without --use_ema; give ema=False"
            " (--no-ema)"
        )
    try:
        source = find_source(find_place(str(checkpoint)))
    except ValueError as error:
        raise ValueError(f"{checkpoint} cannot be loaded: {error}") from error
    if source.scheduler is None:
        raise ValueError(f"{checkpoint} cannot be loaded: nothing says which diffusion it was trained with")
    folder = checkpoint / ("unet" if ema is False else source.place.name)
    try:
        unet = UNet2DModel.from_pretrained(folder, use_safetensors=True)
        scheduler = DDPMScheduler.from_config(source.scheduler)
        vae = load_autoencoder(source.vae) if source.vae else None
        if source.classes:
            return ClassConditionalDDPMPipeline(unet, scheduler, dict(enumerate(source.classes)), vae)
        return DDPMPipeline(unet, scheduler, vae)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} cannot be loaded: {why_not_loaded(error)}") from error
