"""A learned variance against fixed ones in short chains: the bound in bits/dim on held-out digits.

    python benchmarks/few_step_bound.py MODEL [--images 256] [--draws 4]

MODEL was trained with --variance_type learned_range --objective hybrid. The same network, the same x_t: only the
variance of the reverse step differs. Reported is the mean bound over the images, and, for the difference to the
learned variance, its mean with its standard error (over images; paired). The claim of Nichol & Dhariwal 2021, sec. 3.
"""

import argparse

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from digit_quality import real_digits
from tqdm.auto import tqdm

from ddpm_hf import DDPMPipeline, DDPMScheduler, bits_per_dim
from ddpm_hf.common.machine import usable_cores


class Remembered(torch.nn.Module):
    """The network's outputs at the x_t that it was called with, in order, to use with another variance."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet, self.outputs, self.replayed = unet, [], None

    def forward(self, x_t, t):
        """[N, C, H, W] -> [N, 2C, H, W], or [N, C, H, W], without the variance, where it replays."""
        if self.replayed is None:
            self.outputs.append(self.unet(x_t, t).sample)
            return UNet2DOutput(self.outputs[-1])
        return UNet2DOutput(next(self.replayed)[:, : x_t.shape[1]])

    def replay(self) -> "Remembered":
        """Itself, giving the same outputs again from the first on."""
        self.replayed = iter(self.outputs)
        return self


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
    unet, learned = pipeline.unet.eval(), pipeline.scheduler
    side = unet.config.sample_size
    pixels, _ = real_digits("test", side)
    chosen = np.random.default_rng(0).permutation(len(pixels))[: arguments.images]
    images = torch.from_numpy(pixels[chosen]).float().reshape(-1, 1, side, side) * 2 - 1
    fixed = {
        name: DDPMScheduler.from_config(learned.config, variance_type=name) for name in ("fixed_small", "fixed_large")
    }
    print(f"{len(images)} held-out digits, {arguments.draws} draws of x_t each; bits/dim\n")
    print("| steps | learned | fixed_small | more, ± s.e. | fixed_large | more, ± s.e. |\n|---|---|---|---|---|---|")
    for steps in arguments.steps:
        # evenly spaced and ending at T-1, where the bound's prior term is
        chain = np.linspace(0, len(learned) - 1, steps).round().astype(int).tolist()
        bounds = {name: [] for name in ("learned", *fixed)}  # [draws · parts] of [N]
        parts = list(images.split(64)) * arguments.draws
        for number, part in enumerate(tqdm(parts, desc=f"{steps} steps", leave=False)):
            network = Remembered(unet)
            for name, scheduler in {"learned": learned, **fixed}.items():
                generator = torch.Generator().manual_seed(number)  # the same x_t for each variance
                source = network if name == "learned" else network.replay()
                bounds[name].append(bits_per_dim(source, scheduler, part, chain, generator=generator).total)
        totals = {name: torch.cat(found).reshape(arguments.draws, -1).mean(0) for name, found in bounds.items()}
        cells = [f"{steps}", f"{totals['learned'].mean():.4f}"]
        for name in fixed:
            more = totals[name] - totals["learned"]
            error = more.std() / len(more) ** 0.5
            cells += [
                f"{totals[name].mean():.4f}",
                f"{more.mean():+.4f} ± {error:.4f} ({more.mean() / error:.1f} s.e.)",
            ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
