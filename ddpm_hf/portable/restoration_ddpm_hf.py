"""Methods of restoration: one step of the reverse chain given y = A x_0 + n, with n ~ N(0, σ_y² I).

Each method is a function and a row of `METHODS`. It gets x_t and the network's x̂_0 = E[x_0 | x_t], and returns x_s and
the x̂_0 that takes y into account. Notation: ᾱ_s = 1 at the chain's end; β̃ and c are the variance and the factor of x_0
in q(x_s | x_t, x_0); J = ∂x̂_0/∂x_t, so that Cov[x_0 | x_t] = (1-ᾱ_t)/√ᾱ_t J (Tweedie's formula, twice); z ~ N(0, I).

This file is copied into published repositories: it imports torch and files next to it.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from .linear_ddpm_hf import LinearMap, Operator, conjugate_gradients, inner
from .scheduling_ddpm_hf import DDPMScheduler

PROBED = 1024  # random signs in all that probe J: an image of fewer numbers requires several probes
DECIDED, FEW = 2.0, 40  # with fewer steps, they are not spent on a ρ above this, where x̂_0 hardly varies
ROUND = 5  # steps of a round of `gibbs`
OVERRELAXED = 0.8  # how much of a round's noise is minus that of the one before
LEAST_SIGNAL = 1e-4  # below this ᾱ_t, J is rounding: x̂_0 then hardly depends on x_t


class Options(NamedTuple):
    """Settings of a method; what they mean, `METHODS` says.

    Args:
        eta: how much of the noise is new.
        weight: of the observation against the prior.
        iterations: of conjugate gradients; rounds of `gibbs`, 0 for as many as suit the steps.
    """

    eta: float
    weight: float = 1.0
    iterations: int = 0


@dataclass(frozen=True)
class Problem:
    """What is known: y [N, ...], how it was made, and the model's diffusion."""

    operator: Operator
    y: torch.Tensor
    sigma_y: float
    scheduler: DDPMScheduler
    options: Options
    image: LinearMap  # of latents the image that they stand for; of an image itself

    def error(self, x_start: torch.Tensor) -> torch.Tensor:
        """y - A x, [N, ...]; 0 where nothing is observed."""
        return self.operator.observed(self.y - self.operator.forward(self.image(x_start)))

    def project(self, x_start: torch.Tensor) -> torch.Tensor:
        """The nearest x with A x = y."""
        return x_start + self.operator.pseudo_inverse(self.error(x_start))


@dataclass(frozen=True)
class Moment:
    """A step of the chain, from t to s."""

    x_t: torch.Tensor  # [N, C, H, W]
    x_start: torch.Tensor  # x̂_0, clipped as the scheduler's config says, [N, C, H, W]
    epsilon: torch.Tensor  # ε̂ that belongs to it
    t: int
    alpha_bar_t: float
    alpha_bar_s: float
    posterior_variance: float  # β̃
    from_x0: float  # c
    noise: Callable[[], torch.Tensor]  # z [N, C, H, W], other numbers each time
    vector_jacobian: LinearMap  # v -> Jᵀ v

    @property
    def last(self) -> bool:
        """Whether x_s is x_0."""
        return self.alpha_bar_s == 1

    @property
    def gain(self) -> float:
        """(1-ᾱ_t)/√ᾱ_t, so that Cov[x_0 | x_t] is `gain` · J."""
        return (1 - self.alpha_bar_t) / math.sqrt(self.alpha_bar_t)

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        """Cov[x_0 | x_t] v, [N, C, H, W]."""
        return self.gain * self.vector_jacobian(v)


class Step(NamedTuple):
    """x_s, and the x̂_0 given y that it rests on; [N, C, H, W] each."""

    sample: torch.Tensor
    x_start: torch.Tensor


StepMethod: TypeAlias = Callable[[Problem, Moment], Step]

# Steps down


def renoised(moment: Moment, x_start: torch.Tensor, epsilon: torch.Tensor, new: float) -> torch.Tensor:
    """√ᾱ_s x̂_0 + √(1-ᾱ_s) (√(1-ζ) ε + √ζ z), with ζ = `new`."""
    if moment.last:
        return x_start
    level = math.sqrt(1 - moment.alpha_bar_s)
    mixed = math.sqrt(1 - new) * epsilon + (math.sqrt(new) * moment.noise() if new else 0.0)
    return math.sqrt(moment.alpha_bar_s) * x_start + level * mixed


def ddim_step(
    problem: Problem,
    moment: Moment,
    x_start: torch.Tensor,
    spread: LinearMap | None = None,
) -> torch.Tensor:
    """DDIM's step (Song et al. 2021, Eq. 12) with the ε that x̂_0 implies; η = 1 samples q(x_s | x_t, x̂_0).

    Args:
        spread: z -> noise of the step's covariance, where that is not β̃ I; for η = 1.
    """
    if moment.last:
        return x_start
    eta = problem.options.eta
    variance = eta**2 * moment.posterior_variance
    epsilon = problem.scheduler.predict_epsilon(x_start, moment.t, moment.x_t)
    mean = math.sqrt(moment.alpha_bar_s) * x_start + math.sqrt(1 - moment.alpha_bar_s - variance) * epsilon
    if not eta:
        return mean
    return mean + (math.sqrt(variance) * moment.noise() if spread is None else spread(moment.noise()))


# Methods


def ddnm(problem: Problem, moment: Moment) -> Step:
    """Range and null space (Wang et al. 2023): what y says is set, the rest is the network's.

    With noise, what y says of a singular direction has the deviation √ᾱ_s σ_y/S in x_s. As long as that is less
    than x_s's own √(1-ᾱ_s), y is taken and noise is added for the rest; later, y - A x̂_0 is a share of the noise (sec.
    3.3 there; Kawar et al. 2022, Eq. 7). η is the share of new noise in x_s.
    """
    operator, sigma = problem.operator, problem.sigma_y
    signal, level, eta = math.sqrt(moment.alpha_bar_s), math.sqrt(1 - moment.alpha_bar_s), problem.options.eta
    old = math.sqrt(1 - eta**2)
    if not sigma:
        x_start = problem.project(moment.x_start)
        return Step(renoised(moment, x_start, moment.epsilon, eta**2), x_start)

    def brought(s: torch.Tensor) -> torch.Tensor:
        return torch.where(s > 0, signal * sigma / s.clamp(min=1e-12), 0.0)

    def correction(s: torch.Tensor) -> torch.Tensor:
        return torch.where(brought(s) <= level, 1.0, old * level / brought(s)) / s

    def new_noise(s: torch.Tensor) -> torch.Tensor:
        return eta * torch.where(brought(s) <= level, (level**2 - brought(s) ** 2).clamp(min=0).sqrt(), level)

    def old_noise(s: torch.Tensor) -> torch.Tensor:
        return old * torch.where(brought(s) <= level, (level**2 - brought(s) ** 2).clamp(min=0).sqrt(), 0.0)

    x_start = moment.x_start + operator.from_observation(problem.error(moment.x_start), correction)  # type: ignore[attr-defined]
    x_s = signal * x_start
    if not moment.last:
        x_s = x_s + operator.reweight(moment.noise(), new_noise)  # type: ignore[attr-defined]
        x_s = x_s + operator.reweight(moment.epsilon, old_noise)  # type: ignore[attr-defined]
    return Step(x_s, x_start)


def pigdm(problem: Problem, moment: Moment) -> Step:
    """Pseudo-inverse guidance (Song et al. 2023): p(y | x_t) by Cov[x_0 | x_t] = r² I, and its gradient through x̂_0.

    r² is the mean of the analytic covariance's diagonal, from one random probe of J (Hutchinson 1990). The noise
    has the covariance of x_0 given x_t and y in it, c² r² σ_y²/(r² S² + σ_y²), where A's SVD is known.
    """
    variance = diagonal(moment)
    residual = problem.error(moment.x_start)
    ratio = problem.sigma_y**2 / variance if problem.sigma_y else 0.0
    back = problem.operator.regularized_inverse(residual, ratio)  # r² Aᵀ(r² AAᵀ + σ²)⁻¹ r
    shift = back if moment.alpha_bar_t < LEAST_SIGNAL else moment.covariance(back) / variance
    x_start = problem.scheduler.clip(moment.x_start + shift)
    return Step(ddim_step(problem, moment, x_start, spread_given_y(problem, moment, variance)), x_start)


def mmps(problem: Problem, moment: Moment) -> Step:
    """Moment matching (Rozet et al. 2024): p(y | x_t) by the whole Cov[x_0 | x_t], in products with J alone.

    A Cov Aᵀ + σ_y² I is inverted by a few conjugate gradients, a gradient of the network each.
    """
    if moment.alpha_bar_t < LEAST_SIGNAL:
        return pigdm(problem, moment)
    operator, residual = problem.operator, problem.error(moment.x_start)
    floor = max(problem.sigma_y**2, 1e-6)

    def matrix(u: torch.Tensor) -> torch.Tensor:
        return operator.observed(operator.forward(moment.covariance(operator.adjoint(u)))) + floor * u

    solution = conjugate_gradients(matrix, residual, problem.options.iterations)
    x_start = problem.scheduler.clip(moment.x_start + moment.covariance(operator.adjoint(solution)))
    return Step(ddim_step(problem, moment, x_start, spread_given_y(problem, moment, diagonal(moment))), x_start)


def diffpir(problem: Problem, moment: Moment) -> Step:
    """A proximal step (Zhu et al. 2023): x̂_0 is moved to argmin ‖y - A x‖² + ρ ‖x - x̂_0‖², ρ = λ σ_y² ᾱ_t/(1-ᾱ_t)."""
    ratio = problem.options.weight * problem.sigma_y**2 * moment.alpha_bar_t / (1 - moment.alpha_bar_t)
    residual = problem.error(moment.x_start)
    x_start = moment.x_start + problem.operator.regularized_inverse(residual, ratio)
    epsilon = problem.scheduler.predict_epsilon(x_start, moment.t, moment.x_t)
    return Step(renoised(moment, x_start, epsilon, problem.options.eta), x_start)


def dps(problem: Problem, moment: Moment) -> Step:
    """Diffusion posterior sampling (Chung et al. 2023): an ancestral step less ζ times the gradient of ‖y - A x̂_0‖."""
    with torch.enable_grad():
        x = moment.x_start.detach().requires_grad_(True)
        residual = problem.error(x)
        length = inner(residual, residual).sqrt()
        down = torch.autograd.grad(length.sum(), x)[0]  # of x̂_0
    shift = problem.options.weight * torch.nan_to_num(moment.vector_jacobian(down))
    return Step(ddim_step(problem, moment, moment.x_start) - shift, moment.x_start)


def repaint(problem: Problem, moment: Moment) -> Step:
    """RePaint (Lugmayr et al. 2022): an unconditional step, in which what is known is replaced by y, noised to s.

    Time travel (its resampling) brings the two parts into agreement.
    """
    known = problem.operator.pseudo_inverse(problem.y)
    if not moment.last:
        known = math.sqrt(moment.alpha_bar_s) * known + math.sqrt(1 - moment.alpha_bar_s) * moment.noise()
    x_s = ddim_step(problem, moment, moment.x_start)
    return Step(x_s + problem.operator.pseudo_inverse(problem.operator.forward(known - x_s)), moment.x_start)


def gibbs(problem: Problem, moment: Moment) -> Step:
    """A step of the unconditional chain, as split Gibbs sampling takes them (Wu et al. 2024; Xu & Chi 2024).

    A round goes from x_u down to x_0, a sample of p(x_0 | x_u), and `renoised_given_y` then samples the next x_u given
    x_0 and y. No p(y | x_t) is approximated. The noise is that of `fixed_large`, 1 - ᾱ_t/ᾱ_s: what is too much of it
    is removed by later steps where the network knows x_0, and what is too little would be missing where it does not.
    """
    if moment.last:
        return Step(moment.x_start, moment.x_start)
    mean = math.sqrt(moment.alpha_bar_s) * moment.x_start
    mean = mean + math.sqrt(1 - moment.alpha_bar_s - moment.posterior_variance) * moment.epsilon
    return Step(mean + math.sqrt(1 - moment.alpha_bar_t / moment.alpha_bar_s) * moment.noise(), moment.x_start)


def renoised_given_y(
    problem: Problem, x_start: torch.Tensor, alpha_bar: float, noise: torch.Tensor, before: tuple[torch.Tensor, float]
) -> torch.Tensor:
    """x_u = √ᾱ (x_0 + ρ ε) with ε sampled given x_0 and y, [N, C, H, W].

    Of a singular direction S, y's noise is thought of as S times the noise ρ ε of x_u, and the rest. As long as
    ρ ≤ σ_y/S, p(x_0) p(y | x_0) is then what the rounds sample, whatever ρ is; with a larger ρ, y is as if it had a
    noise of ρ S. While ρ comes down, overrelaxation (Adler 1981) doubles the speed of what changes slowly: ε is mostly
    minus the noise that the x_u of this round has given x_0 and y, which leaves the distribution as it is. In the last
    rounds it would enlarge the error of x_0's steps.

    Args:
        before: x_u of the round that led to x_0, and its ᾱ.
    """
    operator, sigma = problem.operator, problem.sigma_y
    residual, (x_before, alpha_bar_before) = problem.error(x_start), before
    over = OVERRELAXED if alpha_bar > alpha_bar_before else 0.0

    def gain(s: torch.Tensor, rho: float) -> torch.Tensor:
        return ((rho / sigma * s) ** 2).clamp(max=1) if sigma else (s > 0).to(s.dtype)

    def moved(rho: float) -> torch.Tensor:
        return x_start + operator.from_observation(residual, lambda s: gain(s, rho) / s)  # type: ignore[attr-defined]

    def reweight(x: torch.Tensor, factor: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return operator.reweight(x, factor)  # type: ignore[attr-defined]

    rho, rho_before = (math.sqrt((1 - one) / one) for one in (alpha_bar, alpha_bar_before))
    free = lambda s: (1 - gain(s, rho_before)).sqrt()  # noqa: E731  # deviation of x_u in ρ
    old = reweight(
        x_before / math.sqrt(alpha_bar_before) - moved(rho_before),
        lambda s: torch.where(free(s) > 0, -over / (rho_before * free(s).clamp(min=1e-6)), 0.0),
    )
    new = reweight(noise, lambda s: torch.where(free(s) > 0, math.sqrt(1 - over**2), 1.0))
    epsilon = reweight(old + new, lambda s: (1 - gain(s, rho)).sqrt())
    return math.sqrt(alpha_bar) * (moved(rho) + rho * epsilon)


def diagonal(moment: Moment) -> torch.Tensor:
    """r² [N, 1, 1, 1], the mean of Cov[x_0 | x_t]'s diagonal; at most 1 - ᾱ_t, its value for data of unit variance."""
    most = 1 - moment.alpha_bar_t
    if moment.alpha_bar_t < LEAST_SIGNAL:
        return moment.x_t.new_full((len(moment.x_t), 1, 1, 1), most)
    size = moment.x_t[0].numel()
    probes = [torch.sign(moment.noise()) for _ in range(math.ceil(PROBED / size))]
    estimate = sum(inner(probe, moment.covariance(probe)) for probe in probes) / (size * len(probes))
    return torch.where(estimate.isfinite(), estimate.clamp(1e-3 * most, most), most)


def spread_given_y(
    problem: Problem, moment: Moment, variance: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """z -> noise of covariance β̃ I + c² Cov[x_0 | x_t, y]; None where A's SVD is unknown, or η is not 1."""
    operator, sigma = problem.operator, problem.sigma_y
    if not operator.has_svd or problem.options.eta != 1:
        return None

    def deviation(s: torch.Tensor) -> torch.Tensor:
        given_y = variance / (1 + variance * s * s / sigma**2) if sigma else torch.where(s > 0, 0.0, variance)
        return (moment.posterior_variance + moment.from_x0**2 * given_y).sqrt()

    return lambda z: operator.reweight(z, deviation)  # type: ignore[attr-defined]


class Method(NamedTuple):
    """A method of restoration.

    Args:
        step: its function.
        title: for people, with its source.
        defaults: of its settings; `eta` is DDIM's η, but the share of new noise where `step` says so.
        reads: which of the settings it has a use for.
        gradients: whether it differentiates the network: a step then costs two to three times as much.
        exact: whether it takes y as exact, so that y's noise stays in the image.
        noise_needs_svd: whether σ_y > 0 requires an operator with a known SVD; with `rounds`, it is always required.
        latents: whether it works for models of latents, whose observations are not linear in x_0.
        time_travel: its usual one, (length, repeats).
        second_rho: with few steps, ρ = √((1-ᾱ)/ᾱ) at the second timestep at most; those after it are evenly spaced.
        rounds: whether it takes rounds of steps down to x_0, and what the way up is: (problem, x_0, ᾱ_u, z, (x_u and
            ᾱ_u of the round before)) -> x_u.
    """

    step: StepMethod
    title: str
    defaults: Options
    reads: tuple[str, ...]
    gradients: bool = False
    exact: bool = False
    noise_needs_svd: bool = False
    latents: bool = False
    time_travel: tuple[int, int] = (1, 1)
    second_rho: float = math.inf
    rounds: Callable[..., torch.Tensor] | None = None


METHODS: dict[str, Method] = {
    "ddnm": Method(
        ddnm, "range and null space (Wang et al. 2023)", Options(0.85), ("eta",), noise_needs_svd=True,
        second_rho=DECIDED,
    ),
    "pigdm": Method(pigdm, "pseudo-inverse guidance (Song et al. 2023)", Options(1.0), ("eta",), gradients=True),
    "mmps": Method(
        mmps, "moment matching (Rozet et al. 2024)", Options(1.0, iterations=5), ("eta", "iterations"), gradients=True
    ),
    "diffpir": Method(
        diffpir, "proximal steps (Zhu et al. 2023)", Options(1.0), ("eta", "weight"), second_rho=DECIDED
    ),
    "dps": Method(
        dps, "posterior sampling (Chung et al. 2023)", Options(1.0), ("eta", "weight"), gradients=True, latents=True
    ),
    "gibbs": Method(
        gibbs, "split Gibbs sampling (Wu et al. 2024)", Options(1.0), ("iterations",), noise_needs_svd=True,
        rounds=renoised_given_y,
    ),
    "repaint": Method(
        repaint, "resampling (Lugmayr et al. 2022)", Options(1.0), ("eta",), exact=True, time_travel=(10, 10)
    ),
}  # fmt: skip


# Around the chain


def estimate_sigma(y: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """σ_y of images y [N, C, H, W], from the median of their finest diagonal differences (Donoho & Johnstone 1994).

    Fine texture counts as noise, so it is rather too high.

    Args:
        mask: True where y is observed, to broadcast against y.

    Raises:
        ValueError: not images, or none with neighbours that are observed.
    """
    if y.ndim != 4 or min(y.shape[-2:]) < 2:
        raise ValueError("sigma_y cannot be estimated from an observation that is not an image; give it")
    detail = (y[..., :-1, :-1] - y[..., 1:, :-1] - y[..., :-1, 1:] + y[..., 1:, 1:]) / 2
    if mask is not None:
        shown = mask.expand(y.shape)
        detail = detail[shown[..., :-1, :-1] & shown[..., 1:, :-1] & shown[..., :-1, 1:] & shown[..., 1:, 1:]]
    if not detail.numel():
        raise ValueError("sigma_y cannot be estimated: the mask shows no 2x2 pixels together; give it")
    return float(detail.abs().flatten().float().median()) / 0.6745


def plan_chain(timesteps: list[int], length: int, repeats: int) -> list[tuple[int, int, int]]:
    """The steps of a chain with time travel: (t, s, u) goes down from t to s, and is then noised up to u ≥ s.

    Args:
        timesteps: descending.
        length: after so many steps down, the chain goes back up by as many and takes them again.
        repeats: how often these steps are taken altogether; 1 is no time travel.

    >>> plan_chain([3, 2, 1, 0], 2, 2)
    [(3, 2, 2), (2, 1, 3), (3, 2, 2), (2, 1, 1), (1, 0, 0), (0, -1, -1)]
    """
    chain, plan = [*timesteps, -1], []
    for first in range(0, len(timesteps), length):
        block = [(chain[i], chain[i + 1]) for i in range(first, min(first + length, len(timesteps)))]
        again = repeats - 1 if block[-1][1] >= 0 else 0  # from the data there is no way back
        for left in range(again, -1, -1):
            *within, (t, s) = block
            plan += [(one, following, following) for one, following in within] + [(t, s, block[0][0] if left else s)]
    return plan


def plan_rounds(top: float, least: float, calls: int, rounds: int = 0) -> list[tuple[float, int]]:
    """The rounds of `gibbs`: from which angle arctan ρ each goes down, and in how many steps.

    They come down evenly from the top, and the last fifth stays at the least angle.

    Args:
        top, least: angles in radians.
        calls: steps in all.
        rounds: 0 for rounds of about `ROUND` steps.

    >>> [(round(angle, 2), steps) for angle, steps in plan_rounds(1.5, 0.3, 12, 5)]
    [(1.5, 2), (1.1, 3), (0.7, 2), (0.3, 3), (0.3, 2)]
    """
    rounds = min(calls, rounds or max(1, round(calls / ROUND)))
    falling = rounds - rounds // 5
    angles = [top - (top - least) * i / max(1, falling - 1) for i in range(falling)] + [least] * (rounds // 5)
    ends = [round(i * calls / rounds) for i in range(rounds + 1)]
    return [(angle, after - before) for angle, (before, after) in zip(angles, itertools.pairwise(ends))]


def tiled(predict: Callable[..., Any], size: tuple[int, int], overlap: float = 0.5) -> Callable[..., torch.Tensor]:
    """`predict` for images larger than the model's: of overlapping tiles, blended by weights that fall to the edges.

    Every tile sees its neighbours' pixels at each step, so that the tiles agree (Bar-Tal et al. 2023).

    Args:
        predict: (x_t [N, C, h, w], t, **conditioning) -> output [N, C', h, w].
        size: (h, w) of the model.
        overlap: of neighbouring tiles, as a share of their side.
    """

    def places(whole: int, part: int) -> list[int]:
        count = 1 + max(0, math.ceil((whole - part) / max(1, round(part * (1 - overlap)))))
        return [round(i * (whole - part) / max(1, count - 1)) for i in range(count)]

    def window(part: int, like: torch.Tensor) -> torch.Tensor:
        place = torch.arange(part, dtype=like.dtype, device=like.device) + 0.5
        return torch.minimum(place, part - place)

    def predict_tiles(x: torch.Tensor, t: Any, **conditioning: torch.Tensor) -> torch.Tensor:
        (height, width), total, weights = size, 0.0, 0.0
        weight = window(height, x)[:, None] * window(width, x)  # [h, w]
        for top in places(x.shape[2], height):
            for left in places(x.shape[3], width):
                output = predict(x[:, :, top : top + height, left : left + width], t, **conditioning)
                around = (left, x.shape[3] - width - left, top, x.shape[2] - height - top)
                total = total + torch.nn.functional.pad(output * weight, around)
                weights = weights + torch.nn.functional.pad(weight, around)
        return total / weights

    return predict_tiles
