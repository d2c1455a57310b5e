"""95% intervals from a variance.

No metric here is bootstrapped by drawing rows again: repeated rows make a covariance smaller in rank and a
neighbour's distance zero, so that the Fréchet distance and all figures of neighbourhoods come out biased by more than
their spread. Smooth functions of the samples' distribution use the infinitesimal jackknife, to which the bootstrap's
variance tends to first order: the variance of the influence of each sample (Efron 1982, chapter 6). Figures of
neighbourhoods use the jackknife that leaves out groups of samples.
"""

import math
from typing import Any

from .figures import Figure

NORMAL_95 = 1.959964
GROUPS = 20  # of the jackknife
STUDENT_95 = 2.093024  # with GROUPS - 1 degrees of freedom
INFINITESIMAL = "infinitesimal jackknife over samples"
BY_GROUPS = f"jackknife over {GROUPS} groups of samples"


def symmetric(
    value: float, variance: float, method: str, *, floor: float = -math.inf, details: dict[str, Any] | None = None
) -> Figure:
    """A figure whose estimate is normal with this variance; the interval ends at the floor of possible values."""
    half = NORMAL_95 * math.sqrt(variance)
    return Figure(float(value), float(max(value - half, floor)), float(value + half), method, details or {})


def share(value: float, variance: float, count: int, method: str, details: dict[str, Any] | None = None) -> Figure:
    """A share in 0..1: Wilson's interval (1927) for as many independent samples as the variance amounts to.

    Args:
        count: of samples that the share is of; what counts where all or none are in, and the variance is 0.
    """
    spread = value * (1 - value)
    effective = min(spread / variance, count) if variance > 0 and spread > 0 else count
    square = STUDENT_95**2
    centre = (value + square / (2 * effective)) / (1 + square / effective)
    half = STUDENT_95 / (1 + square / effective) * math.sqrt(spread / effective + square / (4 * effective**2))
    return Figure(float(value), float(max(centre - half, 0)), float(min(centre + half, 1)), method, details or {})
