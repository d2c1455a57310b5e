"""Sample grids during training: drawn by all processes together, the same noise each time."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object

from .data import image_grid
from .publishing import save_image
from .training.config import TrainingConfig
from .training.randomness import keyed_seed
from .training.setup import track_image


def draw_grid(
    sample: Callable[[list[int], list[torch.Generator]], list],
    count: int,
    columns: int | None,
    step: int,
    config: TrainingConfig,
    accelerator,
) -> None:
    """Sample `count` images, shared out over the ranks, into one PNG and the tracker.

    An image depends on the seed and its place in the grid alone, so that grids show one model's progress.

    Args:
        sample: (places in the grid, a generator for each) -> PIL images.
    """
    own = list(range(accelerator.process_index, count, accelerator.num_processes))
    drawn = []
    if own:
        seeds = [keyed_seed(config.seed, "sample", 0, index) for index in own]
        generators = [torch.Generator(accelerator.device).manual_seed(seed) for seed in seeds]
        with accelerator.autocast():
            drawn = sample(own, generators)
    drawn = [image for _, image in sorted(gather_object(list(zip(own, drawn))), key=lambda pair: pair[0])]
    if accelerator.is_main_process:
        grid = image_grid(drawn, columns, scale=max(1, 64 // drawn[0].width))
        save_image(grid, Path(config.output_dir) / "samples" / f"step-{step:06d}.png")
        track_image(accelerator, "samples", grid, step)
