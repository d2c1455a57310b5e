"""From real and generated images to figures, each with its interval and with what it was computed from."""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..common.errors import DataError, UsageError
from ..common.image_sets import ImageSet
from .features import PARTS, Extractor, Features, extract
from .features.cache import cached_features
from .metrics import METRICS, Figure, Metric
from .protocols import Protocol
from .ranks import Ranks
from .sampling import AT_ONCE, SampleStore, fill, stored_features

CACHED_AT_ONCE = 1024  # real images whose features are a file of the cache


@dataclass
class NoFeatures:
    """Stands for the network where metrics read pixels alone."""

    name: str = ""
    fingerprint: str = ""
    provides: frozenset[str] = frozenset()

    def __call__(self, images: Any) -> Features:
        """Rows without a number."""
        return Features(np.zeros((len(images), 0), np.float32))


@dataclass(frozen=True)
class Measure:
    """How images are measured.

    Args:
        metrics: names of `METRICS`.
        extractor: the network whose features are compared; `NoFeatures` where no metric reads them.
        protocol: how it and the metrics compute.
        seed: of subsets and of the bootstrap.
    """

    metrics: tuple[str, ...]
    extractor: Extractor
    protocol: Protocol
    seed: int = 0

    @property
    def rows(self) -> dict[str, Metric]:
        """The metrics by their names."""
        return {name: METRICS[name] for name in self.metrics}

    @property
    def conventions(self) -> str:
        """The protocol and the network, for the record of a figure."""
        network = f", {self.extractor.name} features" if self.extractor.name else ""
        return f"{self.protocol.name} protocol{network}"

    @property
    def keep(self) -> frozenset[str]:
        """The parts of the features that the metrics read, always with `pool`."""
        return frozenset(part for row in self.rows.values() for part in parts_of(row)) & frozenset(PARTS) | {"pool"}


def parts_of(metric: Metric) -> list[str]:
    """What a metric reads: parts of `Features`, `images`, and `train` if it also reads the training images."""
    return metric.needs.split("+")


def reads_pixels_alone(metrics: Sequence[str]) -> bool:
    """Whether no network is needed: these are names of `METRICS`, and none of them reads features."""
    return all(name in METRICS and not set(parts_of(METRICS[name])) & set(PARTS) for name in metrics)


def serves(extractor: Extractor, metric: Metric) -> bool:
    """Whether a network provides the features that a metric reads."""
    return set(parts_of(metric)) & set(PARTS) <= extractor.provides


def check_metrics(metrics: Sequence[str], extractor: Extractor) -> tuple[str, ...]:
    """The metrics, without repetitions.

    Raises:
        UsageError: an unknown one, or one that reads features which the extractor lacks.
    """
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"--metrics {name}: must be one of {', '.join(METRICS)}")
        if not serves(extractor, METRICS[name]):
            raise UsageError(
                f"--metrics {name}: requires {METRICS[name].needs} features, which --features {extractor.name} lack"
            )
    return tuple(dict.fromkeys(metrics))


class Reference:
    """The real images: features and summaries of them are computed once, when they are first needed.

    Args:
        images: those that samples are compared with; for memorization, those that the model was trained on.
        held_out: images that it was not trained on.
    """

    def __init__(self, measure: Measure, images: ImageSet, held_out: ImageSet | None = None):
        self.measure, self.images, self.held_out = measure, images, held_out
        self._features: dict[str, Features] = {}
        self._summaries: dict[tuple[str, str], np.ndarray] = {}

    def features(self, images: ImageSet, ranks: Ranks | None = None) -> Features:
        """Those of a set of real images: what the cache lacks is computed, in parts, so that a stop loses little.

        Args:
            ranks: that share the work; all of them call it.
        """
        if images.fingerprint in self._features:
            return self._features[images.fingerprint]
        ranks = ranks or Ranks()
        spans = [range(at, min(at + CACHED_AT_ONCE, images.count)) for at in range(0, images.count, CACHED_AT_ONCE)]
        title, mine = f"features of {images.name}", list(ranks.share(spans))
        random.Random(os.getpid()).shuffle(mine)  # evaluations of the same images at once take parts from each other
        for span in tqdm(mine, desc=title, unit="part", disable=not ranks.is_main):
            self._cached(images, span)
        ranks.wait()
        parts = [self._cached(images, span) for span in spans]
        names = self.measure.keep
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        self._features[images.fingerprint] = Features(**joined)
        return self._features[images.fingerprint]

    def _cached(self, images: ImageSet, span: range) -> Features:
        return cached_features(
            self.measure.extractor,
            lambda: images.batches(AT_ONCE, span),
            f"{images.fingerprint} {span.start}-{span.stop}",
            keep=self.measure.keep,
        )

    def summary(self, images: ImageSet, metric: Metric) -> np.ndarray:
        """What a metric on pixels keeps of each image, [N, ...]."""
        key = (images.fingerprint, str(metric.summary_home))
        if key not in self._summaries:
            self._summaries[key] = summarize(metric, images.batches(AT_ONCE))
        return self._summaries[key]

    def side(self, images: ImageSet, metric: Metric) -> Any:
        """What a metric reads of a set of real images."""
        return self.summary(images, metric) if "images" in parts_of(metric) else self.features(images)

    def figure(self, metric: Metric, generated: Any) -> Figure:
        """A metric of generated images, given their features, or what `summary` keeps of each."""
        measure, options, real = self.measure, {}, self.images
        if "train" in parts_of(metric):
            assert self.held_out is not None  # `check_counts`
            options = {"train": self.side(self.images, metric), "train_labels": self.images.labels}
            real = self.held_out
        return metric.function(self.side(real, metric), generated, measure.protocol, measure.seed, **options)

    def prepare(self, ranks: Ranks | None = None) -> None:
        """Read all real images, so that one that cannot be read ends the evaluation before anything is sampled.

        Args:
            ranks: that share the work; all of them call it.
        """
        for metric in self.measure.rows.values():
            for images in filter(None, (self.images, self.held_out if "train" in parts_of(metric) else None)):
                if "images" not in parts_of(metric):
                    self.features(images, ranks)
                elif ranks is None or ranks.is_main:
                    self.summary(images, metric)


def summarize(metric: Metric, batches: Iterable) -> np.ndarray:
    """What a metric on pixels keeps of each image, [N, ...], batch by batch."""
    summary = metric.summary
    assert summary is not None  # a metric that reads images has one
    return np.concatenate([summary(batch) for batch in batches])


@dataclass(frozen=True)
class Samples:
    """Images of a model under one sampler, or from elsewhere.

    Args:
        count: how many to evaluate.
        labels: how they were sampled, for the report and the record: sampler, steps, network calls, seed.
        store: where they are kept; None for `images`.
        settings: what determines the images of the store.
        sample: indices -> uint8 [n, C, H, W].
        images: those from elsewhere.
        batch_size: sampled at once.
        summaries: what metrics on pixels keep of the images, once it was computed.
    """

    count: int
    labels: dict[str, Any] = field(default_factory=dict)
    store: SampleStore | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    sample: Callable[[range], np.ndarray] | None = None
    images: ImageSet | None = None
    batch_size: int = 64
    summaries: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def title(self) -> str:
        """A short name."""
        if "sampler" not in self.labels:
            return "images"
        std = self.labels.get("ema_std")  # of the average of the weights; 0 is the run's own
        average = {None: "", 0.0: "the run's weights, "}.get(std, f"EMA {std}, ")
        return f"{average}{self.labels['sampler']}, {self.labels['steps']} steps"

    def batches(self) -> Iterable:
        """The images in order, uint8 [n, C, H, W]."""
        if self.images is not None:
            return self.images.batches(AT_ONCE)
        assert self.store is not None
        return self.store.batches(self.count)

    def summary(self, metric: Metric) -> np.ndarray:
        """What a metric on pixels keeps of each image, [N, ...]; metrics and plots that keep the same share it."""
        key = str(metric.summary_home)
        if key not in self.summaries:
            self.summaries[key] = summarize(metric, self.batches())
        return self.summaries[key]

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """Some of the images, uint8 [n, C, H, W]."""
        if self.images is not None:
            return self.images.read(indices)
        assert self.store is not None
        return self.store.take(indices)

    def features(self, measure: Measure, ranks: Ranks) -> Features:
        """Their features; what is missing is sampled first. All ranks call it, and all get them."""
        if self.images is not None and not measure.extractor.provides:
            return measure.extractor(range(self.count))
        if self.images is not None:
            progress, total = f"features of {self.images.name}", self.count
            return extract(measure.extractor, self.batches(), keep=measure.keep, progress=progress, total=total)
        assert self.store is not None
        assert self.sample is not None
        if ranks.is_main:
            self.store.open(self.settings)
        fill(self.store, self.count, self.batch_size, self.sample, ranks, f"sampling ({self.title})")
        return stored_features(self.store, self.count, measure.extractor, measure.keep, ranks)


def check_counts(measure: Measure, real: int, held_out: int | None, samples: int) -> None:
    """Raise DataError for fewer images than a metric requires."""
    for name, row in measure.rows.items():
        counts = {"real images": real, "samples": samples}
        if "train" in parts_of(row):
            if held_out is None:
                raise DataError(
                    f"--metrics {name}: requires images that the model was not trained on: --held-out-split"
                )
            counts["held-out images"] = held_out
        for which, count in counts.items():
            least = row.least(measure.protocol)
            if count < least:
                raise DataError(
                    f"--metrics {name}: requires {least:,} {which} or more with --protocol {measure.protocol.name}"
                    f" (got {count:,})"
                )


def figures(reference: Reference, samples: Samples, generated: Features) -> dict[str, Figure]:
    """All figures of one set of samples."""
    found = {}
    for name, row in reference.measure.rows.items():
        ours = samples.summary(row) if "images" in parts_of(row) else generated
        found[name] = reference.figure(row, ours)
    return found


def evaluate(reference: Reference, everything: Sequence[Samples], ranks: Ranks, say: Callable) -> list[dict[str, Any]]:
    """Sample, extract and measure; all ranks call it, and the main one gets the results, one for each of `everything`.

    Args:
        say: a function that shows a line on the main process.

    Returns: for each, how it was sampled, its `samples` and its `figures`, ready for JSON.
    """
    reference.prepare(ranks)
    ranks.wait()
    results = []
    for samples in everything:
        generated = samples.features(reference.measure, ranks)
        if ranks.is_main:
            say(f"measuring {len(reference.measure.rows)} metrics of {samples.title}")
            found = figures(reference, samples, generated)
            shown = {name: asdict(figure) for name, figure in found.items()}
            results.append({"title": samples.title, **samples.labels, "samples": samples.count, "figures": shown})
    ranks.wait()
    return results


def stamp(reference: Reference, samples: int | None) -> dict[str, Any]:
    """What figures must have in common to be compared."""
    measure, images, held_out = reference.measure, reference.images, reference.held_out
    return {
        "protocol": measure.protocol.name,
        "features": measure.extractor.name or None,
        "features_fingerprint": measure.extractor.fingerprint or None,
        "dataset": images.name,
        "dataset_fingerprint": images.fingerprint,
        "real_images": images.count,
        "held_out_images": held_out.count if held_out else None,
        "held_out_fingerprint": held_out.fingerprint if held_out else None,
        "samples": samples,
        "image": list(images.shape),
    }
