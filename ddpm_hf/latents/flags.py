"""Flags of the latents and of the autoencoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..common.arguments import FIXED, FREE, HfArg, Need, names_elsewhere
from ..common.errors import UsageError

LATENTS = names_elsewhere("""
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

    def cache_folder(self) -> Path:
        """Where that is kept: below --cache_dir, for all runs, or in the run's folder."""
        return Path(self.cache_dir) / "ddpm_hf" if self.cache_dir else Path(self.output_dir) / "cache"


AUTOENCODER_FOLDER = "autoencoder"  # of its run, within that of the model that it is for


@dataclass
class AutoencoderFlags(LatentFlags):
    """Flags of the autoencoder, where a script trains one."""

    title: ClassVar[str] = "Autoencoder"
    needs: ClassVar[dict[str, Need]] = dict.fromkeys(
        ("vae_train_steps", "vae_learning_rate", "vae_kl_weight", "vae_latent_channels", "vae_widths"),
        Need(
            lambda run: not (run.vae_name_or_path or run.pretrained_model_name_or_path),
            "has no effect: no autoencoder is trained, that of --vae_name_or_path or of the checkpoint is used",
        ),
    )

    vae_train_steps: int = HfArg(
        resume=FIXED, default=1500, help="Steps to train a new autoencoder for, where there is none."
    )
    vae_learning_rate: float = HfArg(resume=FIXED, default=1e-3, help="Its learning rate, decaying as a cosine.")
    vae_kl_weight: float = HfArg(
        resume=FIXED, default=1e-4, help="Weight of the latents' KL to a unit Gaussian, added to the L1 loss."
    )
    vae_latent_channels: int = HfArg(resume=FIXED, default=4, help="Channels of its latents.")
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

    def check_autoencoder(self) -> None:
        """Raise UsageError for a value out of range."""
        self.widths()
        for name in ("vae_train_steps", "vae_latent_channels", "vae_learning_rate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} {getattr(self, name)}: must be more than 0")
        if self.vae_latent_channels > 1024:
            raise UsageError(f"--vae_latent_channels {self.vae_latent_channels}: must be 1024 or less")
        if not self.vae_kl_weight >= 0:
            raise UsageError(f"--vae_kl_weight {self.vae_kl_weight}: must be 0 or more")
