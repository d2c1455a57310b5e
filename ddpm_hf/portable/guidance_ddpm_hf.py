"""Guidance by a class: classifier-free (Ho & Salimans 2022) and by a classifier (Dhariwal & Nichol 2021).

This file is copied into published repositories: it imports torch, diffusers and files next to it, each directly.
"""

import difflib
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from .hub_ddpm_hf import MixinBase
from .scheduling_ddpm_hf import DDPMScheduler

Predict: TypeAlias = Callable[
    ..., torch.Tensor
]  # (x_t [N, C, H, W], t, **conditioning [N, ...]) -> the model's output
TakeStep: TypeAlias = Callable[
    [torch.Tensor, float, torch.Tensor], SchedulerOutput
]  # (output, t, x_t) -> x_s, `prev_sample`
# An id or a name, several of them, or None for the null class
ClassLabels: TypeAlias = int | str | Sequence[int | str | None] | torch.Tensor | None
MAX_SCALE = 1e4  # far beyond use, and far from where float32 overflows


class FreeGuidance(NamedTuple):
    """Where and how strongly classifier-free guidance acts.

    Raises, by `check`: ValueError for a number that is not finite, or an interval without a timestep.
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[int, int] | None = None

    def check(self) -> "FreeGuidance":
        """Itself, if its numbers can be used."""
        if not -MAX_SCALE <= self.scale <= MAX_SCALE:
            raise ValueError(f"guidance_scale={self.scale}: must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale}: must be from 0 to 1")
        if self.interval is not None and len(self.interval) != 2:
            raise ValueError(f"guidance_interval={self.interval!r}: (low, high), two timesteps")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance_interval={tuple(self.interval)}: (low, high), the lower timestep first")
        return self

    def acts(self, t: float | torch.Tensor) -> bool:
        """Whether the output at t is a guided one."""
        inside = self.interval is None or self.interval[0] <= float(t) <= self.interval[1]
        return self.scale != 1.0 and inside

    def extrapolates(self, t: float | torch.Tensor) -> bool:
        """Whether the output at t lies beyond those of the conditional and the unconditional model."""
        return self.acts(t) and not 0 <= self.scale <= 1

    def guided(self, predict: Predict, name: str, condition: torch.Tensor, null: torch.Tensor | None) -> Predict:
        """`predict` with a condition, guided where this acts, then in one pass of twice the batch.

        Args:
            name: of the argument of `predict` that takes the condition.
            condition, null: what to follow, [N, ...], and what to move away from; None where this never acts.
        """

        def guided_predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if not self.acts(t):
                return predict(x, t, **{name: condition})
            both = predict(torch.cat([x, x]), t, **{name: torch.cat([condition, null])})  # [2N, C or 2C, H, W]
            conditional, unconditional = both.chunk(2)
            return classifier_free_guidance(conditional, unconditional, self.scale, self.rescale, x.shape[1])

        return guided_predict


def find_class(name: str, ids: dict[str, int]) -> int:
    """The id of a class by its name; upper and lower case are the same where that leaves one class.

    Raises:
        ValueError: no such class, or several; the message suggests similar names.
    """
    if name in ids:
        return ids[name]
    alike = [known for known in ids if known.casefold() == name.casefold()]
    if len(alike) == 1:
        return ids[alike[0]]
    by_folded = {known.casefold(): known for known in ids}
    near = alike or [by_folded[one] for one in difflib.get_close_matches(name.casefold(), by_folded, n=3)]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    names = ", ".join(map(repr, list(ids)[:12])) + (", ..." if len(ids) > 12 else "")
    raise ValueError(f"class {name!r} must be one of the model's {len(ids)}: an id from 0, or a name of {names}{hint}")


def classifier_free_guidance(
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    guidance_scale: float,
    guidance_rescale: float,
    channels: int,
) -> torch.Tensor:
    """unconditional + scale · (conditional - unconditional) (Ho & Salimans 2022, Eq. 6, where scale = 1 + w).

    Args:
        conditional, unconditional: the model's outputs [N, C, H, W], or [N, 2C, H, W] with a learned variance.
        guidance_rescale: the share, from 0 to 1, by which the guided output is brought back to the conditional one's
            standard deviation (Lin et al. 2023, sec. 3.4).
        channels: C. A learned variance is interpolated from scale 0 to 1 and the conditional one beyond: extrapolating
            a variance has no meaning.
    """
    mean = conditional[:, :channels]
    guided = torch.lerp(unconditional[:, :channels], mean, guidance_scale)
    if guidance_rescale > 0:
        dims = tuple(range(1, guided.ndim))
        ratio = mean.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = torch.lerp(guided, guided * ratio, guidance_rescale)
    variance = torch.lerp(unconditional[:, channels:], conditional[:, channels:], min(max(guidance_scale, 0.0), 1.0))
    return torch.cat([guided, variance], dim=1)


class ClassifierGuidance:
    """Shifts a reverse step towards images that a noisy classifier reads as the requested class.

    Args:
        classifier: any module or function (x_t [N, C, H, W], t [N]) -> logits [N, K].
        class_labels: LongTensor [N], the requested classes.
        scale: s of Dhariwal & Nichol's algorithms; 1 samples from p(x)·p(y|x).
    """

    def __init__(self, classifier: Callable, class_labels: torch.Tensor, scale: float):
        if not callable(classifier):
            raise ValueError(f"classifier={classifier!r}: must be a function (x_t, t) -> logits")
        if not -MAX_SCALE <= scale <= MAX_SCALE:
            raise ValueError(f"classifier_scale={scale}: must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}")
        self.classifier, self.class_labels, self.scale = classifier, class_labels, scale

    def guided(
        self, predict: Predict, take_step: TakeStep, scheduler: DDPMScheduler, ancestral: bool
    ) -> tuple[Predict, TakeStep]:
        """`predict` and `take_step`, one of them guided: Algorithm 1 for ancestral steps, 2 for other samplers.

        Args:
            scheduler: ours over the sampler's diffusion; for ancestral steps the sampler itself.
        """

        def guided_step(output: torch.Tensor, t: float, x_t: torch.Tensor) -> SchedulerOutput:
            step = take_step(output, t, x_t)
            step.prev_sample = self.shift_sample(scheduler, step.prev_sample, output, x_t, t)
            return step

        def guided_predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.shift_output(scheduler, predict(x_t, t), x_t, t)

        return (predict, guided_step) if ancestral else (guided_predict, take_step)

    def gradient(self, x_t: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """s ∇ log p(y | x_t) with respect to x_t, [N, C, H, W]."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            timesteps = torch.as_tensor(timestep, device=x.device).expand(len(x))  # [N]
            log_probability = self.classifier(x, timesteps).float().log_softmax(dim=-1)
            if int(self.class_labels.max()) >= log_probability.shape[1]:
                known = log_probability.shape[1]
                raise ValueError(f"class {int(self.class_labels.max())}: the classifier knows {known}, from 0")
            chosen = log_probability.gather(1, self.class_labels[:, None]).sum()
            return self.scale * torch.autograd.grad(chosen, x)[0]

    def shift_output(
        self, scheduler: DDPMScheduler, output: torch.Tensor, x_t: torch.Tensor, timestep: float | torch.Tensor
    ) -> torch.Tensor:
        """The model's output for the guided score: on epsilon, ε - √(1-ᾱ) s∇ (Algorithm 2), for DDIM and the like."""
        t = int(timestep)
        alpha_bar = float(scheduler.exact_tables.alphas_cumprod[t])
        if alpha_bar == 0:  # x_t is noise alone and tells no class: ∇ log p(y | x_t) = 0
            return output
        _, from_output = scheduler.x0_coefficients(t, x_t)
        # x̂_0 moves by (1-ᾱ)/√ᾱ · s∇, whatever the output is; the output by that over its factor in x̂_0
        factor = (1 - alpha_bar) / alpha_bar**0.5 / from_output
        return output + (factor * self.gradient(x_t, timestep)).to(output.dtype)

    def shift_sample(
        self,
        scheduler: DDPMScheduler,
        prev_sample: torch.Tensor,
        output: torch.Tensor,
        x_t: torch.Tensor,
        timestep: float | torch.Tensor,
    ) -> torch.Tensor:
        """x_s with its mean moved by Σ s∇ (Algorithm 1), for ancestral steps."""
        t = int(timestep)
        moments = scheduler.p_mean_variance(output, t, x_t, int(scheduler.previous_timestep(t)))
        return prev_sample + (moments.variance * self.gradient(x_t, timestep)).to(prev_sample.dtype)


class ClassesMixin(MixinBase):
    """The classes of a pipeline whose `unet` embeds them: K, or K + 1 with the null class, the last."""

    unet: Any

    def register_classes(self, id2label: dict | None, trained_classes: list[int] | None) -> None:
        """Keep the K classes' names, by default their ids, and which of them training images had, in the config.

        Raises:
            ValueError: names or ids that do not fit the embeddings.
        """
        embeddings = self.unet.config.num_class_embeds
        names = {int(key): str(name) for key, name in (id2label or {}).items()}
        names = names or {number: str(number) for number in range(embeddings)}
        if len(names) not in (embeddings, embeddings - 1) or set(names) != set(range(len(names))):
            raise ValueError(f"id2label names {len(names)} classes and the UNet embeds {embeddings}")
        if trained_classes is not None and not (trained_classes and set(trained_classes) <= set(names)):
            raise ValueError(f"trained_classes={trained_classes}: must be ids of the {len(names)} classes")
        self.register_to_config(id2label={str(number): names[number] for number in sorted(names)})
        if trained_classes is not None:
            self.register_to_config(trained_classes=sorted(trained_classes))

    @property
    def has_classes(self) -> bool:
        """Whether the network reads a class."""
        return bool(self.unet.config.get("num_class_embeds"))

    @property
    def class_names(self) -> dict[str, str]:
        """The classes' names by their ids, which are strings as in JSON; empty for a model without classes."""
        return dict(self.config.get("id2label") or {})

    @property
    def labels(self) -> dict[str, int]:
        """The classes' ids by their names."""
        return {name: int(number) for number, name in self.class_names.items()}

    @property
    def default_classes(self) -> list[int]:
        """The ids of the classes to sample where none are asked for: those that training images had."""
        return list(self.config.get("trained_classes") or range(len(self.class_names)))

    def untrained(self, ids: list[int] | None = None) -> list[str]:
        """The names of the classes (of those among `ids`) that no training image had."""
        names, trained = self.class_names, set(self.default_classes)
        return [
            name
            for number, name in names.items()
            if int(number) not in trained and (ids is None or int(number) in ids)
        ]

    @property
    def null_class(self) -> int | None:
        """The id that stands for no class, or None if the model never learned one."""
        classes = len(self.class_names)
        return classes if classes and self.unet.config.num_class_embeds == classes + 1 else None

    def class_ids(self, class_labels: ClassLabels) -> torch.Tensor:
        """Ids (integers) or names (strings), one or several, as a LongTensor [N]; None is the null class.

        Raises:
            ValueError: an id or a name that the model does not know.
        """
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.reshape(-1).tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        known, count = self.labels, len(self.class_names)
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                ids.append(find_class(label, known))
            elif label is None and self.null_class is not None:
                ids.append(self.null_class)
            elif isinstance(label, numbers.Integral) and not isinstance(label, bool) and 0 <= int(label) < count:
                ids.append(int(label))
            else:
                names = ", ".join(map(repr, list(known)[:12])) + (", ..." if count > 12 else "")
                raise ValueError(
                    f"class {label!r} must be one of the model's {count}: an id from 0 to {count - 1}, or a name of"
                    f" {names}"
                )
        return torch.tensor(ids, dtype=torch.int64, device=self._execution_device)
