"""Keyed randomness: random numbers are functions of the seed and of their purpose, without generator state.

They do not depend on earlier random numbers. A run that resumes at any step continues bit for bit, two ranks train as
one with twice the batch, and sampling in between changes nothing. The numbers come from Philox, a counter-based
generator (Salmon et al. 2011): the counter identifies the purpose, so there is no state to save.
"""

from typing import NamedTuple

import numpy as np
import torch

# The purposes, one stream each: no two streams share numbers. Append new ones at the end.
PURPOSES = (
    "order", "dropout", "noise", "timestep", "class_dropout", "validation_noise", "validation_timestep", "sample",
    "posterior", "validation_posterior", "caption_dropout", "noise_offset", "input_perturbation",
)  # fmt: skip
STREAMS = {name: number for number, name in enumerate(PURPOSES)}
# The second word of the key: purposes that need more than a block of 4 numbers have a generator each.
BLOCKS = 0
GENERATORS = {
    "epoch_order": 1, "augmentation": 2, "split": 3, "balanced_order": 4, "subset": 5, "bucketed_order": 6,
}  # fmt: skip


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
        generator = torch.Generator(reference.device)
        # contiguous, whatever the reference's memory layout, which would change the order of the numbers
        noise = torch.empty(reference.shape, dtype=reference.dtype, device=reference.device)
        for sample, seed in zip(noise, (blocks[:, 0] >> np.uint64(1)).tolist()):
            sample.normal_(generator=generator.manual_seed(seed))
        return noise
