"""Our training script against other programs as their users run them, on a CPU or a GPU: JSON, and a table.

    python benchmarks/peers.py --peer-script train_unconditional.py      # Diffusers' example, from its repository
    python benchmarks/peers.py --lucidrains --python other/bin/python    # that has denoising-diffusion-pytorch

All programs are alive at once, each a process, and take blocks of optimizer steps in turn, so that other work on the
machine hits all of them. A ratio above 1 is the median over the blocks, and means that ours is faster. Diffusers'
script and ours train the same network on the same images with the same flags. denoising-diffusion-pytorch has a
network of its own: there FLOP a second are compared, and its images are in memory already, in its favour.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DModel
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu import NETWORKS, training_flops  # isort: skip
from turns import write_images  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
# Runs a script that waits for a byte before each block of steps, and then says how many seconds a step took
IN_BLOCKS = """
import os, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook

script, block, log, modules, *words = sys.argv[1:]
if modules:  # only now, as Diffusers would use a stand-in of torchvision too
    import accelerate, datasets
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
    sys.path.insert(0, modules)
said, told = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(0), "rb", buffering=0)
for stream in (1, 2):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
taken, since, warm = 0, 0.0, 3

def step(*_):
    global taken, since
    taken += 1
    if taken >= warm and (taken - warm) % int(block) == 0:
        print((time.perf_counter() - since) / int(block), file=said)
        told.read(1) or os._exit(0)
        since = time.perf_counter()

register_optimizer_step_post_hook(step)
sys.argv = [script, *words]
sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
runpy.run_path(script, run_name="__main__")
"""
# A step as its README's Trainer takes it, fp32; what only its Trainer and its FID need is left out
LUCIDRAINS = """
import importlib, json, sys
from unittest.mock import MagicMock
for name in ("torchvision", "torchvision.transforms", "torchvision.utils", "pytorch_fid", "pytorch_fid.fid_score",
             "pytorch_fid.inception"):
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = MagicMock()
import torch
from ema_pytorch import EMA
from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch.utils.flop_counter import FlopCounterMode

side, channels, batch, flops = json.loads(sys.argv[1])
diffusion = GaussianDiffusion(Unet(32, dim_mults=(1, 2, 2), channels=channels), image_size=side)
images = torch.rand(4 * batch, channels, side, side)
with FlopCounterMode(display=False) as counter:
    diffusion(images[:1]).backward()
open(flops, "w").write(str(counter.get_total_flops()))
optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
ema = EMA(diffusion, beta=0.995, update_every=10)
while True:
    diffusion(images[torch.randint(len(images), (batch,))]).backward()
    torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ema.update()
"""


class Program:
    """A script that takes blocks of steps when it is told."""

    def __init__(
        self, folder: Path, python: str, script: str | Path, block: int, words: list, modules: str = "", **env: str
    ):
        self.log = folder / "log.txt"
        command = [python, "-c", IN_BLOCKS, script, block, self.log, modules, *words]
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **env}
        )
        self._read()  # it is warm

    def _read(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.log} says why it ended:\n{self.log.read_text()[-2000:]}")
        return float(line)

    def block(self) -> float:
        """Seconds of a step."""
        self.process.stdin.write(b"x")
        self.process.stdin.flush()
        return self._read()


def measure(flags: argparse.Namespace, name: str, precision: str) -> dict:
    """The programs' seconds a step on one of `NETWORKS`, and their ratios to ours."""
    network, batch, _ = NETWORKS[name]
    network = {**network, "in_channels": 3, "out_channels": 3}  # Diffusers' script makes all images RGB
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        programs: dict[str, Program] = {}
        for one in ("images", "ours", "theirs", "lucidrains"):
            (root / one).mkdir()
        count = batch * (flags.block * flags.rounds + 5)  # no epoch ends, whose pictures would be measured
        write_images(root / "images", count, network["in_channels"], network["sample_size"])
        (root / "config.json").write_text(UNet2DModel(**network).to_json_string())
        words = [
            *("--train_data_dir", root / "images", "--resolution", network["sample_size"], "--use_ema"),
            *("--model_config_name_or_path", root / "config.json", "--train_batch_size", batch, "--random_flip"),
            *("--mixed_precision", {"fp32": "no"}.get(precision, precision), "--save_images_epochs", 100_000),
            *("--save_model_epochs", 100_000, "--num_epochs", 10_000),
        ]
        record = {"network": name, "batch": batch, "precision": precision}
        flops = {"ours": training_flops(network, torch.device("cpu"))}
        try:
            if flags.peer_script:
                out = ["--output_dir", root / "theirs" / "run"]
                programs["diffusers"] = Program(
                    root / "theirs", sys.executable, flags.peer_script, flags.block, [*words, *out], flags.modules
                )
            if flags.lucidrains and precision == "fp32":
                (root / "lucidrains.py").write_text(LUCIDRAINS)
                of = [network["sample_size"], network["in_channels"], batch, str(root / "flops")]
                programs["lucidrains"] = Program(
                    root / "lucidrains", flags.python, root / "lucidrains.py", flags.block, [json.dumps(of)]
                )
                flops["lucidrains"] = float((root / "flops").read_text())
            ours, out = ROOT / "train_unconditional.py", ["--output_dir", root / "ours" / "run", "--logger", "none"]
            programs["ours"] = Program(
                root / "ours", sys.executable, ours, flags.block, [*words, *out], PYTHONPATH=str(ROOT)
            )
            seconds = {one: [] for one in programs}
            for number in tqdm(range(flags.rounds), f"{name}, {precision}"):
                for one in list(programs)[:: 1 if number % 2 else -1]:
                    seconds[one].append(programs[one].block())
        finally:
            for program in programs.values():
                program.process.kill()
    for one, times in seconds.items():
        work = batch * flops.get(one, flops["ours"])
        ratios = [theirs / own for theirs, own in zip(times, seconds["ours"])]
        if one == "lucidrains":  # ours does so many times as much work in the time
            ratios = [ratio * flops["ours"] / flops[one] for ratio in ratios]
        record[one] = {
            "seconds": statistics.median(times), "gflops": work / statistics.median(times) / 1e9,
            "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        }  # fmt: skip
    return record


def table(records: list[dict]) -> str:
    """The figures in Markdown."""
    lines = ["| network | program | s a step | GFLOP/s | ours is faster by |", "|---|---|---|---|---|"]
    for record in records:
        for one in ("ours", "diffusers", "lucidrains"):
            if one in record:
                row = record[one]
                ratio = "" if one == "ours" else f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
                title = f"{record['network']}, batch {record['batch']}, {record['precision']}"
                lines.append(f"| {title} | {one} | {row['seconds']:.3g} | {row['gflops']:.0f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-script", type=Path, help="Diffusers' train_unconditional.py")
    parser.add_argument("--modules", default="", help="a folder of stand-ins for modules that its script imports")
    parser.add_argument("--lucidrains", action="store_true", help="denoising-diffusion-pytorch, in fp32")
    parser.add_argument("--python", default=sys.executable, help="that has it")
    parser.add_argument("--networks", nargs="*", default=["small"], help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--precisions", nargs="*", default=["fp32"], help="of fp32, bf16")
    parser.add_argument("--block", type=int, default=2, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="a JSON file")
    flags = parser.parse_args()
    records = []
    for name in flags.networks:
        for precision in flags.precisions:
            records.append(measure(flags, name, precision))
            if flags.out:
                flags.out.write_text(json.dumps(records, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
