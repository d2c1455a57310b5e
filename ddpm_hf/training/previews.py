"""Sample grids during training: sampled by all processes together, the same noise each time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from ..common.ownership import claim_files
from ..common.pictures import image_grid, save_image
from ..common.randomness import keyed_seed
from .faults import out_of_memory, storage_fault
from .logs import track_image
from .reporting import shows_bars
from .run import Run
from .stopping import InterruptedSamplingError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

INTERRUPTED = "interrupted"

CHAIN_ROWS, CHAIN_MOMENTS = 8, 10  # of the strip of predictions: images, and moments of each one's chain


def draw_grid(
    run: Run,
    pipeline: "DiffusionPipeline",
    step: int,
    rows: Sequence[Any] = (),
    legend: Sequence[str] = (),
    **options: Any,
) -> Path | None:
    """Sample `--eval_batch_size` images on all ranks together, into one PNG and the tracker; x̂_0 along some chains.

    An image depends on the seed and its index in the grid alone, so that grids show one model's progress. A grid that
    memory or disk have no room for is left out with a warning. Returns the picture's path, on the main process.

    Args:
        pipeline: called with this rank's requests, a generator for each, and how many frames to keep.
        rows: what each row of the grid shows, as far as there is room, such as a class or a prompt; without, the
            images are the pipeline's own. The chains are those of the rows' first images.
        legend: a label for each row; without, rows are strips, and as many stand side by side as fit a square.
        options: for the pipeline.

    Raises:
        InterruptedSamplingError: on all ranks, if one was asked to stop meanwhile.
    """
    accelerator, count = run.accelerator, run.flags.eval_batch_size
    columns = count // len(rows[:count]) if rows else None
    requests = [row for row in rows[:count] for _ in range(columns or 0)]
    labels = legend[:count] or None
    count = len(requests) or count
    pipeline.set_progress_bar_config(
        desc="sampling", leave=False, disable=not (accelerator.is_main_process and shows_bars())
    )
    local = list(range(accelerator.process_index, count, accelerator.num_processes))
    shown = set(range(0, count, columns or 1)[:CHAIN_ROWS])
    samples, fault = [], None
    try:
        if local:
            seeds = [keyed_seed(run.seed, "sample", 0, index) for index in local]
            generators = [torch.Generator(accelerator.device).manual_seed(seed) for seed in seeds]
            asked = [requests[index] for index in local] if requests else len(local)
            frames = CHAIN_MOMENTS if shown & set(local) else 0
            with accelerator.autocast():
                output = pipeline(asked, generator=generators, num_frames=frames, output_type="preview", **options)
            chains = [
                [frame.prediction[i] for frame in output.frames or [] if index in shown]
                for i, index in enumerate(local)
            ]
            samples = list(zip(local, output.images, chains))
    except InterruptedSamplingError:
        fault = INTERRUPTED
    except Exception as error:
        if not out_of_memory(error):
            raise
        fault = "out of memory; make --eval_batch_size smaller"
    parts = gather_object([(fault, samples)])  # of all ranks, whatever happened to this one
    faults = [fault for fault, _ in parts if fault is not None]
    if INTERRUPTED in faults:
        raise InterruptedSamplingError
    if not faults and accelerator.is_main_process:
        samples = sorted((one for _, part in parts for one in part), key=lambda one: one[0])
        scale, folder = max(1, 64 // min(samples[0][1].size)), run.folder / "samples"
        images = [image for _, image, _ in samples]
        if rows and not labels:  # each is a row of its own already: strips of images
            grid = image_grid(images, scale=scale, gap=8)
        else:
            grid = image_grid(images, columns, scale=scale, legend=labels)
        chains = [chain for index, _, chain in samples if index in shown]
        strip = image_grid([image for chain in chains for image in chain], len(chains[0]), scale=scale, legend=labels)
        try:
            claim_files(run.folder, [f"samples/{kind}-{step:06d}.png" for kind in ("step", "chain")])
            save_image(grid, folder / f"step-{step:06d}.png")
            save_image(strip, folder / f"chain-{step:06d}.png")
        except OSError as error:
            faults = [storage_fault(error)]
        track_image(run, "samples", grid, step)
    if faults:
        run.warn(f"no pictures of step {step} ({faults[0]}); training goes on")
        return None
    return run.folder / "samples" / f"step-{step:06d}.png"
