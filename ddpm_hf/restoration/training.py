"""Training a network that reads a degraded image: the images that it reads, and strips of what it makes of them."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..common.randomness import StepKeys, to_device
from ..portable.conditioning_ddpm_hf import Conditioning
from .pictures import on_white, picture

if TYPE_CHECKING:
    from PIL import Image

    from ..portable.pipeline_image_to_image_ddpm_hf import DDPMImageToImagePipeline

BOX = (0.25, 0.75)  # of each side, that a box hides
HIDDEN = (0.1, 0.9)  # the share of the pixels that random masks hide


def condition_of(conditioning: Conditioning, x_start: torch.Tensor, keys: StepKeys) -> torch.Tensor:
    """What the network reads besides x_t, of images x_0 [N, C, H, W] in [-1, 1]; all that is random is of `keys`.

    The noise's level is uniform up to that of the conditioning (Ho et al. 2021, sec. 4.2).
    """
    with torch.autocast(x_start.device.type, enabled=False):  # else the operator rounds the images
        y, known = degraded(conditioning, x_start, keys)
        if not conditioning.noise:
            level, noise = torch.zeros(len(y), device=y.device), None
        else:
            level = to_device((keys.uniform("conditioning_level") * conditioning.noise).float(), y.device)
            noise = keys.normal_like(y, "conditioning_noise")
        return conditioning.condition(y, x_start.shape[1:], level, noise, known=known)


def degraded(
    conditioning: Conditioning, x_start: torch.Tensor, keys: StepKeys
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y of x_0 [N, C, H, W], and for inpainting what is known, bool [N, 1, H, W]."""
    if conditioning.task != "inpaint":
        operator = conditioning.operator(tuple(x_start.shape[1:]))
        assert operator is not None  # flags have what it is made of
        return operator.forward(x_start), None
    known = random_masks(conditioning.masks, x_start, keys)
    return torch.where(known, x_start, 0.0), known


def random_masks(kinds: Sequence[str], x_start: torch.Tensor, keys: StepKeys) -> torch.Tensor:
    """A mask of one of the kinds for each image, bool [N, 1, H, W], true where a pixel is known."""
    count, _, height, width = x_start.shape
    # numbers for the kind, four for its shape, one for each pixel: uniform, by the normal distribution's function
    normal = keys.normal_like(x_start.new_empty(count, 5 + height * width), "conditioning_mask")
    uniform = (0.5 * (1 + torch.erf(normal / math.sqrt(2)))).clamp(max=1 - 1e-6)
    choice = (uniform[:, 0] * len(kinds)).long()  # [N]
    a, b, c, d = (one[:, None, None] for one in uniform[:, 1:5].unbind(1))
    rows = torch.arange(height, device=x_start.device)[None, :, None]
    columns = torch.arange(width, device=x_start.device)[None, None]

    def inside(place: torch.Tensor, side: int, share: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        length = ((BOX[0] + (BOX[1] - BOX[0]) * share) * side).round().clamp(min=1)
        first = (start * (side - length + 1)).floor()
        return (place >= first) & (place < first + length)

    quarter = (a * 4).long()
    masks = {
        "box": lambda: ~(inside(rows, height, a, b) & inside(columns, width, c, d)),
        "random": lambda: uniform[:, 5:].reshape(count, height, width) >= HIDDEN[0] + (HIDDEN[1] - HIDDEN[0]) * a,
        "half": lambda: torch.where(
            quarter < 2, (columns < width // 2) == (quarter == 0), (rows < height // 2) == (quarter == 2)
        ),
    }
    made = torch.stack([masks[kind]().expand(count, height, width) for kind in kinds])  # [kinds, N, H, W]
    return made[choice, torch.arange(count, device=choice.device)][:, None]


class Strips:
    """A pipeline for the grids of a training: its n-th picture shows an input, what is made of it, and the truth.

    Args:
        pipeline: of the network as it is trained.
        truth: [M, C, H, W] in [-1, 1].
        labels: the class of each, [M]; None for a model without classes.
        seed: of the degraded images' masks.
    """

    def __init__(
        self, pipeline: "DDPMImageToImagePipeline", truth: torch.Tensor, labels: torch.Tensor | None, seed: int
    ):
        self.pipeline, self.truth, self.labels = pipeline, truth, labels
        keys = StepKeys(seed, 0, 0, len(truth), validation=True)
        self.y, self.known = degraded(pipeline.conditioning, truth, keys)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """As the pipeline's."""
        self.pipeline.set_progress_bar_config(**settings)

    def __call__(self, indices: Sequence[int], **options: Any) -> Any:
        """The pipeline's output for these images, with strips for its pictures."""
        chosen = torch.as_tensor(indices)
        y = self.y[chosen]
        device = self.pipeline.device
        known = None if self.known is None else self.known[chosen].to(device)
        labels = None if self.labels is None else self.labels[chosen].to(device)
        options["output_type"] = "pt"
        with torch.no_grad():
            output = self.pipeline.solve(y.to(device), known=known, labels=labels, **options)
        for frame_index, frame in enumerate(output.frames or []):
            output.frames[frame_index] = frame._replace(prediction=[picture(one) for one in frame.prediction])
        read = self.pipeline.conditioning.lift(y, self.pipeline.sample_shape) / 2 + 0.5
        truth = self.truth[chosen] / 2 + 0.5
        output.images = [strip_of(three) for three in zip(read, output.images.cpu(), truth)]
        return output


def strips_of(
    batch: dict[str, torch.Tensor], pipeline_of: Callable[[torch.nn.Module], "DDPMImageToImagePipeline"], seed: int
) -> tuple[range, list[str], Callable[[torch.nn.Module], Strips]]:
    """What a grid's rows show (numbers of images), their names (none), and model -> what draws these rows.

    Args:
        batch: `images` in [-1, 1], and `labels` where the model has classes.
    """
    truth = batch["images"]
    return range(len(truth)), [], lambda model: Strips(pipeline_of(model), truth, batch.get("labels"), seed)


def strip_of(images: Sequence[torch.Tensor]) -> "Image.Image":
    """Images [C, H, W] in [0, 1] side by side."""
    from PIL import Image

    pictures = [on_white(picture(one)) for one in images]
    width, height = pictures[0].size
    strip = Image.new(pictures[0].mode, (len(pictures) * width + len(pictures) - 1, height), "white")
    for number, one in enumerate(pictures):
        strip.paste(one, (number * (width + 1), 0))
    return strip
