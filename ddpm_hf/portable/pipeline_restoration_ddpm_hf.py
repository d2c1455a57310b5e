"""Restoration with an unconditional or class-conditional model, without retraining: inpainting, super-resolution, ...

This file can be copied next to a published model: it imports torch, diffusers and files next to it, each directly.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .acceleration_ddpm_hf import AccelerationMixin
from .coefficients_ddpm_hf import Coefficients, posterior_mean_coefficients, posterior_variance_and_log_beta
from .guidance_ddpm_hf import find_class
from .hub_ddpm_hf import PortablePipelineMixin
from .linear_ddpm_hf import Operator, as_operator, least_squares
from .multistep_ddpm_hf import EpsilonMultistepScheduler  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .operators_ddpm_hf import OPERATORS  # noqa: F401  so that it lies beside, and for `from ... import OPERATORS`
from .restoration_ddpm_hf import (
    FEW,
    METHODS,
    Method,
    Moment,
    Options,
    Problem,
    estimate_sigma,
    plan_chain,
    plan_rounds,
    tiled,
)
from .sampling_ddpm_hf import (
    DDPMPipelineOutput,
    Generators,
    SamplingMixin,
    StepCallback,
    in_channels,
    output_channels,
)
from .schedules_ddpm_hf import BETA_SCHEDULES  # noqa: F401  Diffusers fetches what a pipeline imports itself
from .scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES, DDPMScheduler

logger = logging.get_logger(__name__)

FINE = 0.01  # noise below it is not seen: 8-bit images have 0.0023
RESTORED = ("DDPMPipeline", "DDIMPipeline", "ClassConditionalDDPMPipeline")  # pipelines whose models restore


@dataclass
class RestorationOutput(DDPMPipelineOutput):
    """The solutions `images`, those of the first observation first; and

    residuals: the root mean square of A x - y of each solution, [N·num_solutions].
    sigma_y: the deviation of the observation's noise, as given or estimated.
    """

    residuals: torch.Tensor = None  # type: ignore[assignment]
    sigma_y: float = 0.0


class DDPMRestorationPipeline(SamplingMixin, AccelerationMixin, PortablePipelineMixin, DiffusionPipeline):
    """Images x_0 that explain an observation y = A x_0 + n, sampled by a model of such images.

    Made from another pipeline, whose network it shares: `DDPMRestorationPipeline.from_pipe(pipeline)`.

    Args:
        unet, scheduler, vae: as of `DDPMPipeline`; another sampler's diffusion is taken over.
        id2label: the names of the classes, for a network with class embeddings.
        trained_classes: the ids of those that training images had, where not all had some.
    """

    unet: UNet2DModel
    vae: AutoencoderKL | None
    scheduler: DDPMScheduler
    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        trained_classes: list[int] | None = None,
    ):
        super().__init__()
        changes: dict[str, Any] = {}
        doubled = output_channels(unet) == 2 * unet.config.in_channels
        if doubled and scheduler.config.get("variance_type") not in LEARNED_VARIANCE_TYPES:
            changes["variance_type"] = "learned_range"  # a sampler before it dropped it
        self.register_modules(unet=unet, scheduler=DDPMScheduler.from_config(scheduler.config, **changes), vae=vae)
        if id2label is not None:
            self.register_to_config(id2label={str(key): str(name) for key, name in id2label.items()})
        if trained_classes is not None:
            self.register_to_config(trained_classes=list(trained_classes))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "DDPMRestorationPipeline":
        """The restoration pipeline of a pipeline of ours or of stock's `DDPMPipeline`; they share the network.

        Raises:
            ValueError: a pipeline that is conditioned on text, or that has no `unet` and `scheduler`.
        """
        if hasattr(pipeline, "tokenizer"):
            raise ValueError("restoration requires a model that is unconditional or by class; this one is by text")
        if not (hasattr(pipeline, "unet") and hasattr(pipeline, "scheduler")):
            raise ValueError(
                f"{type(pipeline).__name__} has no unet and scheduler; restoration requires a DDPMPipeline"
            )
        if hasattr(pipeline, "conditioning") or hasattr(pipeline, "conditionings"):
            raise ValueError("restoration requires a model that reads x_t alone; this one reads an image too")
        parts = {name: pipeline.config.get(name) for name in ("id2label", "trained_classes")}
        parts["vae"] = getattr(pipeline, "vae", None)
        return cls(pipeline.unet, pipeline.scheduler, **{**parts, **kwargs})

    @classmethod
    def check_class(cls, index: dict[str, Any], name: str) -> None:
        """Raise ValueError for the `model_index.json` of a model that cannot restore."""
        entry = index.get("_class_name")
        saved_by = entry[-1] if isinstance(entry, list) and entry else entry
        if saved_by not in RESTORED:
            raise ValueError(f"{name} is for {saved_by}; restoration requires a model for {' or '.join(RESTORED)}")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: what it holds is another pipeline's."""
        raise ValueError("a restoration pipeline holds nothing to save; save the pipeline that it was made from")

    def class_ids(self, class_labels: Any, count: int) -> torch.Tensor | None:
        """One class for each of `count` observations, LongTensor [N]; None for a model without classes.

        Args:
            class_labels: as of `ClassConditionalDDPMPipeline`: ids, names or None, one or several, or a tensor.

        Raises:
            ValueError: labels for a model without classes, unknown ones, too few, or none where the model needs one.
        """
        embeddings = self.unet.config.get("num_class_embeds")
        if not embeddings:
            if class_labels is not None:
                raise ValueError("class_labels: this model has no classes; leave them out")
            return None
        names = dict(self.config.get("id2label") or {str(one): str(one) for one in range(embeddings)})
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.reshape(-1).tolist()
        labels = list(class_labels) if isinstance(class_labels, (list, tuple, range)) else [class_labels]
        null = int(embeddings) - 1 if embeddings > len(names) else None
        if null is None and None in labels:
            raise ValueError("this model always has a class; give class_labels")
        absent = -1 if null is None else null
        known = {name: int(number) for number, name in names.items()}
        for one in labels:
            if not (one is None or isinstance(one, (str, numbers.Integral))) or isinstance(one, bool):
                raise ValueError(f"class {one!r} must be an id from 0 to {len(names) - 1}, or a name")
        ids = [
            absent if one is None else find_class(one, known) if isinstance(one, str) else int(one) for one in labels
        ]
        if any(not 0 <= one < len(names) and one != null for one in ids) or len(ids) not in (1, count):
            raise ValueError(
                f"class_labels={labels}: give one for all or for each of {count} observations, from 0 to"
                f" {len(names) - 1}"
            )
        trained = self.config.get("trained_classes")
        if trained and (untrained := sorted({names[str(one)] for one in ids if one not in (*trained, null)})):
            logger.warning(f"no training image had these classes, whose embeddings are untrained: {untrained}")
        return torch.tensor(ids * (count if len(ids) == 1 else 1), device=self._execution_device)

    def read_observation(self, observation: Any, operator: Operator) -> torch.Tensor:
        """y [N, *observation_shape] of a tensor, with or without N, or of PIL images, scaled to [-1, 1].

        Raises:
            ValueError: another shape than the operator's, NaN or infinity.
        """
        expected = operator.observation_shape
        if not isinstance(observation, torch.Tensor):
            images = observation if isinstance(observation, (list, tuple)) else [observation]
            if len(expected) != 3 or not images or not all(hasattr(one, "convert") for one in images):
                raise ValueError(
                    f"the observation must be a tensor [N, {', '.join(map(str, expected))}]"
                    + (", or PIL images" if len(expected) == 3 else "")
                )
            arrays = [np.atleast_3d(np.asarray(in_channels(one, expected[0]))) for one in images]
            if len({one.shape for one in arrays}) > 1:
                raise ValueError("the observations are images of several sizes; restore them one by one")
            observation = torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float() / 127.5 - 1
        if tuple(observation.shape) == expected:
            observation = observation[None]
        if observation.ndim != len(expected) + 1 or tuple(observation.shape[1:]) != expected or not len(observation):
            raise ValueError(
                f"an observation of shape {tuple(observation.shape)}, and the operator gives"
                f" {expected} for images of {tuple(operator.shape)} (channels, height, width)"
            )
        observation = observation.to(device=self._execution_device, dtype=self.exact_dtype)
        if not torch.isfinite(observation).all():
            raise ValueError("the observation contains NaN or infinity")
        return observation

    @property
    def exact_dtype(self) -> torch.dtype:
        """In which all but the network computes: A x = y is not a matter of half precision."""
        return torch.promote_types(self.unet.dtype, torch.float32)

    def check_method(self, method: str, operator: Operator, sigma_y: float) -> Method:
        """The row of a method, if it works for the operator and the model; a warning where it leaves y's noise.

        Raises:
            ValueError: it does not, or is unknown.
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
        row = METHODS[method]
        if self.vae is not None and not row.latents:
            usable = ", ".join(name for name, one in METHODS.items() if one.latents)
            raise ValueError(f"method={method!r} requires a model of pixels; for this model of latents, use {usable}")
        if (sigma_y or row.rounds) and row.noise_needs_svd and not operator.has_svd:
            raise ValueError(
                f"method={method!r} with sigma_y={sigma_y:g} requires an operator with a known SVD; use pigdm or"
                " diffpir"
            )
        if row.exact and sigma_y > FINE:
            logger.warning(f"method={method!r} takes y as exact: noise of sigma_y={sigma_y:.3g} stays in the images")
        return row

    def restoration_timesteps(self, num_inference_steps: int, start: float, second_rho: float = math.inf) -> list[int]:
        """The chain's timesteps, from `start` of T down to 0; the scheduler's chain is set to them.

        Args:
            second_rho: as in `Method`.
        """
        T = len(self.scheduler)
        if not 0 < start <= 1:
            raise ValueError(f"start={start!r}: must be above 0, and at most 1 (from noise)")
        first = max(1, round(start * T)) - 1
        if not (isinstance(num_inference_steps, numbers.Integral) and 1 <= num_inference_steps <= first + 1):
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: must be from 1 to {first + 1}")
        return self.prepare_timesteps(None, self._spaced(first, int(num_inference_steps), second_rho))

    def restoration_rounds(
        self, num_inference_steps: int, start: float, rounds: int, least: float
    ) -> list[tuple[int, int, int]]:
        """The steps (t, s, u) of rounds from t_k down to x_0 and up again, with t_k falling to where ρ is `least`."""
        if not (isinstance(num_inference_steps, numbers.Integral) and num_inference_steps >= 1):
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: must be a whole number of 1 or more")
        top = self.restoration_timesteps(1, start)[0]
        if top and self.scheduler.exact_tables.alphas_cumprod[top] == 0:
            top -= 1  # with zero terminal SNR x_T says nothing of x_0, and the way up divides by √ᾱ
        angles = torch.arccos(self.scheduler.exact_tables.alphas_cumprod.sqrt()).numpy()
        low = min(max(math.atan(least), angles[0]), angles[top])
        chains = []
        for angle, steps in plan_rounds(float(angles[top]), float(low), int(num_inference_steps), rounds):
            first = max(0, int(np.searchsorted(angles, angle, side="right")) - 1)
            steps = min(steps, first + 1)
            wanted = np.interp(angles[first] * np.arange(1, steps + 1) / steps, angles, np.arange(len(angles)))
            chains.append(self._distinct(wanted, first)[::-1].tolist())
        plan = []
        for chain, following in zip(chains, [*chains[1:], [-1]]):
            ends = [*chain[1:], -1]
            plan += [(t, s, s) for t, s in zip(chain[:-1], ends)] + [(chain[-1], -1, following[0])]
        return plan

    def _spaced(self, first: int, count: int, second_rho: float = math.inf) -> list[int]:
        """`count` different timesteps from `first` down to 0, even in the angle arccos √ᾱ between image and noise.

        A cosine schedule's timesteps are even in it; a linear one's then have more steps where the image is decided.
        With few steps and a `second_rho`, the first step may be longer, and those after it are even.
        """
        angles = torch.arccos(self.scheduler.exact_tables.alphas_cumprod.sqrt()).numpy()[: first + 1]
        wanted = np.linspace(angles[0], angles[-1], count)
        if 2 < count < FEW and wanted[-2] > math.atan(second_rho) > angles[0]:
            wanted[:-1] = np.linspace(angles[0], math.atan(second_rho), count - 1)
        ascending = np.interp(wanted, angles, np.arange(first + 1)) if count > 1 else np.array([float(first)])
        return self._distinct(ascending, first)[::-1].tolist()

    @staticmethod
    def _distinct(ascending: np.ndarray, first: int) -> np.ndarray:
        """The nearest whole numbers, different from each other, up to `first`."""
        ascending, count = ascending.round().astype(int), len(ascending)
        for i in range(1, count):
            ascending[i] = max(ascending[i], ascending[i - 1] + 1)
        return np.minimum(ascending, first - np.arange(count - 1, -1, -1))

    @torch.no_grad()
    def __call__(
        self,
        observation: Any,
        operator: Any,
        sigma_y: float | None = 0.0,
        method: str = "ddnm",
        num_inference_steps: int = 100,
        num_solutions: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: Sequence[int | str] | int | str | None = None,
        eta: float | None = None,
        weight: float | None = None,
        iterations: int | None = None,
        start: float = 1.0,
        time_travel: tuple[int, int] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        num_frames: int = 0,
    ) -> RestorationOutput:
        """Sample solutions x_0 of y = A x_0 + n.

        Args:
            observation: y, a tensor [N, *operator.observation_shape] (or without N) of images in [-1, 1] as A maps
                them; or PIL images, where y is an image.
            operator: A: one of `OPERATORS`, a physics of deepinv, or a pair of functions (A, its adjoint). Its `shape`
                is that of the solutions; one larger than the model's is restored in overlapping tiles.
            sigma_y: the standard deviation of n, for images in [-1, 1] (twice that in [0, 1]); 0 where y is exact,
                None to estimate it from y.
            method: a name in `METHODS`.
            num_inference_steps: calls of the network, without time travel; of `gibbs` in all rounds.
            num_solutions: for each observation.
            generator: one, or one for each solution.
            output_type, return_dict, callback_on_step_end, num_frames: as in `DDPMPipeline`.
            class_labels: for a model by class, one for all or one for each observation; None is the null class.
            eta, weight, iterations: settings of the method; by default those of its row.
            start: the share of T to start from, at the noised pseudo-inverse A⁺y; 1 is noise alone.
            time_travel: (length, repeats): after each `length` steps go back up and take them again, `repeats` times
                in all. Multiplies the calls of the network.

        Raises:
            ValueError: what does not fit the operator, the method or the model.
        """
        self.check_output_type(output_type)
        operator = as_operator(operator, getattr(operator, "shape", None) or (self.image_channels, *self.image_size))
        self.check_size(operator)
        y = self.read_observation(observation, operator)
        if sigma_y is None:
            sigma_y = estimate_sigma(y, getattr(operator, "mask", None))
        if not (isinstance(sigma_y, numbers.Real) and 0 <= sigma_y < math.inf):
            raise ValueError(f"sigma_y={sigma_y!r}: must be 0 or more")
        row = self.check_method(method, operator, sigma_y)
        options = self._options(row, eta, weight, iterations)
        length, repeats = time_travel or row.time_travel
        for name, value in (("num_solutions", num_solutions), ("time_travel", length), ("time_travel", repeats)):
            if not (isinstance(value, numbers.Integral) and value >= 1):
                raise ValueError(f"{name}={value!r}: must be a whole number of 1 or more")
        labels = self.class_ids(class_labels, len(y))
        if row.rounds:
            if (length, repeats) != (1, 1):
                raise ValueError(f"time_travel={time_travel!r}: {method} has rounds; leave it out")
            least = float(sigma_y) / operator.norm  # type: ignore[attr-defined]
            plan = self.restoration_rounds(num_inference_steps, start, options.iterations, least)
        else:
            timesteps = self.restoration_timesteps(num_inference_steps, start, row.second_rho)
            plan = plan_chain(timesteps, length, repeats)
        self.scheduler.timesteps = torch.tensor([t for t, _, _ in plan])  # with the steps that are taken again
        y = y.repeat_interleave(num_solutions, 0)  # [N·num_solutions, ...]
        conditioning = {} if labels is None else {"class_labels": labels.repeat_interleave(num_solutions, 0)}

        size = self.sample_shape[1:] if self.vae is not None else operator.shape[1:]
        x = self.prepare_latents(len(y), generator, size=size).to(self.exact_dtype)
        with in_full_precision(x):
            explained = y  # what no x explains says nothing of x
            if not operator.has_svd:
                explained = operator.forward(least_squares(operator.forward, operator.adjoint, y))
            if start < 1:
                x_start = self._encoded(operator.pseudo_inverse(explained)).to(x.dtype)
                x = self.scheduler.add_noise(x_start, x, plan[0][0])  # type: ignore[arg-type]
        problem = Problem(operator, explained, float(sigma_y), self.scheduler, options, self.pixels)
        chain = _Chain(self, problem, row, plan, conditioning, generator)
        output = self.denoise(
            x, [t for t, _, _ in plan], chain.predict, chain.take_step, output_type, True,  # type: ignore[arg-type]
            callback_on_step_end, callback_on_step_end_tensor_inputs, num_frames,
        )  # fmt: skip
        if not return_dict:
            return (output.images,)  # type: ignore[return-value]
        with in_full_precision(y):
            error = operator.observed(y - operator.forward(self.pixels(chain.x))).flatten(1)
        residuals = error.square().mean(1).sqrt()
        return RestorationOutput(output.images, output.frames, residuals, float(sigma_y))

    def check_size(self, operator: Operator) -> None:
        """Raise ValueError for an operator whose images the model cannot make."""
        channels, height, width = operator.shape
        (h, w), tiles = self.image_size, self.vae is None
        if channels != self.image_channels:
            raise ValueError(f"the operator is for images of {channels} channels; the model has {self.image_channels}")
        if (height < h or width < w) if tiles else (height, width) != (h, w):
            raise ValueError(
                f"the operator is for images of {height}x{width} pixels, and the model makes {h}x{w}"
                + ("; larger ones are restored in tiles, smaller ones not" if tiles else "")
            )

    def _options(self, row: Method, eta: float | None, weight: float | None, iterations: int | None) -> Options:
        options = row.defaults
        for name, value in (("eta", eta), ("weight", weight), ("iterations", iterations)):
            if value is not None and name not in row.reads:
                readers = " and ".join(one for one, method in METHODS.items() if name in method.reads)
                raise ValueError(f"{name}={value!r} is for the methods {readers}; leave it out")
        if eta is not None:
            if not (isinstance(eta, numbers.Real) and 0 <= eta <= 1):
                raise ValueError(f"eta={eta!r}: must be from 0 to 1")
            options = options._replace(eta=float(eta))
        if weight is not None:
            if not (isinstance(weight, numbers.Real) and 0 < weight < math.inf):
                raise ValueError(f"weight={weight!r}: must be above 0")
            options = options._replace(weight=float(weight))
        if iterations is not None:
            if not (isinstance(iterations, numbers.Integral) and iterations >= 1):
                raise ValueError(f"iterations={iterations!r}: must be a whole number of 1 or more")
            options = options._replace(iterations=int(iterations))
        return options

    def pixels(self, x_start: torch.Tensor) -> torch.Tensor:
        """x_0 as images in [-1, 1]: itself, or what the `vae` decodes it to."""
        if self.vae is None:
            return x_start
        latents = x_start / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].to(x_start.dtype)

    def _encoded(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] as x_0."""
        return images if self.vae is None else self.encode(images / 2 + 0.5)


def in_full_precision(x: torch.Tensor) -> torch.autocast:
    """A context without autocast, in which the products of an operator would lose y."""
    return torch.autocast(x.device.type, enabled=False)


class _Chain:
    """The network and the steps of one restoration, as `SamplingMixin.chain` asks for them."""

    def __init__(
        self,
        pipeline: DDPMRestorationPipeline,
        problem: Problem,
        method: Method,
        plan: list[tuple[int, int, int]],
        conditioning: dict[str, torch.Tensor],
        generator: Generators,
    ):
        self.problem, self.method, self.conditioning, self.generator = problem, method, conditioning, generator
        self.plan: Any = iter(plan)
        self.network: Callable[..., torch.Tensor] = pipeline.predict
        if tuple(problem.operator.shape[1:]) != tuple(pipeline.image_size):
            self.network = tiled(pipeline.predict, pipeline.image_size)
        self.dtype = pipeline.unet.dtype
        self.log_alpha_bar = Coefficients(pipeline.scheduler.exact_tables.betas.numpy()).log_alpha_bar
        self.latent = pipeline.vae is not None
        self.x: torch.Tensor = problem.y  # x_s of the latest step
        self.input: torch.Tensor = problem.y  # that the output's graph begins with
        self.top: tuple[torch.Tensor, float] | None = None  # x_t that the steps, or this round, came from, and its ᾱ

    def predict(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The model's output at x_t, with its graph where the method differentiates it."""
        self.input = x.detach().requires_grad_(self.method.gradients)
        with torch.set_grad_enabled(self.method.gradients):
            return self.network(self.input.to(self.dtype), t, **self.conditioning).to(x.dtype)

    def take_step(self, output: torch.Tensor, t: float, x_t: torch.Tensor) -> DDPMSchedulerOutput:
        """Down from t to s by the method, then, with time travel, up again."""
        with in_full_precision(x_t):
            return self._step(output, t, x_t)

    def _step(self, output: torch.Tensor, t: float, x_t: torch.Tensor) -> DDPMSchedulerOutput:
        _, s, up = next(self.plan)
        scheduler = self.problem.scheduler
        with torch.set_grad_enabled(self.method.gradients):
            estimate = scheduler.predict_original_sample(output, int(t), self.input)
            x_start = scheduler.clip(estimate)
        log_t, log_s = self.log_alpha_bar[int(t) + 1], self.log_alpha_bar[s + 1]
        self.top = self.top or (x_t, math.exp(log_t))
        moment = Moment(
            x_t,
            x_start.detach(),
            scheduler.predict_epsilon(x_start.detach(), int(t), x_t),
            int(t),
            math.exp(log_t),
            math.exp(log_s),
            float(posterior_variance_and_log_beta(log_t, log_s)[0]),
            float(posterior_mean_coefficients(log_t, log_s)[0]),
            self.noise,
            lambda v: torch.autograd.grad(x_start, self.input, v, retain_graph=True)[0],
        )
        step = self.method.step(self.problem, moment)
        x_s = step.sample
        if s < 0 and not self.problem.sigma_y and not self.latent:
            x_s = self.problem.project(x_s)
        if up > s:
            if self.method.rounds:
                alpha_bar = math.exp(self.log_alpha_bar[up + 1])
                x_s = self.method.rounds(self.problem, x_s, alpha_bar, self.noise(), self.top)
                self.top = x_s, alpha_bar
            else:
                ratio = math.exp(self.log_alpha_bar[up + 1] - log_s)  # q(x_u | x_s)
                x_s = math.sqrt(ratio) * x_s + math.sqrt(1 - ratio) * self.noise()
        self.x = x_s.to(x_t.dtype)
        return DDPMSchedulerOutput(prev_sample=self.x, pred_original_sample=step.x_start)

    def noise(self) -> torch.Tensor:
        """z ~ N(0, I) of x_t's shape."""
        x = self.input
        return randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
