"""Attention by plain matrix products against the fused kernel, on a CPU: forward and backward pass of one layer.

For each number of heads, width and resolution: the median, over rounds in turn, of the fused kernel's time over the
plain one's; above 1 the plain one is faster. `AttentionBySize`
(ddpm_hf/portable/acceleration_ddpm_hf.py) takes its rule from this table.
"""

import argparse
import statistics
import time

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0


def seconds(layer: Attention, x: torch.Tensor, bf16: bool) -> float:
    """The time of a forward and a backward pass."""
    begin = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = layer(x).float().square().mean()
    loss.backward()
    return time.perf_counter() - begin


def ratio(heads: int, width: int, side: int, batch: int, bf16: bool, rounds: int) -> float:
    """The fused kernel's time over the plain products', median over the rounds."""
    torch.manual_seed(0)
    layers = []
    for processor in (AttnProcessor2_0(), AttnProcessor()):
        layer = Attention(
            width, heads=heads, dim_head=width // heads, norm_num_groups=8, residual_connection=True, bias=True,
            upcast_softmax=True, processor=processor,
        )  # fmt: skip
        layers.append(layer)
    x = torch.randn(batch, width, side, side, requires_grad=True)
    for layer in layers:
        seconds(layer, x, bf16)
    pairs = [[seconds(layer, x, bf16) for layer in layers] for _ in range(rounds)]
    return statistics.median(fused / plain for fused, plain in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, batch {options.batch}; fused time / plain time, fp32 and bf16")
    for side in (4, 8, 16, 32):
        for width, heads in ((64, 1), (64, 2), (64, 8), (128, 1), (128, 4), (128, 16), (256, 1), (256, 4)):
            batch = options.batch if side < 32 else max(1, options.batch // 8)
            found = [ratio(heads, width, side, batch, bf16, options.rounds) for bf16 in (False, True)]
            print(f"{side:>3}×{side:<3} width {width:<4} heads {heads:<3} {found[0]:6.2f} {found[1]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
