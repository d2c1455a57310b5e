"""The reverse chain that our pipelines share: Algorithm 2 of Ho et al. 2020, or any sampler of Diffusers.

This file is copied into published repositories: it imports torch, diffusers and the scheduler, from the same folder.
"""

import inspect
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import diffusers
import numpy as np
import torch
from diffusers import ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .guidance_ddpm_hf import Predict, TakeStep
from .hub_ddpm_hf import MixinBase
from .multistep_ddpm_hf import EpsilonMultistepScheduler
from .schedules_ddpm_hf import OLD_KEYS, without_old_keys
from .scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES, DDPMScheduler

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "numpy", "pt", "latent", "preview")  # "numpy" is stock DDPMPipeline's word for "np"
PIL_CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # that images of these modes have
# (pipeline, index, timestep, {"latents": x_s}) -> what replaces these, or nothing
StepCallback: TypeAlias = Callable[[Any, int, Any, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]
Generators: TypeAlias = torch.Generator | list[torch.Generator] | None  # for all images, or one for each
# What these samplers raise an error for only once the network has run
UNSUPPORTED_PREDICTIONS = {"PNDMScheduler": ("sample",)}


@dataclass
class ChainStep:
    """A step of the chain, from x_t to x_s. The chain continues from `sample`, which its consumer may replace."""

    index: int
    timestep: float  # t; an int but for samplers that visit timesteps in between
    before: torch.Tensor  # x_t [N, C, H, W]
    output: torch.Tensor  # of the model, [N, C, H, W], or [N, 2C, H, W] with a learned variance
    sample: torch.Tensor  # x_s [N, C, H, W]
    pred_original_sample: torch.Tensor | None  # x̂_0, where the sampler reports it


class Frame(NamedTuple):
    """A moment of the chain: x_s after the step from `timestep`, and the x̂_0 predicted there, as images."""

    timestep: int
    sample: Any
    prediction: Any


@dataclass
class DDPMPipelineOutput(ImagePipelineOutput):
    """`images` as `output_type` says; `frames` is a list of `Frame` where `num_frames` asked for it, or else None."""

    frames: list[Frame] = None  # type: ignore[assignment]  # Optional would make every caller that asked test it


def adopt_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that our pipelines work with: ours in place of stock's DDPM, any other as it is.

    A sampler that would itself cut off a learned variance (at a fixed number of channels) is told that there is none:
    the pipeline cuts.
    """
    if type(scheduler) is diffusers.DDPMScheduler:
        return DDPMScheduler.from_config(scheduler.config)
    if isinstance(scheduler, DDPMScheduler):
        return scheduler
    if OLD_KEYS & set(scheduler.config):
        scheduler = type(scheduler).from_config(without_old_keys(scheduler.config))
    takes_variance = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    if takes_variance and scheduler.config.variance_type in LEARNED_VARIANCE_TYPES:
        return type(scheduler).from_config(scheduler.config, variance_type=None)
    return scheduler


def check_sampler(scheduler: SchedulerMixin, timesteps: Sequence[float]) -> None:
    """Raise ValueError, with the way out, where the sampler cannot run the model over the timesteps."""
    if isinstance(scheduler, DDPMScheduler):
        return scheduler.check_invertible(int(t) for t in timesteps)
    name = type(scheduler).__name__
    theirs = getattr(scheduler, "alphas_cumprod", None)
    ascending = len(timesteps) > 1 and timesteps[0] < timesteps[-1]
    if theirs is None or ascending or not getattr(scheduler, "timesteps", torch.zeros(0)).numel():
        instead = "call pipe.use_multistep() for iPNDM" if "IPNDM" in name else "sample with DDPMScheduler"
        raise ValueError(
            f"{name} does not run from the model's timestep T-1 down to 0: it is for models of another kind, or adds"
            f" noise; {instead}, DDIMScheduler or DPMSolverMultistepScheduler"
        )
    if scheduler.config.prediction_type == "posterior_mean":
        raise ValueError(
            f"{name} does not know prediction_type='posterior_mean'; sample with ddpm_hf's DDPMScheduler"
            " (pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config))"
        )
    if scheduler.config.prediction_type in UNSUPPORTED_PREDICTIONS.get(name, ()):
        raise ValueError(
            f"{name} does not support prediction_type={scheduler.config.prediction_type!r}; sample with DDPMScheduler,"
            " DDIMScheduler or EulerDiscreteScheduler"
        )
    ours = DDPMScheduler.from_config(scheduler.config)
    if not torch.allclose(theirs.to(ours.alphas_cumprod), ours.alphas_cumprod, rtol=0, atol=1e-4):
        raise ValueError(
            f"{name} does not know rescale_betas_zero_snr and would denoise at other noise levels than the model's;"
            " sample with DDPMScheduler or DDIMScheduler"
        )
    visited = [int(t) for t in timesteps]
    if name.startswith(("DPMSolver", "UniPC")) and len(set(visited)) < len(visited):
        raise ValueError(
            f"{name} would visit a timestep twice in {len(visited)} steps, and divide by zero; take fewer than the"
            f" model's {len(ours)}, or timestep_spacing='trailing'"
        )
    ours.check_invertible(visited)
    if name != "DDIMScheduler" and ours.exact_tables.alphas_cumprod[max(visited)] == 0:
        raise ValueError(
            f"{name} works with log-SNR, which is -inf at timestep {max(visited)} of this zero-terminal-SNR schedule;"
            " sample with DDPMScheduler or DDIMScheduler"
        )


def stock_samples_alike(scheduler: SchedulerMixin) -> bool:
    """Whether stock's scheduler of the same config samples the same images as the sampler of ours.

    Not where it lacks a prediction or a variance, and not where a chain ends above t = 0: it then adds noise to the
    finished image, unless the posterior's variance, 0 there, says that there is none.
    """
    config, ours = scheduler.config, isinstance(scheduler, DDPMScheduler)
    if config.get("prediction_type") == "posterior_mean":
        return False
    if not ours:
        return True
    ends_above = config.timestep_spacing == "trailing" or (
        config.timestep_spacing == "leading" and config.steps_offset > 0
    )
    noisy = config.variance_type not in ("fixed_small", "fixed_small_log")
    return config.variance_type not in ("learned", "fixed_large_log") and not (ends_above and noisy)


def output_channels(unet: torch.nn.Module) -> int:
    """How many channels a network predicts; where its config does not say, as many as it reads."""
    return unet.config.get("out_channels") or unet.config.in_channels


def downscaling(widths: Sequence[int]) -> int:
    """The factor by which a UNet or an autoencoder of these `block_out_channels` reduces height and width."""
    return 2 ** (len(widths) - 1)


def scale_latents(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """An encoder's latents as x_0, of about unit variance; any shape."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def white_of(image: Any) -> float:
    """Which value of a PIL image of 16 or 32 bits is white: 65535, or 1 of floats; 255 where values are of 8 bits."""
    largest = float(np.asarray(image).max())
    if image.mode == "F":
        return 1.0 if largest <= 1 else 255.0
    return 65535.0 if largest > 255 or image.mode.startswith("I;") else 255.0


def in_channels(image: Any, channels: int) -> Any:
    """A PIL image in a model's channels, 8 bits each: PIL itself clips 16-bit values at 255."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64) / white_of(image)
        (image,) = VaeImageProcessor.numpy_to_pil(values.clip(0, 1)[None, ..., None])
    mode = PIL_CHANNELS.get(channels)
    return image.convert(mode) if mode else image


class SamplingMixin(MixinBase):
    """What a pipeline with a `unet`, a `scheduler` and an optional `vae` needs in order to sample."""

    unet: Any
    vae: Any
    scheduler: Any  # ours, or another sampler of Diffusers

    scheduler_names: tuple[str, ...] = ("scheduler",)  # a cascade has one for each stage

    def __setattr__(self, name: str, value: Any) -> None:
        """Adopt a scheduler; restores a learned `variance_type` that another sampler dropped."""
        if name in self.scheduler_names and value is not None:
            given = value.config.get("variance_type")
            value = adopt_scheduler(value)
            learned = self.__dict__.setdefault("_learned_variance_types", {})
            if given in LEARNED_VARIANCE_TYPES:
                learned[name] = given
            remembered = learned.get(name)
            unet = getattr(self, name.replace("scheduler", "unet"), None)
            doubled = unet is not None and output_channels(unet) == 2 * self.sample_shape[0]
            if remembered and doubled and isinstance(value, DDPMScheduler) and given != remembered:
                value = DDPMScheduler.from_config(value.config, variance_type=remembered)
        super().__setattr__(name, value)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t: of the images, or of the latents where there is a `vae`."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a latent stands for, in each direction; 1 without a `vae`."""
        return 1 if self.vae is None else downscaling(self.vae.config.block_out_channels)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        _, height, width = self.sample_shape
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def image_channels(self) -> int:
        """How many channels an image has: that of x_0, or what the `vae` decodes it to."""
        return self.sample_shape[0] if self.vae is None else self.vae.config.out_channels

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Between tensors in [-1, 1] and images, in the model's number of channels."""
        gray, colour = self.image_channels == 1, self.image_channels == 3
        return VaeImageProcessor(vae_scale_factor=1, do_convert_grayscale=gray, do_convert_rgb=colour)

    def prepare_latents(
        self,
        batch_size: int,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """x_T [N, C, H, W] ~ N(0, I), or the given one, scaled as the sampler requires; `size` is (H, W)."""
        if not (isinstance(batch_size, numbers.Integral) and batch_size >= 1):
            raise ValueError(f"batch_size={batch_size!r}: must be a whole number of 1 or more")
        several = generator if isinstance(generator, (list, tuple)) else [generator or None]
        if not all(isinstance(one, torch.Generator) for one in several if several != [None]):
            raise ValueError(f"generator={generator!r}: give a torch.Generator, or one for each image")
        shape = (batch_size, self.sample_shape[0], *(size or self.sample_shape[1:]))
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators for batch_size={batch_size}; give one for each image, or one"
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        elif not isinstance(latents, torch.Tensor):
            raise ValueError(f"latents of {type(latents).__name__}: give a tensor")
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: batch_size and model require {shape}")
        elif not torch.isfinite(latents).all():
            raise ValueError("latents contain NaN or infinity")
        latents = latents.to(device=self._execution_device, dtype=self.unet.dtype)
        return latents * self.scheduler.init_noise_sigma

    def prepare_timesteps(self, num_inference_steps: int | None, timesteps: list[int] | None = None) -> list:
        """Set the chain (None: all of the scheduler's T steps) and return its timesteps, as Python numbers."""
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError("timesteps and num_inference_steps both say which steps to take; give one of them")
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(self.scheduler).__name__} takes no timesteps; give num_inference_steps")
            self.scheduler.set_timesteps(timesteps=timesteps)
        else:
            if num_inference_steps is None:
                num_inference_steps = self.scheduler.config.num_train_timesteps
            if not 1 <= num_inference_steps <= self.scheduler.config.num_train_timesteps:
                most = self.scheduler.config.num_train_timesteps
                raise ValueError(f"num_inference_steps={num_inference_steps}: must be from 1 to {most}, the model's T")
            self.scheduler.set_timesteps(num_inference_steps)
        visited = self.scheduler.timesteps.tolist()
        check_sampler(self.scheduler, visited)
        return visited

    def predict(
        self, latents: torch.Tensor, timestep: int | torch.Tensor, **conditioning: torch.Tensor
    ) -> torch.Tensor:
        """The model's output at x_t, without a learned variance's half where the sampler has no use for it."""
        return self.without_variance(self.unet(latents, timestep, **conditioning).sample, latents.shape[1])

    def without_variance(self, output: torch.Tensor, channels: int) -> torch.Tensor:
        """A model's output for x_t of so many channels, cut to these where the sampler cannot use a variance."""
        if not isinstance(self.scheduler, DDPMScheduler) and output.shape[1] == 2 * channels:
            return output[:, :channels]
        return output

    def sampler_step(
        self, generator: Generators = None, eta: float = 0.0, extrapolates: Callable[[float], bool] | None = None
    ) -> TakeStep:
        """The sampler's step from x_t to x_s, (model output, t, x_t) -> its output.

        Args:
            generator: of the noise; a list has one for each image.
            eta: of DDIM (Song et al. 2021, Eq. 16): 0 is deterministic, 1 as noisy as ancestral sampling.
            extrapolates: whether the output at t is guided beyond any model's: x̂_0 then leaves [-1, 1].

        Raises:
            ValueError: an eta outside [0, 1], or one that the sampler does not have.
        """
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepted else {}
        if not (isinstance(eta, numbers.Real) and 0 <= eta <= 1):
            raise ValueError(f"eta={eta!r}: must be from 0 to 1")
        if "eta" in accepted:
            options["eta"] = eta
        elif eta:
            raise ValueError(f"eta={eta}: {type(self.scheduler).__name__} has no eta; leave it out, or use DDIM")

        def take_step(output: torch.Tensor, t: float, x_t: torch.Tensor) -> SchedulerOutput:
            if "use_clipped_model_output" in accepted:
                # DDIM: where a guided x̂_0 is clipped, ε must be the one that leads to it, or steps add what was cut
                options["use_clipped_model_output"] = extrapolates is not None and extrapolates(t)
            return self.scheduler.step(output, t, x_t, **options)  # Algorithm 2, line 4

        return take_step

    def chain(self, x: torch.Tensor, timesteps: list, predict: Predict, take_step: TakeStep) -> Iterator[ChainStep]:
        """The reverse chain, step by step (Algorithm 2); guidance wraps `predict` or `take_step`.

        Args:
            x: x_t [N, C, H, W] at the first of the timesteps.
            timesteps: a part of the scheduler's, descending, as Python numbers.
            predict: (x_t as the sampler scales it, t on x's device) -> the model's output.
            take_step: (output, t, x_t) -> the sampler's output; see `sampler_step`.

        Yields: each step; the chain continues from its `sample`, which may be replaced.
        """
        # The model reads t on its device, our scheduler as a Python int: neither then waits for the other.
        on_device = torch.as_tensor(timesteps).to(x.device)
        for index, t in enumerate(timesteps):
            output = predict(self.scheduler.scale_model_input(x, on_device[index]), on_device[index])
            result = take_step(output, t, x)
            step = ChainStep(index, t, x, output, result.prev_sample, getattr(result, "pred_original_sample", None))
            yield step
            x = step.sample

    def denoise(
        self,
        x: torch.Tensor,
        timesteps: list,
        predict: Predict,
        take_step: TakeStep,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        num_frames: int = 0,
    ) -> DDPMPipelineOutput:
        """Run a `chain` to its end: the images and the frames; without `return_dict` the tuple (images,), as in stock.

        Args:
            callback_on_step_end: called with (pipeline, index, timestep, {"latents": x_s}); what it returns replaces
                the latents.
            callback_on_step_end_tensor_inputs: what to hand to it; also "pred_original_sample", the x̂_0 of the step.
            num_frames: how many moments of the chain to keep, evenly spaced and ending with the last.
        """
        if not (isinstance(num_frames, numbers.Integral) and num_frames >= 0):
            raise ValueError(f"num_frames={num_frames!r}: must be a whole number of 0 or more")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end={callback_on_step_end!r}: must be a function")
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents", "pred_original_sample"}
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {', '.join(sorted(unknown))}; there are only latents and"
                " pred_original_sample"
            )
        predicting = callback_on_step_end is not None and "pred_original_sample" in callback_on_step_end_tensor_inputs
        kept = set(torch.linspace(0, len(timesteps) - 1, num_frames).round().int().tolist()) if num_frames else set()
        frames = []
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step in self.chain(x, timesteps, predict, take_step):
                x = step.sample
                if predicting or step.index in kept:
                    prediction = self.predicted_x_start(step)
                if step.index in kept:
                    pictures = (self.decode(one, output_type) for one in (x, prediction))
                    frames.append(Frame(int(step.timestep), *pictures))
                if callback_on_step_end is not None:
                    offered = {"latents": x} | ({"pred_original_sample": prediction} if predicting else {})
                    chosen = {name: offered[name] for name in callback_on_step_end_tensor_inputs}
                    replaced = callback_on_step_end(self, step.index, step.timestep, chosen) or {}
                    step.sample = x = replaced.get("latents", x)
                progress_bar.update()
        self.warn_of_nan(x)
        images = self.decode(x, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)  # type: ignore[return-value]  # a union would make every caller test it
        return DDPMPipelineOutput(images=images, frames=frames if num_frames else None)  # type: ignore[arg-type]

    def warn_of_nan(self, x: torch.Tensor) -> None:
        """Log how many of the samples [N, C, H, W] are NaN or infinite: as pictures they are black.

        It waits for the device, once a chain.
        """
        finite = torch.isfinite(x).flatten(1).all(1).tolist()
        if all(finite):
            return
        taken, T = len(self.scheduler.timesteps), self.scheduler.config.num_train_timesteps
        advice = "is the model trained, and does the precision suit it?"
        if self.scheduler.config.get("prediction_type") == "posterior_mean" and taken < T:
            advice = (
                f"it took {taken} of {T} timesteps, and predicts the mean of a step to the next timestep: take all {T}"
            )
        logger.warning(f"{finite.count(False)} of {len(finite)} samples are NaN or infinite; {advice}")

    def predicted_x_start(self, step: ChainStep) -> torch.Tensor:
        """x̂_0 as the sampler reports it, or else by DDPM's formula (samplers that rescale x_t report it)."""
        if step.pred_original_sample is not None:
            return step.pred_original_sample
        ours = self.ddpm_scheduler()
        return ours.clip(ours.predict_original_sample(step.output, int(step.timestep), step.before))

    def use_multistep(self) -> None:
        """Sample with iPNDM from now on: 5 to 20 steps, on fitted timesteps where the model has them for that number.

        `pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)` is the way back.
        """
        for name in self.scheduler_names:
            scheduler = getattr(self, name)
            if scheduler is not None:
                setattr(self, name, EpsilonMultistepScheduler.from_config(scheduler.config))

    def ddpm_scheduler(self) -> DDPMScheduler:
        """Our scheduler over the sampler's diffusion, for its formulas: the sampler itself where it is ours."""
        if isinstance(self.scheduler, DDPMScheduler):
            return self.scheduler
        return DDPMScheduler.from_config(
            self.scheduler.config, variance_type="fixed_small", timestep_spacing="leading", steps_offset=0
        )

    def encode(self, images: Any, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (PIL, numpy or tensor in [0, 1]) as x_0 [N, C, H, W]: in [-1, 1], or latents with a `vae`."""
        height, width = self.image_size
        pictures = images if isinstance(images, (list, tuple)) else [images]
        if pictures and all(hasattr(one, "convert") for one in pictures) and self.image_channels in PIL_CHANNELS:
            images = [in_channels(one, self.image_channels) for one in pictures]
        pixels = self.image_processor.preprocess(images, height=height, width=width)
        pixels = pixels.to(device=self._execution_device, dtype=self.unet.dtype)
        if self.vae is None:
            return pixels
        latents = self.vae.encode(pixels).latent_dist.sample(generator)
        return scale_latents(self.vae, latents)

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """x_0 as images: "pil", "np" [N, H, W, C] or "pt" [N, C, H, W] in [0, 1], or "latent", x_0 itself.

        "preview" is "pil" too, and of more channels than PIL has the first three.
        """
        if output_type == "latent":
            return latents
        if self.vae is not None:
            latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        if output_type == "preview" and self.image_channels not in PIL_CHANNELS:
            latents = latents[:, :3]
        output_type = {"preview": "pil", "numpy": "np"}.get(output_type, output_type)
        return self.image_processor.postprocess(latents.float(), output_type=output_type)

    def check_output_type(self, output_type: str) -> None:
        """Raise ValueError for what `decode` does not know or cannot make of the model's channels, before any work."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} must be one of {', '.join(OUTPUT_TYPES)}")
        if output_type == "pil" and self.image_channels not in PIL_CHANNELS:
            raise ValueError(
                f"output_type='pil': PIL images have up to 4 channels, this model's {self.image_channels}; use 'np' or"
                " 'pt', or 'preview' for the first three"
            )
