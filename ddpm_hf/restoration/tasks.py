"""The tasks of `ddpm-hf restore`: what a user calls them, and the operator that each is."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from ..portable.linear_ddpm_hf import Operator

MASKS = ("box", "random", "left", "right", "top", "bottom")  # without a file; a half is what is shown


class Settings(NamedTuple):
    """What the operators of the tasks are made of.

    Args:
        mask: bool [H, W], True where a pixel is known; or a name of `MASKS`.
        hidden: the share that a box (of each side) or random pixels hide.
        factor: of super-resolution.
        filter: how its small images were made, "bicubic" or "average".
        blur: "gaussian", "motion" or "anisotropic".
        blur_size: its deviation or length, in pixels.
        blur_angle: its direction, in degrees from the horizontal.
        seed: of random pixels.
    """

    mask: "torch.Tensor | str | None" = None
    hidden: float = 0.5
    factor: int = 2
    filter: str = "bicubic"
    blur: str = "gaussian"
    blur_size: float = 1.0
    blur_angle: float = 0.0
    seed: int = 0


class Task(NamedTuple):
    """A task.

    Args:
        operator: (shape (C, H, W) of the restored image, settings) -> A.
        reads: the settings that it has a use for.
        title: on a page.
        note: for people.
    """

    operator: Callable[[tuple[int, int, int], Settings], "Operator"]
    reads: tuple[str, ...]
    title: str
    note: str


def _operators() -> dict[str, Any]:
    from ..portable.operators_ddpm_hf import OPERATORS

    return OPERATORS


def _inpaint(shape: tuple[int, int, int], settings: Settings) -> "Operator":
    mask = settings.mask
    if mask is None:
        raise ValueError(f"inpainting requires a mask: a picture that is white where to paint, or {', '.join(MASKS)}")
    if not isinstance(mask, str):
        return _operators()["mask"](shape, mask)
    if mask == "box":
        return _operators()["box"](shape, settings.hidden)
    if mask == "random":
        return _operators()["random-pixels"](shape, settings.hidden, settings.seed)
    return _operators()["half"](shape, mask)


def _enlarge(shape: tuple[int, int, int], settings: Settings) -> "Operator":
    name = {"bicubic": "bicubic", "average": "average-pooling"}[settings.filter]
    return _operators()[name](shape, settings.factor)


def _colorize(shape: tuple[int, int, int], settings: Settings) -> "Operator":
    return _operators()["gray"](shape)


def _deblur(shape: tuple[int, int, int], settings: Settings) -> "Operator":
    size, angle = settings.blur_size, settings.blur_angle
    if settings.blur == "gaussian":
        return _operators()["gaussian-blur"](shape, size)
    if settings.blur == "motion":
        return _operators()["motion-blur"](shape, size, angle)
    return _operators()["anisotropic-blur"](shape, size, size / 4, angle)


TASKS = {
    "inpaint": Task(_inpaint, ("mask", "hidden"), "Inpaint what is painted over", "fill in what a mask hides"),
    "super-resolution": Task(_enlarge, ("factor", "filter"), "Enlarge (super-resolution)", "enlarge"),
    "colorize": Task(_colorize, (), "Colorize", "gray to colour"),
    "deblur": Task(_deblur, ("blur", "blur_size", "blur_angle"), "Deblur", "undo a known blur"),
    "denoise": Task(lambda shape, settings: _operators()["identity"](shape), (), "Remove noise", "remove noise"),
}
