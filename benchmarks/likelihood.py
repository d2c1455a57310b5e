"""Bits/dim of held-out digits: by model and variance type, from all network calls, and from a few of them.

    python benchmarks/likelihood.py MODEL [MODEL ...] [--images 256] [--calls 50] [--repeats 100] [--output FILE]

Each MODEL is a saved pipeline of the embedded digits. The first table has the bound of the same x_t with each variance
of the reverse step that the network has: its own, and the fixed ones. The second is for the first model: `--repeats`
estimates from `--calls` network calls for an image, each with other timesteps and noise, against the full sum.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from digit_quality import real_digits
from tqdm.auto import tqdm

import ddpm_hf
from ddpm_hf import DDPMScheduler
from ddpm_hf.common.machine import usable_cores
from ddpm_hf.evaluation.bound import Bound, BoundBatch, measure_bound
from ddpm_hf.evaluation.coding import progressive_coding
from ddpm_hf.inference.studio import best_device


class Remembered(torch.nn.Module):
    """A network, and its outputs in the order of the calls, to use again with a fixed variance."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet, self.dtype, self.outputs, self.replayed = unet, unet.dtype, [], None

    def forward(self, x_t, t):
        """[N, C, H, W] -> [N, C or 2C, H, W]; without the variance where it replays."""
        if self.replayed is None:
            self.outputs.append(self.unet(x_t, t).sample)
            return UNet2DOutput(self.outputs[-1])
        return UNet2DOutput(next(self.replayed)[:, : x_t.shape[1]])


def bounds_of(pipeline, batches: list[BoundBatch]) -> dict[str, Bound]:
    """The full bound with each variance type, at the same x_t."""
    network, scheduler = Remembered(pipeline.unet.eval()), pipeline.scheduler
    found = {scheduler.variance_type: measure_bound(network, scheduler, batches, progress=True)}
    for name in sorted({"fixed_small", "fixed_large"} - set(found)):
        network.replayed = iter(network.outputs)
        other = DDPMScheduler.from_config(scheduler.config, variance_type=name)
        found[name] = measure_bound(network, other, batches)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cores())
    device, record = best_device(), {}

    print("| model | variance | bits/dim ± s.e. | prior | steps | decoder |\n|---|---|---|---|---|---|")
    for model in arguments.models:
        pipeline = ddpm_hf.load(model).to(device)
        side = pipeline.unet.config.sample_size
        pixels, _ = real_digits("test", side)
        chosen = np.random.default_rng(0).permutation(len(pixels))[: arguments.images]
        images = torch.from_numpy(pixels[chosen]).reshape(-1, 1, side, side).to(device) * 2 - 1
        starts = range(0, len(images), arguments.batch_size)
        batches = [BoundBatch(start, images[start : start + arguments.batch_size]) for start in starts]
        bounds = bounds_of(pipeline, batches)
        for name, bound in bounds.items():
            figures = bound.summary()
            record[f"{model} {name}"] = figures
            parts = " | ".join(f"{figures[part]:.4f}" for part in ("prior", "steps", "decoder"))
            value = f"{figures['value']:.4f} ± {figures['standard_error']:.4f}"
            print(f"| {Path(model).name} | {name} | {value} | {parts} |", flush=True)
        if model == arguments.models[0]:
            first = pipeline, batches, bounds[pipeline.scheduler.variance_type]

    pipeline, batches, full = first
    coding = progressive_coding(full)
    record["coding"] = coding.as_dict()
    print(f"\n{coding.table()}\n")
    errors, stated = [], []
    for seed in tqdm(range(1, arguments.repeats + 1), desc=f"{arguments.calls} calls"):
        bound = measure_bound(pipeline.unet, pipeline.scheduler, batches, calls=arguments.calls, seed=seed)
        errors.append(bound.bits_per_dim - full.bits_per_dim)
        stated.append(bound.estimation_error)
    if errors:
        covered = int(np.sum(np.abs(errors) <= 2 * np.array(stated)))
        record["estimates"] = {"calls": arguments.calls, "errors": errors, "standard_errors": stated}
        print(
            f"{arguments.calls} calls for an image: {covered} of {len(errors)} estimates are within two of their"
            f" standard errors of the full sum; error {np.std(errors):.4f} (RMS about its mean"
            f" {np.mean(errors):+.4f}), stated {np.mean(stated):.4f} bits/dim"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
