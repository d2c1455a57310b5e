"""Which samples an optimizer step sees."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch


class StepPlan(NamedTuple):
    """Which samples an optimizer step sees: all of it follows from the step's number.

    An epoch is a permutation of the data, cut into global batches of `batch_size` times `world`; the last batch, and
    the last accumulation, may be partial. `samples=None` is a stream: every batch is full and there are no epochs.
    """

    samples: int | None
    batch_size: int
    world: int
    accumulation: int
    total: int = 0  # optimizer steps of the whole training; a stream's one "epoch"

    @property
    def global_batch(self) -> int:
        """Samples of one forward pass, over all ranks."""
        return self.batch_size * self.world

    @property
    def batches_per_epoch(self) -> int:
        """Forward passes in an epoch."""
        if self.samples is None:
            return self.total * self.accumulation
        return math.ceil(self.samples / self.global_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def batches(self, step: int) -> range:
        """The numbers, within their epoch, of the step's batches."""
        first = step % self.steps_per_epoch * self.accumulation
        return range(first, min(first + self.accumulation, self.batches_per_epoch))

    def samples_in(self, step: int) -> int:
        """The samples of the step, over all ranks: what its gradient is the mean of."""
        batches = self.batches(step)
        last = batches.stop * self.global_batch
        return (last if self.samples is None else min(last, self.samples)) - batches.start * self.global_batch

    def own_samples(self, batch: int, rank: int) -> tuple[int, int]:
        """Where in the epoch's order a rank's part of a batch begins and ends; it may be empty in the last batch."""
        begin = batch * self.global_batch + rank * self.batch_size
        end = begin + self.batch_size
        return (begin, end) if self.samples is None else (min(begin, self.samples), min(end, self.samples))

    def batches_before(self, step: int) -> int:
        """Forward passes before a step, from the beginning of training."""
        return self.epoch_of(step) * self.batches_per_epoch + self.batches(step).start


class KeyedBatchSampler(torch.utils.data.Sampler):
    """A rank's batches of keys (epoch, index), from a step on and without end; `order(epoch)`: indices [n]."""

    def __init__(self, plan: StepPlan, order: Callable[[int], np.ndarray], rank: int, first_step: int):
        self.plan, self.order, self.rank, self.first_step = plan, order, rank, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.plan.epoch_of(self.first_step)
        first = self.plan.batches(self.first_step).start
        while True:
            order = self.order(epoch)
            for batch in range(first, self.plan.batches_per_epoch):
                begin, end = self.plan.own_samples(batch, self.rank)
                # a rank without a sample of its own runs the epoch's first, at weight 0: all ranks must take part
                yield [(epoch, int(index)) for index in (order[begin:end] if end > begin else order[:1])]
            epoch, first = epoch + 1, 0
