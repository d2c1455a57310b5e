"""Keyed randomness: random numbers are functions of the seed and of their purpose, without generator state.

They do not depend on earlier random numbers. A run that resumes at any step continues bit for bit, two ranks train as
one with twice the batch, and sampling in between changes nothing. The numbers come from Philox, a counter-based
generator (Salmon et al. 2011): the counter identifies the purpose, so there is no state to save.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

# The purposes, one stream each: no two streams share numbers. Append new ones at the end.
PURPOSES = (
    "order", "dropout", "noise", "timestep", "class_dropout", "validation_noise", "validation_timestep", "sample",
    "posterior", "validation_posterior", "caption_dropout", "noise_offset", "input_perturbation", "likelihood_noise",
    "likelihood_timestep", "fit_noise", "conditioning_noise", "validation_conditioning_noise", "conditioning_level",
    "validation_conditioning_level", "conditioning_mask", "validation_conditioning_mask",
)  # fmt: skip
STREAMS = {name: number for number, name in enumerate(PURPOSES)}
# The second word of the key: purposes that need more than a block of 4 numbers have a generator each.
BLOCKS = 0
GENERATORS = {
    "epoch_order": 1, "augmentation": 2, "split": 3, "balanced_order": 4, "subset": 5, "bucketed_order": 6,
    "conditions": 7,
}  # fmt: skip


# SplitMix64's constants as signed numbers: its increment; the shifts and factors of its mixing
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def keyed_blocks(seed: int, stream: str, step: int, first: int, count: int) -> np.ndarray:
    """Random uint64 [count, 4]: row i is a function of (seed, stream, step, first + i)."""
    counter = [first, step, STREAMS[stream], 0]
    return np.random.Philox(key=[seed, BLOCKS], counter=counter).random_raw(4 * count).reshape(count, 4)


def keyed_generator(seed: int, purpose: str, *counter: int) -> np.random.Generator:
    """A generator for a purpose in `GENERATORS`, keyed by up to four more numbers."""
    words = [*counter, 0, 0, 0, 0][:4]
    return np.random.Generator(np.random.Philox(key=[seed, GENERATORS[purpose]], counter=words))


def keyed_seed(seed: int, stream: str, step: int, index: int = 0) -> int:
    """One 63-bit seed for a generator, keyed by (seed, stream, step, index)."""
    return int(keyed_blocks(seed, stream, step, index, 1)[0, 0] >> np.uint64(1))


def counted_normal(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers of which row i depends on `seeds[i]` alone, computed together on the seeds' device.

    Element pairs are Box and Muller's transform (1958) of SplitMix64's output (Steele et al. 2014): the seed plus a
    multiple of the golden ratio, mixed.

    Args:
        seeds: LongTensor [N], of any value.
        shape: of a row.

    Returns: float32 [N, *shape].
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    state = seeds[:, None] + torch.arange(1, pairs + 1, device=seeds.device) * GOLDEN  # wraps, as in C
    for shift, factor in MIXING:
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor  # the mask makes the shift a logical one
    state = state ^ (state >> 31 & (1 << 33) - 1)
    radius = torch.sqrt(-2 * torch.log(((state >> 32 & 0xFFFFFFFF) + 1).float() * 2.0**-32))
    angle = (state & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return normal[:, :count].reshape(len(seeds), *shape)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of the CPU on a device, without waiting for a GPU to have taken it."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def seed_global(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout reads: the CPU's and the device's.

    `torch.manual_seed` seeds those of every kind of device, and formats a traceback for each kind that is not there:
    half a millisecond, at each step.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class StepKeys(NamedTuple):
    """The randomness of a batch: samples `first`.. of the global batch of an optimizer step."""

    seed: int
    step: int
    first: int
    count: int  # type: ignore[assignment]  # tuple.count is not needed here
    validation: bool = False  # the same numbers at every validation, from streams of their own
    valid: int | None = None  # the number of real samples; the rest is padding on a rank without samples (None: all)

    def _stream(self, name: str) -> str:
        return f"validation_{name}" if self.validation else name

    def uniform(self, name: str) -> torch.Tensor:
        """Uniform numbers in [0, 1), one per sample: float64 [count], on the CPU."""
        blocks = keyed_blocks(self.seed, self._stream(name), self.step, self.first, self.count)
        return torch.from_numpy((blocks[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal_like(self, reference: torch.Tensor, name: str = "noise") -> torch.Tensor:
        """Standard normal noise of the reference's shape [count, ...], dtype and device."""
        blocks = keyed_blocks(self.seed, self._stream(name), self.step, self.first, self.count)
        if reference.is_cuda:  # where a launch for each sample would take longer than the noise
            seeds = to_device(torch.from_numpy(blocks[:, 0].view(np.int64)), reference.device)
            return counted_normal(seeds, reference.shape[1:]).to(reference.dtype)
        generator = torch.Generator(reference.device)
        # contiguous, whatever the reference's memory layout, which would change the order of the numbers
        noise = torch.empty(reference.shape, dtype=reference.dtype, device=reference.device)
        for sample, seed in zip(noise, (blocks[:, 0] >> np.uint64(1)).tolist()):
            sample.normal_(generator=generator.manual_seed(seed))
        return noise
