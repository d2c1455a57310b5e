"""Flags of the latents and of the autoencoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..common.arguments import FIXED, FREE, NOT_NEGATIVE, POSITIVE, HfArg, Need, synonyms
from ..common.errors import UsageError

LATENTS = synonyms("""
--vae_name_or_path: vae autoencoder vae_path first_stage pretrained_vae_model_name_or_path
--cache_latents: precompute_latents latent_cache
""")


@dataclass
class LatentFlags:
    """Flags of the latents."""

    title: ClassVar[str] = "Latents"
    meanings: ClassVar[dict[str, str]] = LATENTS

    vae_name_or_path: str | None = HfArg(
        resume=FIXED,
        default=None,
        help="An AutoencoderKL, or a pipeline with one, on the Hub or on disk: diffuse in its latents.",
    )
    cache_latents: bool = HfArg(
        resume=FREE,
        default=False,
        help="Encode images, and captions where the text encoder is frozen, once and for all.",
    )

    def check(self, flags: Any) -> None:
        """Raise UsageError for latents that nothing computes, or that are never complete."""
        autoencoder = self.vae_name_or_path or hasattr(flags, "vae_train_steps")  # which trains one
        if self.cache_latents and (flags.streaming or not autoencoder):
            raise UsageError("--cache_latents needs --vae_name_or_path, and a dataset that is not a stream")


def cache_folder(cache_dir: str | None, output_dir: str) -> Path:
    """Where encodings are kept: below --cache_dir, for all runs, or in the run's folder."""
    return Path(cache_dir) / "ddpm_hf" if cache_dir else Path(output_dir) / "cache"


@dataclass
class AutoencoderFlags:
    """Flags of the autoencoder, where a script trains one."""

    title: ClassVar[str] = "Autoencoder"
    needs: ClassVar[dict[str, Need]] = {
        **dict.fromkeys(
            ("vae_train_steps", "vae_learning_rate", "vae_kl_weight", "vae_latent_channels", "vae_widths"),
            Need(
                lambda run: not (run.vae_name_or_path or run.pretrained_model_name_or_path),
                "has no effect: no autoencoder is trained, that of --vae_name_or_path or of the checkpoint is used",
            ),
        ),
        "eval_batch_size": Need(
            lambda run: True, "is also the batch in which a new autoencoder's latents are measured"
        ),
    }

    vae_train_steps: int = HfArg(
        range=POSITIVE, resume=FIXED, default=1500, help="Steps to train a new autoencoder for, where there is none."
    )
    vae_learning_rate: float = HfArg(
        range=POSITIVE, resume=FIXED, default=1e-3, help="Its learning rate, decaying as a cosine."
    )
    vae_kl_weight: float = HfArg(
        range=NOT_NEGATIVE,
        resume=FIXED,
        default=1e-4,
        help="Weight of the latents' KL to a unit Gaussian, added to the L1 loss.",
    )
    vae_latent_channels: int = HfArg(range=POSITIVE, resume=FIXED, default=4, help="Channels of its latents.")
    vae_widths: str = HfArg(
        resume=FIXED, default="16,32,64", help="Channels at each of its levels; each but the first halves."
    )

    def widths(self) -> tuple[int, ...]:
        """The numbers of --vae_widths."""
        parts = self.vae_widths.split(",")
        widths = [int(part) if part.strip().isdecimal() and len(part) < 6 else 0 for part in parts]
        if len(widths) > 8 or not all(0 < width <= 4096 and width % 8 == 0 for width in widths):
            raise UsageError(
                f"--vae_widths {self.vae_widths}: give up to 8 multiples of 8, each up to 4096, such as 16,32,64"
            )
        return tuple(widths)

    def check(self, flags: Any) -> None:
        """Raise UsageError for a value out of range."""
        self.widths()
        if self.vae_latent_channels > 1024:
            raise UsageError(f"--vae_latent_channels {self.vae_latent_channels}: must be 1024 or less")
