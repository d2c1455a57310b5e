"""The conditions of `ddpm-hf sample` for a model that reads an image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .conditions import Guidance

ONE_IMAGE = 4  # solutions of a single image, by default


@dataclass(frozen=True)
class ImageConditions:
    """The degraded image of each sample: one of `images`, in turn.

    Args:
        images: [c, h, w] in [0, 1].
        names: theirs, for legends.
        masks: of inpainting, bool [H, W], true where a pixel is known.
        class_labels: ids of a model by class, one for each; empty for no class.
        options: further arguments of the pipeline's call.
    """

    images: Sequence[Any]
    names: Sequence[str]
    masks: Sequence[Any] = ()
    class_labels: Sequence[int] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def default_count(self) -> int:
        """How many samples to make where none are asked for."""
        return len(self.images) if len(self.images) > 1 else ONE_IMAGE

    def labels(self, count: int) -> list[int]:
        """None: the samples are of images."""
        return []

    def sample(self, pipeline: "DiffusionPipeline", indices: range, **options: Any) -> Any:
        """The pipeline's output for the samples of these indices."""
        chosen = [index % len(self.images) for index in indices]
        if self.masks:
            options["mask"] = [self.masks[number] for number in chosen]
        if self.class_labels:
            options["class_labels"] = [self.class_labels[number] for number in chosen]
        return pipeline([self.images[number] for number in chosen], **self.options, **options)


def read_image_conditions(
    pipeline: Any,
    image: Path | None,
    mask: Path | None,
    classes: Sequence[str] | None,
    guidance: "Guidance",
    conditioning_noise: float | None,
    others: dict[str, Any],
) -> ImageConditions:
    """The conditions that the options give, checked against the pipeline.

    Args:
        others: options of models that read no image, by name; an error if one is given.

    Raises:
        ValueError: options, images or masks that the model does not support.
    """
    from ..restoration.pictures import to_tensor
    from .conditions import class_ids, free_guidance
    from .restore_inputs import counterpart, list_images, read_mask, read_pixels

    task = pipeline.conditioning.task
    if image is None:
        raise ValueError(f"this model ({task}) reads an image: give one, or a folder, with --image")
    for name, value in others.items():
        if value:
            raise ValueError(f"--{name} is not for a model that reads an image; leave it out")
    if mask is None and task == "inpaint":
        raise ValueError("this model inpaints: give --mask, a picture, white where to paint, or a folder of them")
    if mask is not None and task != "inpaint":
        raise ValueError(f"--mask {mask}: this model's task is {task}; leave it out")
    files = list_images(image, "image")
    channels, height, width = pipeline.conditioning.observed_shape(pipeline.sample_shape)
    images = []
    for file in files:
        images.append(to_tensor(read_pixels(file, channels, "image")) / 2 + 0.5)
        found = tuple(images[-1].shape[1:])
        if height is not None and found != (height, width):
            raise ValueError(
                f"--image {file}: {found[0]}x{found[1]} pixels, and the model reads {height}x{width}; resize it"
            )
    masks = [read_mask(counterpart(file, mask, "mask")) for file in files] if mask is not None else []
    for known in masks:
        pipeline.read_mask(known, 1)
    if classes and len(classes) not in (1, len(files)):
        raise ValueError(f"{len(classes)} times --class for {len(files)} images; give one, or one for each")
    if classes and not pipeline.has_classes:
        raise ValueError("this model has no classes; leave out --class")
    if not classes and pipeline.has_classes and pipeline.null_class is None:
        raise ValueError(f"this model always has a class: give --class, one of {', '.join(pipeline.labels)}")
    labels = class_ids(classes, pipeline.class_names, pipeline.default_classes) if classes else []
    labels = labels * (len(files) if len(labels) == 1 else 1)
    scale, rescale, interval = guidance
    scale = 1.0 if scale is None else scale
    if scale != 1.0 and not (pipeline.has_classes and pipeline.null_class is not None):
        raise ValueError(
            "--guidance-scale requires a model by class that was also trained without classes (--class_dropout 0.1)"
        )
    options = {**free_guidance(scale, rescale, interval), "conditioning_noise": conditioning_noise or 0.0}
    pipeline.check_level(options["conditioning_noise"], 0.0)
    return ImageConditions(images, [file.stem for file in files], masks, labels, options)


def refuse_image_models(pipeline: Any, command: str) -> None:
    """Raise ValueError for a command whose samples are made of noise alone, and a model that reads an image."""
    if hasattr(pipeline, "conditionings"):
        raise ValueError(
            f"{command} is for single models, and this is a cascade: give a model of it, or a folder of samples"
        )
    if hasattr(pipeline, "conditioning"):
        task = pipeline.conditioning.task
        raise ValueError(
            f"{command} is for models that sample without an image, and this one ({task}) reads one; measure it with"
            f" `ddpm-hf restore MODEL --task {task} --image FOLDER --degrade`"
        )
