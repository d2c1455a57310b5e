"""Sample grids during training: drawn by all processes together, the same noise each time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from .data import image_grid
from .saving import save_image
from .training.config import TrainingConfig
from .training.randomness import keyed_seed
from .training.setup import track_image

CHAIN_ROWS, CHAIN_MOMENTS = 8, 10  # of the strip of predictions: images, and moments of each one's chain


def draw_grid(
    sample: Callable[[list[int], list[torch.Generator], int], Any],
    count: int,
    columns: int | None,
    step: int,
    config: TrainingConfig,
    accelerator,
) -> None:
    """Sample `count` images, shared out over the ranks, into one PNG and the tracker; and x̂_0 along some chains.

    An image depends on the seed and its place in the grid alone, so that grids show one model's progress.

    Args:
        sample: (places in the grid, a generator for each, how many frames to keep) -> a pipeline's output.
        columns: of the grid; its chains are those of the rows' first images.
    """
    own = list(range(accelerator.process_index, count, accelerator.num_processes))
    shown = list(range(0, count, columns or 1))[:CHAIN_ROWS]
    drawn = []
    if own:
        seeds = [keyed_seed(config.seed, "sample", 0, index) for index in own]
        generators = [torch.Generator(accelerator.device).manual_seed(seed) for seed in seeds]
        with accelerator.autocast():
            output = sample(own, generators, CHAIN_MOMENTS if set(own) & set(shown) else 0)
        chains = [[frame.prediction[i] for frame in output.frames or []] for i in range(len(own))]
        drawn = list(zip(own, output.images, [chain if i in shown else [] for i, chain in zip(own, chains)]))
    drawn = sorted(gather_object(drawn), key=lambda one: one[0])
    if accelerator.is_main_process:
        images, chains = [image for _, image, _ in drawn], [chain for *_, chain in drawn if chain]
        scale, folder = max(1, 64 // images[0].width), Path(config.output_dir) / "samples"
        grid = image_grid(images, columns, scale=scale)
        save_image(grid, folder / f"step-{step:06d}.png")
        strip = image_grid([image for chain in chains for image in chain], len(chains[0]), scale=scale)
        save_image(strip, folder / f"chain-{step:06d}.png")
        track_image(accelerator, "samples", grid, step)
