"""Bits/dim of held-out digits: by model and variance type, and whether estimates from few network calls are right.

    python benchmarks/likelihood.py MODEL [MODEL ...] [--images 128] [--calls 50] [--repeats 100] [--output FILE]

Each MODEL is a saved pipeline of the embedded digits. The first table has the bound with each variance of the reverse
step that the network has, its own and the fixed ones. Then, for the first model: `--repeats` estimates
from `--calls` network calls for an image, each with other timesteps and noise, against the sum over all timesteps (the
mean of eight, since one has noise of its own); and that sum as progressive coding.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from digit_quality import real_digits

import ddpm_hf
from ddpm_hf import DDPMScheduler
from ddpm_hf.common.machine import usable_cores
from ddpm_hf.evaluation.bound import Bound, BoundBatch, measure_bound
from ddpm_hf.evaluation.coding import progressive_coding
from ddpm_hf.inference.studio import best_device

AT_ONCE = 128  # images in a network call
FULL_SUMS = 8


class Mean(torch.nn.Module):
    """A network without the half of its output that is a variance."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet, self.dtype = unet, unet.dtype

    def forward(self, x_t, t):
        """[N, C, H, W] -> [N, C, H, W]."""
        return UNet2DOutput(self.unet(x_t, t).sample[:, : x_t.shape[1]])


def split(images: torch.Tensor) -> list[BoundBatch]:
    """Images in batches."""
    return [BoundBatch(first, images[first : first + AT_ONCE]) for first in range(0, len(images), AT_ONCE)]


def bounds_of(pipeline, images: torch.Tensor, calls: int) -> dict[str, Bound]:
    """The bound with each variance type."""
    own, found = pipeline.scheduler.variance_type, {}
    for name in (own, *sorted({"fixed_small", "fixed_large"} - {own})):
        network = Mean(pipeline.unet) if own.startswith("learned") and name != own else pipeline.unet
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type=name)
        found[name] = measure_bound(network, scheduler, split(images), calls=calls, progress=True)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--images", type=int, default=128, help="of the first table")
    parser.add_argument("--calls", type=int, default=50, help="for an image, in both tables")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--repeated-images", type=int, default=10, help="that the repeats estimate the bound of")
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cores())
    device, record = best_device(), {}

    columns = ("model", "variance", "bits/dim ± s.e.", "s.e. of these calls", "prior", "steps", "decoder")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for model in arguments.models:
        pipeline = ddpm_hf.load(model).to(device)
        pipeline.unet.eval()
        side = pipeline.unet.config.sample_size
        pixels, _ = real_digits("test", side)
        chosen = np.random.default_rng(0).permutation(len(pixels))
        images = torch.from_numpy(pixels[chosen]).reshape(-1, 1, side, side).to(device) * 2 - 1
        for name, bound in bounds_of(pipeline, images[: arguments.images], arguments.calls).items():
            figures = bound.summary()
            record[f"{Path(model).name} {name}"] = figures
            parts = " | ".join(f"{figures[part]:.4f}" for part in ("estimation_error", "prior", "steps", "decoder"))
            value = f"{figures['value']:.3f} ± {figures['standard_error']:.3f}"
            print(f"| {Path(model).name} | {name} | {value} | {parts} |", flush=True)
        if model == arguments.models[0]:
            first = pipeline, images[: arguments.repeated_images]

    if arguments.repeats:
        record |= repeated(*first, arguments.calls, arguments.repeats)
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def repeated(pipeline, images: torch.Tensor, calls: int, repeats: int) -> dict:
    """Print the full sum, and how far estimates are from it."""
    network, scheduler, count = pipeline.unet, pipeline.scheduler, len(images)
    # its noise, one draw for each timestep, is not small beside the estimates' errors: the mean of several
    sums = measure_bound(network, scheduler, split(images.repeat(FULL_SUMS, 1, 1, 1)), progress=True)
    full, coding = sums.bits_per_dim, progressive_coding(sums)
    print(f"\nmean of {FULL_SUMS} full sums: {full:.4f} bits/dim\n\n{coding.table()}\n", flush=True)
    # copies of the images at other indices: each index has timesteps and noise of its own
    copies = measure_bound(
        network, scheduler, split(images.repeat(repeats, 1, 1, 1)), calls=calls, seed=1, progress=True
    )
    errors = copies.total.reshape(repeats, count).mean(axis=1) - full
    stated = np.sqrt(copies.variance.reshape(repeats, count).sum(axis=1)) / count
    covered = int((np.abs(errors) <= 2 * stated).sum())
    print(
        f"{count} images, {calls} calls each: {covered} of {repeats} estimates are within two of their standard errors"
        f" of the mean full sum; error {errors.std():.4f} about its mean of {errors.mean():+.4f}, stated"
        f" {np.sqrt((stated**2).mean()):.4f} bits/dim"
    )
    return {"coding": coding.as_dict(), "full": full, "errors": errors.tolist(), "stated": stated.tolist()}


if __name__ == "__main__":
    main()
