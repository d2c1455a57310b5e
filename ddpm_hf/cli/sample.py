"""`ddpm-hf sample`: sample images from a trained model."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from .common import own_token, quiet
from .conditions import Conditions, read_conditions
from .pictures import check_out, write_pictures


class Sampler(str, enum.Enum):
    """The samplers of `ddpm-hf sample`."""

    ddpm = "ddpm"
    ddim = "ddim"
    dpmpp = "dpm++"
    unipc = "unipc"


class Precision(str, enum.Enum):
    """What the network computes in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def sample(
    model: Annotated[str, typer.Argument(help="A training run's output folder, or a model on the Hub (user/name).")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("samples"),
    num_images: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many images to draw.")] = 16,
    sampler: Annotated[
        Sampler, typer.Option(help="ddpm is ancestral sampling; the others need fewer steps.")
    ] = "ddpm",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Timesteps to visit; by default all for ddpm, 50 or 25 for the others.")
    ] = None,
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", help="A class by name or id, for a model by class; repeat it for several in turn."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="For text to image: what to draw; repeat it for several in turn.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="For text to image: what to move away from.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance: 1 is none, 2 insists on the class. By default 1, by prompt 7.5."),
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(min=0, max=1, help="Against over-exposure at high guidance scales (Lin et al. 2023).")
    ] = 0.0,
    guidance_interval: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LOW HIGH", help="Guide only between these timesteps.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="A folder of train-classifier, to guide towards --class by its gradient.")
    ] = None,
    classifier_scale: Annotated[float, typer.Option(help="How strongly the classifier guides.")] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Image i depends on the seed and i alone, whatever the batch.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 64,
    precision: Annotated[
        Precision, typer.Option(help="bf16 and fp16 are faster where the hardware has them.")
    ] = "fp32",
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best there is.")] = None,
    progressive: Annotated[
        bool, typer.Option("--progressive", help="Also a strip of x̂_0 along the chain and an animated GIF of x_t.")
    ] = False,
    grid_only: Annotated[bool, typer.Option("--grid-only", help="Write no single images.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    token: Annotated[
        str | None, typer.Option(help="For a private model; by default your login.", envvar="HF_TOKEN")
    ] = None,
) -> None:
    """Draw images: a grid (grid.png) and single ones (0000.png, ...)."""
    from ..space.drawing import load_pipeline
    from ..training.config import check_word
    from ..training.ownership import settle

    for name, word in (("out", out), ("MODEL", model), ("classifier", classifier), ("revision", revision)):
        if word is not None:
            check_word(name, str(word))
    quiet()
    use_all_cores()
    device = checked_device(device)
    settle(model)
    pipeline = load_pipeline(model, revision, own_token(token)).to(device)
    guidance = (guidance_scale, guidance_rescale, guidance_interval)
    if pipeline.image_channels > 4:
        shown = f"the first three of {pipeline.image_channels} channels"
        typer.echo(f"warning: the pictures show {shown}; output_type='np' of the pipeline gives all", err=True)
    conditions = read_conditions(pipeline, classifier, class_, prompt, negative_prompt, guidance, classifier_scale)
    check_out(out)
    steps = set_sampler(pipeline, sampler.value, steps)
    with autocast(device, precision):
        images, frames = sample_images(pipeline, conditions, num_images, batch_size, seed, steps, progressive)
    write_pictures(images, frames, out, grid_only, progressive)
    typer.echo(f"{len(images)} images in {out}: grid.png" + (", progressive.png, chain.gif" if progressive else ""))


def use_all_cores() -> None:
    """Let torch use every core that this process may use, but where OMP_NUM_THREADS says otherwise."""
    import os

    import torch

    from ..training.machine import usable_cores

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())


def checked_device(device: str | None) -> str:
    """The device, by default the best of this machine.

    Raises:
        ValueError: this machine does not have it.
    """
    import torch

    available = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    device = device or available[0]
    try:
        if torch.device(device).type not in available:
            raise NotImplementedError("torch has devices that hold no data")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: not available; must be one of {', '.join(available)}") from error
    return device


def set_sampler(pipeline, sampler: str, steps: int | None) -> int:
    """Put a sampler into the pipeline; the number of steps to sample in, by default its usual one.

    Raises:
        ValueError: more steps than the model has timesteps.
    """
    from ..space.drawing import swap_sampler

    usual_steps = swap_sampler(pipeline, sampler)
    timesteps = pipeline.scheduler.config.num_train_timesteps
    if steps is not None and steps > timesteps:
        raise ValueError(f"--steps {steps}: the model has {timesteps} timesteps, T of its training")
    return steps or usual_steps or timesteps


def autocast(device: str, precision: Precision):
    """A context in which the networks compute in a precision."""
    import contextlib

    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.value)
    return torch.autocast(torch.device(device).type, dtype) if dtype else contextlib.nullcontext()


def sample_images(
    pipeline, conditions: Conditions, num_images: int, batch_size: int, seed: int, steps: int, progressive: bool
) -> tuple[list, list]:
    """PIL images, and the frames of the first batch's chains if they are to be shown."""
    from tqdm.auto import tqdm

    from ..space.drawing import keyed_generators

    pipeline.set_progress_bar_config(desc="steps", leave=False, disable=num_images > batch_size)
    images, frames = [], []
    starts = range(0, num_images, batch_size)
    for first in tqdm(starts, desc="batches", disable=len(starts) == 1):
        indices = range(first, min(first + batch_size, num_images))
        num_frames = 40 if progressive and first == 0 else 0
        output = conditions.sample(
            pipeline,
            indices,
            generator=keyed_generators(pipeline.device, seed, indices),
            num_inference_steps=steps,
            num_frames=num_frames,
            output_type="preview",
        )
        images += output.images
        frames = output.frames or frames
    return images, frames
