"""The flags of image-to-image training, and the conditioning that they describe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..common.arguments import FIXED, SHARE, HfArg, Need, Range, synonyms
from ..common.errors import UsageError

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    from ..portable.conditioning_ddpm_hf import Conditioning

TASKS = ("super-resolution", "colorize", "inpaint", "deblur")
MASK_KINDS = ("box", "random", "half")
FACTOR = Range(lambda value: value >= 2, "2 or more")
BLUR_SIZE = Range(lambda value: value > 0, "more than 0")
# of `Conditioning`, by flag, and the tasks that have them
FIELDS = {
    "conditioning_factor": ("factor", ("super-resolution",)),
    "conditioning_filter": ("filter", ("super-resolution",)),
    "conditioning_enlarge": ("enlarge", ("super-resolution",)),
    "conditioning_masks": ("masks", ("inpaint",)),
    "conditioning_blur_size": ("blur_size", ("deblur",)),
    "conditioning_noise": ("noise", TASKS),
}


def _only_for(*tasks: str) -> Need:
    words = " or ".join(f"--conditioning {task}" for task in tasks) if len(tasks) < len(TASKS) else "--conditioning"
    return Need(lambda run: run.conditioning in tasks, f"has no effect without {words}")


@dataclass
class ConditioningFlags:
    """Flags of a model that reads a degraded image."""

    title: ClassVar[str] = "Image to image"
    meanings: ClassVar[dict[str, str]] = synonyms("""
--conditioning: image_to_image img2img condition conditioned task degradation restoration_task
--conditioning super-resolution: super_resolution superres sr upsample upscale sr3
--conditioning colorize: colorization colorisation colorise
--conditioning inpaint: inpainting palette
--conditioning_factor: scale_factor upscale_factor sr_factor
--conditioning_noise: conditioning_augmentation noise_conditioning low_res_noise aug_level noise_augmentation
--conditioning_masks: mask_kinds mask_types masks mask_mode
--conditioning_blur_size: blur_sigma blur_size blur
""")
    needs: ClassVar[dict[str, Need]] = {flag: _only_for(*tasks) for flag, (_, tasks) in FIELDS.items()}

    conditioning: Literal["super-resolution", "colorize", "inpaint", "deblur"] | None = HfArg(
        resume=FIXED,
        default=None,
        help="Train a model that reads a degraded image besides x_t: a smaller one, a gray one, one with a part"
        " hidden, a blurred one. The degraded images are made from the training images.",
    )
    conditioning_factor: int = HfArg(
        resume=FIXED,
        range=FACTOR,
        default=2,
        help="Super-resolution: how many times smaller the images are that it reads.",
    )
    conditioning_filter: Literal["bicubic", "average"] = HfArg(
        resume=FIXED, default="bicubic", help="Super-resolution: how these are made: PIL's bicubic filter, or means."
    )
    conditioning_enlarge: Literal["bicubic", "bilinear"] = HfArg(
        resume=FIXED, default="bicubic", help="Super-resolution: how they are enlarged for the network."
    )
    conditioning_masks: list[str] = field(
        default_factory=lambda: list(MASK_KINDS),
        metadata={
            "resume": FIXED,
            "help": "Inpainting: the kinds of masks, one at random for each image: box (a rectangle of a quarter to"
            " three quarters of each side), random (a tenth to nine tenths of the pixels), half.",
        },
    )
    conditioning_blur_size: float = HfArg(
        resume=FIXED, range=BLUR_SIZE, default=1.0, help="Deblurring: deviation of the Gaussian blur in pixels."
    )
    conditioning_noise: float = HfArg(
        resume=FIXED,
        range=SHARE,
        default=0.5,
        help="Conditioning augmentation: noise of a random level up to this one is mixed into the degraded images, and"
        " the network reads the level; for cascades and noisy images. 0 disables it.",
    )

    def check(self, flags: Any) -> None:
        """Raise UsageError for masks that do not exist and for what a conditional model does not support."""
        unknown = [kind for kind in self.conditioning_masks if kind not in MASK_KINDS]
        if unknown or not self.conditioning_masks:
            raise UsageError(
                f"--conditioning_masks must be of {', '.join(MASK_KINDS)} (got {' '.join(unknown) or 'none'})"
            )
        if self.conditioning is None:
            return
        task = f"--conditioning {self.conditioning}"
        if flags.vae_name_or_path:
            raise UsageError(f"{task} reads pixels: leave --vae_name_or_path out")
        if flags.evaluation_epochs:
            raise UsageError(
                f"--evaluation_epochs samples without images, and {task} reads one: use --validation_steps, or"
                " `ddpm-hf restore --degrade` after the training"
            )


def conditioning_of(settings: Mapping[str, Any]) -> "Conditioning | None":
    """The conditioning that flags describe, by their names; None for a model that reads x_t alone."""
    from ..portable.conditioning_ddpm_hf import Conditioning

    task = settings.get("conditioning")
    if task is None:
        return None
    fields = {name: settings[flag] for flag, (name, tasks) in FIELDS.items() if task in tasks}
    return Conditioning.from_config({"task": task, **fields})


def flags_of_conditioning(conditioning: "Conditioning") -> dict[str, Any]:
    """The flags that describe a conditioning."""
    values = {
        flag: getattr(conditioning, name) for flag, (name, tasks) in FIELDS.items() if conditioning.task in tasks
    }
    lists = {flag: list(value) if isinstance(value, tuple) else value for flag, value in values.items()}
    return {"conditioning": conditioning.task} | {flag: value for flag, value in lists.items() if value is not None}


def describe_conditioning(conditioning: "Conditioning") -> str:
    """What it is, in a line for people."""
    settings = {name: value for name, value in conditioning.config().items() if name not in ("task", "noise")}
    said = [f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in settings.items()]
    noise = f"noise up to {conditioning.noise:g}" if conditioning.noise else "no noise"
    return ", ".join([conditioning.task, *said, noise])


def check_conditioning(conditioning: "Conditioning", shape: tuple[int, int, int]) -> None:
    """Raise UsageError for images (C, H, W) that it cannot degrade."""
    try:
        conditioning.operator(shape)
    except ValueError as error:
        raise UsageError(f"--conditioning {conditioning.task}: {error}") from error
