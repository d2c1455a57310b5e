"""A processor that rounds differently, emulated: `OTHER_ROUNDING=1 pytest` detects tests that compare too exactly.

Kernels choose their code path by the alignment of the weights (safetensors maps a file, so loaded weights lie at other
addresses than new ones) and by the batch size, and then round differently. Whether they do depends on the processor;
this makes every layer do it, by some units in the last place. Equality to the bit must be asserted only where the
same computation is repeated with the same alignment and batch size.
"""

import torch

ROUNDING = 2.0**-24  # half a unit in the last place of float32


def install() -> None:
    """Make the layers' outputs depend, in their last bits, on the alignment of the weights and on the batch size."""
    for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
        kind.forward = _rounding_otherwise(kind.forward)


def _rounding_otherwise(forward):
    def other_forward(self, x, *args, **kwargs):
        output = forward(self, x, *args, **kwargs)
        if self.weight is None or torch.compiler.is_compiling() or output.dtype != torch.float32:
            return output
        units = self.weight.data_ptr() // 4 % 16 + 3 * x.shape[0] % 5
        return output * (1 + units * ROUNDING) if units else output

    return other_forward
