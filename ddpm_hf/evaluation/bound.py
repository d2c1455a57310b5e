"""The variational bound of a set of images: from all network calls or from a few, on one process or on several."""

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..common.errors import DataError
from ..common.randomness import StepKeys
from ..objectives.bound import prior_bpd, vb_terms_bpd
from ..objectives.gaussians import mean_flat
from ..portable.scheduling_ddpm_hf import DDPMScheduler
from .strata import CallPlan, checked_chain, plan_calls

NORMAL_95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


class BoundBatch(NamedTuple):
    """Consecutive images of a set.

    Args:
        first: the index of the first of them in the set, which their random numbers depend on.
        images: [N, C, H, W] in [-1, 1], on the 256 levels of a byte; or latents, scaled as the network takes them.
        conditions: what else the network takes, such as `class_labels` [N].
    """

    first: int
    images: torch.Tensor
    conditions: dict[str, torch.Tensor] = {}


@dataclass(frozen=True)
class BoundPart:
    """What a batch contributes: for its N images, and for the S timesteps summed over them; float64."""

    first: int
    prior: np.ndarray  # [N], bits/dim
    total: np.ndarray  # [N], bits/dim: the prior's term and the (estimated) sum of all others
    decoder: np.ndarray  # [N], bits/dim, in the total
    variance: np.ndarray  # [N], of the total as an estimate, from its pairs of calls; 0 without any
    sums: dict[str, np.ndarray] = field(repr=False)  # of [S]: calls, share (of the total), term, x_start, epsilon


@dataclass(frozen=True)
class Bound:
    """The bound of N images, in bits per dimension, and its parts along a chain of S timesteps."""

    timesteps: np.ndarray  # [S], ascending
    calls: int  # of the network for each image; S where each timestep is called once
    latent: bool  # whether the dimensions are those of latents
    prior: np.ndarray  # [N]
    decoder: np.ndarray  # [N]
    total: np.ndarray  # [N]
    variance: np.ndarray  # [N], of each total as an estimate of the expected bound
    visits: np.ndarray  # [S], calls at each timestep, for all images together
    shares: np.ndarray  # [S], of the mean total: they sum to it less the prior's term
    terms: np.ndarray  # [S], the mean term over the visits; nan where there was none, as in the two that follow
    x_start_mse: np.ndarray  # [S], of x̂_0
    epsilon_mse: np.ndarray  # [S], of the ε that x̂_0 implies

    @property
    def bits_per_dim(self) -> float:
        """The mean bound over the images."""
        return float(self.total.mean())

    @property
    def standard_error(self) -> float | None:
        """Of the mean bound, as that of all images like these; None for one image."""
        return float(self.total.std(ddof=1) / math.sqrt(len(self.total))) if len(self.total) > 1 else None

    @property
    def estimation_error(self) -> float | None:
        """The standard error, for these images, of evaluating only some timesteps; None if all were evaluated."""
        return None if self.calls == len(self.timesteps) else float(math.sqrt(self.variance.sum()) / len(self.total))

    @property
    def unit(self) -> str:
        """Of all figures."""
        return "bits/latent dim" if self.latent else "bits/dim"

    def summary(self) -> dict[str, Any]:
        """The figures for `metrics.json`; `low` and `high` are a 95% interval for all images like these."""
        value, error = self.bits_per_dim, self.standard_error
        return {
            "value": value,
            "unit": self.unit,
            "low": None if error is None else value - NORMAL_95 * error,
            "high": None if error is None else value + NORMAL_95 * error,
            "interval": "normal, over images",
            "standard_error": error,
            "estimation_error": self.estimation_error,
            "prior": float(self.prior.mean()),
            "steps": value - float(self.prior.mean() + self.decoder.mean()),
            "decoder": float(self.decoder.mean()),
            "images": len(self.total),
            "timesteps": len(self.timesteps),
            "calls": self.calls,
        }

    def curve(self) -> list[dict[str, Any]]:
        """A row for each timestep that was evaluated: `t`, `calls`, `term`, `x_start_mse`, `epsilon_mse`."""
        columns = zip(self.timesteps, self.visits, self.terms, self.x_start_mse, self.epsilon_mse)
        names = ("term", "x_start_mse", "epsilon_mse")
        return [
            {"t": int(t), "calls": int(visits)} | dict(zip(names, map(float, values)))
            for t, visits, *values in columns
            if visits
        ]

    def table(self) -> str:
        """The figures as lines of text."""
        figures = self.summary()
        called = "" if self.estimation_error is None else f"; from {self.calls} of {len(self.timesteps)} timesteps"
        error = "" if self.estimation_error is None else f", ± {self.estimation_error:.4f} for these images"
        several = self.standard_error is not None
        spread = f"± {self.standard_error:.4f} (standard error over" if several else "(of"
        return (
            f"{figures['value']:.4f} {self.unit}, {spread}"
            f" {len(self.total):,} image{'s' * several}{called}{error})\n"
            f"prior {figures['prior']:.4f} + steps {figures['steps']:.4f} + decoder {figures['decoder']:.4f}"
        )


def measure_bound(
    network: Callable[..., Any],
    scheduler: DDPMScheduler,
    batches: Iterable[BoundBatch],
    *,
    timesteps: Iterable[int] | None = None,
    calls: int | None = None,
    seed: int = 0,
    latent: bool = False,
    gather: Callable[[list[BoundPart]], list[list[BoundPart]]] | None = None,
    progress: bool = False,
) -> Bound:
    """The bound on -log2 p(x_0) of a set of images (Ho et al. 2020, Eq. 5), from all terms or from a few.

    Image i's noise and timesteps depend on the seed and on i alone. With few calls its total is still an unbiased
    estimate of the expected bound: see `plan_calls`.

    Args:
        network: `network(x_t, t, **conditions).sample` is the scheduler's kind of output, for t a LongTensor [N].
            Called as it is: put it in eval mode first.
        scheduler: of any prediction type and variance type of ours.
        batches: those of this process, on the network's device.
        timesteps: those of a strided chain, in any order; None means all T.
        calls: of the network for each image, 4 or more; None means one for each timestep.
        latent: whether the images are latents: x̂_0 is then not clipped, and the decoder's term is that of a density.
        gather: a list of each process -> the lists of all, on each; None for one process.
        progress: show a bar, of one step for each call.

    Raises:
        ValueError: too few calls, timesteps that repeat or leave 0..T-1, or an ᾱ of 0 under epsilon prediction.
        DataError: there are no images, or the network's output is not finite.
    """
    chain = checked_chain(scheduler, timesteps)
    plan = plan_calls(scheduler, chain, calls)
    total = len(batches) * plan.calls if isinstance(batches, Sized) else None
    with tqdm(total=total, desc="likelihood", unit="call", disable=not progress) as bar:
        parts = [_measure(network, scheduler, batch, chain, plan, seed, latent, bar) for batch in batches]
    parts = sorted((part for rank in (gather(parts) if gather else [parts]) for part in rank), key=lambda p: p.first)
    if not parts:
        raise DataError("no images to measure the likelihood of")
    return _joined(parts, chain, plan, latent)


@torch.no_grad()
def _measure(
    network: Callable[..., Any],
    scheduler: DDPMScheduler,
    batch: BoundBatch,
    chain: list[int],
    plan: CallPlan,
    seed: int,
    latent: bool,
    bar: tqdm,
) -> BoundPart:
    """The calls of a batch, and what they say. All but the network computes in float64, where the device has it."""
    exact = torch.float32 if batch.images.device.type == "mps" else torch.float64
    dtype, x_start = getattr(network, "dtype", batch.images.dtype), batch.images.to(exact)
    count, positions, values = len(x_start), [], []
    all_t, all_s = np.array(chain), np.array([-1, *chain[:-1]])
    for call in range(plan.calls):
        keys = StepKeys(seed, call, batch.first, count)
        at, factor = plan.sample(call, keys.uniform("likelihood_timestep").numpy())
        t, s = (torch.from_numpy(table[at]).to(x_start.device) for table in (all_t, all_s))  # [N]
        noise = keys.normal_like(x_start, "likelihood_noise")
        x_t = scheduler.add_noise(x_start, noise, t)
        output = network(x_t.to(dtype), t, **batch.conditions).sample.to(exact)
        terms = vb_terms_bpd(scheduler, output, x_start, x_t, t, s, clip_sample=not latent, discretized=not latent)
        epsilon = scheduler.predict_epsilon(terms.pred_original_sample, t, x_t)
        errors = mean_flat((terms.pred_original_sample - x_start) ** 2), mean_flat((epsilon - noise) ** 2)
        measured = torch.stack([terms.bits_per_dim, *errors]).double().cpu().numpy()  # [3, N]
        if not np.isfinite(measured).all():
            image = int(np.argmin(np.isfinite(measured).all(axis=0)))
            raise DataError(
                f"the bound of image {batch.first + image} is not finite at t={all_t[at[image]]}; check the network's"
                " weights, and the precision that it computes in"
            )
        positions.append(at)
        values.append(np.concatenate([measured, factor[None]]))
        bar.update()
    prior = prior_bpd(scheduler, x_start).double().cpu().numpy()
    return _part(batch.first, prior, np.stack(positions), np.stack(values, axis=1), plan)


def _part(first: int, prior: np.ndarray, positions: np.ndarray, values: np.ndarray, plan: CallPlan) -> BoundPart:
    """A batch's part, from the positions [K, N] of its calls, and their terms, errors and factors [4, K, N]."""
    term, x_start, epsilon, factor = values
    sizes, starts = np.array(plan.sizes)[:, None], np.cumsum((0, *plan.sizes[:-1]))
    estimates = term * factor  # [K, N], each of its group's part of the bound
    means = np.add.reduceat(estimates, starts) / sizes  # [G, N]
    squares = np.add.reduceat((estimates - means[plan.groups]) ** 2, starts)
    variance = (squares / np.maximum(sizes - 1, 1) / sizes).sum(axis=0)  # [N]
    flat = positions.ravel()

    def by_position(weights: np.ndarray) -> np.ndarray:
        return np.bincount(flat, weights.ravel(), minlength=plan.positions)  # [S]

    shares = estimates / np.array(plan.sizes)[plan.groups][:, None]
    sums = {
        "calls": by_position(np.ones_like(term)),
        "share": by_position(shares),
        "term": by_position(term),
        "x_start": by_position(x_start),
        "epsilon": by_position(epsilon),
    }
    return BoundPart(first, prior, prior + means.sum(axis=0), means[0], variance, sums)


def _joined(parts: list[BoundPart], chain: list[int], plan: CallPlan, latent: bool) -> Bound:
    """The bound of all images, from the parts in the order of the images: the same sums on any number of processes."""
    rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("prior", "decoder", "total")}
    sums = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
    visits = np.asarray(sums["calls"])
    with np.errstate(invalid="ignore"):
        means = [np.asarray(sums[name]) / visits for name in ("term", "x_start", "epsilon")]  # nan without a visit
    return Bound(
        np.array(chain),
        plan.calls,
        latent,
        **rows,
        variance=np.concatenate([part.variance for part in parts]),
        visits=visits.astype(np.int64),
        shares=np.asarray(sums["share"]) / len(rows["total"]),
        terms=means[0],
        x_start_mse=means[1],
        epsilon_mse=means[2],
    )
