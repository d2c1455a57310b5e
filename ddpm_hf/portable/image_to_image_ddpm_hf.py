"""Sampling with a network that reads an image: what the image-to-image pipeline and the cascade share.

This file is copied into published repositories: it imports torch, diffusers and files next to it, each directly.
"""

import math
import numbers
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .conditioning_ddpm_hf import Conditioning, corrected, correction_of
from .guidance_ddpm_hf import ClassesMixin, ClassLabels, FreeGuidance, Predict
from .sampling_ddpm_hf import DDPMPipelineOutput, Generators, SamplingMixin, StepCallback, in_channels, white_of

logger = logging.get_logger(__name__)
UNGUIDED = FreeGuidance(1.0)


def conditioning_of_unet(unet: Any, config: dict[str, Any] | None) -> Conditioning:
    """What a UNet reads besides x_t.

    Args:
        config: as saved; None for an OpenAI upsampler, which reads the small image enlarged bilinearly (Nichol &
            Dhariwal 2021, sec. 3).

    Raises:
        ValueError: a UNet that reads no image, or another than the config says.
    """
    condition_channels = unet.config.get("condition_channels")
    if config is not None:
        conditioning = Conditioning.from_config(config)
        if condition_channels and condition_channels != conditioning.extra_channels(unet.config.in_channels):
            raise ValueError(f"conditioning={config}: the UNet reads {condition_channels} channels of an image")
    elif condition_channels == unet.config.in_channels:
        conditioning = Conditioning("super-resolution", enlarge="bilinear")
    else:
        raise ValueError("the UNet does not read an image besides x_t: give its conditioning, or use DDPMPipeline")
    channels = unet.config.in_channels
    channels = channels if condition_channels else conditioning.image_channels(channels)
    if unet.config.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"the UNet predicts {unet.config.out_channels} channels and reads images of {channels}; it must predict as"
            " many, or twice as many with a learned variance"
        )
    return conditioning


class ImageToImageMixin(SamplingMixin, ClassesMixin):
    """A pipeline whose `unet` reads an image as its `conditioning` says."""

    conditioning: Conditioning

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t and of the images."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        channels = self.unet.config.in_channels
        if not self.unet.config.get("condition_channels"):
            channels = self.conditioning.image_channels(channels)
        return channels, height, width

    def read_image(self, image: Any) -> torch.Tensor:
        """y [N, c, h, w] in [-1, 1] of PIL images, arrays [N, h, w, c] or tensors [N, c, h, w] in [0, 1].

        Raises:
            ValueError: none of these, or images of another size or number of channels.
        """
        channels, height, width = self.conditioning.observed_shape(self.sample_shape)
        several = image if isinstance(image, (list, tuple)) else [image]
        if several and all(hasattr(one, "convert") for one in several):
            arrays = [np.atleast_3d(np.asarray(in_channels(one, channels))) for one in several]
            if len({one.shape for one in arrays}) > 1:
                raise ValueError("the images have several sizes; give them one by one")
            y = torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float() / 255
        elif several and all(isinstance(one, (torch.Tensor, np.ndarray)) and one.ndim in (3, 4) for one in several):
            parts = [
                torch.as_tensor(one) if isinstance(one, torch.Tensor) else torch.from_numpy(one).movedim(-1, -3)
                for one in several
            ]
            if len({one.shape[-3:] for one in parts}) > 1:
                raise ValueError("the images have several sizes; give them one by one")
            y = torch.cat([one[None] if one.ndim == 3 else one for one in parts]).float()
            if not (y.numel() and float(y.min()) >= 0 and float(y.max()) <= 1):  # also NaN
                raise ValueError("the image must have values in [0, 1]")
        else:
            raise ValueError(
                "the image must be a PIL image, an array or tensor of 3 or 4 dimensions, or a list of these"
            )
        wrong = y.ndim != 4 or y.shape[1] != channels or not len(y)
        if wrong or (height is not None and tuple(y.shape[2:]) != (height, width)):
            size = "any size" if height is None else f"{height}x{width} pixels"
            found = "x".join(map(str, y.shape[2:]))
            raise ValueError(
                f"an image of {found} pixels and {y.shape[1] if y.ndim > 1 else 0} channels; this model"
                f" ({self.conditioning.task}) reads {channels} channels and {size}"
            )
        return (y * 2 - 1).to(self._execution_device, self.unet.dtype)

    def read_mask(self, mask: Any, count: int) -> torch.Tensor | None:
        """What inpainting knows, bool [count, 1, H, W]; None for another task.

        Raises:
            ValueError: a mask that is missing, not needed or of another size.
        """
        if self.conditioning.task != "inpaint":
            if mask is not None:
                raise ValueError(f"mask: this model's task is {self.conditioning.task}; leave the mask out")
            return None
        if mask is None:
            raise ValueError("inpainting requires a mask: a picture, white where to paint, or a tensor, true if known")
        several = mask if isinstance(mask, (list, tuple)) else [mask]
        parts = [
            torch.from_numpy(known_of_picture(one)) if hasattr(one, "convert") else torch.as_tensor(one)
            for one in several
        ]
        size = tuple(self.sample_shape[1:])
        if any(one.ndim < 2 or tuple(one.shape[-2:]) != size for one in parts):
            found = tuple(parts[0].shape)
            raise ValueError(f"a mask of shape {found} for images of {size[0]}x{size[1]} pixels")
        known = torch.cat([one.bool().reshape(-1, 1, *size) for one in parts])  # [M, 1, H, W]
        if len(known) not in (1, count):
            raise ValueError(f"{len(known)} masks for {count} images; give one, or one for each")
        return known.expand(count, -1, -1, -1).to(self._execution_device)

    def check_level(self, conditioning_noise: float, sigma_y: float) -> float:
        """The level that the network is told.

        Raises:
            ValueError: one that it was not trained with.
        """
        for name, value in (("conditioning_noise", conditioning_noise), ("sigma_y", sigma_y)):
            if not (isinstance(value, numbers.Real) and 0 <= value < math.inf):
                raise ValueError(f"{name}={value!r}: must be 0 or more")
        level = max(float(conditioning_noise), sigma_y / math.sqrt(1 + sigma_y**2))
        if level > self.conditioning.noise:
            name, value = ("sigma_y", sigma_y) if level > conditioning_noise else ("conditioning_noise", level)
            raise ValueError(
                f"{name}={value:g}: this model was trained with conditioning noise up to {self.conditioning.noise:g}"
                + (f" (sigma_y {highest_sigma(self.conditioning.noise):g})" if name == "sigma_y" else "")
            )
        return level

    def class_condition(self, class_labels: ClassLabels, count: int) -> torch.Tensor | None:
        """The class of each of `count` images, LongTensor [count]; None for a model without classes.

        Raises:
            ValueError: unknown classes, too few, or none where the model requires one.
        """
        if not self.has_classes:
            if class_labels is not None:
                raise ValueError("class_labels: this model has no classes; leave them out")
            return None
        if class_labels is None and self.null_class is None:
            raise ValueError("this model always has a class; give class_labels")
        ids = self.class_ids(class_labels)
        if len(ids) not in (1, count):
            raise ValueError(f"{len(ids)} class_labels for {count} images; give one, or one for each")
        if untrained := self.untrained(ids.tolist()):
            logger.warning(f"no training image had these classes, whose embeddings are untrained: {untrained}")
        return ids.expand(count)

    def predict_with(
        self,
        y: torch.Tensor,
        *,
        known: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        conditioning_noise: float = 0.0,
        sigma_y: float = 0.0,
        correction: str | None = None,
        guidance: FreeGuidance = UNGUIDED,
        generator: Generators = None,
    ) -> Predict:
        """(x_t, t) -> the network's output at x_t and y, guided by class and corrected.

        Args:
            y: [N, c, h, w] in [-1, 1].
            known, labels: as of `read_mask` and `class_condition`.
            conditioning_noise, sigma_y, correction, generator: as of the pipeline's call.

        Raises:
            ValueError: a level, a correction or a guidance that the model does not support.
        """
        level = self.check_level(conditioning_noise, sigma_y)
        name = self.conditioning.default_correction(level) if correction is None else correction
        self.conditioning.check_correction(name)
        guidance.check()
        if guidance.scale != 1.0 and (labels is None or self.null_class is None):
            raise ValueError(
                f"guidance_scale={guidance.scale} needs a model by class that also learned no class"
                " (--label_column, --class_dropout 0.1); use guidance_scale=1"
            )
        noise = None
        if level * math.sqrt(1 + sigma_y**2) > sigma_y * (1 + 1e-6):
            noise = randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        levels = torch.full((len(y),), level, device=y.device)
        condition = self.conditioning.condition(y, self.sample_shape, levels, noise, sigma_y, known)
        separate = bool(self.unet.config.get("condition_channels"))

        def predict(x_t: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
            read = condition if len(x_t) == len(condition) else torch.cat([condition, condition])  # guided
            if separate:
                return self.predict(x_t, t, condition=read, **conditions)
            output = self.unet(torch.cat([x_t, read], dim=1), t, **conditions).sample
            return self.without_variance(output, x_t.shape[1])

        if labels is not None:
            null = None if self.null_class is None else torch.full_like(labels, self.null_class)
            predict = guidance.guided(predict, "class_labels", labels, null)  # type: ignore[assignment]
        correct = correction_of(name, self.conditioning, y, self.sample_shape, known)
        return corrected(predict, correct, self.ddpm_scheduler())

    def solve(
        self,
        y: torch.Tensor,
        *,
        known: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_solutions: int = 1,
        conditioning_noise: float = 0.0,
        sigma_y: float = 0.0,
        correction: str | None = None,
        guidance: FreeGuidance = UNGUIDED,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        num_frames: int = 0,
        eta: float = 0.0,
    ) -> DDPMPipelineOutput:
        """The pipeline's call for degraded images y [N, c, h, w] in [-1, 1] that were read and checked before.

        Args:
            known, labels: as of `read_mask` and `class_condition`.
        """
        if not (isinstance(num_solutions, numbers.Integral) and num_solutions >= 1):
            raise ValueError(f"num_solutions={num_solutions!r}: must be a whole number of 1 or more")
        parts = (one if one is None else one.repeat_interleave(num_solutions, 0) for one in (y, known, labels))
        y, known, labels = parts  # type: ignore[assignment]
        visited = self.prepare_timesteps(num_inference_steps, timesteps)
        take_step = self.sampler_step(generator, eta, extrapolates=guidance.extrapolates)
        x = self.prepare_latents(len(y), generator, latents)
        predict = self.predict_with(
            y, known=known, labels=labels, conditioning_noise=conditioning_noise, sigma_y=sigma_y,
            correction=correction, guidance=guidance, generator=generator,
        )  # fmt: skip
        return self.denoise(
            x,
            visited,
            predict,
            take_step,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            num_frames,
        )


def highest_sigma(level: float) -> float:
    """The deviation of the noise in y of a level s, s/√(1-s²), rounded down to three decimals."""
    return math.floor(1000 * level / math.sqrt(1 - level**2)) / 1000


def known_of_picture(mask: Any) -> np.ndarray:
    """What a PIL mask shows, bool [H, W]: where it is black, or, if parts are transparent, where it is opaque.

    Raises:
        ValueError: it hides nothing, or is white on transparent, which may mean either.
    """
    if "transparency" in mask.info or "A" in mask.mode:  # of a palette, too
        mask = mask.convert("RGBA")
    if mask.mode == "RGBA" and mask.getextrema()[-1][0] < 128:
        pixels = np.asarray(mask)
        known = pixels[..., 3] >= 128
        if known.any() and pixels[known].min() >= 250:
            raise ValueError(
                "the mask is white on transparent: is the white to be painted, or the rest? Give one that is white"
                " where to paint, on black"
            )
    elif mask.mode in ("I", "F") or mask.mode.startswith("I;"):  # more than 8 bits, which PIL would clip
        values = np.asarray(mask).astype(np.float64)
        white = 255.0 if 1 < values.max() <= 255 else white_of(mask)  # of 0 and 255 in as many bits, too
        known = values < white / 2
    else:
        known = np.asarray(mask.convert("L")) < 128
    if known.all():
        raise ValueError("the mask hides nothing; what is to be painted must be white, or transparent")
    return known
