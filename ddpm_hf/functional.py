"""Closed forms on Gaussians, by the name that they are imported by: they lie in `objectives.gaussians`."""

from .objectives.gaussians import LOG2 as LOG2
from .objectives.gaussians import approx_standard_normal_cdf as approx_standard_normal_cdf
from .objectives.gaussians import discretized_gaussian_log_likelihood as discretized_gaussian_log_likelihood
from .objectives.gaussians import mean_flat as mean_flat
from .objectives.gaussians import normal_kl as normal_kl
