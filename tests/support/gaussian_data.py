"""Gaussian data under a diffusion: the exact model and the exact bound of each image are known in closed form."""

import math
from types import SimpleNamespace

import torch

LOG2 = math.log(2)


class GaussianData:
    """x_0 ~ N(0, v), in closed form, under a scheduler's chain."""

    def __init__(self, scheduler, v):
        self.alphas_cumprod, self.v = scheduler.exact_tables.alphas_cumprod.tolist(), v

    def alpha_bar(self, t):
        return 1.0 if t < 0 else self.alphas_cumprod[t]

    def marginal(self, t):
        return self.alpha_bar(t) * self.v + 1 - self.alpha_bar(t)

    def beta(self, t, s):
        return 1 - self.alpha_bar(t) / self.alpha_bar(s)

    def reverse_variance(self, t, s):
        return self.marginal(s) * self.beta(t, s) / self.marginal(t)

    def reverse_mean(self, x_t, t, s):
        return math.sqrt(self.alpha_bar(t) / self.alpha_bar(s)) * self.marginal(s) / self.marginal(t) * x_t

    def posterior_variance(self, t, s):
        return (1 - self.alpha_bar(s)) / (1 - self.alpha_bar(t)) * self.beta(t, s)

    def epsilon(self, x_t, t):
        return math.sqrt(1 - self.alpha_bar(t)) / self.marginal(t) * x_t

    def draw(self, n, *shape, seed=0):
        """The distribution's quantiles in a random order: an even sample has less error than a random one."""
        count = n * math.prod(shape)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
        return math.sqrt(self.v) * quantiles[order].reshape(n, *shape)

    def expected_bpd(self):
        """Entropy of x_0 plus KL(q(x_T) ‖ N(0, 1)), in bits per dimension."""
        M = self.marginal(len(self.alphas_cumprod) - 1)
        return (0.5 * math.log(2 * math.pi * math.e * self.v) + 0.5 * (M - 1 - math.log(M))) / LOG2


def within(samples, expected, standard_errors=4.0):
    """Whether the mean of independent samples agrees with an expectation."""
    error = samples.std() / math.sqrt(len(samples))
    return abs(samples.mean().item() - expected) <= standard_errors * error.item() + 1e-12


class ExactNetwork(torch.nn.Module):
    """E[ε | x_t] and the exact log-variance of the step from t to t-1, for the timesteps [N] of each image."""

    dtype = torch.float64

    def __init__(self, scheduler, data):
        super().__init__()
        T = len(scheduler)
        abar = scheduler.exact_tables.alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        M, M_before = (a * data.v + 1 - a for a in (abar, before))
        self.factor = (1 - abar).sqrt() / M  # [T]
        self.variance = M_before * (1 - abar / before) / M  # [T]
        self.mean = (abar / before).sqrt() * M_before / M  # [T], times x_t
        self.abar, self.timesteps = abar, torch.arange(T)

    def forward(self, x_t, t):
        t = t.reshape(-1, *[1] * (x_t.ndim - 1))
        output = torch.cat([self.factor[t] * x_t, self.variance[t].log().expand_as(x_t)], dim=1)
        return SimpleNamespace(sample=output)

    def expected_terms(self, scheduler, x_0):
        """E[L_t | x_0] over the noise, bits/dim [N, T], the decoder's a density: by the moments of Gaussians."""
        x = x_0.flatten(1)[..., None]  # [N, D, 1]
        one = torch.ones(len(self.timesteps), 1, dtype=torch.float64)
        zero = torch.zeros_like(one)
        posterior = scheduler.q_posterior_mean_variance(one, zero, self.timesteps)
        from_x0, small = posterior.mean.flatten(), posterior.log_variance.flatten().exp()  # [T]
        from_x_t = scheduler.q_posterior_mean_variance(zero, one, self.timesteps).mean.flatten()
        c = from_x_t - self.mean
        squared = ((from_x0 + c * self.abar.sqrt()) * x) ** 2 + c**2 * (1 - self.abar)  # of the means' difference
        ratio = small / self.variance
        kl = 0.5 * (ratio - 1 - ratio.log() + squared / self.variance)  # [N, D, T]
        m, v = self.mean[0], self.variance[0]
        error = ((1 - m * self.abar[0].sqrt()) * x[..., 0]) ** 2 + m**2 * (1 - self.abar[0])
        kl[..., 0] = 0.5 * (math.log(2 * math.pi) + v.log() + error / v)
        return kl.mean(dim=1) / LOG2
