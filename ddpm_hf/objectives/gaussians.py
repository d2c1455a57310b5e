"""Closed forms on Gaussians that the objectives are made of. Imports nothing of ddpm_hf."""

import math

import torch

LOG2 = math.log(2.0)


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """The mean over all dimensions but the first: [N, ...] -> [N].

    >>> mean_flat(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    tensor([2., 6.])
    """
    return x.mean(dim=tuple(range(1, x.ndim)))


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean1, e^log_variance1) ‖ N(mean2, e^log_variance2)) elementwise, in nats; the shapes broadcast.

    >>> zero = torch.zeros(1)
    >>> normal_kl(zero + 2, zero, zero, zero)  # half the squared distance
    tensor([2.])
    """
    ratio = log_variance1 - log_variance2
    return 0.5 * (-1.0 - ratio + torch.exp(ratio) + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def approx_standard_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The standard normal CDF in its tanh form, as published likelihoods have it (Page 1977; Ho et al.'s code)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """The log-density of x under N(mean, e^log_variance) elementwise, in nats; the shapes broadcast.

    >>> zero = torch.zeros(1)
    >>> gaussian_log_likelihood(zero + 1, zero, zero)
    tensor([-1.4189])
    """
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * torch.exp(-log_variance))


def discretized_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-probability, in nats, of x's bin of width 2/255 under N(mean, e^(2·log_scale)) (Ho et al. 2020, Eq. 13).

    Args:
        x: images in [-1, 1], on the 256 levels of a byte; the outermost bins reach to infinity.
        mean, log_scale: of the Gaussian; broadcast against x.

    Returns: the log-probability of each element, floored at log(1e-12), in x's shape and dtype.
    """
    centered = x - mean
    inverse_scale = torch.exp(-log_scale)
    cdf_above = approx_standard_normal_cdf(inverse_scale * (centered + 1.0 / 255.0))
    cdf_below = approx_standard_normal_cdf(inverse_scale * (centered - 1.0 / 255.0))
    probability = torch.where(x < -0.999, cdf_above, torch.where(x > 0.999, 1.0 - cdf_below, cdf_above - cdf_below))
    return torch.log(probability.clamp(min=1e-12))
