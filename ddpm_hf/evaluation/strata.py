"""Which timesteps of a chain are evaluated for an image, so that a few network calls estimate the whole bound."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..portable.coefficients_ddpm_hf import FIXED_LARGE
from ..portable.scheduling_ddpm_hf import DDPMScheduler

LEAST_CALLS = 4  # two for the decoder's term, two for the others
UNIFORM_SHARE = 0.1  # of the probability of a timestep, so that no weight is large where the expectation errs
DATA_VARIANCES = np.geomspace(1e-4, 1, 17)  # of an image's components, in [-1, 1]


def checked_chain(scheduler: DDPMScheduler, timesteps: Iterable[int] | None) -> list[int]:
    """The timesteps of a chain, ascending; all T for None.

    Raises:
        ValueError: timesteps that repeat or leave 0..T-1, or an ᾱ of 0 under epsilon prediction.
    """
    chain = sorted(range(len(scheduler)) if timesteps is None else [int(t) for t in timesteps])
    if not chain or len(set(chain)) != len(chain) or chain[0] < 0 or chain[-1] >= len(scheduler):
        raise ValueError(f"timesteps must be different and within 0..{len(scheduler) - 1}; got {timesteps}")
    scheduler.check_invertible(chain)
    return chain


def expected_terms(scheduler: DDPMScheduler, chain: list[int]) -> np.ndarray:
    """What the terms of a chain are about, without its decoder's: float64 [S - 1], in bits/dim, before any network.

    They are those of the exact model of Gaussian data, ½ log2((1 + v·SNR_s)/(1 + v·SNR_t)), averaged over variances v
    of its components from those of fine texture to those of a whole image. For `fixed_large`, plus the KL of its
    variance from β̃, which no network changes.
    """
    log_alpha_bar = scheduler.exact_tables.alphas_cumprod[chain].log().numpy()
    snr = np.exp(log_alpha_bar) / -np.expm1(log_alpha_bar)
    information = 0.5 * np.log2(1 + DATA_VARIANCES[:, None] * snr).mean(axis=0)  # [S]
    terms = information[:-1] - information[1:]
    if scheduler.variance_type in FIXED_LARGE:
        one = torch.ones(len(chain) - 1, 1, dtype=torch.float64)
        t, s = torch.tensor(chain[1:]), torch.tensor(chain[:-1])
        log_ratio = scheduler.q_posterior_mean_variance(one, one, t, s).log_variance.flatten().numpy()
        log_ratio = log_ratio - np.log(-np.expm1(log_alpha_bar[1:] - log_alpha_bar[:-1]))  # log β̃/β
        terms = terms + 0.5 * (np.expm1(log_ratio) - log_ratio) / math.log(2)
    return terms


@dataclass(frozen=True)
class CallPlan:
    """The network calls of each image, in groups: the calls of a group estimate one part of the bound.

    Args:
        positions: S, the length of the chain.
        sizes: the calls of each group [G]. Group 0 is position 0, the decoder's term; the others divide positions 1 to
            S - 1 into parts of equal probability.
        probabilities: of the positions 1 to S - 1, [S - 1]; None where every position is called once.
    """

    positions: int
    sizes: tuple[int, ...]
    probabilities: np.ndarray | None = None

    @property
    def calls(self) -> int:
        """The network calls for an image."""
        return sum(self.sizes)

    @property
    def groups(self) -> np.ndarray:
        """The group of each call, [calls]."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def sample(self, call: int, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The position of a call for N images, and the factor that makes its term an estimate of its group's part.

        Args:
            uniforms: in [0, 1), float64 [N].

        Returns: int64 [N] and float64 [N].
        """
        group = int(self.groups[call])
        if self.probabilities is None or group == 0:
            return np.full(len(uniforms), group), np.ones(len(uniforms))
        parts = len(self.sizes) - 1
        cumulative = np.cumsum(self.probabilities)
        at = np.searchsorted(cumulative, (group - 1 + uniforms) / parts * cumulative[-1], side="right")
        at = np.minimum(at, len(cumulative) - 1)
        return at + 1, cumulative[-1] / (parts * self.probabilities[at])


def plan_calls(scheduler: DDPMScheduler, chain: list[int], calls: int | None) -> CallPlan:
    """A plan for a chain (ascending): every timestep once, or `calls` of them, stratified, in pairs.

    Pairs, since the difference of two calls in a stratum tells the error of their mean. The strata are equally long in
    the `expected_terms`: many at small t, where most bits are.

    Raises:
        ValueError: too few calls.
    """
    if calls is not None and calls < LEAST_CALLS:
        raise ValueError(f"{calls} network calls for an image: a likelihood requires {LEAST_CALLS} or more")
    if calls is None or calls >= len(chain):
        return CallPlan(len(chain), (1,) * len(chain))
    expected = expected_terms(scheduler, chain)
    probabilities = (1 - UNIFORM_SHARE) * expected / expected.sum() + UNIFORM_SHARE / len(expected)
    return CallPlan(len(chain), (2 + calls % 2, *(2,) * (calls // 2 - 1)), probabilities)
