"""The conditions of `ddpm-hf sample`: classes, prompts or none, and the guidance."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.classifier import NoisyClassifier

DEFAULT_IMAGES = 16
Guidance = tuple[float | None, float, tuple[int, int] | None]  # scale (None: the model's default), rescale, interval


@dataclass(frozen=True)
class Conditions:
    """The condition of each image: one of `given`, in turn.

    Args:
        given: class ids, or prompts; empty for a model that is sampled without either.
        names: their names, for legends.
        options: further arguments of the pipeline's call.
        by_keyword: whether the pipeline takes `given` as `class_labels`, for the classifier that guides it.
    """

    given: Sequence[Any] = ()
    names: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)
    by_keyword: bool = False

    @property
    def default_count(self) -> int:
        """How many images to sample where no number is asked for."""
        return DEFAULT_IMAGES

    def labels(self, count: int) -> list[int]:
        """The class ids of the first images; empty for a model without classes."""
        by_class = all(isinstance(one, int) for one in self.given)
        return [self.given[index % len(self.given)] for index in range(count)] if self.given and by_class else []

    def sample(self, pipeline: "DiffusionPipeline", indices: range, **options: Any) -> Any:
        """The pipeline's output for the images of these indices."""
        chosen = [self.given[index % len(self.given)] for index in indices if self.given]
        if self.by_keyword:
            options["class_labels"] = chosen
        return pipeline(len(indices) if self.by_keyword or not chosen else chosen, **self.options, **options)


def read_conditions(
    pipeline: "DiffusionPipeline",
    classifier: str | Path | None,
    classes: Sequence[str] | None,
    prompts: Sequence[str] | None,
    negative_prompt: str | None,
    guidance: Guidance,
    classifier_scale: float | None,
) -> Conditions:
    """The conditions that the options give, checked against the pipeline.

    Args:
        classifier: the folder of a classifier that guides the pipeline.
        classifier_scale: how strongly; without a folder, the pipeline's own classifier guides, if it has one.

    Raises:
        ValueError: options that the model does not support.
    """
    if hasattr(pipeline, "tokenizer"):
        warn_of_cut_prompts(pipeline.tokenizer, [*(prompts or ()), negative_prompt or ""])
        return _by_prompt(pipeline, prompts, negative_prompt, classes, classifier, guidance, classifier_scale)
    if prompts or negative_prompt:
        raise ValueError("this model has no text encoder; leave out --prompt and --negative-prompt")
    guide = None if classifier is None else load_classifier(Path(classifier), pipeline).to(pipeline.device)
    if guide is None and classifier_scale is not None:
        guide = getattr(pipeline, "classifier", None)
    if guide is None:
        _check_no_classifier_scale(classifier_scale)
    scale_of_classifier = 1.0 if classifier_scale is None else classifier_scale
    options = {} if guide is None else {"classifier": guide, "classifier_scale": scale_of_classifier}
    scale, rescale, interval = guidance
    scale = 1.0 if scale is None else scale
    if getattr(pipeline, "has_classes", False):
        if scale != 1.0 and pipeline.null_class is None:
            raise ValueError(
                "--guidance-scale requires a model that was also trained without classes (--class_dropout 0.1)"
            )
        options |= free_guidance(scale, rescale, interval)
        return _by_class(classes, class_names(pipeline), pipeline.default_classes, options)
    _check_no_free_guidance(classes, scale, rescale, interval, guide)
    if guide is None:
        return Conditions()
    return _by_class(classes, class_names(guide), guide.config.get("trained_classes"), options, by_keyword=True)


def _by_class(
    classes: Sequence[str] | None,
    id2label: dict[str, str],
    trained: Sequence[int] | None,
    options: dict[str, Any],
    by_keyword: bool = False,
) -> Conditions:
    ids = class_ids(classes, id2label, trained)
    return Conditions(ids, [id2label[str(number)] for number in ids], options, by_keyword)


def _by_prompt(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str] | None,
    negative_prompt: str | None,
    classes: Sequence[str] | None,
    classifier: str | Path | None,
    guidance: Guidance,
    classifier_scale: float | None,
) -> Conditions:
    if not prompts:
        raise ValueError("this model requires a text; give one with --prompt")
    if classes or classifier:
        raise ValueError("this model is conditioned on text (--prompt); leave out --class and --classifier")
    _check_no_classifier_scale(classifier_scale)
    scale, rescale, interval = guidance
    scale = pipeline.config.guidance_scale if scale is None else scale
    options = free_guidance(scale, rescale, interval)
    if negative_prompt and scale == 1:
        raise ValueError("--negative-prompt has no effect without guidance; give a --guidance-scale above 1")
    return Conditions(prompts, prompts, {**options, "negative_prompt": negative_prompt})


def warn_of_cut_prompts(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Print to stderr the part of each prompt that exceeds the text encoder's length."""
    from ..portable.text_encoding_ddpm_hf import cut_off

    length = tokenizer.model_max_length
    for rest in filter(None, cut_off(tokenizer, list(prompts))):
        print(
            f"warning: the prompt is longer than {length} tokens; the text encoder does not read {rest!r}",
            file=sys.stderr,
        )


def free_guidance(scale: float, rescale: float, interval: tuple[int, int] | None) -> dict[str, Any]:
    from ..portable.guidance_ddpm_hf import FreeGuidance

    FreeGuidance(scale, rescale, interval).check()
    if scale == 1 and (rescale or interval):
        flag = f"--guidance-rescale {rescale:g}" if rescale else "--guidance-interval"
        raise ValueError(f"{flag} has no effect without guidance; give a --guidance-scale above 1, such as 3")
    return {"guidance_scale": scale, "guidance_rescale": rescale, "guidance_interval": interval}


def _check_no_classifier_scale(classifier_scale: float | None) -> None:
    if classifier_scale is not None:
        raise ValueError(
            f"--classifier-scale {classifier_scale:g} requires --classifier; give one, or leave --classifier-scale out"
        )


def _check_no_free_guidance(
    classes: Sequence[str] | None, scale: float, rescale: float, interval: tuple[int, int] | None, guide: Any
) -> None:
    """Raise ValueError for classes and guidance that require a class-conditional model."""
    if guide is None and (classes or scale != 1.0):
        raise ValueError("this model has no classes; leave out --class and --guidance-scale, or add --classifier")
    if scale != 1.0:
        raise ValueError("this model has no classes; leave out --guidance-scale (--classifier-scale guides it)")
    if rescale or interval:
        raise ValueError("this model has no classes; leave out --guidance-rescale and --guidance-interval")


def class_names(model: Any) -> dict[str, str]:
    """The names of the classes of a pipeline or a classifier, by their ids as strings."""
    return dict(model.config.id2label or {str(number): str(number) for number in range(model.config.num_classes)})


def class_ids(
    classes: Sequence[str] | None, id2label: dict[str, str], trained: Sequence[int] | None = None
) -> list[int]:
    """The ids of classes given by name or id; of all trained classes if none are given.

    Args:
        trained: the ids of the trained classes; None for all. An untrained class is sampled too, with a warning.

    Raises:
        ValueError: an unknown class.
    """
    from ..portable.guidance_ddpm_hf import find_class

    trained = list(trained or map(int, id2label))
    ids = {name: int(number) for number, name in id2label.items()}
    try:  # a class name that looks like a number is taken as a name
        chosen = [int(one) if one in id2label and one not in ids else find_class(one, ids) for one in classes or ()]
    except ValueError as error:
        raise ValueError(f"--class: {error}") from error
    for number in sorted(set(chosen) - set(trained)):
        warning = f"warning: no training image had the class {id2label[str(number)]!r}; its embedding is untrained"
        print(warning, file=sys.stderr)
    return chosen or trained


def same_diffusion(betas: Sequence[float], scheduler: Any) -> bool:
    """Whether a scheduler's betas are these."""
    import numpy as np

    from ..portable.scheduling_ddpm_hf import DDPMScheduler

    known = DDPMScheduler.from_config(scheduler.config).exact_tables.betas.numpy()
    return len(known) == len(betas) and np.allclose(known, betas, rtol=1e-4, atol=1e-8)


def load_classifier(folder: Path, pipeline: "DiffusionPipeline") -> "NoisyClassifier":
    """A classifier of noised images that fits the pipeline.

    Raises:
        ValueError: there is no classifier, or it does not fit the pipeline's images.
    """
    from ..common.errors import why_not_loaded
    from ..models.classifier import NoisyClassifier

    if not folder.is_dir() and len(folder.parts) != 2:  # on the Hub it is user/name
        raise ValueError(f"--classifier {folder}: not a classifier (there is no such folder)")
    try:
        classifier = NoisyClassifier.from_pretrained(folder, use_safetensors=True).eval()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--classifier {folder}: not a classifier ({why_not_loaded(error)})") from error
    shape, expected = (classifier.config.unet[key] for key in ("in_channels", "sample_size")), pipeline.unet.config
    if list(shape) != [expected.in_channels, expected.sample_size]:
        raise ValueError(
            f"--classifier {folder} was trained for images of another size or number of channels than the model's"
        )
    betas = classifier.config.trained_betas
    if betas is not None and not same_diffusion(betas, pipeline.scheduler):
        raise ValueError(
            f"--classifier {folder} was trained with another noise schedule than the model's (T={len(betas)})"
        )
    if getattr(pipeline, "has_classes", False) and class_names(classifier) != class_names(pipeline):
        raise ValueError(f"--classifier {folder} has other classes than the model, or in another order")
    return classifier
