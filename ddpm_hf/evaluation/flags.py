"""Flags of evaluations during training."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..common.arguments import FREE, NOT_NEGATIVE, POSITIVE, HfArg, Need, synonyms
from ..common.errors import UsageError
from ..inference.samplers import UNFITTED
from .metrics import METRICS
from .protocols import PROTOCOLS

EVALUATIONS = synonyms("""
--evaluation_epochs: eval_epochs eval_every fid_every evaluation_interval compute_fid
--evaluation_samples: num_eval_samples fid_samples num_fid_samples eval_num_samples
--evaluation_metrics: eval_metrics
--evaluation_features: feature_extractor
""")
NEEDED = ("samples", "metrics", "features", "features_weights", "protocol", "sampler", "steps")


@dataclass
class EvaluationFlags:
    """Flags of figures that are computed during training."""

    title: ClassVar[str] = "Evaluation"
    meanings: ClassVar[dict[str, str]] = EVALUATIONS
    needs: ClassVar[dict[str, Need]] = dict.fromkeys(
        (f"evaluation_{name}" for name in NEEDED),
        Need(lambda run: run.evaluation_epochs, "has no effect without --evaluation_epochs"),
    )

    evaluation_epochs: int = HfArg(
        range=NOT_NEGATIVE,
        resume=FREE,
        default=0,
        help="Epochs between evaluations of samples against the training images (metrics.jsonl, the tracker and the"
        " card); each samples from the same noise. 0 turns them off.",
    )
    evaluation_samples: int = HfArg(range=POSITIVE, resume=FREE, default=1000, help="Samples of an evaluation.")
    evaluation_metrics: list[str] = HfArg(  # noqa: RUF009
        resume=FREE,
        default_factory=lambda: ["fid", "mind"],
        help=f"{', '.join(METRICS)}.",
    )
    evaluation_features: str = HfArg(
        resume=FREE, default="inception", help="The network whose features are compared, as in `ddpm-hf evaluate`."
    )
    evaluation_features_weights: str | None = HfArg(
        resume=FREE, default=None, help="A file of that network's weights."
    )
    evaluation_protocol: str = HfArg(
        resume=FREE, default="adm", help=f"The tool whose conventions are followed: {', '.join(PROTOCOLS)}."
    )
    evaluation_sampler: str = HfArg(
        resume=FREE, default="ddim", help=f"The sampler of evaluations: {', '.join(UNFITTED)}."
    )
    evaluation_steps: int | None = HfArg(
        range=POSITIVE, resume=FREE, default=None, help="Its steps; by default the sampler's usual number."
    )

    def check(self, flags: Any) -> None:
        """Raise UsageError for an unknown name, or for data that is not there twice."""
        # with commas too, as `ddpm-hf evaluate --metrics` takes them
        self.evaluation_metrics = [name for given in self.evaluation_metrics for name in given.split(",") if name]
        names: dict[str, tuple[list[str], Iterable[str]]] = {
            "evaluation_metrics": (self.evaluation_metrics, METRICS),
            "evaluation_protocol": ([self.evaluation_protocol], PROTOCOLS),
            "evaluation_sampler": ([self.evaluation_sampler], UNFITTED),
        }
        for flag, (given, known) in names.items():
            unknown = [name for name in given if name not in known]
            if unknown:
                raise UsageError(f"--{flag} {unknown[0]}: must be one of {', '.join(known)}")
        if self.evaluation_epochs and not self.evaluation_metrics:
            raise UsageError("--evaluation_metrics: name one, or leave --evaluation_epochs out")
        if self.evaluation_epochs and flags.streaming:
            raise UsageError("--evaluation_epochs: images are compared with all of the dataset; leave --streaming out")
        steps = getattr(flags, "ddpm_num_steps", None)
        if self.evaluation_steps and steps and self.evaluation_steps > steps:
            raise UsageError(f"--evaluation_steps {self.evaluation_steps}: the model has {steps} timesteps")
