"""Deterministic sampling in few steps: iPNDM, a linear multistep method on the model's own timesteps.

With x̃ = x/√ᾱ and ρ = √((1-ᾱ)/ᾱ), DDIM is Euler's method for dx̃/dρ = ε(x̃, ρ) (Song et al. 2021, Eq. 14). A multistep
method replaces ε by a combination of the last four, one network call a step. iPNDM takes Adams and Bashforth's weights
(Zhang & Chen 2023, https://arxiv.org/abs/2204.13902), which are right where the steps are even in ρ; those here
integrate the same polynomial over the steps as they are (ρAB-DEIS in that paper). Diffusers' IPNDMScheduler has noise
levels of its own, and cannot run an ε-DDPM.

This file is copied into published repositories: it imports torch, numpy, diffusers and the scheduler, next to it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from .coefficients_ddpm_hf import combine, working_dtype
from .scheduling_ddpm_hf import DDPMScheduler

if TYPE_CHECKING:  # Diffusers' decorator has no types
    from .scheduling_ddpm_hf import register_to_config
else:
    from diffusers.configuration_utils import register_to_config

MAX_ORDER = 4  # how many ε a step combines at most
# Entries of a config, which stock ignores and other samplers keep: by the number of calls, as a string
FITTED_TIMESTEPS = "_fitted_timesteps"
FITTED_WEIGHTS = "_fitted_weights"
LIKELIHOOD_TIMESTEPS = "_likelihood_timesteps"


class EpsilonMultistepScheduler(SchedulerMixin, ConfigMixin):
    """iPNDM for models of any prediction type over β; with fitted timesteps and weights where the config has them.

    Its config is DDPM's, and `from_config` takes that of any sampler over β. For n steps `ddpm-hf fit-timesteps` may
    have written the timesteps to visit and the weights of the last ε; otherwise they are evenly spaced from T-1, and
    `multistep_weights`. `fits = "ignored"` leaves the fits out, `"required"` refuses other numbers of steps.

    Args: as those of `DDPMScheduler`; with `timestep_spacing="karras"` the timesteps are even in ρ^(1/7) (Karras et
        al. 2022, Eq. 5), with any other name of Diffusers even in t.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1  # network calls a step
    timesteps: torch.Tensor
    num_inference_steps: int | None
    weights: Sequence[Sequence[float]] | None  # of ε at each step of the chain; None: `multistep_weights`
    fits: str  # "used" where there are any, "ignored" or "required"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self.register_to_config(_use_default_values=[])  # `from_config` forgets what was given by position
        self.diffusion = DDPMScheduler(
            num_train_timesteps,
            beta_start,
            beta_end,
            beta_schedule,
            trained_betas,
            "fixed_small",
            clip_sample,
            prediction_type,
            thresholding,
            dynamic_thresholding_ratio,
            clip_sample_range,
            sample_max_value,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self.alphas_cumprod = self.diffusion.alphas_cumprod
        self.init_noise_sigma = 1.0
        self.max_order = MAX_ORDER
        self.num_inference_steps = None
        self.fits = "used"
        self._history: list[tuple[float, torch.Tensor]] = []  # ρ and ε of the last steps, the latest first
        self._set_chain(range(num_train_timesteps - 1, -1, -1), None, None)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def fitted_calls(self) -> list[int]:
        """The numbers of steps for which the config has fitted timesteps, ascending."""
        return sorted(map(int, self.config.get(FITTED_TIMESTEPS) or {}))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Choose the timesteps that the chain visits; after the last it goes to x_0.

        Args:
            num_inference_steps: their number, from 1 to T.
            device: of `self.timesteps`.
            timesteps: the timesteps themselves, descending, instead of a number.
            weights: of ε at each step, the current one first, then those before; None: `multistep_weights`.

        Raises:
            ValueError: both or neither given, timesteps not descending within 0..T-1, weights that do not fit, or a
                number without the fit that `fits` requires.
        """
        if timesteps is None and num_inference_steps is not None:
            fitted: Mapping[str, Any] = self.config.get(FITTED_TIMESTEPS) or {}
            key = str(num_inference_steps)
            if self.fits == "required" and key not in fitted:
                known = ", ".join(map(str, self.fitted_calls())) or "none"
                raise ValueError(f"{key} steps: fitted are {known}; `ddpm-hf fit-timesteps` fits others")
            if key in fitted and weights is None and self.fits != "ignored":
                timesteps, weights = fitted[key], (self.config.get(FITTED_WEIGHTS) or {}).get(key)
            else:
                timesteps = self._spaced(num_inference_steps)
            number = num_inference_steps
        else:
            number = None
        given = None if timesteps is None else [int(t) for t in timesteps]
        self.diffusion.set_timesteps(number if given is None else None, timesteps=given)  # checks them
        chain = self.diffusion.timesteps.tolist()
        if weights is not None:
            allowed = [min(index + 1, MAX_ORDER) for index in range(len(chain))]
            if len(weights) != len(chain) or any(not 1 <= len(row) <= n for row, n in zip(weights, allowed)):
                raise ValueError(f"weights of {len(weights)} steps for {len(chain)}: give each step 1 to 4, of its ε")
        self.num_inference_steps = number
        self._set_chain(chain, weights, device)

    def _spaced(self, n: int) -> list[int]:
        """n timesteps from T-1 down, evenly spaced to x_0, or evenly in ρ^(1/7)."""
        T = len(self)
        if not 1 <= n <= T or n != int(n):
            raise ValueError(f"num_inference_steps={n}: must be from 1 to {T}, the model's T")
        if self.config.timestep_spacing == "karras":
            return karras_timesteps(self.diffusion, int(n))
        chain = np.linspace(-1, T - 1, int(n) + 1).round()[1:].astype(int)
        return [int(t) for t in chain[::-1]]

    def _set_chain(
        self, chain: Sequence[int], weights: Sequence[Sequence[float]] | None, device: str | torch.device | None
    ) -> None:
        self.timesteps = torch.tensor(list(chain), dtype=torch.int64).to(device)
        self.weights = weights
        self._steps = {t: (index, s) for index, (t, s) in enumerate(zip(chain, [*chain[1:], -1]))}
        self._history = []

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the diffusion and the fits, as a DDPMScheduler: Diffusers knows it, and any sampler is made of it."""
        spacing = self.config.timestep_spacing
        ddpm = DDPMScheduler.from_config(self.config, timestep_spacing="leading" if spacing == "karras" else spacing)
        ddpm.save_pretrained(save_directory, push_to_hub, **kwargs)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample unchanged."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """As `DDPMScheduler.add_noise`."""
        return self.diffusion.add_noise(original_samples, noise, timesteps)

    def signal_and_rho(self, t: int) -> tuple[float, float]:
        """√ᾱ_t and ρ_t = √((1-ᾱ_t)/ᾱ_t); 1 and 0 for x_0, t = -1."""
        if t < 0:
            return 1.0, 0.0
        alpha_bar = self.diffusion.exact_tables.alphas_cumprod[t].item()
        return alpha_bar**0.5, ((1 - alpha_bar) / alpha_bar) ** 0.5

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step: x̃_s = x̃_t + (ρ_s - ρ_t) Σ_j w_j ε_j, over the last ε; the first steps have fewer.

        Args:
            model_output: [N, C, ...] at x_t.
            timestep: one of `self.timesteps`, in their order.
            sample: x_t [N, C, ...].

        Returns: `prev_sample` and `pred_original_sample`, [N, C, ...] in the sample's dtype.
        """
        t = int(timestep)
        if t not in self._steps:
            raise ValueError(f"timestep {t} is not in the chain that set_timesteps made; pass one of its timesteps")
        index, s = self._steps[t]
        if index == 0:
            self._history = []
        dtype = working_dtype(sample)
        x_t = sample.to(dtype)
        x_start = self.diffusion.predict_original_sample(model_output.to(dtype), t, x_t)
        epsilon = self.diffusion.predict_epsilon(x_start, t, x_t)
        (signal_t, rho_t), (signal_s, rho_s) = self.signal_and_rho(t), self.signal_and_rho(s)
        self._history = [(rho_t, epsilon), *self._history][:MAX_ORDER]
        if self.weights is not None:
            weights = self.weights[index]
        else:
            weights = multistep_weights([rho for rho, _ in self._history[: self.max_order]], rho_s)
        combined = weights[0] * epsilon
        for weight, (_, earlier) in zip(weights[1:], self._history[1:]):
            combined = torch.add(combined, earlier, alpha=weight)
        previous = combine(signal_s / signal_t, x_t, signal_s * (rho_s - rho_t), combined).to(sample.dtype)
        predicted = self.diffusion.clip(x_start).to(sample.dtype)
        if not return_dict:
            return previous, predicted
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=predicted)


def multistep_weights(rhos: Sequence[float], rho_s: float) -> list[float]:
    """The weights of k ≤ 4 ε in a step to ρ_s that make it exact where ε is a polynomial in ρ of degree k-1.

    Their mean over the step of Lagrange's polynomials, by Gauss's two points, which are exact to degree 3.

    Args:
        rhos: where the ε were predicted, the beginning of the step first, then those before it.
        rho_s: the end of the step.

    >>> multistep_weights([2.0, 3.0], 1.0)  # on an even grid, Adams and Bashforth's
    [1.5, -0.5]
    """
    middle, half = (rhos[0] + rho_s) / 2, (rhos[0] - rho_s) / 2
    points = (middle - half / 3**0.5, middle + half / 3**0.5)
    weights = []
    for node in rhos:
        others = [other for other in rhos if other != node]
        weights.append(sum(math.prod((x - other) / (node - other) for other in others) for x in points) / 2)
    return weights


def karras_timesteps(diffusion: DDPMScheduler, n: int) -> list[int]:
    """n different timesteps from T-1 down to 0, as evenly spaced in ρ^(1/7) as the model's timesteps allow."""
    alphas_cumprod = diffusion.exact_tables.alphas_cumprod.numpy()
    return evenly_spaced(((1 - alphas_cumprod) / alphas_cumprod) ** (0.5 / 7), n)


def evenly_spaced(values: np.ndarray, n: int) -> list[int]:
    """n different timesteps from T-1 down to 0, as evenly spaced in a monotone function of t [T] as there are."""
    chain = [int(np.abs(values - one).argmin()) for one in np.linspace(values[-1], values[0], n)]
    for index in range(1, n):  # below the one before ...
        chain[index] = min(chain[index], chain[index - 1] - 1)
    for index in range(n - 1, -1, -1):  # ... and with room for those after
        chain[index] = max(chain[index], n - 1 - index)
    return chain
