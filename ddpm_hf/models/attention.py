"""The attention kernel of a model that trains on a CPU."""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

PLAIN_POSITIONS = 64  # of an 8×8 feature map


class AttentionBySize:
    """An attention processor for CPUs: plain matrix products for one head over few positions, else the fused kernel.

    Both compute the same function. With several heads or more positions than `PLAIN_POSITIONS` the products write
    score matrices that no longer fit into a cache, and take up to four times as long (`benchmarks/attention.py`). The
    choice follows from the shape alone, so that a resumed run makes the same one.
    """

    def __init__(self) -> None:
        self.plain, self.fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [N, C, H, W] or [N, L, C] -> the same shape."""
        positions = hidden_states[0, 0].numel() if hidden_states.ndim == 4 else hidden_states.shape[1]
        process = self.plain if attn.heads == 1 and positions <= PLAIN_POSITIONS else self.fused
        return process(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def choose_attention(model: torch.nn.Module) -> None:
    """Attention by `AttentionBySize` in every layer, for a model that trains on a CPU. Nothing of it is saved."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttentionBySize())
