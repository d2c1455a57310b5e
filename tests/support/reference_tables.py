"""The tables of DDPM to 50 digits, from each schedule's definition, and the same tables as a scheduler gives them.

Shared by `tests/portable/test_schedules.py` and `benchmarks/table_precision.py`. Nothing of the package's own formulas
is used for the reference: it multiplies 1-β out and subtracts, which 50 digits can afford.
"""

from itertools import pairwise

import mpmath as mp
import numpy as np
import torch

from ddpm_hf import DDPMScheduler

mp.mp.dps = 50

BETA_START, BETA_END = 0.0001, 0.02
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")


# β by definition: name -> function(T) -> list of mpf


def _linspace(start, end, n):
    return [start + (end - start) * i / (n - 1) if n > 1 else start for i in range(n)]


def _from_alpha_bar(alpha_bar, T):
    values = [alpha_bar(mp.mpf(i) / T) for i in range(T + 1)]
    return [min(1 - after / before, mp.mpf("0.999")) for before, after in pairwise(values)]


def _sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def _cosine_alpha_bar(t):
    return mp.cos((t + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2) ** 2


def _sigmoid_alpha_bar(t):
    return (_sigmoid(mp.mpf(3)) - _sigmoid(6 * t - 3)) / (_sigmoid(mp.mpf(3)) - _sigmoid(mp.mpf(-3)))


def _laplace_alpha_bar(t):
    half = mp.mpf("0.5")
    sign = 1 if t <= half else -1
    snr = mp.exp(-half * sign * mp.log(1 - 2 * abs(half - t) + mp.mpf("1e-6")))
    return mp.sqrt(snr / (1 + snr))


def _warmup(T, steps, start, end):
    return _linspace(start, end, steps) + [end] * (T - steps)


def reference_betas(name: str, T: int) -> list:
    """β_0..β_{T-1} of a schedule, from its definition."""
    start, end = mp.mpf(BETA_START), mp.mpf(BETA_END)
    definitions = {
        "linear": lambda: _linspace(start, end, T),
        "scaled_linear": lambda: [root**2 for root in _linspace(mp.sqrt(start), mp.sqrt(end), T)],
        "squaredcos_cap_v2": lambda: _from_alpha_bar(_cosine_alpha_bar, T),
        "sigmoid": lambda: [start + (end - start) * _sigmoid(x) for x in _linspace(mp.mpf(-6), mp.mpf(6), T)],
        "sigmoid_alpha_bar": lambda: _from_alpha_bar(_sigmoid_alpha_bar, T),
        "laplace": lambda: _from_alpha_bar(_laplace_alpha_bar, T),
        "const": lambda: [end] * T,
        "jsd": lambda: [mp.mpf(1) / (T - t) for t in range(T)],
        "warmup10": lambda: _warmup(T, T // 10, start, end),
        "warmup50": lambda: _warmup(T, T // 2, start, end),
    }
    return definitions[name]()


def reference_rescaled(betas: list) -> list:
    """Lin et al. 2023, Alg. 1, as printed: shift √ᾱ so that it ends at 0, scale so that it starts where it did."""
    roots = [mp.sqrt(a) for a in reference_alpha_bars(betas)[1:]]
    roots = [(root - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for root in roots]
    ratios = [(after / before) ** 2 for before, after in pairwise(roots)]
    return [betas[0], *(1 - ratio for ratio in ratios)]


def reference_alpha_bars(betas: list) -> list:
    """ᾱ at t = -1..T-1, so ᾱ_t is at index t + 1."""
    alpha_bars = [mp.mpf(1)]
    for beta in betas:
        alpha_bars.append(alpha_bars[-1] * (1 - beta))
    return alpha_bars


def checked_timesteps(T: int) -> list[int]:
    """The ends, the middle (where some schedules have a kink) and 60 spread timesteps."""
    spread = np.linspace(0, T - 1, 60).astype(int).tolist()
    near = [*range(20), *range(T - 20, T), *range(T // 2 - 3, T // 2 + 4), *range(T // 10 - 3, T // 10 + 4)]
    return sorted({t for t in spread + near if 0 <= t < T})


def _divide(a, b):
    return a / b if b != 0 else mp.inf


def reference_tables(betas: list, timesteps: list[int], previous: list[int]) -> dict[str, list]:
    """Every table at the timesteps t, for reverse steps to s = `previous`: name -> values to 50 digits."""
    alpha_bars = reference_alpha_bars(betas)
    rows = [_reference_row(betas, alpha_bars, t, s) for t, s in zip(timesteps, previous)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _reference_row(betas, alpha_bars, t, s):
    a_t, a_s, a_before = alpha_bars[t + 1], alpha_bars[s + 1], alpha_bars[t]
    beta = 1 - a_t / a_s  # of the step from s to t
    posterior_variance = (1 - a_s) / (1 - a_t) * beta
    if s >= 0:
        clipped = posterior_variance
    elif t == len(betas) - 1:
        clipped = beta
    else:
        a_into = alpha_bars[min(2 * t + 1, len(betas) - 1) + 1]
        clipped = (1 - a_t) / (1 - a_into) * (1 - a_into / a_t)
    # q(x_{t-1} | x_t, x_0), which the output of posterior_mean is the mean of
    mu_x0 = mp.sqrt(a_before) * betas[t] / (1 - a_t)
    mu_xt = mp.sqrt(1 - betas[t]) * (1 - a_before) / (1 - a_t)
    large = clipped if s < 0 else beta
    return {
        "beta": betas[t],
        "alpha": 1 - betas[t],
        "alpha_bar": a_t,
        "sqrt_alpha_bar": mp.sqrt(a_t),
        "sqrt_one_minus_alpha_bar": mp.sqrt(1 - a_t),
        "one_minus_alpha_bar": 1 - a_t,
        "log_one_minus_alpha_bar": mp.log(1 - a_t),
        "step_scale": mp.sqrt(1 - betas[t]),
        "step_variance": betas[t],
        "log_step_variance": mp.log(betas[t]),
        "posterior_mean_from_x0": mp.sqrt(a_s) * beta / (1 - a_t),
        "posterior_mean_from_sample": mp.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t),
        "posterior_variance": posterior_variance,
        "log_posterior_variance": mp.log(clipped),
        "large_variance": large,
        "log_large_variance": mp.log(large),
        "epsilon_from_sample": 1 / mp.sqrt(1 - a_t),
        "epsilon_from_x0": -mp.sqrt(a_t) / mp.sqrt(1 - a_t),
        "x0_from_sample, epsilon": _divide(1, mp.sqrt(a_t)),
        "x0_from_output, epsilon": _divide(-mp.sqrt(1 - a_t), mp.sqrt(a_t)),
        "x0_from_sample, sample": mp.mpf(0),
        "x0_from_output, sample": mp.mpf(1),
        "x0_from_sample, v_prediction": mp.sqrt(a_t),
        "x0_from_output, v_prediction": -mp.sqrt(1 - a_t),
        "x0_from_sample, posterior_mean": -mu_xt / mu_x0,
        "x0_from_output, posterior_mean": 1 / mu_x0,
    }


def our_tables(config: dict, timesteps: list[int], previous: list[int], dtype: torch.dtype) -> dict[str, list[float]]:
    """The same tables as `DDPMScheduler`'s public methods give them for samples of a dtype."""
    t, s = torch.tensor(timesteps), torch.tensor(previous)
    one, zero = torch.ones(len(timesteps), 1, dtype=dtype), torch.zeros(len(timesteps), 1, dtype=dtype)
    scheduler = DDPMScheduler(**config)
    marginal, step = scheduler.q_mean_variance(one, t), scheduler.q_step_mean_variance(one, t)
    posterior = scheduler.q_posterior_mean_variance(one, zero, t, s)
    large = DDPMScheduler(**config, variance_type="fixed_large").p_mean_variance(zero, t, zero, s)
    tables = {
        "sqrt_alpha_bar": scheduler.add_noise(one, zero, t),
        "sqrt_one_minus_alpha_bar": scheduler.add_noise(zero, one, t),
        "one_minus_alpha_bar": marginal.variance,
        "log_one_minus_alpha_bar": marginal.log_variance,
        "step_scale": step.mean,
        "step_variance": step.variance,
        "log_step_variance": step.log_variance,
        "posterior_mean_from_x0": posterior.mean,
        "posterior_mean_from_sample": scheduler.q_posterior_mean_variance(zero, one, t, s).mean,
        "posterior_variance": posterior.variance,
        "log_posterior_variance": posterior.log_variance,
        "large_variance": large.variance,
        "log_large_variance": large.log_variance,
        "epsilon_from_sample": scheduler.predict_epsilon(zero, t, one),
        "epsilon_from_x0": scheduler.predict_epsilon(one, t, zero),
    }
    if dtype == torch.float64:  # these are attributes, and float64
        tables |= {
            "beta": scheduler.exact_tables.betas[t],
            "alpha": scheduler.exact_tables.alphas[t],
            "alpha_bar": scheduler.exact_tables.alphas_cumprod[t],
        }
    for prediction_type in PREDICTION_TYPES:
        scheduler = DDPMScheduler(**config, prediction_type=prediction_type)
        tables[f"x0_from_sample, {prediction_type}"] = scheduler.predict_original_sample(zero, t, one)
        tables[f"x0_from_output, {prediction_type}"] = scheduler.predict_original_sample(one, t, zero)
    return {name: table.flatten().tolist() for name, table in tables.items()}


def relative_errors(tables: dict[str, list[float]], reference: dict[str, list]) -> dict[str, float]:
    """The largest relative error of each table over its finite, nonzero entries; a zero must be met exactly.

    A logarithm crosses zero, so its error is taken relative to max(1, |log|).
    """
    errors = {}
    for name, table in tables.items():
        worst = 0.0
        for value, exact in zip(table, reference[name]):
            if mp.isinf(exact):
                continue
            if exact == 0:
                error = 0.0 if value == 0 else float("inf")
            else:
                scale = max(1, abs(exact)) if name.startswith("log_") else abs(exact)
                error = float(abs(mp.mpf(value) - exact) / scale)
            worst = error if not error <= worst else worst  # a nan is the worst of all
        errors[name] = worst
    return errors
