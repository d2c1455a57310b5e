"""Trained super-resolution against a zero-shot one, its colours, and a cascade with and without augmentation.

    python benchmarks/conditional.py train base single augmented plain --out runs --minutes 2 [--data folder]
    python benchmarks/conditional.py measure --out runs [--features MODEL] --result conditional.json

`train` makes the named models, each for `--minutes` times its share, with the EMA of a constant learning rate: `base`
at half the size, `single` at the full size, and two models of super-resolution ×2 from that half: `augmented` with
noise in what it reads, `plain` without. A cascade of base and augmented has the training time of `single`. Where other
programs share the machine, `--train-steps` counts steps: one of base, with a quarter of the pixels, as a third of one.

`measure` computes, of held-out images:

- PSNR and Fréchet distance of the super-resolution, by `augmented` and `plain` with each correction of colours, and
  zero-shot by `single` (ddnm), all with the same number of calls;
- how far the channels' means of the outputs are from those of the inputs, in 1/255: median and 95th percentile;
- the Fréchet distance of samples of the cascades, by the level of noise, and of `single`.

The Fréchet distance is that of the means of a UNet's middle block at t = T/10: `--features`, or else `single`'s.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ddpm_hf import OPERATORS, DDPMRestorationPipeline, load
from ddpm_hf.common.checkpoints import list_checkpoints
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler
from ddpm_hf.restoration.figures import psnr

SHARES = {"base": 1, "single": 3, "augmented": 2, "plain": 2}  # of --minutes
OF_STEPS = {"base": 0.6, "single": 1.0, "augmented": 0.8, "plain": 0.8}  # of --train-steps
READS = ["--conditioning", "super-resolution", "--conditioning_factor", "2"]
MODELS = {
    "base": [],
    "single": [],
    "augmented": [*READS, "--conditioning_noise", "0.5"],
    "plain": [*READS, "--conditioning_noise", "0"],
}


def train(args: argparse.Namespace) -> None:
    """Train the models that the command line names."""
    for name in args.models:
        side = args.size // 2 if name == "base" else args.size
        flags = [
            "--output_dir", f"{args.out}/{name}", "--resolution", str(side), "--seed", "0",
            "--validation_split", "0.2", "--validation_steps", "1000000", "--train_batch_size", str(args.batch),
            "--learning_rate", "2e-3", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "50",
            "--use_ema", "--ema_max_decay", "0.995", "--logger", "none", "--save_images_epochs", "0",
            "--save_model_epochs", "1000000", "--checkpointing_steps", "500", "--checkpoints_total_limit", "1",
            "--mixed_precision", args.precision, "--adam_beta1", "0.9", "--adam_weight_decay", "0",
            "--model_preset", args.preset, *(["--cpu_threads", "1"] if args.device == "cpu" else []),
        ]  # fmt: skip
        flags += ["--train_data_dir", args.data] if args.data else []
        if args.train_steps is None:
            flags += ["--num_epochs", "100000", "--max_train_hours", str(args.minutes * SHARES[name] / 60)]
        else:
            flags += ["--max_train_steps", str(round(args.train_steps * OF_STEPS[name]))]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ddpm_hf", "train", *flags, *MODELS[name]], check=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def newest(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return list_checkpoints(folder)[-1]


class Features:
    """The means of a UNet's middle block at t = T/10 of images [N, C, H, W] in [0, 1]."""

    def __init__(self, pipeline):
        self.unet, scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
        self.timestep, self.scheduler = len(scheduler) // 10, scheduler

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> np.ndarray:
        kept = []
        hook = self.unet.mid_block.register_forward_hook(lambda module, args, output: kept.append(output.mean((2, 3))))
        x = images.to(self.unet.device) * 2 - 1
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        noised = self.scheduler.add_noise(x, noise, torch.full((len(x),), self.timestep, device=x.device))
        for part in noised.split(256):
            self.unet(part, self.timestep)
        hook.remove()
        return torch.cat(kept).double().cpu().numpy()


def held_out(args: argparse.Namespace, channels: int) -> torch.Tensor:
    """The images that no model was trained on, [N, C, H, W] in [0, 1]."""
    from ddpm_hf.data.batches import ImageDataset
    from ddpm_hf.data.flags import DataFlags
    from ddpm_hf.data.reading import load_rows

    flags = DataFlags(train_data_dir=args.data, resolution=str(args.size), validation_split=0.2, center_crop=True)
    _, rows = load_rows(flags, 0, None, None, True)
    dataset = ImageDataset(rows, flags.transform(channels), 0, True)
    return dataset.__getitems__([(0, index) for index in range(len(dataset))])["images"] / 255


def rounded(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as 8 bits hold them."""
    return (images.clamp(0, 1) * 255).round() / 255


def colours(made: torch.Tensor, small: torch.Tensor) -> dict[str, float]:
    """How far channels' means are from those of the inputs, in 1/255."""
    error = (made.mean((2, 3)) - small.mean((2, 3))).abs().flatten().numpy() * 255
    return {"median": float(np.quantile(error, 0.5)), "95%": float(np.quantile(error, 0.95))}


def super_resolution(args: argparse.Namespace, models: dict, truth: torch.Tensor, distance) -> list[dict]:
    """Rows of figures: who, PSNR, Fréchet distance, colours."""
    truth = truth[: args.images]
    operator = OPERATORS["bicubic"](tuple(truth.shape[1:]), factor=2)
    small = rounded(operator.forward(truth * 2 - 1) / 2 + 0.5)
    rows = []

    def row(name: str, made: torch.Tensor, seconds: float) -> None:
        made = rounded(made.float().cpu())
        figures = {"psnr": float(psnr(made, truth).mean()), "frechet": distance(made)}
        rows.append({"model": name, **figures, "colours": colours(made, small), "seconds": seconds})
        print(rows[-1], flush=True)

    for name in (one for one in ("augmented", "plain") if one in models):
        for correction in ("none", "colour", "observation"):
            began = time.perf_counter()
            options = {"num_inference_steps": args.steps, "correction": correction, "output_type": "pt"}
            generator = torch.Generator(args.device).manual_seed(1)
            made = [models[name](part, generator=generator, **options).images for part in small.split(128)]
            row(f"{name}, {correction}", torch.cat(made), time.perf_counter() - began)
    others = {"zero-shot ddnm": models["single"]} if "single" in models else {}
    if args.other is not None:
        others[f"zero-shot ddnm, {Path(args.other).name}"] = load(args.other).to(args.device)
    for name, model in others.items():
        pipeline = DDPMRestorationPipeline.from_pipe(model)
        pipeline.set_progress_bar_config(disable=True)
        began = time.perf_counter()
        options = {"num_inference_steps": args.steps, "output_type": "pt"}
        generator = torch.Generator(args.device).manual_seed(1)
        made = [
            pipeline(part * 2 - 1, operator, 0.0, generator=generator, **options).images for part in small.split(128)
        ]
        row(name, torch.cat(made), time.perf_counter() - began)
    enlarged = torch.nn.functional.interpolate(small, truth.shape[2:], mode="bicubic")
    row("bicubic", enlarged, 0.0)
    return rows


def cascades(args: argparse.Namespace, models: dict, distance) -> list[dict]:
    """Rows of figures: what sampled, Fréchet distance."""

    def sampled(pipeline) -> torch.Tensor:
        generator = torch.Generator(args.device).manual_seed(2)
        counts = [128] * (args.samples // 128) + [args.samples % 128] * bool(args.samples % 128)
        options = {"num_inference_steps": args.steps, "output_type": "pt"}
        return torch.cat([pipeline(count, generator, **options).images for count in counts])

    rows = []
    singles = {"single": models["single"]} if "single" in models else {}
    if args.other is not None:
        singles[Path(args.other).name] = load(args.other).to(args.device)
    for name, pipeline in singles.items():
        pipeline.set_progress_bar_config(disable=True)
        rows.append({"model": name, "frechet": distance(rounded(sampled(pipeline).cpu()))})
        print(rows[-1], flush=True)
    small = rounded(sampled(models["base"]))
    for name, levels in (("plain", [0.0]), ("augmented", args.levels)):
        for level in levels if name in models else []:
            generator = torch.Generator(args.device).manual_seed(3)
            options = {"num_inference_steps": args.steps, "output_type": "pt", "conditioning_noise": level}
            made = [models[name](part, generator=generator, **options).images for part in small.split(128)]
            rows.append({"model": f"base, {name}, level {level}", "frechet": distance(rounded(torch.cat(made).cpu()))})
            print(rows[-1], flush=True)
    return rows


def measure(args: argparse.Namespace) -> None:
    """Compute the figures, and write them."""
    models = {name: load(newest(args.out / name)).to(args.device) for name in MODELS if (args.out / name).is_dir()}
    for pipeline in models.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.enable_acceleration()
    network = newest(args.out / "single") if args.features is None else args.features
    features = Features(load(network).to(args.device))  # not accelerated: a CUDA graph runs no hooks
    truth = held_out(args, next(iter(models.values())).image_channels)
    reference = features(truth)
    half = len(reference) // 2

    def distance(images: torch.Tensor) -> float:
        return float(frechet_distance(reference, features(images)))

    result = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "steps trained": {name: int(newest(args.out / name).name.rpartition("-")[2]) for name in models},
        "parameters": {name: sum(p.numel() for p in one.unet.parameters()) for name, one in models.items()},
        "held out": len(truth),
        "frechet of halves": float(frechet_distance(reference[:half], reference[half:])),
        "super-resolution": super_resolution(args, models, truth, distance),
        "cascades": cascades(args, models, distance) if "base" in models else [],
    }
    args.result.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Train or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "measure"])
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", help="a folder of images; by default the embedded digits")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--preset", default="small-16")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--train-steps", type=int)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--features", help="a model whose UNet gives the features")
    parser.add_argument("--other", help="another single model, also for zero-shot super-resolution")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--levels", type=float, nargs="*", default=[0.0, 0.1, 0.2, 0.3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--result", type=Path, default=Path("conditional.json"))
    args = parser.parse_args()
    train(args) if args.action == "train" else measure(args)


if __name__ == "__main__":
    main()
