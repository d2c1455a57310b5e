"""`ddpm-hf sample`: sample images from a trained model."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from .common import own_token, quiet


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


def load_classifier(folder: Path, pipeline):
    """A classifier of noised images that fits the pipeline.

    Raises:
        ValueError: no classifier there, or one of other images.
    """
    from ..classifier import NoisyClassifier
    from ..loading import why_not_loaded

    try:
        classifier = NoisyClassifier.from_pretrained(folder, use_safetensors=True).eval()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--classifier {folder}: no classifier there ({why_not_loaded(error)})") from error
    own, wanted = (classifier.config.unet[key] for key in ("in_channels", "sample_size")), pipeline.unet.config
    if list(own) != [wanted.in_channels, wanted.sample_size]:
        raise ValueError(f"--classifier {folder} reads images of another size or number of channels than the model's")
    if hasattr(pipeline, "class_ids") and class_names(classifier) != class_names(pipeline):
        raise ValueError(f"--classifier {folder} knows other classes than the model, or in another order")
    return classifier


def class_names(model) -> dict[str, str]:
    """The names of the classes that a pipeline or a classifier knows, by their ids as strings."""
    return dict(model.config.id2label or {str(number): str(number) for number in range(model.config.num_classes)})


def check_prompts(by_text: bool, prompt, negative_prompt, classes, classifier) -> None:
    """Raise ValueError for prompts where nothing reads them, for none where they are wanted, and for classes there."""
    if by_text and not prompt:
        raise ValueError("this model draws what --prompt says; give one")
    if by_text and (classes or classifier):
        raise ValueError("this model draws what --prompt says; leave out --class and --classifier")
    if not by_text and (prompt or negative_prompt):
        raise ValueError("this model reads no text; leave out --prompt and --negative-prompt")


def wanted_classes(pipeline, classifier, classes: list[str] | None, guidance_scale: float, count: int):
    """The class of each image: those asked for in turn, by default all; None for a model without classes.

    Raises:
        ValueError: a class that is not known, or classes where nothing knows any.
    """
    by_class = hasattr(pipeline, "class_ids")
    if not by_class and classifier is None:
        if classes or guidance_scale != 1.0:
            raise ValueError(
                "this model knows no classes; leave out --class and --guidance-scale, or add --classifier"
            )
        return None
    if not by_class and guidance_scale != 1.0:
        raise ValueError("this model knows no classes; leave out --guidance-scale (--classifier-scale guides it)")
    if by_class and guidance_scale != 1.0 and pipeline.null_class is None:
        raise ValueError(
            "--guidance-scale wants a model that also learned no class (trained with --class_dropout 0.1)"
        )
    id2label = class_names(pipeline if by_class else classifier)
    ids = {number: int(number) for number in id2label}  # a name that looks like a number is the name
    ids |= {name: int(number) for number, name in id2label.items()}
    unknown = [name for name in classes or [] if name not in ids]
    if unknown:
        raise ValueError(f"--class {unknown[0]}: none of {', '.join(id2label.values())}")
    known = [ids[name] for name in classes] if classes else [int(number) for number in id2label]
    return [known[index % len(known)] for index in range(count)]


def write_chain(frames: list[list], path: Path, scale: int) -> None:
    """An animated GIF of a grid along the chain; the last frame stays a while."""
    import io

    from ..data import image_grid
    from ..training.checkpointing import write_whole

    grids = [image_grid(images, scale=scale).convert("P") for images in frames]
    buffer = io.BytesIO()
    durations = [100] * (len(grids) - 1) + [2000]
    grids[0].save(buffer, "GIF", save_all=True, append_images=grids[1:], duration=durations, loop=0)
    write_whole(path, buffer.getvalue())


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
    import contextlib
    import os

    import torch
    from tqdm.auto import tqdm

    from ..data import image_grid
    from ..portable.guidance_ddpm_hf import FreeGuidance
    from ..saving import save_image
    from ..space.drawing import keyed_generators, load_pipeline, swap_sampler
    from ..training.config import check_word

    for name, word in (("out", out), ("MODEL", model), ("classifier", classifier), ("revision", revision)):
        if word is not None:
            check_word(name, str(word))

    quiet()
    token = own_token(token)
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    accelerators = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    device = device or [*accelerators, "cpu"][0]
    try:
        if torch.device(device).type not in (*accelerators, "cpu"):
            raise NotImplementedError("torch has devices that hold no data")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: there is none here ({', '.join([*accelerators, 'cpu'])})") from error
    pipeline = load_pipeline(model, revision, token).to(device)
    by_text = hasattr(pipeline, "tokenizer")
    check_prompts(by_text, prompt, negative_prompt, class_, classifier)
    if guidance_scale is None:
        guidance_scale = 7.5 if by_text else 1.0
    free = FreeGuidance(guidance_scale, guidance_rescale, guidance_interval).check()
    guide = None if classifier is None else load_classifier(classifier, pipeline).to(device)
    labels = None if by_text else wanted_classes(pipeline, guide, class_, guidance_scale, num_images)
    if not by_text and not hasattr(pipeline, "class_ids") and (guidance_rescale or guidance_interval):
        raise ValueError("this model knows no classes; leave out --guidance-rescale and --guidance-interval")
    if guide is None and classifier_scale != 1.0:
        raise ValueError(f"--classifier-scale {classifier_scale} without --classifier")
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--out {out} cannot be written; name another folder")
    usual_steps = swap_sampler(pipeline, sampler.value)
    longest = pipeline.scheduler.config.num_train_timesteps
    if steps is not None and steps > longest:
        raise ValueError(f"--steps {steps}: the model has {longest} timesteps, T of its training")
    steps = steps or usual_steps
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.value)
    autocast = torch.autocast(torch.device(device).type, dtype) if dtype else contextlib.nullcontext()
    pipeline.set_progress_bar_config(desc="steps", leave=False, disable=num_images > batch_size)

    images, frames = [], []
    starts = range(0, num_images, batch_size)
    with autocast:
        for first in tqdm(starts, desc="batches", disable=len(starts) == 1):
            indices = range(first, min(first + batch_size, num_images))
            generators = keyed_generators(device, seed, indices)
            wanted = 40 if progressive and first == 0 else 0
            options = {"generator": generators, "num_inference_steps": steps, "num_frames": wanted}
            if guide is not None:
                options |= {"classifier": guide, "classifier_scale": classifier_scale}
            chosen = None if labels is None else [labels[i] for i in indices]
            if by_text or hasattr(pipeline, "class_ids"):
                options |= {"guidance_rescale": free.rescale, "guidance_interval": free.interval}
                options["guidance_scale"] = free.scale
            if by_text:
                asked = [prompt[i % len(prompt)] for i in indices]
                drawn = pipeline(asked, negative_prompt=negative_prompt, **options)
            elif hasattr(pipeline, "class_ids"):
                drawn = pipeline(chosen, **options)
            else:
                drawn = pipeline(len(indices), class_labels=chosen, **options)
            images += drawn.images
            frames = drawn.frames or frames

    scale = max(1, 64 // images[0].width)
    save_image(image_grid(images, scale=scale), out / "grid.png")
    if not grid_only:
        for index, image in enumerate(images):
            save_image(image, out / f"{index:04d}.png")
    if progressive:
        shown = min(8, len(images))
        moments = frames[:: max(1, len(frames) // 10)][-9:] + frames[-1:]
        strip = [moment.prediction[index] for index in range(shown) for moment in moments]
        save_image(image_grid(strip, columns=len(moments), scale=scale), out / "progressive.png")
        write_chain([frame.sample[:16] for frame in frames], out / "chain.gif", scale)
    typer.echo(f"{len(images)} images in {out}: grid.png" + (", progressive.png, chain.gif" if progressive else ""))
