"""Networks that read an image besides x_t: what they read of it, and how x̂_0 is made to agree with it.

A degraded image y is enlarged to x_t's size and concatenated to x_t (Saharia et al. 2021, SR3; Saharia et al. 2022,
Palette). With conditioning augmentation (Ho et al. 2021, sec. 4.2) noise is mixed into y, √(1-s²) y + s ε, and the
network reads the level s as one more channel, which is constant: it stays a stock `UNet2DModel`.

This file is copied into published repositories: it imports torch, diffusers and files next to it, each directly.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .guidance_ddpm_hf import Predict
from .linear_ddpm_hf import Operator
from .operators_ddpm_hf import OPERATORS
from .scheduling_ddpm_hf import DDPMScheduler

CONDITIONINGS = ("super-resolution", "colorize", "inpaint", "deblur")
FILTERS = {"bicubic": "bicubic", "average": "average-pooling"}  # that reduce images -> operator
ENLARGED_BY = ("bicubic", "bilinear")
MASK_KINDS = ("box", "random", "half")  # in training
CORRECTIONS = ("colour", "observation", "none")


class Conditioning(NamedTuple):
    """What a network reads besides x_t.

    Args:
        task: one of `CONDITIONINGS`.
        factor: of super-resolution; None where y may have any size.
        filter: that reduced its images, of `FILTERS`; None where that is not known.
        enlarge: how y is enlarged, of `ENLARGED_BY`.
        masks: of inpainting, the `MASK_KINDS` that it was trained with.
        blur_size: of deblurring, the deviation of the Gaussian in pixels.
        noise: the highest level of conditioning augmentation; with 0 the network reads no level.
    """

    task: str
    factor: int | None = None
    filter: str | None = None
    enlarge: str | None = None
    masks: tuple[str, ...] = ()
    blur_size: float | None = None
    noise: float = 0.0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Conditioning":
        """Of a saved config; the masks are a list there.

        Raises:
            ValueError: not such a config.
        """
        unknown = set(config) - set(cls.__annotations__)
        if unknown or config.get("task") not in CONDITIONINGS:
            raise ValueError(
                f"conditioning={dict(config)}: must have a task of {', '.join(CONDITIONINGS)}"
                + (f", and has unknown {', '.join(sorted(unknown))}" if unknown else "")
            )
        return cls(**{**config, "masks": tuple(config.get("masks") or ())})

    def config(self) -> dict[str, Any]:
        """For JSON: what is set."""
        config = {name: value for name, value in self._asdict().items() if value not in (None, ())}
        return config | ({"masks": list(self.masks)} if self.masks else {})

    def extra_channels(self, channels: int) -> int:
        """How many channels the network reads besides x_t's `channels`: y's, the mask, the level."""
        return channels + (self.task == "inpaint") + (self.noise > 0)

    def image_channels(self, in_channels: int) -> int:
        """How many channels x_t has where the network reads `in_channels` in all.

        Raises:
            ValueError: an impossible number.
        """
        both = in_channels - self.extra_channels(0)
        if both < 2 or both % 2:
            raise ValueError(
                f"the UNet reads {in_channels} channels; for {self.task} it would be an image's twice"
                f" and {self.extra_channels(0)} more"
            )
        return both // 2

    def observed_shape(self, shape: tuple[int, int, int]) -> tuple[int, int | None, int | None]:
        """(c, h, w) of y for x of a shape (C, H, W); h and w are None where any size is enlarged."""
        channels, height, width = shape
        if self.task == "super-resolution":
            return (
                channels,
                *((None, None) if self.factor is None else (height // self.factor, width // self.factor)),
            )
        if self.task == "colorize":
            return channels - 2, height, width
        return shape

    def operator(self, shape: tuple[int, int, int]) -> Operator | None:
        """A of y = A x for x of a shape (C, H, W); None where each image has its own (a mask), or it is unknown.

        Raises:
            ValueError: a shape that it does not fit.
        """
        if self.task == "inpaint" or (self.task == "super-resolution" and not (self.factor and self.filter)):
            return None
        return operator_of(self, tuple(shape))

    def lift(self, y: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """y [N, c, h, w] at the size and in the channels of x, [N, C, H, W]."""
        if self.task == "super-resolution":
            return F.interpolate(y.float(), shape[1:], mode=self.enlarge or "bicubic").to(y.dtype)
        if self.task == "colorize":
            return torch.cat([y[:, :1].expand(-1, 3, -1, -1), y[:, 1:]], dim=1)  # alpha stays
        return y

    def condition(
        self,
        y: torch.Tensor,
        shape: tuple[int, int, int],
        level: torch.Tensor,
        noise: torch.Tensor | None = None,
        sigma_y: float = 0.0,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the network reads besides x_t, [N, extra channels, H, W].

        Args:
            y: the degraded images [N, c, h, w] in [-1, 1].
            shape: (C, H, W) of x.
            level: s of each, [N], the deviation of the noise in √(1-s²) y.
            noise: ε ~ N(0, I) of y's shape; None where the level is that of the noise in y already.
            sigma_y: the deviation of that noise.
            known: of inpainting, bool [N, 1, H, W]: what is hidden is not read.
        """
        s = level.to(y.dtype).reshape(-1, 1, 1, 1)
        y = (1 - s**2).sqrt() * y
        if noise is not None:
            y = y + (s**2 - (1 - s**2) * sigma_y**2).clamp(min=0).sqrt() * noise
        parts = []
        if known is not None:
            y = torch.where(known, y, 0.0)
            parts.append(known.to(y.dtype) * 2 - 1)
        if self.noise > 0:
            parts.append(s.expand(-1, 1, *shape[1:]))
        return torch.cat([self.lift(y, shape), *parts], dim=1)

    def default_correction(self, level: float) -> str:
        """The correction of `CORRECTIONS` where none is asked for: what y says is kept where it is exact."""
        if self.task in ("super-resolution", "deblur"):
            return "colour"
        return "none" if level else "observation"

    def check_correction(self, name: str) -> None:
        """Raise ValueError for a correction that is unknown, or that this conditioning does not allow."""
        if name not in CORRECTIONS:
            raise ValueError(f"correction={name!r}: must be one of {', '.join(CORRECTIONS)}")
        if name == "colour" and self.task not in ("super-resolution", "deblur"):
            raise ValueError(f"correction='colour': {self.task} does not know the image's mean; use 'observation'")
        if name == "observation" and self.task == "super-resolution" and not (self.factor and self.filter):
            raise ValueError("correction='observation': nothing says how the images were reduced; use 'colour'")


@functools.lru_cache(maxsize=8)
def operator_of(conditioning: Conditioning, shape: tuple[int, int, int]) -> Operator:
    """The operator of a conditioning, made once: its matrices are decomposed."""
    if conditioning.task == "super-resolution":
        return OPERATORS[FILTERS[str(conditioning.filter)]](shape, conditioning.factor)
    if conditioning.task == "colorize":
        if shape[0] not in (3, 4):
            raise ValueError(f"colorizing requires images of 3 or 4 channels, not {shape[0]}")
        return OPERATORS["gray"](shape)
    if conditioning.task == "deblur":
        return OPERATORS["gaussian-blur"](shape, conditioning.blur_size)
    raise ValueError(f"{conditioning.task} has no operator of its own")  # the masks of inpainting are drawn


def shifted_to_mean(x: torch.Tensor, mean: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """x [N, C, H, W] in [-1, 1] with a constant added to each channel, clipped, whose mean is `mean` [N, C, 1, 1].

    The mean of the clipped image is piecewise linear in the constant: Newton's method, from 0.
    """
    shift = torch.zeros_like(mean)
    for _ in range(iterations):
        moved = x + shift
        inside = ((moved > -1) & (moved < 1)).to(x.dtype).mean((2, 3), keepdim=True).clamp(min=0.05)
        shift = shift + (mean - moved.clamp(-1, 1).mean((2, 3), keepdim=True)) / inside
    return (x + shift).clamp(-1, 1)


def correction_of(
    name: str, conditioning: Conditioning, y: torch.Tensor, shape: tuple[int, int, int], known: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """x̂_0 -> x̂_0 that agrees with y, or None.

    Args:
        name: `colour` keeps y's mean in each channel; `observation` all that y says, x̂_0 + A⁺(y - A x̂_0) (Wang et
            al. 2023, DDNM); `none`.
        y: [N, c, h, w], without added noise.
        known: of inpainting, bool [N, 1, H, W].
    """
    if name == "colour":
        mean = y.mean((2, 3), keepdim=True).clamp(-1, 1)
        return lambda x: shifted_to_mean(x, mean)
    if name == "none":
        return None
    if known is not None:
        return lambda x: torch.where(known, y, x)
    operator = conditioning.operator(shape)
    assert operator is not None  # `check_correction` refuses it

    def observed(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):  # its products would be rounded
            return x + operator.pseudo_inverse(y - operator.forward(x))

    return observed


def corrected(
    predict: Predict, correction: Callable[[torch.Tensor], torch.Tensor] | None, scheduler: DDPMScheduler
) -> Predict:
    """`predict` whose output leads to the corrected x̂_0; a learned variance stays.

    Args:
        scheduler: ours over the sampler's diffusion, whose x̂_0 exists at all timesteps that are visited.
    """
    if correction is None:
        return predict

    def corrected_predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = predict(x_t, t)
        from_sample, from_output = scheduler.x0_coefficients(t.long(), x_t)  # reading t would make the host wait
        mean = output[:, : x_t.shape[1]]
        x_start = correction(scheduler.clip(from_sample * x_t + from_output * mean))
        return torch.cat([(x_start - from_sample * x_t) / from_output, output[:, x_t.shape[1] :]], dim=1)

    return corrected_predict
