"""What a small error of the network costs under each schedule, with and without clipping, without a trained network.

    python benchmarks/schedule_error.py fashion28 classifier [--steps 1000] [--error 0.03]

Ancestral sampling with the exact denoiser of a few training images, to whose epsilon a constant is added; the
Inception Score is of a classifier of `ddpm-hf train-classifier`. The folder is a dataset that `save_to_disk` wrote.
"""

import argparse

import datasets
import numpy as np
import torch

from ddpm_hf import DDPMScheduler
from ddpm_hf.evaluation.features import load_extractor
from ddpm_hf.evaluation.metrics import inception_score
from ddpm_hf.evaluation.protocols import PROTOCOLS

SCHEDULES = ("linear", "cosine", "quadratic", "sigmoid")
IMAGES, SAMPLES = 400, 64


def sample(scheduler: DDPMScheduler, data: torch.Tensor, error: float) -> tuple[torch.Tensor, float]:
    """Samples [N, D] with the denoiser of images [M, D], and the mean of x after the first step."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(len(scheduler))
    x = torch.randn(SAMPLES, data.shape[1], generator=generator)
    first = None
    for t in scheduler.timesteps.tolist():
        kept = float(scheduler.exact_tables.alphas_cumprod[t])
        logits = (kept**0.5 * x @ data.T - kept * (data**2).sum(1) / 2) / (1 - kept)  # log p(x_0 | x_t) [N, M]
        x_start = logits.softmax(1) @ data
        epsilon = (x - kept**0.5 * x_start) / (1 - kept) ** 0.5 + error
        x = scheduler.step(epsilon, t, x, generator=generator).prev_sample
        first = float(x.mean()) if first is None else first
    return x, first


def main() -> None:
    """Print a row for each schedule, error and clipping."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("classifier")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--error", type=float, default=0.03)
    arguments = parser.parse_args()
    parts = datasets.load_from_disk(arguments.folder)
    real = {name: np.stack([np.asarray(one) for one in parts[name][:IMAGES]["image"]]) for name in ("train", "test")}
    size = real["train"].shape[1:]
    data = torch.from_numpy(real["train"]).float().flatten(1) / 127.5 - 1  # [M, D]
    network = load_extractor(f"classifier:{arguments.classifier}", protocol=PROTOCOLS["adm"])

    def score(pixels: torch.Tensor) -> float:
        return inception_score(network(pixels[:, None]).logits, splits=1)[0]

    print(f"{len(real['test'])} real test images: {score(torch.from_numpy(real['test'])):.3f}", flush=True)
    for name in SCHEDULES:
        for error, clip in ((0.0, True), (arguments.error, True), (arguments.error, False)):
            x, first = sample(DDPMScheduler(arguments.steps, beta_schedule=name, clip_sample=clip), data, error)
            pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).view(-1, *size)
            print(
                f"{name} error {error} clipped {clip}: {score(pixels):.3f}, mean after a step {first:+.3f}", flush=True
            )


if __name__ == "__main__":
    main()
