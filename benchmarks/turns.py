"""Two training loops in turn in one process: Diffusers' example as a plain loop, and ours as the script runs it.

Blocks of steps of each alternate, so that what the machine does besides hits both; the median of the ratios counts.
"""

import collections
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_unconditional

EPOCH = 4  # steps; the first epoch ends with a saved model, and is not measured


class Done(BaseException):
    """Enough was measured; no `Exception`, which our loop would save a checkpoint for."""


@dataclasses.dataclass
class Clock:
    """Seconds of blocks of steps, by program, and the host's waits for the device."""

    device: torch.device
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    waits: dict[str, float] = dataclasses.field(default_factory=dict)

    def settle(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def median(self, name: str) -> float:
        """Milliseconds of a step."""
        return 1000 * statistics.median(self.seconds[name])

    def ratios(self, ours: str, theirs: str) -> list[float]:
        """How many times as fast ours was, block by block."""
        return [other / own for own, other in zip(self.seconds[ours], self.seconds[theirs])]


@contextlib.contextmanager
def counted_waits(device: torch.device, counts: dict[str, float], name: str, steps: int) -> Iterator[None]:
    """Count the host's waits for a GPU a step, as torch's debug mode reports them."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "called a synchronizing" in str(one.message)]
    counts[name] = len(waits) / steps
    for place, count in collections.Counter((one.filename, one.lineno) for one in waits).most_common(3):
        print(f"{name} waits {count / steps:g} times a step at {place[0]}:{place[1]}", file=sys.stderr)


def plain_loop(unet: UNet2DModel, images: torch.Tensor, batch: int, dtype: torch.dtype | None) -> Callable[[], None]:
    """A training step as Diffusers' `train_unconditional.py` writes it, with its defaults; batches are on the device.

    Args:
        images: in [-1, 1], [N, C, H, W]. Reading them is left out, in its favour.
        dtype: of autocast; None is fp32.
    """
    device = images.device
    unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(device)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def step() -> None:
        clean = images[torch.randint(len(images), (batch,))]
        noise = torch.randn(clean.shape, dtype=clean.dtype, device=device)
        timesteps = torch.randint(0, 1000, (batch,), device=device).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = unet(noisy, timesteps).sample
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.detach().item()  # which the example logs at each step

    return step


def write_images(folder: Path, count: int, channels: int, side: int) -> torch.Tensor:
    """Smooth random PNG files; the same images in [-1, 1], [N, C, H, W]."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.random((count, channels, 4, 4), dtype=np.float32))
    pixels = (F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).byte()
    for number, one in enumerate(pixels):
        Image.fromarray(one.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / f"{number:04}.png")
    return pixels.float() / 127.5 - 1


def in_turn(
    network: dict,
    batch: int,
    precision: str,
    theirs: tuple[str, ...],
    *,
    block: int,
    rounds: int,
    device: torch.device,
    flags: tuple[str, ...] = (),
    warm: int = EPOCH + 1,
) -> tuple[Clock, dict]:
    """Our script and plain loops in turn.

    Args:
        network: arguments of `UNet2DModel`.
        precision: of ours: fp32 or bf16.
        theirs: precisions of plain loops, each one program.

    Returns: the clock, with programs "ours" and those of `theirs`; and ours' start in seconds, what it says of its
        acceleration, and the device's peak memory of each.
    """
    facts: dict = {}
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(Done):
        folder = Path(temporary)
        (folder / "images").mkdir()
        (folder / "unet.json").write_text(UNet2DModel(**network).to_json_string())
        images = write_images(folder / "images", EPOCH * batch, network["in_channels"], network["sample_size"])
        argv = [
            *("--train_data_dir", folder / "images", "--output_dir", folder / "run", "--seed", 0, "--use_ema"),
            *("--model_config_name_or_path", folder / "unet.json", "--resolution", network["sample_size"]),
            *("--train_batch_size", batch, "--mixed_precision", {"fp32": "no"}.get(precision, precision)),
            *("--logger", "none", "--max_train_steps", 100_000, "--logging_steps", 50_000),
            *("--save_images_steps", 100_000, "--checkpointing_steps", 100_000, *flags),
        ]
        plain = {name: _plain(network, images.to(device), batch, name, clock, facts, warm) for name in theirs}
        resident, begin = _held(device, alone=True), time.perf_counter()
        loop = train_unconditional.training_loop

        def measured(batches):
            facts["start_seconds"] = time.perf_counter() - begin
            clock.seconds["ours"] = []
            for _ in range(warm):
                yield next(batches)
            with counted_waits(device, clock.waits, "ours", block):
                for _ in range(block):
                    yield next(batches)
                clock.settle()
            facts["memory_ours"] = _held(device) - resident
            since = time.perf_counter()
            for _ in range(block):
                next(batches)
            facts["input_images_per_second"] = batch * block / (time.perf_counter() - since)
            for number in range(rounds):
                order = [*plain, "ours"] if number % 2 else ["ours", *plain]
                for name in order:
                    clock.settle()
                    since = time.perf_counter()
                    for _ in range(block):
                        if name == "ours":
                            yield next(batches)
                        else:
                            plain[name]()
                    clock.settle()
                    clock.seconds.setdefault(name, []).append((time.perf_counter() - since) / block)
            raise Done

        def replaced(*args, **kwargs):
            position = next(i for i, one in enumerate(args) if hasattr(one, "__next__"))
            args = (*args[:position], measured(args[position]), *args[position + 1 :])
            return loop(*args, **kwargs)

        train_unconditional.training_loop = replaced
        try:
            train_unconditional.main([str(one) for one in argv])
        finally:
            train_unconditional.training_loop = loop
            AcceleratorState._reset_state(reset_partial_state=True)
    return clock, facts


def _plain(network, images, batch, name, clock, facts, warm):
    """A plain loop that is warm, with its waits and memory known."""
    torch.manual_seed(0)
    before = _held(images.device, alone=True)
    step = plain_loop(UNet2DModel(**network).to(images.device), images, batch, {"bf16": torch.bfloat16}.get(name))
    for _ in range(warm):
        step()
    with counted_waits(images.device, clock.waits, name, warm):
        for _ in range(warm):
            step()
    facts[f"memory_{name}"] = _held(images.device) - before
    return step


def _held(device: torch.device, alone: bool = False) -> float:
    """MiB of a GPU that this process holds; `alone`: without what earlier programs left to be used again."""
    if device.type != "cuda":
        return 0.0
    if alone:
        torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20
