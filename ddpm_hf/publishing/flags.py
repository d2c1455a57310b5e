"""Flags of access to the Hub, and of what is saved and published."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..common.arguments import FREE, HfArg, Need, check_license, synonyms
from ..common.errors import UsageError
from ..evaluation.metrics import METRICS

HELD_OUT_LOSS = "validation_loss"
VARIANTS = ("fp16", "non_ema")  # of the weights, in addition to the pipeline's
USES_OF_THE_TOKEN = (
    "push_to_hub", "dataset_name", "pretrained_model_name_or_path", "model_config_name_or_path", "vae_name_or_path",
    "text_encoder_name_or_path",
)  # fmt: skip

# What other programs call these flags
ACCESS = dict.fromkeys(("token", "hf_token", "use_auth_token"), "--hub_token")
PUBLISHING = synonyms("""
--hub_model_id: repo repo_id repository hub_repo hub_repo_id hub_id push_to_hub_model_id
--hub_private_repo: private private_repo hub_private
--hub_license: license
--push_to_hub: push upload hub
--save_variants fp16: save_fp16 save_half
""")


@dataclass
class PublishingFlags:
    """Flags of what is saved and published."""

    title: ClassVar[str] = "Hugging Face Hub"
    meanings: ClassVar[dict[str, str]] = PUBLISHING
    needs: ClassVar[dict[str, Need]] = dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_revision"),
        Need(lambda run: run.push_to_hub, "uploads nothing without --push_to_hub"),
    ) | {
        "hub_best_metric": Need(
            lambda run: run.hub_strategy == "best", "has no effect with --hub_strategy {hub_strategy}"
        )
    }

    push_to_hub: bool = HfArg(resume=FREE, default=False, help="Upload the pipeline and its card when training ends.")
    hub_model_id: str | None = HfArg(
        resume=FREE,
        default=None,
        help="user/name of the repository; by default the output folder's name, under your user.",
    )
    hub_private_repo: bool = HfArg(resume=FREE, default=False, help="Make the repository private.")
    hub_strategy: Literal["end", "checkpoint", "best"] = HfArg(
        resume=FREE,
        default="end",
        help="What is saved and uploaded: the model at the end; also at each checkpoint, in the background; or the"
        " best one by --hub_best_metric.",
    )
    hub_best_metric: str = HfArg(
        resume=FREE,
        default=HELD_OUT_LOSS,
        help="What --hub_strategy best compares: validation_loss, at checkpoints (requires --validation_steps), or one"
        " of --evaluation_metrics, at evaluations.",
    )
    hub_revision: str | None = HfArg(
        resume=FREE,
        default=None,
        help="Tag of the last upload: from_pretrained(..., revision=TAG) always loads it.",
    )
    hub_license: str | None = HfArg(
        resume=FREE, default=None, help="License that the model card names, such as apache-2.0."
    )
    save_variants: list[str] = HfArg(  # noqa: RUF009
        resume=FREE,
        default_factory=list,
        help="Additional weights, for from_pretrained(..., variant=NAME): fp16; with --use_ema also"
        " non_ema, the weights without averaging.",
    )

    def check(self, flags: Any) -> None:
        """Raise UsageError for an unknown variant or license, and for a strategy that the other flags rule out."""
        check_license("hub_license", self.hub_license)
        unknown = [name for name in self.save_variants if name not in VARIANTS]
        if unknown:
            raise UsageError(f"--save_variants: each must be one of {', '.join(VARIANTS)} (got {unknown[0]!r})")
        if "non_ema" in self.save_variants and not flags.use_ema:
            raise UsageError("--save_variants non_ema requires --use_ema; without it there is only one set of weights")
        by_loss = self.hub_best_metric == HELD_OUT_LOSS
        evaluated = flags.evaluation_metrics if flags.evaluation_epochs else []
        if self.hub_strategy == "best" and not by_loss and self.hub_best_metric not in evaluated:
            raise UsageError(
                f"--hub_best_metric {self.hub_best_metric}: must be {HELD_OUT_LOSS}, or one of"
                " --evaluation_metrics with --evaluation_epochs"
            )
        if self.hub_strategy == "best" and not by_loss and METRICS[self.hub_best_metric].lower_is_better is None:
            raise UsageError(f"--hub_best_metric {self.hub_best_metric}: neither more nor less of it is better")
        if (
            self.hub_strategy == "best"
            and by_loss
            and (not flags.validation_steps or flags.checkpointing_steps % flags.validation_steps)
        ):
            raise UsageError(
                "--hub_strategy best requires the held-out loss of each checkpoint: give --validation_steps, of which"
                f" --checkpointing_steps {flags.checkpointing_steps} is a multiple"
            )


@dataclass
class HubFlags:
    """Flags of access to the Hub."""

    title: ClassVar[str] = "Hugging Face Hub"
    meanings: ClassVar[dict[str, str]] = ACCESS
    needs: ClassVar[dict[str, Need]] = {
        "hub_token": Need(
            lambda run: any(getattr(run, name, None) for name in USES_OF_THE_TOKEN),
            "has no effect: nothing is read from the Hub, as by --dataset_name, or uploaded to it",
        )
    }

    hub_token: str | None = HfArg(
        resume=FREE,
        default=None,
        help="Token for private datasets and models, and for uploads; by default your login (hf auth login).",
    )
