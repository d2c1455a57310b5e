"""The samples that `ddpm-hf evaluate` measures: of which sampler, of which classes or prompts, kept where."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..common.errors import DataError, UsageError
from ..inference.samplers import SAMPLERS
from .conditions import Conditions, class_names, read_conditions
from .sample import Precision, autocast, set_sampler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from ..common.image_sets import ImageSet
    from ..evaluation.evaluate import Samples

STORES = "samples"  # of the output folder


class Chain(NamedTuple):
    """A sampler and its number of steps; None is its usual one."""

    sampler: str
    steps: int | None


class How(NamedTuple):
    """How a model is sampled, apart from the chain."""

    seed: int
    eta: float
    precision: Precision
    device: str
    batch_size: int


def read_chains(sweep: str | None, sampler: str, steps: int | None, eta: float) -> list[Chain]:
    """The chains to sample: of --sweep, or the one of --sampler and --steps.

    Raises:
        UsageError: a malformed sweep, or eta without DDIM.
    """
    chains = [Chain(sampler, steps)]
    if sweep is not None:
        if steps is not None:
            raise UsageError(f"--sweep and --steps {steps}: the sweep says the steps; give one of them")
        chains = []
        for word in sweep.split():
            match = re.fullmatch(r"([^:\s]+):(\d+(?:,\d+)*)", word)
            if match is None or match[1] not in SAMPLERS or 0 in map(int, match[2].split(",")):
                raise UsageError(
                    f'--sweep {word!r}: give SAMPLER:STEPS,STEPS such as "ddpm:1000,250 ddim:50,25"; the samplers are'
                    f" {', '.join(SAMPLERS)}"
                )
            chains += [Chain(match[1], int(number)) for number in match[2].split(",")]
        if not chains:
            raise UsageError('--sweep is empty: give SAMPLER:STEPS, such as "ddpm:1000,250 ddim:50,25"')
    if eta and not all(chain.sampler == "ddim" for chain in chains):
        other = next(chain.sampler for chain in chains if chain.sampler != "ddim")
        raise UsageError(f"--eta {eta:g} requires --sampler ddim (got {other})")
    return list(dict.fromkeys(chains))


def conditions_of(
    pipeline: "DiffusionPipeline",
    real: "ImageSet",
    classes: Sequence[str] | None,
    prompts: Sequence[str] | None,
    guidance: tuple[float | None, float, tuple[int, int] | None],
    seed: int,
) -> Conditions:
    """What each sample is to show: the classes or prompts given, in turn, or the real images', as often as there.

    Raises:
        ValueError: options that the model does not support, or no prompts for a model by text.
    """
    order = _order(seed, real.count)
    by_text = hasattr(pipeline, "tokenizer")
    if by_text and not prompts:
        if real.captions is None:
            raise DataError(f"this model requires texts, and {real.name} gives none: --caption-column, or --prompt")
        captions = [real.captions[index] for index in order]
        return dataclasses.replace(_read(pipeline, classes, captions[:1], guidance), given=captions, names=())
    conditions = _read(pipeline, classes, prompts, guidance)
    if getattr(pipeline, "has_classes", False) and not classes and real.labels is not None:
        given = [int(one) for one in ids_of_labels(pipeline, real)[order]]
        return dataclasses.replace(conditions, given=given, names=())
    return conditions


def ids_of_labels(pipeline: "DiffusionPipeline", real: "ImageSet") -> np.ndarray:
    """The model's class ids of real images, which are matched by the names of the classes, int64 [N].

    Raises:
        DataError: a class that the model does not know.
    """
    ids = {name: int(number) for number, name in class_names(pipeline).items()}
    labels = np.asarray(real.labels)
    names = list(real.label_names) or [str(number) for number in range(int(labels.max()) + 1)]
    unknown = sorted({names[label] for label in np.unique(labels)} - ids.keys())
    if unknown:
        raise DataError(
            f"{real.name} has the class {unknown[0]!r}, which the model does not know (it knows"
            f" {', '.join(list(ids)[:8])}); give --class, or another --label-column"
        )
    return np.array([ids.get(name, -1) for name in names], dtype=np.int64)[labels]


def _order(seed: int, count: int) -> np.ndarray:
    """A random order of the real images, whose classes or captions the samples take in turn."""
    from ..common.randomness import keyed_generator

    return keyed_generator(seed, "conditions").permutation(count)


def _read(
    pipeline: "DiffusionPipeline",
    classes: Sequence[str] | None,
    prompts: Sequence[str] | None,
    guidance: tuple[float | None, float, tuple[int, int] | None],
) -> Conditions:
    return read_conditions(pipeline, None, classes, prompts, None, guidance, None)


def weights_digest(pipeline: "DiffusionPipeline") -> str:
    """A digest of all weights of a pipeline, and of its diffusion."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            for key, value in sorted(part.state_dict().items()):
                digest.update(f"{name}.{key}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    settings = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def fit_of(scheduler: "SchedulerMixin") -> str:
    """A digest of what was fitted to the model and is used by its sampler; empty if there is nothing."""
    from ..portable.multistep_ddpm_hf import EpsilonMultistepScheduler
    from ..portable.scheduling_ddpm_hf import FITTED, DDPMScheduler

    used: Any = None
    if isinstance(scheduler, DDPMScheduler) and scheduler.variance_type == FITTED:
        variances = scheduler.x_start_variances
        used = None if variances is None else variances.tolist()
    if isinstance(scheduler, EpsilonMultistepScheduler) and scheduler.fits == "required":
        used = scheduler.timesteps.tolist(), scheduler.weights
    return hashlib.sha256(json.dumps(used).encode()).hexdigest()[:16] if used else ""


def of_folder(images: "ImageSet") -> "Samples":
    """The samples that a folder or an npz file holds."""
    from ..evaluation.evaluate import Samples

    return Samples(images.count, {"images": images.name}, images=images)


def of_chain(
    pipeline: "DiffusionPipeline", digest: str, chain: Chain, conditions: Conditions, count: int, how: How, out: Path
) -> "Samples":
    """The samples of a chain. The pipeline has its sampler only while it samples, so that several chains share it.

    Args:
        digest: of the pipeline's weights.
        out: the output folder, which keeps the images.

    Raises:
        ValueError: more steps than the model has timesteps, or a sampler that cannot run it.
    """
    from ..evaluation.evaluate import Samples
    from ..evaluation.sampling import SampleStore, network_calls, pipeline_sampler
    from ..inference.samplers import schedulers_of, swapped

    with swapped(pipeline, chain.sampler):
        steps = set_sampler(pipeline, chain.sampler, chain.steps)
        guided = conditions.options.get("guidance_scale", 1.0) != 1.0
        calls = network_calls(pipeline, steps, guided)
        fit = "".join(map(fit_of, schedulers_of(pipeline).values()))
    labels: dict[str, Any] = {"sampler": chain.sampler, "steps": steps, "network_calls": calls, "seed": how.seed}
    labels |= {"eta": how.eta} if chain.sampler == "ddim" else {}
    labels |= {"variance": "fitted"} if fit and chain.sampler == "ddpm" else {}
    said = {name: value for name, value in conditions.options.items() if value or name == "guidance_scale"}
    labels |= {name: value for name, value in said.items() if value is not None}
    settings = {
        **labels,
        "model": digest,
        "precision": how.precision.value,
        "conditions": hashlib.sha256(json.dumps(list(conditions.given)).encode()).hexdigest()[:16],
    }
    settings |= {"fit": fit} if fit else {}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    shape = (pipeline.image_channels, *pipeline.image_size)
    store = SampleStore(out / STORES / f"{chain.sampler.replace('++', 'pp')}-{steps}-{key}", shape)

    def sample(indices: range) -> np.ndarray:
        with swapped(pipeline, chain.sampler), autocast(how.device, how.precision):
            options = {"num_inference_steps": steps, "eta": how.eta}
            return pipeline_sampler(pipeline, how.seed, conditions.sample, **options)(indices)

    return Samples(count, labels, store, settings, sample, batch_size=how.batch_size)
