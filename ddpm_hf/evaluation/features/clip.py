"""CLIP's image encoder (Radford et al. 2021)."""

import torch

from ..protocols import Protocol
from .network import NetworkExtractor, display_name
from .pretrained import load_pretrained

MEAN = (122.7709383, 116.7460125, 104.09373615)  # of CLIP's training images, in 0..255
DEVIATION = (68.5005327, 66.6321579, 70.32316275)


def load(
    argument: str | None,
    *,
    protocol: Protocol,
    device: torch.device | str,
    weights: str | None,
    trust_remote_code: bool,
) -> NetworkExtractor:
    """The network, of a local folder or of the Hub; the protocol chooses the default and the layer."""
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

    name = argument or protocol.clip_model
    model_class = CLIPVisionModelWithProjection if protocol.clip_projection else CLIPVisionModel
    network = load_pretrained(model_class, name, "clip" if argument is None else f"clip:{name}")

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        output = network(x)
        return {"pool": output.image_embeds if protocol.clip_projection else output.pooler_output}  # [N, D]

    config = network.config
    return NetworkExtractor(
        display_name("clip", argument),
        forward,
        network,
        size=(config.image_size, config.image_size),
        resize=protocol.resize,
        mean=MEAN,
        deviation=DEVIATION,
        device=device,
        settings=[protocol.clip_projection, config.num_attention_heads, config.hidden_act],
    )
