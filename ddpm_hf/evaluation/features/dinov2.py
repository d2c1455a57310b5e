"""DINOv2's class token (Oquab et al. 2023), the features of FD-DINOv2 (Stein et al. 2023)."""

import torch
import torch.nn.functional as F

from ..protocols import Protocol
from .network import NetworkExtractor, display_name
from .pretrained import load_pretrained

MODEL = "facebook/dinov2-large"  # ViT-L/14, 1,024 features
SIDE = 224
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, in 0..255
OFFSET = 0.1  # which the original adds to the number of patches when it interpolates the positions


def load(
    argument: str | None,
    *,
    protocol: Protocol,
    device: torch.device | str,
    weights: str | None,
    trust_remote_code: bool,
) -> NetworkExtractor:
    """The network, of a local folder or of the Hub."""
    from transformers import Dinov2Model

    name = argument or MODEL
    network = load_pretrained(Dinov2Model, name, "dinov2" if argument is None else f"dinov2:{name}")
    resample_positions(network, SIDE // network.config.patch_size)

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pool": network(x).pooler_output}  # the normalized class token, [N, D]

    return NetworkExtractor(
        display_name("dinov2", argument),
        forward,
        network,
        size=(SIDE, SIDE),
        resize=protocol.resize,
        mean=MEAN,
        deviation=DEVIATION,
        device=device,
        settings=[network.config.num_attention_heads, network.config.hidden_act],
    )


@torch.no_grad()
def resample_positions(network: torch.nn.Module, patches: int) -> None:
    """Interpolate the position embeddings as the original code does, which published figures come from.

    It scales by (patches + 0.1) / trained patches; transformers interpolates to the exact size, to other values.

    Args:
        network: a `Dinov2Model`.
        patches: of the images to come, in each direction.
    """
    embeddings = network.embeddings
    positions = embeddings.position_embeddings  # [1, 1 + M·M, D]
    trained = round((positions.shape[1] - 1) ** 0.5)
    if trained == patches:
        return
    grid = positions[:, 1:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2)  # [1, D, M, M]
    scale = (patches + OFFSET) / trained
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")[..., :patches, :patches]
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)  # [1, patches·patches, D]
    embeddings.position_embeddings = torch.nn.Parameter(torch.cat([positions[:, :1], grid], dim=1))
