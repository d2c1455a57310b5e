"""A learned or fitted variance against fixed ones in short chains: the bound in bits/dim on held-out digits.

    python benchmarks/few_step_bound.py MODEL [--images 256] [--draws 4]

MODEL was trained with --variance_type learned_range --objective hybrid, or `ddpm-hf fit-variance` was run for it. The
same network, the same x_t: only the variance of the reverse step differs. Reported is the mean bound over the images,
and, for the difference to the model's own variance, its mean with its standard error (over images; paired). The chains
are evenly spaced, and those of `ddpm-hf fit-timesteps --objective likelihood` for the numbers that it was run for. The
claims of Nichol & Dhariwal 2021, sec. 3, of Bao et al. 2022, and of Watson et al. 2021.
"""

import argparse

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from digit_quality import real_digits
from tqdm.auto import tqdm

from ddpm_hf import DDPMPipeline, DDPMScheduler, bits_per_dim
from ddpm_hf.common.machine import usable_cores
from ddpm_hf.evaluation.model_bound import LIKELIHOOD_TIMESTEPS, even_timesteps


class Remembered(torch.nn.Module):
    """The network's outputs at the x_t that it was called with, in order, to use with another variance."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet, self.outputs, self.replayed = unet, [], None

    def forward(self, x_t, t):
        """[N, C, H, W] -> what the network outputs, or where it replays, [N, C, H, W], without a variance."""
        if self.replayed is None:
            self.outputs.append(self.unet(x_t, t).sample)
            return UNet2DOutput(self.outputs[-1])
        return UNet2DOutput(next(self.replayed)[:, : x_t.shape[1]])

    def replay(self) -> "Remembered":
        """Itself, giving the same outputs again from the first on."""
        self.replayed = iter(self.outputs)
        return self


def fixed(own: DDPMScheduler, name: str) -> DDPMScheduler:
    """The scheduler with a fixed variance."""
    scheduler = DDPMScheduler.from_config(own.config, variance_type=name)
    scheduler.use_x_start_variances(None)
    return scheduler


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--draws", type=int, default=1, help="draws of x_t for each image")
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50, 100, 1000])
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cores())

    pipeline = DDPMPipeline.from_pretrained(arguments.model)
    pipeline.enable_acceleration()
    unet, own = pipeline.unet.eval(), pipeline.scheduler
    if own.variance_type in ("fixed_small", "fixed_large"):
        parser.error(f"the variance of {arguments.model} is fixed; run `ddpm-hf fit-variance {arguments.model}` first")
    side = unet.config.sample_size
    pixels, _ = real_digits("test", side)
    chosen = np.random.default_rng(0).permutation(len(pixels))[: arguments.images]
    images = torch.from_numpy(pixels[chosen]).float().reshape(-1, 1, side, side) * 2 - 1
    names = ("fixed_small", "fixed_large")
    schedulers = {own.variance_type: own, **{name: fixed(own, name) for name in names}}
    print(f"{len(images)} held-out digits, {arguments.draws} draws of x_t each; bits/dim\n")
    print(f"| steps | {own.variance_type} | fixed_small | more, ± s.e. | fixed_large | more, ± s.e. |")
    print("|---|---|---|---|---|---|")
    chains = {}
    for steps in arguments.steps:
        chains[f"{steps}"] = even_timesteps(len(own), steps)
        if str(steps) in (fitted := own.config.get(LIKELIHOOD_TIMESTEPS) or {}):
            chains[f"{steps}, fitted"] = fitted[str(steps)]
    for title, chain in chains.items():
        bounds = {name: [] for name in schedulers}  # [draws · parts] of [N]
        parts = list(images.split(64)) * arguments.draws
        for number, part in enumerate(tqdm(parts, desc=f"{title} steps", leave=False)):
            network = Remembered(unet)
            for name, scheduler in schedulers.items():
                generator = torch.Generator().manual_seed(number)  # the same x_t for each variance
                source = network if scheduler is own else network.replay()
                bounds[name].append(bits_per_dim(source, scheduler, part, chain, generator=generator).total)
        totals = {name: torch.cat(found).reshape(arguments.draws, -1).mean(0) for name, found in bounds.items()}
        ours = totals[own.variance_type]
        cells = [title, f"{ours.mean():.4f} ± {ours.std() / len(ours) ** 0.5:.4f}"]
        for name in names:
            more = totals[name] - ours
            error = more.std() / len(more) ** 0.5
            cells += [
                f"{totals[name].mean():.4f}",
                f"{more.mean():+.4f} ± {error:.4f} ({more.mean() / error:.1f} s.e.)",
            ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
