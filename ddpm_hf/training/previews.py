"""Sample grids during training: sampled by all processes together, the same noise each time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from ..common.ownership import claim_files
from ..common.pictures import image_grid, save_image
from ..common.randomness import keyed_seed
from .faults import out_of_memory, storage_fault, warn
from .flags import TrainingConfig
from .logs import track_image
from .stopping import InterruptedSamplingError

INTERRUPTED = "interrupted"

CHAIN_ROWS, CHAIN_MOMENTS = 8, 10  # of the strip of predictions: images, and moments of each one's chain


def draw_grid(
    sample: Callable[[list[int], list[torch.Generator], int], Any],
    count: int,
    columns: int | None,
    step: int,
    config: TrainingConfig,
    accelerator,
    legend: Sequence[str] | None = None,
) -> Path | None:
    """Sample `count` images, shared out over the ranks, into one PNG and the tracker; and x̂_0 along some chains.

    An image depends on the seed and its place in the grid alone, so that grids show one model's progress. A grid that
    memory or disk have no room for is left out with a warning. Returns the picture's path, on the main process.

    Args:
        sample: (places in the grid, a generator for each, how many frames to keep) -> a pipeline's output.
        columns: of the grid; its chains are those of the rows' first images.
        legend: a label for each row, such as its class or prompt.

    Raises:
        InterruptedSamplingError: on all ranks, if one was asked to stop meanwhile.
    """
    own = list(range(accelerator.process_index, count, accelerator.num_processes))
    shown = set(range(0, count, columns or 1)[:CHAIN_ROWS])
    drawn, fault = [], None
    try:
        if own:
            seeds = [keyed_seed(config.seed, "sample", 0, index) for index in own]
            generators = [torch.Generator(accelerator.device).manual_seed(seed) for seed in seeds]
            with accelerator.autocast():
                output = sample(own, generators, CHAIN_MOMENTS if shown & set(own) else 0)
            chains = [
                [frame.prediction[i] for frame in output.frames or [] if own[i] in shown] for i in range(len(own))
            ]
            drawn = list(zip(own, output.images, chains))
    except InterruptedSamplingError:
        fault = INTERRUPTED
    except Exception as error:
        if not out_of_memory(error):
            raise
        fault = "out of memory; make --eval_batch_size smaller"
    parts = gather_object([(fault, drawn)])  # of all ranks, whatever happened to this one
    faults = [fault for fault, _ in parts if fault is not None]
    if INTERRUPTED in faults:
        raise InterruptedSamplingError
    if not faults and accelerator.is_main_process:
        drawn = sorted((one for _, part in parts for one in part), key=lambda one: one[0])
        scale, folder = max(1, 64 // drawn[0][1].width), Path(config.output_dir) / "samples"
        grid = image_grid([image for _, image, _ in drawn], columns, scale=scale, legend=legend)
        chains = [chain for place, _, chain in drawn if place in shown]
        strip = image_grid([image for chain in chains for image in chain], len(chains[0]), scale=scale, legend=legend)
        try:
            claim_files(config.output_dir, [f"samples/{kind}-{step:06d}.png" for kind in ("step", "chain")])
            save_image(grid, folder / f"step-{step:06d}.png")
            save_image(strip, folder / f"chain-{step:06d}.png")
        except OSError as error:
            faults = [storage_fault(error)]
        track_image(accelerator, "samples", grid, step)
    if faults:
        warn(accelerator, f"no pictures of step {step} ({faults[0]}); training goes on")
        return None
    return Path(config.output_dir) / "samples" / f"step-{step:06d}.png"
