"""A classifier of `ddpm-hf train-classifier`, at its lowest noise level: features and classes of a small domain."""

from pathlib import Path

import torch

from ...common.errors import DataError, UsageError, readable_load_errors
from ...portable.networks_ddpm_hf import NoisyClassifier
from ..protocols import Protocol
from . import Features
from .network import NetworkExtractor, display_name

CENTRE = 127.5  # 0..255 becomes [-1, 1]


def load(
    argument: str, *, protocol: Protocol, device: torch.device | str, weights: str | None, trust_remote_code: bool
) -> "ClassifierExtractor":
    """The classifier of a folder.

    Raises:
        UsageError: there is none.
    """
    if not Path(argument).is_dir():
        raise UsageError(f"features 'classifier:{argument}': no such folder; train one with ddpm-hf train-classifier")
    try:
        with readable_load_errors(argument):
            network = NoisyClassifier.from_pretrained(argument, use_safetensors=True)
    except ValueError as error:
        raise UsageError(f"features 'classifier:{argument}': {error}") from error
    return ClassifierExtractor(display_name("classifier", argument), network, protocol, device)


class ClassifierExtractor(NetworkExtractor):
    """The classifier's pooled features, which its last layer reads, and its logits."""

    def __init__(self, name: str, network: NoisyClassifier, protocol: Protocol, device: torch.device | str = "cpu"):
        self.channels = network.config.unet["in_channels"]
        size = network.config.unet["sample_size"]

        def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
            pool = network.features(x[:, : self.channels], torch.zeros(1, dtype=torch.long))  # [N, D]
            return {"pool": pool, "logits": network.head(pool)}

        super().__init__(
            name,
            forward,
            network,
            provides=("pool", "logits"),
            size=(size, size) if isinstance(size, int) else tuple(size),
            resize=protocol.resize,
            mean=CENTRE,
            deviation=CENTRE,
            device=device,
            settings=[sorted(network.config.unet.items(), key=str)],
        )

    def __call__(self, images: torch.Tensor) -> Features:
        """Images uint8 [N, C, H, W]; colours are refused where the classifier reads grey images.

        Raises:
            DataError: colours for a classifier of grey images.
        """
        if self.channels == 1 and images.shape[1] != 1:
            raise DataError(f"features {self.name!r} are of grey images, and these have {images.shape[1]} channels")
        return super().__call__(images)
