"""The likelihood that `ddpm-hf evaluate` measures: of which images, under which conditions, and what is said of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import DataError
from .evaluation_data import Data
from .evaluation_samples import ids_of_labels

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..common.image_sets import ImageSet
    from ..evaluation.bound import Bound
    from ..evaluation.model_bound import ModelBound
    from ..evaluation.report import Sections


def bound_of(
    pipeline: "DiffusionPipeline",
    data: Data,
    calls: int,
    images: int,
    seed: int,
    batch_size: int,
    steps: int | None = None,
) -> "ModelBound":
    """How to measure the likelihood of the held-out images, or of the reference where none are held out.

    Args:
        calls: of the network for each image; 0 is one for each timestep.
        steps: of the chain; None: all timesteps.

    Raises:
        ValueError: too few calls, no chain of so many steps, or a model by class or text without labels or captions
            of the images.
    """
    from ..evaluation.model_bound import ModelBound

    chosen = data.held_out or data.reference
    count, conditions = min(images, chosen.count), _conditions(pipeline, chosen)
    bound = ModelBound(pipeline, chosen, count, conditions, calls or None, seed, batch_size, steps)
    bound.check()
    return bound


def _conditions(pipeline: "DiffusionPipeline", images: "ImageSet") -> Any:
    """A function from indices to what the network takes besides x_t and t."""
    import torch

    if hasattr(pipeline, "tokenizer"):
        if images.captions is None:
            raise DataError(
                f"--likelihood-calls: this model requires texts; give the --caption-column of {images.name}"
            )
        captions = images.captions

        def by_text(indices: Sequence[int]) -> "dict[str, torch.Tensor]":
            with torch.no_grad():
                return {"encoder_hidden_states": pipeline.encode_prompt([captions[index] for index in indices])}

        return by_text
    if getattr(pipeline, "has_classes", False):
        if images.labels is None:
            raise DataError(f"--likelihood-calls: this model is by class; name the --label-column of {images.name}")
        ids = torch.as_tensor(ids_of_labels(pipeline, images))
        return lambda indices: {"class_labels": ids[list(indices)].to(pipeline.device)}
    return lambda indices: {}


def bound_sections(how: "ModelBound", bound: "Bound", held_out: bool) -> "Sections":
    """What `metrics.json`, the report and the terminal say of a bound, and whether its images were held out."""
    from ..evaluation.coding import progressive_coding
    from ..evaluation.model_bound import bound_plot
    from ..evaluation.report import Sections

    coding = progressive_coding(bound)
    record = {**bound.summary(), "dataset": how.images.name, "held_out": held_out, "curve": bound.curve()}
    return Sections(
        {"likelihood": record, "coding": coding.as_dict()},
        {"Likelihood": bound_plot(bound), "Progressive coding": coding.figure()},
        f"likelihood of {how.count:,} images of {how.images.name} ({'held out' if held_out else 'none is held out'}):"
        f" {bound.table()}",
    )
