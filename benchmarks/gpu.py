"""Training and sampling against Diffusers on one GPU: JSON, and the table of docs/performance.md.

    python benchmarks/gpu.py --out gpu.json --table docs/performance.md
    python benchmarks/gpu.py --device cpu --quick        # the same program in miniature, where there is no GPU

Both programs are warm and alternate in one process; ratios are medians of blocks of steps.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline as StockPipeline
from diffusers import DDPMScheduler as StockScheduler
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.common.machine import cpu_has_bf16
from ddpm_hf.models.presets import MODEL_PRESETS

from turns import in_turn  # isort: skip

SMALL = {
    "sample_size": 32, "in_channels": 1, "out_channels": 1, "layers_per_block": 2, "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
TINY = {**SMALL, "sample_size": 16, "block_out_channels": (16, 16, 16), "layers_per_block": 1}
# name: arguments of UNet2DModel, batch, flags of ours
NETWORKS = {
    "tiny": (TINY, 4, ()),  # does it run?
    "small": (SMALL, 64, ()),
    "medium": ({**SMALL, "block_out_channels": (64, 128, 128)}, 64, ()),
    "cifar10": (MODEL_PRESETS["ddpm-cifar10"].unet, 128, ()),
    "adm64": ({**MODEL_PRESETS["adm-64"].unet, "out_channels": 3}, 32, ()),  # Diffusers' loop learns no variance
}
BEGIN, END = "<!-- gpu table -->", "<!-- /gpu table -->"


def peak_flops(device: torch.device, dtype: torch.dtype, size: int, rounds: int = 10) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    best = float("inf")
    for _ in range(rounds):
        settle(device)
        begin = time.perf_counter()
        for _ in range(5):
            a @ b
        settle(device)
        best = min(best, (time.perf_counter() - begin) / 5)
    return 2 * size**3 / best


def training_flops(network: dict, device: torch.device) -> float:
    """FLOP of a forward and a backward pass, an image."""
    unet = UNet2DModel(**network).to(device)
    x = torch.randn(1, network["in_channels"], network["sample_size"], network["sample_size"], device=device)
    with FlopCounterMode(display=False) as counter:
        unet(x, torch.tensor([5], device=device)).sample.sum().backward()
    return counter.get_total_flops()


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def sampling(network: dict, batch: int, dtype: torch.dtype, device: torch.device, steps: int, rounds: int) -> dict:
    """Milliseconds of a step of both pipelines over the same weights, in turn, and how far their images are apart.

    Args:
        dtype: bf16 is autocast, as stock's pipeline cannot return images of it.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(**network).to(device).eval()
    twin = copy.deepcopy(unet)
    pipelines = {"stock": StockPipeline(unet, StockScheduler()), "ours": DDPMPipeline(twin, DDPMScheduler())}
    pipelines["ours"].enable_acceleration()
    images, seconds = {}, {name: [] for name in pipelines}
    for number in range(rounds + 1):  # the first round, with the capture of graphs, is not counted
        for name in ("stock", "ours") if number % 2 else ("ours", "stock"):
            pipelines[name].set_progress_bar_config(disable=True)
            generator = torch.Generator(device).manual_seed(number)
            settle(device)
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = pipelines[name](batch, generator, num_inference_steps=steps, output_type="np")
            settle(device)
            images[name] = output.images
            if number:
                seconds[name].append(1000 * (time.perf_counter() - begin) / steps)
    ratios = [stock / ours for stock, ours in zip(seconds["stock"], seconds["ours"])]
    return {
        "batch": batch, "dtype": str(dtype).removeprefix("torch."), "steps": steps,
        "stock_ms": statistics.median(seconds["stock"]), "ours_ms": statistics.median(seconds["ours"]),
        "ratio": statistics.median(ratios), "ratios": ratios,
        "greatest_difference": float(abs(images["stock"] - images["ours"]).max()),
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks and few steps: does it run?")
    parser.add_argument(
        "--networks", nargs="*", default=["small", "cifar10", "adm64"], help=f"of {', '.join(NETWORKS)}"
    )
    parser.add_argument("--compile", nargs="*", default=["cifar10"], help="networks to measure compiled, too")
    parser.add_argument("--block", type=int, default=10, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--training-only", action="store_true")
    parser.add_argument("--minutes", type=float, default=8, help="nothing new is begun after it")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--table", type=Path, help="a Markdown file with the table's marks")
    flags = parser.parse_args()
    device, begin = torch.device(flags.device), time.perf_counter()
    if flags.quick:
        NETWORKS.update(dict.fromkeys(NETWORKS, (TINY, 4, ())))
    block, rounds, steps = (2, 2, 3) if flags.quick else (flags.block, flags.rounds, 50)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    size = 256 if flags.quick else 8192 if device.type == "cuda" else 2048
    half = "bf16" if cpu_has_bf16() else "fp32"  # emulated, bf16 takes minutes a step
    record = {
        "device": name, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "peak_bf16_tflops": peak_flops(device, torch.bfloat16, size) / 1e12, "training": [], "sampling": [],
    }  # fmt: skip
    print(json.dumps(record), flush=True)

    def training(network: str, precision: str, theirs: tuple[str, ...], *more: str) -> None:
        unet, batch, own = NETWORKS[network]
        clock, facts = in_turn(
            unet, batch, precision, theirs, block=block, rounds=rounds, device=device, flags=(*own, *more)
        )
        flops = training_flops(unet, device) * batch
        row = {"network": network, "precision": precision, "flags": more, "batch": batch, **facts}
        row |= {f"ms_{one}": clock.median(one) for one in clock.seconds}
        row |= {f"ratio_{one}": statistics.median(clock.ratios("ours", one)) for one in theirs}
        row |= {f"ratios_{one}": clock.ratios("ours", one) for one in theirs}
        row |= {"waits": clock.waits, "mfu": flops / (clock.median("ours") / 1000) / 1e12 / record["peak_bf16_tflops"]}
        record["training"].append(row)
        print(json.dumps(row), flush=True)

    jobs = [(training, (one, half, tuple({half, "fp32"}))) for one in flags.networks]
    jobs += [(training, (one, "fp32", ("fp32",))) for one in flags.networks[:2] if half != "fp32"]
    for one in [] if flags.training_only else flags.networks[:2]:
        for batch in (4,) if flags.quick else (16, 64):
            for dtype in {torch.float32, torch.bfloat16 if half == "bf16" else torch.float32}:
                jobs.append((sampling, (NETWORKS[one][0], batch, dtype, device, steps, 3)))
    jobs += [(training, (one, half, tuple({half, "fp32"}), "--acceleration", "compile")) for one in flags.compile]
    for job, arguments in jobs:
        if time.perf_counter() - begin > 60 * flags.minutes:
            break
        result = job(*arguments)
        if result is not None:
            network = next(key for key, value in NETWORKS.items() if value[0] is arguments[0])
            record["sampling"].append({"network": network, **result})
            print(json.dumps(record["sampling"][-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if flags.out:
        flags.out.write_text(json.dumps(record, indent=1) + "\n")
    if flags.table:
        write_table(flags.table, record)


def table(record: dict) -> str:
    """The figures as Markdown."""
    lines = [
        f"{record['device']}, torch {record['torch']}, matrix products of {record['peak_bf16_tflops']:.0f} TFLOP/s in"
        " bf16.",
        "",
        "| training | ours, ms a step | Diffusers' loop in bf16 | in fp32 | waits a step: ours, theirs | MFU | MiB:"
        " ours, theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["training"]:
        ratios = [f"{row[f'ratio_{one}']:.2f}×" if f"ratio_{one}" in row else "" for one in ("bf16", "fp32")]
        same = row["precision"]
        waits = ", ".join(f"{row['waits'][one]:.1f}" for one in ("ours", same) if one in row["waits"])
        memory = f"{row['memory_ours']:.0f}, {row.get(f'memory_{same}', 0):.0f}"
        lines.append(
            f"| {row['network']}, batch {row['batch']}, {same} {' '.join(row['flags'])} | {row['ms_ours']:.1f} |"
            f" {ratios[0]} | {ratios[1]} | {waits} | {100 * row['mfu']:.0f}% | {memory} |"
        )
    lines += ["", "| sampling | ours, ms a step | stock, ms | ratio | greatest difference |", "|---|---|---|---|---|"]
    for row in record["sampling"]:
        lines.append(
            f"| {row['network']}, batch {row['batch']}, {row['dtype']} | {row['ours_ms']:.2f} |"
            f" {row['stock_ms']:.2f} | {row['ratio']:.2f}× | {row['greatest_difference']:.1g} |"
        )
    return "\n".join(lines)


def write_table(file: Path, record: dict) -> None:
    """Put the table between its marks."""
    text = file.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    file.write_text(f"{head}{BEGIN}\n{table(record)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
