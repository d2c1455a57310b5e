"""Sample grids during training: drawn by all processes together, the same noise each time."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object

from .data import image_grid
from .publishing import save_image
from .training.config import TrainingConfig
from .training.faults import out_of_memory, storage_fault, warn
from .training.randomness import keyed_seed
from .training.setup import track_image
from .training.stopping import InterruptedLookError

INTERRUPTED = "interrupted"


def draw_grid(
    sample: Callable[[list[int], list[torch.Generator]], list],
    count: int,
    columns: int | None,
    step: int,
    config: TrainingConfig,
    accelerator,
) -> None:
    """Sample `count` images, shared out over the ranks, into one PNG and the tracker.

    An image depends on the seed and its place in the grid alone, so that grids show one model's progress. A grid that
    memory or disk have no room for is left out with a warning.

    Args:
        sample: (places in the grid, a generator for each) -> PIL images.

    Raises:
        InterruptedLookError: on all ranks, if one was asked to stop meanwhile.
    """
    own = list(range(accelerator.process_index, count, accelerator.num_processes))
    drawn, fault = [], None
    try:
        if own:
            seeds = [keyed_seed(config.seed, "sample", 0, index) for index in own]
            generators = [torch.Generator(accelerator.device).manual_seed(seed) for seed in seeds]
            with accelerator.autocast():
                drawn = sample(own, generators)
    except InterruptedLookError:
        fault = INTERRUPTED
    except Exception as error:
        if not out_of_memory(error):
            raise
        fault = "out of memory; make --eval_batch_size smaller"
    parts = gather_object([(fault, list(zip(own, drawn)))])  # of all ranks, whatever happened to this one
    faults = [fault for fault, _ in parts if fault is not None]
    if INTERRUPTED in faults:
        raise InterruptedLookError
    path = Path(config.output_dir) / "samples" / f"step-{step:06d}.png"
    if not faults and accelerator.is_main_process:
        drawn = [image for _, image in sorted((pair for _, part in parts for pair in part), key=lambda pair: pair[0])]
        grid = image_grid(drawn, columns, scale=max(1, 64 // drawn[0].width))
        try:
            save_image(grid, path)
        except OSError as error:
            faults = [storage_fault(error)]
        track_image(accelerator, "samples", grid, step)
    if faults:
        warn(accelerator, f"no pictures of step {step} ({faults[0]}); training goes on")
