"""The kinds of pipelines, one row each; which a model is for, and loading it."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import readable_load_errors


class Kind(NamedTuple):
    """A kind of pipeline.

    Args:
        file: of its class, in `portable/`.
        title: for people.
        task: for the tags of a model card.
        known_task: whether the Hub has a category for the task.
        does: for a model card, what it does.
        limits: for a model card, what it does not do; a sentence, or empty.
        stock: the classes of Diffusers whose models it samples too.
    """

    file: str
    title: str
    task: str
    known_task: bool
    does: str = "samples images"
    limits: str = ""
    stock: tuple[str, ...] = ()


# by the name of the class
KINDS = {
    "DDPMPipeline": Kind(
        "pipeline_ddpm_hf", "unconditional", "unconditional-image-generation", True, stock=("DDIMPipeline",)
    ),
    "ClassConditionalDDPMPipeline": Kind(
        "pipeline_class_conditional_ddpm_hf", "by class", "class-conditional-image-generation", False,
        "samples images of a class", "It knows its classes, and no others.",
    ),
    "DDPMImageToImagePipeline": Kind(
        "pipeline_image_to_image_ddpm_hf", "image to image", "image-to-image", True,
        "restores an image that it reads", "It knows one kind of degraded images, those that it was trained with.",
    ),
    "DDPMCascadePipeline": Kind(
        "pipeline_cascade_ddpm_hf", "a cascade", "unconditional-image-generation", True,
        "samples small images and enlarges them, by a cascade of models",
    ),
    "TextToImageDDPMPipeline": Kind(
        "pipeline_text2image_ddpm_hf", "text to image", "text-to-image", True,
        "samples images from a text", "It knows the words of its captions, and no others.",
        ("StableDiffusionPipeline",),
    ),
}  # fmt: skip
# The class of ours, by the class that saved a model; `hub_ddpm_hf.SAMPLED_BY`, for Diffusers' classes, says the same
SAMPLED_BY = {saved_by: name for name, kind in KINDS.items() for saved_by in (name, *kind.stock)}


def pipeline_class(model: str, revision: str | None = None, token: str | None = None) -> Any:
    """The class of ours that loads a folder or a model on the Hub, by its `model_index.json` alone.

    Raises:
        ValueError: no such model, or not one of ours.
    """
    from diffusers import DiffusionPipeline

    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model} holds no pipeline (no model_index.json); give the --output_dir of a training run")
    with readable_load_errors(model):
        name = DiffusionPipeline.load_config(model, revision=revision, token=token).get("_class_name")
        name = name[-1] if isinstance(name, list) and name else name  # [file, class] of our repositories' code
        if not isinstance(name, str) or name not in SAMPLED_BY:
            raise ValueError(f"it is a {name}, and must be one of {', '.join(SAMPLED_BY)}")
        file = KINDS[SAMPLED_BY[name]].file
        return getattr(importlib.import_module(f"..portable.{file}", __package__), SAMPLED_BY[name])


def load_pipeline(model: str, revision: str | None = None, token: str | None = None) -> Any:
    """Our pipeline from a folder or Hub name, of whatever kind, without executing anything from it.

    Raises:
        ValueError: no such model, or not one of ours.
    """
    cls = pipeline_class(model, revision, token)
    with readable_load_errors(model):
        return cls.from_pretrained(model, revision=revision, token=token, use_safetensors=True)
