"""Figures of a model while it is trained: the same noise and conditions each time, so that a curve shows the model."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..common.errors import DataError, UsageError, one_line
from ..common.image_sets import ImageSet
from ..common.randomness import keyed_generator
from ..inference.samplers import swapped
from ..training.evaluations import Evaluation
from ..training.reporting import shows_bars
from ..training.run import Run
from ..training.stopping import InterruptedSamplingError
from .evaluate import (
    Measure,
    NoFeatures,
    Reference,
    check_counts,
    check_metrics,
    parts_of,
    reads_pixels_alone,
    summarize,
)
from .features import Extractor, Features, load_extractor
from .flags import EvaluationFlags
from .protocols import PROTOCOLS
from .ranks import Ranks, ranks_of
from .sampling import AT_ONCE, as_bytes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class TrainingEvaluation:
    """Samples a model and compares them with its training images.

    Args:
        reference: these images, and how they are compared.
        requests: what each sample is to show, a class or a text; or how many samples there are.
        seed: of the run; sample i depends on it and on i alone.
        epochs: between evaluations.
        sampler: of `SAMPLERS`.
        steps: of the sampler; None is its usual number.
        batch_size: samples at once.
    """

    reference: Reference
    requests: int | Sequence[Any]
    seed: int
    epochs: int
    sampler: str
    steps: int | None
    batch_size: int

    @property
    def count(self) -> int:
        """How many samples there are."""
        return self.requests if isinstance(self.requests, int) else len(self.requests)

    @property
    def title(self) -> str:
        """What an evaluation does, for people."""
        steps = f", {self.steps} steps" if self.steps else ""
        return f"evaluating {self.count:,} samples ({self.sampler}{steps})"

    def record(self) -> dict[str, Any]:
        """What the figures were computed from, for the run's record and its card."""
        measure = self.reference.measure
        steps = f", {self.steps} steps" if self.steps else ""
        settings = f"{self.sampler}{steps}; {measure.conventions}"
        return {"samples": self.count, "settings": settings, "dataset": self.reference.images.name}

    def during(self, run: Run, pipeline_of: Callable[[torch.nn.Module], "DiffusionPipeline"]) -> Evaluation:
        """The evaluation for the training loop.

        Args:
            pipeline_of: the model -> the pipeline that samples from it.
        """
        ranks, stops = ranks_of(run.accelerator), (InterruptedSamplingError,)

        def measure(model: torch.nn.Module) -> dict[str, float]:
            with run.accelerator.autocast():
                return self.measure(pipeline_of(model), ranks, stops, shows_bars() and ranks.is_main)

        return Evaluation(measure, self.epochs, self.title)

    def measure(
        self,
        pipeline: "DiffusionPipeline",
        ranks: Ranks,
        stops: tuple[type[Exception], ...] = (),
        bar: bool = False,
    ) -> dict[str, float]:
        """The figures by their names, with the ends of their intervals; all ranks call it, and all get them.

        Args:
            pipeline: with the model's weights of this step, in eval mode, on its device.
            stops: exceptions that ask to stop; if one rank has one, all raise it.
            bar: show a progress bar.

        Raises:
            Exception: what sampling raised, on the rank where it did; on the others a RuntimeError that says so.
            DataError: samples of which a metric has no figure, on all ranks.
        """
        pipeline.set_progress_bar_config(disable=True)
        starts = ranks.share(range(0, self.count, self.batch_size))
        parts, fault = [], None  # this rank's
        try:
            for first in tqdm(starts, desc=self.title, leave=False, disable=not bar):
                parts.append(self._part(pipeline, range(first, min(first + self.batch_size, self.count))))
        except Exception as error:  # told to the other ranks, which wait for this one's part
            fault = error
        gathered = ranks.gather((fault and (isinstance(fault, stops), one_line(fault)), parts))
        faults = [one for one, _ in gathered if one is not None]
        if faults:
            stopped, reason = faults[0]
            raise fault or (stops[0](reason) if stopped else RuntimeError(f"another process: {reason}"))
        figures, impossible = dict[str, float](), None
        if ranks.is_main:
            try:
                figures = self._figures([part for _, rank in gathered for part in rank])
            except DataError as error:
                impossible = str(error)
        figures, impossible = ranks.gather((figures, impossible))[0]
        if impossible is not None:
            raise DataError(impossible)
        return figures

    def _part(self, pipeline: "DiffusionPipeline", indices: range) -> tuple[int, Features, dict[str, np.ndarray]]:
        """Of some samples, the first index, the features, and what metrics on pixels keep."""
        from ..inference.studio import keyed_generators

        measure = self.reference.measure
        asked = len(indices) if isinstance(self.requests, int) else [self.requests[index] for index in indices]
        with swapped(pipeline, self.sampler) as usual:
            steps = self.steps or usual or pipeline.scheduler.config.num_train_timesteps
            generators = keyed_generators(pipeline.device, self.seed, indices)
            output = pipeline(asked, generator=generators, num_inference_steps=steps, output_type="pt")
        images = torch.from_numpy(as_bytes(output.images.float()))
        features = [measure.extractor(part) for part in images.split(AT_ONCE)]
        columns = {name: np.concatenate([getattr(one, name) for one in features]) for name in measure.keep}
        on_pixels = {str(row.summary_home): row for row in measure.rows.values() if "images" in parts_of(row)}
        pixels = {home: summarize(row, [images]) for home, row in on_pixels.items()}
        return indices.start, Features(**columns), pixels

    def _figures(self, parts: list[tuple[int, Features, dict[str, np.ndarray]]]) -> dict[str, float]:
        parts = sorted(parts, key=lambda part: part[0])
        reference, measure = self.reference, self.reference.measure
        columns = {name: np.concatenate([getattr(part[1], name) for part in parts]) for name in measure.keep}
        features, values = Features(**columns), dict[str, float]()
        for name, row in measure.rows.items():
            ours = features
            if "images" in parts_of(row):
                ours = np.concatenate([part[2][str(row.summary_home)] for part in parts])
            figure = reference.figure(row, ours)
            values |= {f"evaluation_{name}": figure.value}
            values |= {f"evaluation_{name}_low": figure.low, f"evaluation_{name}_high": figure.high}
        return values


def evaluation_of(
    flags: EvaluationFlags, run: Run, images: Callable[[], ImageSet], held_out: Callable[[], ImageSet] | None
) -> TrainingEvaluation | None:
    """What `--evaluation_epochs` asks for, checked; None if it asks for nothing. All ranks call it.

    The samples show the classes or captions of the training images, as often as there.

    Args:
        images: reads those to train on.
        held_out: reads those held out; None if there are none.

    Raises:
        ValueError: an unknown metric or network, weights that are missing, too few images, or ones that the network
            does not read.
    """
    if not flags.evaluation_epochs:
        return None
    if flags.evaluation_features.startswith("torchscript:"):
        raise UsageError(
            f"--evaluation_features {flags.evaluation_features}: a TorchScript file is a program; give another network"
            " here, and this one to `ddpm-hf evaluate --trust-remote-code`"
        )
    protocol, count, reference = PROTOCOLS[flags.evaluation_protocol], flags.evaluation_samples, images()
    try:
        weights = flags.evaluation_features_weights
        extractor: Extractor = NoFeatures()
        if not reads_pixels_alone(flags.evaluation_metrics):
            extractor = load_extractor(
                flags.evaluation_features, protocol=protocol, device=run.device, weights=weights
            )
        measure = Measure(check_metrics(flags.evaluation_metrics, extractor), extractor, protocol, run.seed)
        with_train = [name for name, row in measure.rows.items() if "train" in parts_of(row)]
        if with_train and held_out is None:
            raise UsageError(f"--metrics {with_train[0]}: requires held-out images, as by --validation_steps")
        others = held_out() if with_train and held_out is not None else None
        check_counts(measure, reference.count, None if others is None else others.count, count)
        extractor(torch.from_numpy(reference.read(range(1))))  # now, not in the first evaluation
    except ValueError as error:  # in the words of `ddpm-hf evaluate`
        raise UsageError(re.sub("--(metrics|features|protocol)", r"--evaluation_\1", str(error))) from error
    shown = reference.captions if reference.captions is not None else reference.labels
    requests: int | list[Any] = count
    if shown is not None:
        order = keyed_generator(run.seed, "conditions").permutation(len(shown))
        chosen = [shown[order[index % len(order)]] for index in range(count)]
        requests = [one if isinstance(one, str) else int(one) for one in chosen]
    return TrainingEvaluation(
        Reference(measure, reference, others),
        requests,
        run.seed,
        flags.evaluation_epochs,
        flags.evaluation_sampler,
        flags.evaluation_steps,
        run.flags.eval_batch_size,
    )
