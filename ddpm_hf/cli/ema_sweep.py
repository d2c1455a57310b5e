"""The figures of several widths of a run's average, in one report."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import typer

from .common import clean_token
from .evaluate import load_measure, read_metrics, ready
from .evaluation_data import DataOptions, read_data
from .evaluation_samples import Chain, How, conditions_of, of_chain, weights_digest
from .sample import Acceleration, Precision

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..common.image_sets import ImageSet
    from ..evaluation.evaluate import Samples
    from ..training.post_hoc import Averages


class SweepOptions(NamedTuple):
    """What to compare with, and how to sample, as in `ddpm-hf evaluate`."""

    dataset: str | None
    metrics: str
    features: str
    features_weights: str | None
    protocol: str
    num_samples: int
    sampler: str
    steps: int | None
    seed: int
    batch_size: int
    device: str
    token: str | None


def compare_widths(
    pipeline: "DiffusionPipeline",
    run: str,
    averages: "Averages",
    widths: list[float],
    options: SweepOptions,
    out: Path,
) -> str:
    """Sample and measure the run's weights and an average of each width; the table, and which is best."""
    from ..evaluation.evaluate import Reference, check_counts, evaluate
    from ..evaluation.metrics import METRICS
    from ..evaluation.ranks import Ranks
    from ..evaluation.report import check_out, write_report

    check_out(out)
    pipeline.set_progress_bar_config(disable=True)  # the images have a bar
    shape = (pipeline.image_channels, *pipeline.image_size)
    data = read_data(DataOptions(options.dataset, token=clean_token(options.token)), run, shape)
    names = read_metrics(options.metrics, None)
    network = options.features, options.protocol, options.device, options.features_weights
    measure = load_measure(names, *network, False, options.seed)
    held_out = None if data.held_out is None else data.held_out.count
    check_counts(measure, data.reference.count, held_out, options.num_samples)
    everything = samples_of(pipeline, averages, widths, data.reference, options, out)
    reference = Reference(measure, data.reference, data.held_out)
    results = evaluate(reference, everything, Ranks(), lambda line: typer.echo(line, err=True))
    table = write_report(out, run, reference, everything, results)
    first = METRICS[names[0]]
    best = min(results, key=lambda one: one["figures"][names[0]]["value"] * (1 if first.lower_is_better else -1))
    width = best["ema_std"]
    way = f"write it with: ddpm-hf ema {run} --std {width:g}" if width else "the run's weights"
    return f"{table}\n\nbest {first.label}: {best['title']}; {way}"


def samples_of(
    pipeline: "DiffusionPipeline",
    averages: "Averages",
    widths: list[float],
    real: "ImageSet",
    options: SweepOptions,
    out: Path,
) -> list["Samples"]:
    """The samples of the run's weights (width 0) and of each width, from the same noise."""
    own = {part: averages.copy(pipeline.components[part]) for part in averages.parts}
    pipeline = ready(pipeline, options.device, Acceleration.auto)
    conditions = conditions_of(pipeline, real, None, None, (None, 0.0, None), options.seed)
    how = How(options.seed, 0.0, Precision.fp32, options.device, options.batch_size)
    digest, chain = weights_digest(pipeline), Chain(options.sampler, options.steps)
    there: list[float] = [0.0]  # the width that the pipeline has now

    def with_width(width: float) -> "Samples":
        told = hashlib.sha256(f"{digest} {averages.digest} {width!r}".encode()).hexdigest()
        samples = of_chain(pipeline, told if width else digest, chain, conditions, options.num_samples, how, out)
        inner = samples.sample
        assert inner is not None  # of a chain

        def sample(indices: range) -> np.ndarray:
            if there[0] != width:
                averages.put(pipeline.components, width, own)
                there[0] = width
            return inner(indices)

        return dataclasses.replace(samples, labels={**samples.labels, "ema_std": width}, sample=sample)

    return [with_width(width) for width in (0.0, *widths)]
