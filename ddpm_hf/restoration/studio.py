"""Restoration as a sequence of steps, for a page: a model, an image, and what to undo."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from ..inference.studio import MOST_IMAGES, SampleRequest, Step, Studio, keyed_generators, step_callback
from ..portable.pipeline_restoration_ddpm_hf import DDPMRestorationPipeline
from ..portable.restoration_ddpm_hf import METHODS
from .figures import summarize
from .pictures import MODES, deviation_picture, observed_picture, on_white, picture, to_tensor
from .problems import Picture, measure, noise_of, pose
from .tasks import TASKS, Settings

FACTORS = (2, 4, 8)  # of super-resolution, those that divide the model's size
LEAST_SIDE = 4  # pixels of an image to enlarge


class RestorationRequest(NamedTuple):
    """A request for solutions.

    Args:
        image: the upload, of any size; it is cropped in the middle and resized for the model.
        painted: of the upload's size; for inpainting, white where to paint.
        degrade: whether the upload is a true image, from which the observation is made; inpainting needs no such.
        sigma_y: the observation's noise, for pixels in [-1, 1]; None is estimated, or 0 where the observation is made.
        class_label: None for no class.
    """

    image: Image.Image
    task: str
    painted: Image.Image | None = None
    settings: Settings = Settings()
    degrade: bool = False
    sigma_y: float | None = None
    method: str = "ddnm"
    steps: int = 50
    solutions: int = 4
    seed: int = 0
    class_label: str | None = None


class Restored(NamedTuple):
    """The solutions, what they say together (with titles), and the figures of `measure`."""

    solutions: list[Image.Image]
    views: list[tuple[Image.Image, str]]
    figures: dict[str, Any]


class RestorationStudio:
    """A model and what it can restore.

    Args:
        model, token, device: as of `Studio`.

    Raises:
        ValueError: what `load_pipeline` raises; or a model by text.
    """

    def __init__(self, model: str, token: str | None = None, device: str | None = None):
        self.sampling = Studio(model, token, device)
        self.pipeline = DDPMRestorationPipeline.from_pipe(self.sampling.pipeline)
        self.pipeline.set_progress_bar_config(disable=True)
        self.classes, self.knows_no_class = self.sampling.classes, self.sampling.knows_no_class
        self.max_steps = self.sampling.max_steps
        self.methods = {name: row for name, row in METHODS.items() if self.pipeline.vae is None or row.latents}
        height, width = self.pipeline.image_size
        self.factors = [
            one for one in FACTORS if not (height % one or width % one) and min(height, width) >= one * LEAST_SIDE
        ]
        usable = {"colorize": self.pipeline.image_channels in (3, 4), "super-resolution": bool(self.factors)}
        self.tasks = {name: task for name, task in TASKS.items() if usable.get(name, True)}
        self._lock = threading.Lock()  # the scheduler is in one chain at a time

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.sampling.image_size

    def sample_image(self, seed: int) -> Image.Image:
        """An image that the model samples, for users that have none."""
        name = "ddim" if "ddim" in self.sampling.samplers else next(iter(self.sampling.samplers))
        return self.sampling.sample(SampleRequest(1, name, self.sampling.samplers[name], seed))[0]

    def problem(self, request: RestorationRequest) -> Picture:
        """What the upload is, as the model sees it.

        Raises:
            ValueError: an unsupported task, or nothing is painted.
        """
        if request.task not in self.tasks:
            raise ValueError(f"{request.task!r}: this model supports {', '.join(self.tasks)}")
        width, height = self.image_size
        inpaints, settings = request.task == "inpaint", request.settings
        degrade = request.degrade and not inpaints
        if request.task == "super-resolution" and not degrade:
            width, height = width // settings.factor, height // settings.factor
        channels = self.pipeline.image_channels
        if channels not in MODES:
            raise ValueError(f"this model's images have {channels} channels, and pictures have up to 4")
        mode = MODES[channels - 2 if request.task == "colorize" and not degrade else channels]
        upload = request.image if "A" in mode else on_white(request.image)
        image = fitted(upload.convert(mode), (width, height))
        if inpaints:
            if request.painted is None or not request.painted.getbbox():
                raise ValueError("paint over the part of the image to replace")
            hidden = to_tensor(fitted(request.painted.convert("L"), (width, height)))[0] > -1
            settings = settings._replace(mask=~hidden)
        noise = noise_of(request.seed, 0)
        return pose(
            "", to_tensor(image), request.task, settings, self.pipeline, degrade=degrade, sigma_y=request.sigma_y,
            generator=noise,
        )  # fmt: skip

    def restore(self, request: RestorationRequest, report: Callable[[Step], None] | None = None) -> Restored:
        """Solutions; solution i depends on the seed and i alone.

        Args:
            report: called after each step.

        Raises:
            ValueError: an unsupported request.
        """
        if not 1 <= request.solutions <= MOST_IMAGES:
            raise ValueError(f"{request.solutions} solutions: ask for 1 to {MOST_IMAGES}")
        posed = self.problem(request)
        options: dict[str, Any] = {}
        if report is not None:
            options["callback_on_step_end"] = step_callback(report)
            options["callback_on_step_end_tensor_inputs"] = ("pred_original_sample",)
        with self._lock:
            output = self.pipeline(
                posed.y,
                posed.operator,
                posed.sigma_y,
                method=request.method,
                num_inference_steps=request.steps,
                num_solutions=request.solutions,
                generator=keyed_generators(self.pipeline.device, request.seed, range(request.solutions)),
                class_labels=request.class_label,
                output_type="latent",
                **options,
            )
        with torch.no_grad():
            solutions = (self.pipeline.pixels(output.images) / 2 + 0.5).float().cpu()
        return Restored([picture(one) for one in solutions], views_of(posed, solutions), measure(posed, solutions))


def views_of(posed: Picture, solutions: torch.Tensor) -> list[tuple[Image.Image, str]]:
    """The observation, what the solutions [S, C, H, W] in [0, 1] say together, and the truth, with titles."""
    views = [(observed_picture(posed.y[0], posed.operator), "observed")]
    if len(solutions) > 1:
        summary = summarize(solutions)
        views += [
            (picture(summary.mean), "mean"),
            (deviation_picture(summary.deviation), "deviation"),
            (picture(summary.low), "5%"),
            (picture(summary.high), "95%"),
        ]
    if posed.truth is not None:
        views.append((picture(posed.truth / 2 + 0.5), "truth"))
    return views


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image resized and cropped in the middle to (width, height); means of pixels where it is made smaller.

    An image whose pixels were enlarged a whole number of times thus comes back as it was.
    """
    smaller = image.width >= size[0] and image.height >= size[1]
    return ImageOps.fit(image, size, Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
