"""From the data flags to this rank's batches, from any step on."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..common.randomness import StepKeys
from ..training.meter import Losses, sum_over_ranks
from ..training.plan import KeyedBatchSampler, StepPlan
from ..training.run import Run
from .dataset import ImageDataset, StreamingBatches, describe_pixels, identity, should_cache
from .flags import DataFlags
from .images import ImageTransform, to_model_range
from .labels import classes_of_resumed, label_warnings, trained_classes
from .orders import bucketed_length, keyed_balanced_order, keyed_bucketed_order, keyed_permutation
from .reading import load_rows
from .rows import Rows
from .texts import check_captions


class Images(NamedTuple):
    """The data of a run."""

    rows: Rows
    transform: ImageTransform
    dataset: ImageDataset | None  # None for a stream
    held_out: ImageDataset | None
    skip_broken: bool = False  # of a stream

    @property
    def count(self) -> int | None:  # type: ignore[override]  # tuple.count is not needed here
        """How many images there are to train on; None for a stream."""
        return None if self.dataset is None else len(self.dataset)

    @property
    def indexed(self) -> ImageDataset:
        """The images of a dataset that is no stream, which flags refuse where this is needed."""
        if self.dataset is None:
            raise TypeError(f"{self.rows.name} is a stream")
        return self.dataset

    @property
    def trained_classes(self) -> list[int] | None:
        """The ids of the classes that training images have, where not all have some; else None."""
        labels = None if self.dataset is None else self.dataset.labels
        return trained_classes(labels, len(self.rows.label_names))

    @property
    def cached_bytes(self) -> int:
        """What the images take that are kept decoded."""
        return 0 if self.dataset is None else self.dataset.cached_bytes

    def lines(self) -> dict[str, str]:
        """What a run says of its data at its start."""
        rows, transform = self.rows, self.transform
        columns = [f"column {rows.image_column!r}"]
        columns += [f"{len(rows.label_names)} classes in {rows.label_column!r}"] if rows.label_column else []
        columns += [f"captions in {rows.caption_column!r}"] if rows.caption_column else []
        count = "a stream" if self.count is None else f"{self.count:,} images"
        shape = f"{transform.channels} × {transform.height} × {transform.width}"
        kept = f"{'' if self.cached_bytes else 'not '}kept decoded"
        return {"data": f"{rows.name}: {count}, {', '.join(columns)}", "images": f"{shape}, {kept}"}

    def name_of(self, row: int) -> str:
        """What to call one of a batch's `index`: the image's file, or its number."""
        return f"{row} of {self.rows.name}" if self.dataset is None else self.dataset.name_of(row)


def open_images(
    run: Run,
    flags: DataFlags,
    channels: int,
    token: str | None = None,
    caption_column: str | None = None,
) -> Images:
    """Read the dataset that the flags name; the images to train on, and those held out if they will be used.

    Args:
        channels: that the model reads.
        token: for a private dataset on the Hub.

    Raises:
        DataError: the dataset or an image cannot be read.
    """
    seed, validates = run.seed, run.flags.validation_steps is not None
    with run.accelerator.local_main_process_first():
        rows, held_out_rows = load_rows(flags, seed, token, caption_column, validates)
    if rows.left_out:
        run.log(f"{rows.name}: left out {rows.left_out}")
    run.log(*(f"warning: {line}" for line in check_captions(rows)))
    for part in (rows, held_out_rows):
        if part is not None:
            part.label_names = classes_of_resumed(part, run.class_names)
    transform = flags.transform(channels)
    dataset = held_out = None
    if not flags.streaming:
        run.log(*describe_pixels(rows, transform))
        cached = should_cache(rows, transform, flags.cache_dataset)
        dataset = ImageDataset(rows, transform, seed, cached, flags.skip_broken_images)
    if held_out_rows is not None and validates:
        upright = transform._replace(center_crop=True, random_flip=False)
        held_out = ImageDataset(held_out_rows, upright, seed, True, flags.skip_broken_images)
    if dataset is not None and dataset.labels is not None:
        lines = label_warnings(rows, dataset.labels, held_out and held_out.labels)
        run.log(*(f"warning: {line}" for line in lines))
    return Images(rows, transform, dataset, held_out, flags.skip_broken_images)


def shown_images(images: Images, count: int) -> dict[str, torch.Tensor]:
    """A batch of up to `count` images in [-1, 1] for pictures, the same each time: held-out ones if there are any."""
    dataset = images.held_out or images.dataset
    if dataset is None:
        stream = StreamingBatches(images.rows, images.transform, 0, count, skip_broken=images.skip_broken)
        batch = next(iter(stream))
    else:
        count = min(count, len(dataset))
        batch = dataset.__getitems__([(0, index * len(dataset) // count) for index in range(count)])
    return {**batch, "images": to_model_range(batch["images"])}


def plan_steps(run: Run, images: Images) -> StepPlan:
    """Which samples each step sees, and how many steps there are."""
    flags, world, samples = run.flags, run.accelerator.num_processes, images.count
    groups = getattr(images.dataset, "group_sizes", None)
    if groups is not None:
        samples = bucketed_length(groups, flags.train_batch_size * world)
    total = flags.max_train_steps or 0
    plan = StepPlan(samples, flags.train_batch_size, world, flags.gradient_accumulation_steps, total)
    return plan if total else plan._replace(total=flags.num_epochs * plan.steps_per_epoch)


def epoch_order(images: Images, seed: int, balanced: bool, global_batch: int) -> Callable[[int], np.ndarray]:
    """The order of an epoch's samples: a permutation; or every class equally often; or batches of one size each."""
    groups = getattr(images.dataset, "group_sizes", None)
    if groups is not None:
        return lambda epoch: keyed_bucketed_order(seed, epoch, groups, global_batch)
    labels = images.indexed.labels
    if balanced and labels is not None:
        return lambda epoch: keyed_balanced_order(seed, epoch, labels)
    return lambda epoch: keyed_permutation(seed, epoch, len(images.indexed))


def make_batches(
    run: Run, images: Images, plan: StepPlan, step: int, class_balanced: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches, from a step on and without end."""
    rank, workers = run.accelerator.process_index, run.flags.dataloader_num_workers
    options = {"pin_memory": run.device.type == "cuda", "collate_fn": identity}
    if images.dataset is not None:
        order = epoch_order(images, run.seed, class_balanced, plan.global_batch)
        options["batch_sampler"] = KeyedBatchSampler(plan, order, rank, step)
        workers = 0 if images.dataset.cache is not None else workers
        return iter(torch.utils.data.DataLoader(images.dataset, num_workers=workers, **options))
    stream = StreamingBatches(
        images.rows,
        images.transform,
        run.seed,
        plan.batch_size,
        rank,
        plan.world,
        skip_batches=plan.batches_before(step),
        skip_broken=images.skip_broken,
    )
    # a stream has a single reader
    return iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=min(1, workers), **options))


def held_out_loss(
    run: Run, images: Images, compute_loss: Callable[..., Losses]
) -> Callable[[torch.nn.Module], dict[str, float]] | None:
    """What gives a model's mean loss over the held-out images, by the same random numbers each time; None without."""
    held_out = images.held_out
    if not held_out:
        return None

    def validate(model: torch.nn.Module) -> dict[str, float]:
        def losses(batch: dict, keys: StepKeys) -> list[torch.Tensor]:
            return [compute_loss(model, batch, keys).losses]

        return held_out_means(run, held_out, ["validation_loss"], losses)

    return validate


@torch.no_grad()
def held_out_means(
    run: Run, held_out: ImageDataset, names: Sequence[str], measure: Callable[[dict, StepKeys], Sequence[torch.Tensor]]
) -> dict[str, float]:
    """Means over the held-out images, divided among the ranks, with the same random numbers each time.

    Args:
        names: the names of the means.
        measure: (batch, keys) -> for each of the names, a value of each image, [N].
    """
    size, accelerator = run.flags.eval_batch_size, run.accelerator
    totals = torch.zeros(len(names) + 1, dtype=torch.float64)
    for first in range(accelerator.process_index * size, len(held_out), accelerator.num_processes * size):
        indices = range(first, min(first + size, len(held_out)))
        batch = held_out.__getitems__([(0, index) for index in indices])
        with accelerator.autocast():
            values = measure(batch, StepKeys(run.seed, 0, first, len(indices), validation=True))
        totals += torch.stack([*(one.cpu().double().sum() for one in values), torch.tensor(float(len(indices)))])
    *sums, count = sum_over_ranks(totals).tolist()
    return {name: total / count for name, total in zip(names, sums)}
