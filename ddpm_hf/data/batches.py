"""From the data flags to this rank's batches, from any step on."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..training.flags import TrainingConfig
from ..training.logs import log
from ..training.plan import KeyedBatchSampler, StepPlan
from . import (
    DataFlags,
    ImageDataset,
    ImageTransform,
    Rows,
    StreamingBatches,
    check_captions,
    classes_of_resumed,
    describe_pixels,
    identity,
    label_warnings,
    load_rows,
    should_cache,
    trained_classes,
)
from .orders import bucketed_length, keyed_balanced_order, keyed_bucketed_order, keyed_permutation


class Images(NamedTuple):
    """The data of a run."""

    rows: Rows
    transform: ImageTransform
    dataset: ImageDataset | None  # None for a stream
    held_out: ImageDataset | None

    @property
    def count(self) -> int | None:
        """How many images there are to train on; None for a stream."""
        return None if self.dataset is None else len(self.dataset)

    @property
    def trained_classes(self) -> list[int] | None:
        """The ids of the classes that training images have, where not all have some; else None."""
        labels = None if self.dataset is None else self.dataset.labels
        return trained_classes(labels, len(self.rows.label_names))

    def name_of(self, row: int) -> str:
        """What to call one of a batch's `index`: the image's file, or its number."""
        return f"{row} of {self.rows.name}" if self.dataset is None else self.dataset.name_of(row)


def open_images(
    flags: DataFlags,
    config: TrainingConfig,
    channels: int,
    accelerator,
    caption_column: str | None = None,
    classes: list[str] | None = None,
) -> Images:
    """Read the dataset that the flags name; the images to train on, and those held out if they will be used.

    Args:
        classes: the class names of the run that is resumed.

    Raises:
        DataError: the dataset or an image cannot be read.
    """
    with accelerator.local_main_process_first():
        rows, held_out_rows = load_rows(
            flags, config.seed, config.hub_token, caption_column, config.validation_steps is not None
        )
    if rows.left_out:
        log(accelerator, f"{rows.name}: left out {rows.left_out}")
    for line in check_captions(rows):
        log(accelerator, f"warning: {line}")
    for part in (rows, held_out_rows):
        if part is not None:
            part.label_names = classes_of_resumed(part, classes)
    transform = flags.transform(channels)
    dataset = held_out = None
    if not flags.streaming:
        for line in describe_pixels(rows, transform):
            log(accelerator, line)
        cached = should_cache(rows, transform, flags.cache_dataset)
        dataset = ImageDataset(rows, transform, config.seed, cached, flags.skip_broken_images)
    if held_out_rows is not None and config.validation_steps:
        upright = transform._replace(center_crop=True, random_flip=False)
        held_out = ImageDataset(held_out_rows, upright, config.seed, True, flags.skip_broken_images)
    if dataset is not None and dataset.labels is not None:
        for line in label_warnings(rows, dataset.labels, held_out and held_out.labels):
            log(accelerator, f"warning: {line}")
    return Images(rows, transform, dataset, held_out)


def make_plan(images: Images, config: TrainingConfig, world: int) -> tuple[StepPlan, int]:
    """Which samples each step sees, and how many steps there are."""
    samples, groups = images.count, getattr(images.dataset, "group_sizes", None)
    if groups is not None:
        samples = bucketed_length(groups, config.train_batch_size * world)
    plan = StepPlan(
        samples,
        config.train_batch_size,
        world,
        config.gradient_accumulation_steps,
        config.max_train_steps or 0,
    )
    return plan, config.max_train_steps or config.num_epochs * plan.steps_per_epoch


def epoch_order(images: Images, seed: int, balanced: bool, global_batch: int) -> Callable[[int], np.ndarray]:
    """The order of an epoch's samples: a permutation; or every class equally often; or batches of one size each."""
    groups = getattr(images.dataset, "group_sizes", None)
    if groups is not None:
        return lambda epoch: keyed_bucketed_order(seed, epoch, groups, global_batch)
    if balanced:
        return lambda epoch: keyed_balanced_order(seed, epoch, images.dataset.labels)
    return lambda epoch: keyed_permutation(seed, epoch, images.count)


def make_batches(
    images: Images,
    flags: DataFlags,
    config: TrainingConfig,
    plan: StepPlan,
    step: int,
    accelerator,
    class_balanced: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches, from a step on and without end."""
    options = {"pin_memory": accelerator.device.type == "cuda", "collate_fn": identity}
    if images.dataset is not None:
        order = epoch_order(images, config.seed, class_balanced, plan.global_batch)
        options["batch_sampler"] = KeyedBatchSampler(plan, order, accelerator.process_index, step)
        workers = 0 if images.dataset.cache is not None else config.dataloader_num_workers
        return iter(torch.utils.data.DataLoader(images.dataset, num_workers=workers, **options))
    stream = StreamingBatches(
        images.rows,
        images.transform,
        config.seed,
        config.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        skip_batches=plan.batches_before(step),
        skip_broken=flags.skip_broken_images,
    )
    workers = min(1, config.dataloader_num_workers)  # a stream has a single reader
    return iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers, **options))
