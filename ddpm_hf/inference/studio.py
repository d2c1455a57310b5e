"""Sampling as a sequence of steps, for a page or a command. Heavy libraries are imported where they are used."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from .kinds import load_pipeline
from .samplers import swapped, usable_samplers

if TYPE_CHECKING:
    import torch

MOST_IMAGES = 16
MOMENTS = 10  # at which a chain is shown


def keyed_generators(device: "torch.device", seed: int, indices: Iterable[int]) -> "list[torch.Generator]":
    """A generator for each image: image i depends on the seed and i alone, whatever the batch."""
    import torch

    from ..common.randomness import keyed_seed

    return [torch.Generator(device).manual_seed(keyed_seed(seed, "sample", 0, index)) for index in indices]


class SampleRequest(NamedTuple):
    """A request for samples."""

    count: int = 4  # type: ignore[assignment]  # tuples have a method of that name
    sampler: str = "ddpm"
    steps: int | None = None  # None: all of T
    seed: int = 0
    class_labels: list[str | None] | None = None  # in turn; None: all of them. One that is None: no class
    prompt: str = ""
    negative_prompt: str = ""
    guidance_scale: float | None = None  # None: as the pipeline has it


class Step(NamedTuple):
    """How far a chain has come."""

    done: int
    total: int
    timestep: int
    predictions: list | None  # x̂_0 as PIL images, at `MOMENTS` moments


class Studio:
    """A model and what may be asked of it.

    Args:
        model: a folder, or its name on the Hub.
        device: by default the best there is.

    Raises:
        ValueError: what `load_pipeline` raises.
    """

    def __init__(self, model: str, token: str | None = None, device: str | None = None):
        self.pipeline = load_pipeline(model, token=token).to(device or best_device())
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler = self.pipeline.scheduler
        self.by_text = hasattr(self.pipeline, "tokenizer")
        self.classes = trained_class_names(self.pipeline)
        self.knows_no_class = getattr(self.pipeline, "null_class", None) is not None
        self.guided = self.by_text or self.knows_no_class
        self.guidance_scale = self.pipeline.config.guidance_scale if self.by_text else 1.0  # by default
        self.max_steps = self.scheduler.config.num_train_timesteps
        self.samplers = usable_samplers(self.pipeline)
        self._lock = threading.Lock()  # a pipeline's sampler is in one chain at a time

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        height, width = self.pipeline.image_size
        return width, height

    def sample(self, request: SampleRequest, report: Callable[[Step], None] | None = None) -> list:
        """PIL images, one for each index.

        Args:
            report: called after each step.

        Raises:
            ValueError: an unsupported request.
        """
        if not 1 <= request.count <= MOST_IMAGES:
            raise ValueError(f"{request.count} images: ask for 1 to {MOST_IMAGES}")
        if self.by_text and not request.prompt.strip():
            raise ValueError("this model samples from a text: give a prompt")
        with self._lock, swapped(self.pipeline, request.sampler):
            return self._sample(request, report)

    def _sample(self, request: SampleRequest, report: Callable[[Step], None] | None) -> list:
        """The images of a checked request."""
        generators = keyed_generators(self.pipeline._execution_device, request.seed, range(request.count))
        options: dict[str, Any] = {"generator": generators, "num_inference_steps": request.steps}
        options["output_type"] = "preview"
        if self.guided and request.guidance_scale is not None:
            options["guidance_scale"] = request.guidance_scale
        if report is not None:
            options["callback_on_step_end"] = step_callback(report)
            options["callback_on_step_end_tensor_inputs"] = ("pred_original_sample",)
        if self.by_text:
            negative = request.negative_prompt or None
            return self.pipeline([request.prompt] * request.count, negative_prompt=negative, **options).images
        if self.classes:
            labels = request.class_labels or self.classes
            return self.pipeline([labels[i % len(labels)] for i in range(request.count)], **options).images
        return self.pipeline(request.count, **options).images


def step_callback(report: Callable[[Step], None]) -> Callable:
    """A `callback_on_step_end` that reports each step."""

    def callback(pipeline: Any, index: int, timestep: float, tensors: dict) -> dict:
        last = len(pipeline.scheduler.timesteps) - 1
        shown = {round(number * last / (MOMENTS - 1)) for number in range(MOMENTS)}
        predictions = pipeline.decode(tensors["pred_original_sample"], "preview") if index in shown else None
        report(Step(index + 1, last + 1, int(timestep), predictions))
        return {}

    return callback


def trained_class_names(pipeline: Any) -> list[str]:
    """The classes to offer: those that training images had; empty for a model without classes."""
    return [pipeline.config.id2label[str(number)] for number in getattr(pipeline, "default_classes", [])]


def best_device() -> str:
    """cuda or mps where there is one, or cpu."""
    import torch

    return next((name for name in ("cuda", "mps") if getattr(torch, name).is_available()), "cpu")


def streamed(sample: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """Run `sample(report)` in a thread; yield what it reports, then what it returns.

    Closing the iterator cancels sampling at the next step; what `sample` raises is raised here.
    """
    reports: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()

    def report(value: Any) -> None:
        if closed.is_set():
            raise InterruptedError("the iterator was closed")
        reports.put([value])

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(sample, report)
        result.add_done_callback(lambda _: reports.put([]))
        try:
            while reported := reports.get():
                yield reported[0]
        finally:
            closed.set()
        yield result.result()
