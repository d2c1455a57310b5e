"""The likelihood of real images under a pipeline: of any kind, in pixels or in latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..common.errors import UsageError
from ..common.image_sets import ImageSet
from ..portable.multistep_ddpm_hf import LIKELIHOOD_TIMESTEPS
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from .bound import Bound, BoundBatch, measure_bound
from .ranks import Ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def even_timesteps(total: int, number: int) -> list[int]:
    """Evenly spaced timesteps from T-1 down to 0."""
    return [int(t) for t in np.linspace(total - 1, 0, number).round()]


@dataclass(frozen=True)
class ModelBound:
    """How the bound of a pipeline is measured.

    Args:
        pipeline: on its device.
        images: real ones, best not trained on.
        count: how many of them, evenly spaced, since a dataset may be sorted by class.
        conditions_of: indices -> what the network takes besides x_t and t, for these images.
        calls: of the network for each image; None is one for each timestep.
        seed: of the noise and, with fewer calls than timesteps, of the timesteps.
        batch_size: images at once.
        steps: of the chain: the best so many timesteps where they were fitted, else evenly spaced; None: all of T.
    """

    pipeline: Any
    images: ImageSet
    count: int
    conditions_of: Callable[[Sequence[int]], dict[str, torch.Tensor]]
    calls: int | None = None
    seed: int = 0
    batch_size: int = 64
    steps: int | None = None

    def check(self) -> None:
        """Raise UsageError for fewer calls than the estimate requires, or for no chain of so many steps."""
        T = self.pipeline.scheduler.config.num_train_timesteps
        if self.steps is not None and not 2 <= self.steps <= T:
            raise UsageError(f"--likelihood-steps {self.steps}: must be from 2 to {T}, the model's timesteps")
        most = self.steps or T
        if self.calls is not None and not 4 <= self.calls <= most:
            which = "the steps of the chain" if self.steps else "the model's timesteps"
            raise UsageError(f"--likelihood-calls {self.calls}: must be from 4 to {most}, {which}")

    @property
    def timesteps(self) -> list[int] | None:
        """The timesteps of the chain, with T-1 and 0, where the prior's and the decoder's terms are; None: all."""
        if self.steps is None:
            return None
        config = self.pipeline.scheduler.config
        fitted = (config.get(LIKELIHOOD_TIMESTEPS) or {}).get(str(self.steps))
        return list(fitted or even_timesteps(config.num_train_timesteps, self.steps))

    def batches(self, ranks: Ranks) -> list["LazyBatch"]:
        """This rank's batches, of the same images whatever the number of ranks."""
        starts = range(0, self.count, self.batch_size)
        return [LazyBatch(self, range(at, min(at + self.batch_size, self.count))) for at in ranks.share(starts)]

    def loaded(self, ranks: Ranks | None = None) -> "Loaded":
        """This rank's batches, each read when it is reached."""
        return Loaded(self.batches(ranks or Ranks()))

    def chosen(self, positions: Sequence[int]) -> list[int]:
        """The indices of the images that are measured, by their positions among these."""
        return [position * self.images.count // self.count for position in positions]

    def measure(self, ranks: Ranks) -> Bound:
        """The bound of all images; all ranks call it, and all get it."""
        batches = self.loaded(ranks)
        scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        latent = getattr(self.pipeline, "vae", None) is not None
        unet = self.pipeline.unet
        return measure_bound(
            unet, scheduler, batches, timesteps=self.timesteps, calls=self.calls, seed=self.seed, latent=latent,
            gather=ranks.gather, progress=ranks.is_main,
        )  # fmt: skip


@dataclass(frozen=True)
class LazyBatch:
    """A batch that is read when it is needed."""

    of: ModelBound
    positions: range

    def load(self) -> BoundBatch:
        """Its images in [-1, 1] on the pipeline's device, or their latents; an image's latent depends on it alone."""
        from ..inference.studio import keyed_generators

        pipeline, indices = self.of.pipeline, self.of.chosen(self.positions)
        images = torch.from_numpy(np.array(self.of.images.read(indices)))
        x_start = images.to(pipeline.device).float() / 127.5 - 1  # [n, C, H, W]
        if getattr(pipeline, "vae", None) is not None:
            generators = keyed_generators(pipeline.device, self.of.seed, self.positions)
            with torch.no_grad():
                units = (x_start[:, None] + 1) / 2  # [n, 1, C, H, W]
                x_start = torch.cat([pipeline.encode(one, key) for one, key in zip(units, generators)])
        return BoundBatch(self.positions.start, x_start, self.of.conditions_of(indices))


@dataclass(frozen=True)
class Loaded:
    """Batches that are read one at a time."""

    lazy: list[LazyBatch]

    def __len__(self) -> int:
        return len(self.lazy)

    def __iter__(self) -> Any:
        return (one.load() for one in self.lazy)


def bound_plot(bound: Bound) -> "Figure":
    """The term of each timestep, and the errors of x̂_0 and ε."""
    from .report import new_figure

    figure, axes = new_figure()
    rows = bound.curve()
    t = [row["t"] + 1 for row in rows]
    axes.plot(t, [max(row["term"], 1e-12) for row in rows], label=f"term of the bound ({bound.unit})")
    axes.plot(t, [row["x_start_mse"] for row in rows], label="mean squared error of x̂₀")
    axes.plot(t, [row["epsilon_mse"] for row in rows], label="mean squared error of ε")
    axes.set(xscale="log", yscale="log", xlabel="t + 1")
    axes.legend(frameon=False, fontsize="small")
    return figure
