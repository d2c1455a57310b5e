"""How the cost of a training step and of sampling grows with resolution, batch, channels and steps: JSON, and a plot.

    python benchmarks/growth.py --out growth.json --plot docs/images/growth.svg

One thing grows at a time, from a UNet of (32, 64, 64) channels at 32×32 with a batch of 16. A training step is forward
and backward pass, in fp32; the median of some.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ddpm_hf import DDPMPipeline, DDPMScheduler

from gpu import SMALL, peak_flops, training_flops  # isort: skip

USUAL = {"resolution": 32, "batch": 16, "channels": 32, "steps": 10}
GROWING = {"resolution": (16, 32, 64), "batch": (4, 16, 64), "channels": (16, 32, 64), "steps": (5, 10, 20)}


def network(resolution: int, channels: int) -> dict:
    """Arguments of the UNet."""
    return {**SMALL, "sample_size": resolution, "block_out_channels": (channels, 2 * channels, 2 * channels)}


def seconds(call: Callable[[], object], rounds: int) -> float:
    """The median of some calls after one that warms up."""
    call()
    measured = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        measured.append(time.perf_counter() - begin)
    return statistics.median(measured)


def measure(what: str, resolution: int, batch: int, channels: int, steps: int, rounds: int) -> dict:
    """Seconds of a training step, or of sampling where the steps grow, and FLOP a second."""
    torch.manual_seed(0)
    unet = UNet2DModel(**network(resolution, channels))
    flops = batch * training_flops(network(resolution, channels), torch.device("cpu"))
    if what == "steps":
        pipeline = DDPMPipeline(unet.eval(), DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        pipeline.enable_acceleration()
        taken = seconds(lambda: pipeline(batch, num_inference_steps=steps, output_type="np"), 1)
        flops *= steps / 3  # a forward pass is a third of a training step
    else:
        x, t = torch.randn(batch, 1, resolution, resolution), torch.randint(0, 1000, (batch,))
        taken = seconds(lambda: unet.train()(x, t).sample.square().mean().backward(), rounds)
    return {"what": what, "resolution": resolution, "batch": batch, "channels": channels, "steps": steps,
            "seconds": taken, "gflops": flops / taken / 1e9}  # fmt: skip


def plot(records: list[dict], file: Path) -> None:
    """Seconds by what grows, on logarithmic axes, with the slope between the ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(GROWING)), GROWING):
        rows = [row for row in records if row["what"] == what]
        x, y = [row[what] for row in rows], [row["seconds"] for row in rows]
        slope = torch.tensor([y[-1] / y[0], x[-1] / x[0]]).log()
        axes.loglog(x, y, marker="o")
        axes.set_xticks(x, map(str, x), minor=False)
        axes.minorticks_off()
        axes.set_title(f"{what}: power {slope[0] / slope[1]:.1f}", fontsize=9)
        axes.set_ylabel("seconds of sampling" if what == "steps" else "seconds of a training step", fontsize=8)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Measure, plot, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--plot", type=Path, help="a picture")
    flags = parser.parse_args()
    records = []
    for what, values in GROWING.items():
        for value in values:
            records.append(measure(what, **{**USUAL, what: value}, rounds=flags.rounds))
            print(json.dumps(records[-1]), flush=True)
    peak = peak_flops(torch.device("cpu"), torch.float32, 1024, 3) / 1e9
    print(f"{torch.get_num_threads()} threads, matrix products of {peak:.0f} GFLOP/s in fp32")
    if flags.out:
        flags.out.write_text(json.dumps({"peak_gflops": peak, "rows": records}, indent=1) + "\n")
    if flags.plot:
        plot(records, flags.plot)


if __name__ == "__main__":
    main()
