"""`ddpm-hf sample`: sample images from a trained model."""

import enum
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..inference.samplers import SAMPLERS
from .common import check_revision, clean_token, quiet
from .conditions import DEFAULT_IMAGES, Conditions, read_conditions
from .exits import reports_stop
from .image_conditions import ImageConditions, read_image_conditions
from .pictures import adm_arrays, check_out, write_pictures

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_BETWEEN, DEFAULT_BATCH = 11, 64

Sampler = enum.Enum("Sampler", {name: name for name in SAMPLERS}, type=str)  # type: ignore[misc]  # a table's names


class Precision(str, enum.Enum):
    """What the network computes in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Acceleration(str, enum.Enum):
    """How the network is executed."""

    auto = "auto"
    none = "none"


class Format(str, enum.Enum):
    """How the images are written."""

    png = "png"
    npz = "npz"


# Panels of --help
WHAT, HOW, WHERE = "What to sample", "How to sample", "Where from, where to"
EPILOG = """Examples:

ddpm-hf sample photos-ddpm --num-images 64 --progressive

ddpm-hf sample photos-ddpm --sampler dpm++ --steps 25 --seed 7

ddpm-hf sample by-class --class cat --class dog --guidance-scale 2

ddpm-hf sample text2image --prompt "a handwritten seven" --prompt "the digit two"

ddpm-hf sample photos-ddpm --num-images 50000 --batch-size 256 --format npz

ddpm-hf sample photos-ddpm --interpolate a.png b.png --timestep 500

ddpm-hf sample photos-x4 --image small.png --num-images 8

ddpm-hf sample --cascade photos-8 photos-x2 photos-x4 --save-model photos-cascade"""


def option(panel: str, help: str, *names: str, **settings: Any) -> Any:
    """A typer option in a panel of --help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


def sample(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A run's folder or checkpoint-N, or a model on the Hub (user/name); with --cascade two or three.",
        ),
    ],
    num_images: Annotated[
        int | None,
        option(
            WHAT,
            "Number of images. Default: 16, or 11 with --interpolate, or one for each --image.",
            min=1,
            max=1_000_000,
        ),
    ] = None,
    class_: Annotated[
        list[str] | None,
        option(
            WHAT,
            "A class by name or id, for a model by class; repeat it for several. Default: all.",
            "--class",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, option(WHAT, "The text, for a text-to-image model; repeat it for several in turn.")
    ] = None,
    negative_prompt: Annotated[str | None, option(WHAT, "For text to image: what to move away from.")] = None,
    image: Annotated[
        Path | None,
        option(WHAT, "The image that an image-to-image model reads, or a folder of them; in turn."),
    ] = None,
    cascade: Annotated[
        bool,
        option(WHAT, "Sample small images by the first MODEL, and enlarge them by the others.", "--cascade"),
    ] = False,
    mask: Annotated[
        Path | None, option(WHAT, "For --image of a model that inpaints: white where to paint; or a folder of masks.")
    ] = None,
    conditioning_noise: Annotated[
        float | None,
        option(
            WHAT,
            "Noise to mix into --image, or into the images between the models of a cascade, from 0 to the level that"
            " they were trained with. Default: 0, in a cascade 0.1 or what was saved with it.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    interpolate: Annotated[
        tuple[Path, Path] | None,
        option(WHAT, "Interpolate between two image files, noised to --timestep.", metavar="IMAGE IMAGE"),
    ] = None,
    timestep: Annotated[
        int | None, option(WHAT, "For --interpolate: the noise level, from 0 to T-1; higher varies more.", min=0)
    ] = None,
    shared_timestep: Annotated[
        int | None,
        option(WHAT, "Sample all images from one x_t: they share the chain down to this timestep.", min=0),
    ] = None,
    sampler: Annotated[
        Sampler,
        option(HOW, "; ".join(f"{name}: {row.title}, {row.note}" for name, row in SAMPLERS.items()) + "."),
    ] = "ddpm",  # type: ignore[assignment]  # typer makes it a Sampler
    steps: Annotated[
        int | None,
        option(
            HOW,
            "Number of steps. Default: "
            + ", ".join(f"{row.steps or 'all'} ({name})" for name, row in SAMPLERS.items())
            + ".",
            min=1,
        ),
    ] = None,
    eta: Annotated[
        float, option(HOW, "Noise of DDIM: 0 is deterministic, 1 as noisy as ddpm.", min=0.0, max=1.0)
    ] = 0.0,
    guidance_scale: Annotated[
        float | None,
        option(
            HOW,
            "Classifier-free guidance: 1 disables it, higher values follow the class or the prompt more strongly."
            " Default: 1 by class; by prompt what is saved with the model.",
        ),
    ] = None,
    guidance_rescale: Annotated[
        float, option(HOW, "Against over-exposure at high guidance scales (Lin et al. 2023).", min=0, max=1)
    ] = 0.0,
    guidance_interval: Annotated[
        tuple[int, int] | None, option(HOW, "Guide only between these timesteps.", metavar="LOW HIGH")
    ] = None,
    classifier: Annotated[
        Path | None, option(HOW, "A folder of train-classifier, to guide towards --class by its gradient.")
    ] = None,
    classifier_scale: Annotated[
        float | None,
        option(HOW, "How strongly it guides, or the classifier that the model has. Default: 1 with --classifier."),
    ] = None,
    seed: Annotated[
        int, option(HOW, "Image i depends on the seed and i alone, whatever the batch.", min=0, max=2**63 - 1)
    ] = 0,
    batch_size: Annotated[int, option(HOW, "Images sampled at once.", min=1)] = DEFAULT_BATCH,
    precision: Annotated[
        Precision, option(HOW, "bf16 and fp16 are faster where the hardware supports them.")
    ] = Precision.fp32,
    acceleration: Annotated[
        Acceleration,
        option(HOW, "auto: CUDA graphs on a GPU, attention by size on a CPU; images are equal but for rounding."),
    ] = Acceleration.auto,
    device: Annotated[str | None, option(HOW, "cuda, mps or cpu. Default: the best of this machine.")] = None,
    out: Annotated[Path, option(WHERE, "The folder to write to.")] = Path("samples"),
    format: Annotated[
        Format,
        option(
            WHERE,
            "png: single images; npz: one file samples.npz as ADM's evaluation suite reads it (arr_0, uint8"
            " [N, H, W, C]; arr_1, the labels of a model by class).",
        ),
    ] = Format.png,
    progressive: Annotated[
        bool, option(WHERE, "Also a strip of x̂_0 along the chain and an animated GIF of x_t.", "--progressive")
    ] = False,
    grid_only: Annotated[bool, option(WHERE, "Write the grid, no single images.", "--grid-only")] = False,
    ema: Annotated[
        bool | None,
        option(WHERE, "For a checkpoint-N: use the EMA weights. Default: if it has them.", "--ema/--no-ema"),
    ] = None,
    save_model: Annotated[
        Path | None, option(WHERE, "With --cascade: also save the models as one, in this folder, for sample and push.")
    ] = None,
    revision: Annotated[str | None, option(WHERE, "Branch, tag or commit on the Hub.")] = None,
    token: Annotated[str | None, option(WHERE, "For a private model. Default: your login.", envvar="HF_TOKEN")] = None,
) -> None:
    """Sample images: a grid (grid.png) and single ones (0000.png, ...).

    Several classes or prompts have a row of the grid each, with a legend.
    """
    from ..common.arguments import check_word
    from ..inference.loading import load
    from ..inference.samplers import schedulers_of
    from ..training.earlier_run import settle

    words = (
        ("out", out), *(("MODEL", model) for model in models), ("classifier", classifier), ("revision", revision),
        ("image", image), ("mask", mask), ("save-model", save_model),
    )  # fmt: skip
    for name, word in words:
        if word is not None:
            check_word(name, str(word))
    check_models(models, cascade, save_model)
    for model in models:
        check_revision(model, revision)
    special = "--interpolate" if interpolate else "--shared-timestep" if shared_timestep is not None else None
    check_together(special, timestep, sampler, eta, progressive, format, grid_only)
    if special and batch_size != DEFAULT_BATCH:
        raise ValueError(f"--batch-size {batch_size}: {special} samples all images at once; leave it out")
    quiet()
    device = ready_device(device)
    loaded = []
    for model in models:
        settle(model)
        loaded.append(load(model, ema=ema, revision=revision, token=clean_token(token)))
    pipeline = (as_cascade(loaded) if cascade else loaded[0]).to(device)
    if acceleration.value == "auto":
        pipeline.enable_acceleration()
    guidance = (guidance_scale, guidance_rescale, guidance_interval)
    if pipeline.image_channels > 4:
        shown = f"the first three of {pipeline.image_channels} channels"
        typer.echo(f"warning: the pictures show {shown}; output_type='np' of the pipeline gives all", err=True)
    conditions: Conditions | ImageConditions
    if hasattr(pipeline, "conditioning"):
        others = {
            "prompt": prompt, "negative-prompt": negative_prompt, "classifier": classifier,
            "classifier-scale": classifier_scale, "interpolate": interpolate,
            "shared-timestep": shared_timestep is not None,
        }  # fmt: skip
        conditions = read_image_conditions(pipeline, image, mask, class_, guidance, conditioning_noise, others)
    else:
        levels = hasattr(pipeline, "conditionings")
        refuse_images(image, mask, None if levels else conditioning_noise)
        conditions = read_conditions(pipeline, classifier, class_, prompt, negative_prompt, guidance, classifier_scale)
        if levels:
            conditions = of_cascade(pipeline, conditions, conditioning_noise)
    check_out(out)
    own = schedulers_of(pipeline)
    steps = set_sampler(pipeline, sampler.value, steps)
    if save_model is not None:
        save_cascade(pipeline, save_model, own, conditioning_noise)
    columns: int | None = None
    labels: list[int] = []
    frames: list[Any] = []
    with reports_stop(lambda: f"nothing was written to {out}"), autocast(device, precision):
        if special:
            check_unconditional(pipeline, conditions, special)
        if interpolate and timestep is not None:
            count = DEFAULT_BETWEEN if num_images is None else num_images
            images, columns = images_between(pipeline, interpolate, timestep, count, seed, steps), count
        elif shared_timestep is not None:
            images = images_from_shared(pipeline, num_images or DEFAULT_IMAGES, shared_timestep, seed, steps)
        else:
            count, moments = num_images or conditions.default_count, 40 if progressive else 0
            images, frames = sample_images(pipeline, conditions, count, batch_size, seed, steps, eta, moments)
            labels = conditions.labels(count)
    arrays = adm_arrays(images, labels) if format is Format.npz else None
    singles = not (grid_only or arrays)
    typer.echo(write_pictures(images, frames, out, conditions.names, columns, singles, arrays))


def check_together(
    special: str | None,
    timestep: int | None,
    sampler: Sampler,
    eta: float,
    progressive: bool,
    format: Format,
    grid_only: bool,
) -> None:
    """Raise ValueError for options that exclude each other, or that nothing would read."""
    if eta and sampler.value != "ddim":
        raise ValueError(f"--eta {eta:g} requires --sampler ddim (got {sampler.value})")
    if format is Format.npz and grid_only:
        raise ValueError("--grid-only writes no images, and --format npz says how; give one of them")
    if timestep is not None and special != "--interpolate":
        raise ValueError(f"--timestep {timestep} is for --interpolate; for one shared x_t, give --shared-timestep")
    if special == "--interpolate" and timestep is None:
        raise ValueError("--interpolate requires --timestep, such as 500 of 1000; higher keeps less of the images")
    if special and sampler.value != "ddpm":
        raise ValueError(f"{special} starts within a chain, which --sampler {sampler.value} cannot; leave it out")
    if special and progressive:
        raise ValueError(f"{special} and --progressive: give one of them")
    if special and format is Format.npz:
        raise ValueError(f"{special} and --format npz: give one of them")


def check_models(models: list[str], cascade: bool, save_model: Path | None) -> None:
    """Raise ValueError for another number of models than the command samples."""
    if cascade and not 2 <= len(models) <= 3:
        raise ValueError(f"--cascade is of two or three models: of small images, then larger (got {len(models)})")
    if not cascade and len(models) > 1:
        raise ValueError(f"{len(models)} models ({' '.join(models)}): give one, or --cascade")
    if save_model is not None and not cascade:
        raise ValueError(f"--save-model {save_model} is for --cascade; leave it out")
    if save_model is not None:
        from .convert import check_target

        check_target(save_model, "save-model")
        if (save_model / "model_index.json").is_file() and not is_cascade(save_model):
            raise ValueError(f"--save-model {save_model}: holds another model, which stays; name another folder")


def is_cascade(folder: Path) -> bool:
    """Whether a folder holds a cascade."""
    from ..common.files import read_json

    index = read_json(folder / "model_index.json")
    return isinstance(index, dict) and "DDPMCascadePipeline" in str(index.get("_class_name"))


def as_cascade(loaded: list[Any]) -> Any:
    """The pipelines as one.

    Raises:
        ValueError: pipelines that do not fit together.
    """
    from ..portable.pipeline_cascade_ddpm_hf import DDPMCascadePipeline

    return DDPMCascadePipeline.from_pipes(*loaded)


def save_cascade(pipeline: Any, folder: Path, own: dict[str, Any], conditioning_noise: float | None) -> None:
    """Save the models as one, with their own schedulers and the level of noise that was asked for."""
    from ..inference.samplers import schedulers_of
    from ..models.saving import save_pipeline

    if conditioning_noise is not None:
        pipeline.register_to_config(conditioning_noise=dict.fromkeys(pipeline.conditionings, conditioning_noise))
    chosen = schedulers_of(pipeline)
    for schedulers in (own, chosen):
        for name, scheduler in schedulers.items():
            setattr(pipeline, name, scheduler)
        if schedulers is own:
            save_pipeline(pipeline, folder)
    typer.echo(f"saved to {folder}: `ddpm-hf sample {folder}` samples from it, `ddpm-hf push` publishes it")


def of_cascade(pipeline: Any, conditions: Conditions, conditioning_noise: float | None) -> Conditions:
    """The conditions of a cascade: classes and a level of noise.

    Raises:
        ValueError: a level that a model was not trained with, or a classifier, which guides small images alone.
    """
    import dataclasses

    if "classifier" in conditions.options:
        raise ValueError("--classifier guides a single model, not a cascade; leave it out")
    pipeline.levels(conditioning_noise)
    return dataclasses.replace(conditions, options={**conditions.options, "conditioning_noise": conditioning_noise})


def refuse_images(image: Path | None, mask: Path | None, conditioning_noise: float | None) -> None:
    """Raise ValueError for what only a model that reads an image has a use for."""
    for name, value in (("image", image), ("mask", mask), ("conditioning-noise", conditioning_noise)):
        if value is not None:
            raise ValueError(
                f"--{name} {value} is for models that read an image, and this one does not; `ddpm-hf restore` restores"
                " images with any model"
            )


def check_unconditional(pipeline: "DiffusionPipeline", conditions: Any, special: str) -> None:
    """Raise ValueError for a model that is sampled by class or text, and for classifier guidance."""
    if not hasattr(pipeline, "interpolate"):
        raise ValueError(f"{special} is for unconditional models, and this one samples by class or text")
    if conditions.options:
        raise ValueError(f"{special} and --classifier: give one of them")


def use_all_cores() -> None:
    """Let torch use every core that this process may use, but where OMP_NUM_THREADS says otherwise."""
    import os

    import torch

    from ..common.machine import usable_cores

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


def ready_device(device: str | None) -> str:
    """The device, checked; on a CPU torch may use every core."""
    use_all_cores()
    return checked_device(device)


def set_sampler(pipeline: "DiffusionPipeline", sampler: str, steps: int | None) -> int | None:
    """Put a sampler into the pipeline; the number of steps to sample in, by default its usual one.

    None stands for all timesteps of each stage, where a cascade's stages have different numbers of them.

    Raises:
        ValueError: more steps than the model has timesteps, or a number that was not fitted.
    """
    from ..inference.samplers import schedulers_of, swap_sampler

    usual_steps = swap_sampler(pipeline, sampler)
    all_timesteps = {one.config.num_train_timesteps for one in schedulers_of(pipeline).values()}
    timesteps = min(all_timesteps)
    if steps is not None and steps > timesteps:
        raise ValueError(f"--steps {steps}: the model has {timesteps} timesteps, T of its training")
    steps = steps or usual_steps or (timesteps if len(all_timesteps) == 1 else None)
    if SAMPLERS[sampler].fitted:
        pipeline.scheduler.set_timesteps(steps)  # it refuses numbers that were not fitted
    return steps


def autocast(device: str, precision: Precision) -> AbstractContextManager:
    """A context in which the networks compute in a precision."""
    import contextlib

    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.value)
    return torch.autocast(torch.device(device).type, dtype) if dtype else contextlib.nullcontext()


def sample_images(
    pipeline: "DiffusionPipeline",
    conditions: Conditions | ImageConditions,
    num_images: int,
    batch_size: int,
    seed: int,
    steps: int | None,
    eta: float,
    num_frames: int,
) -> tuple[list, list]:
    """PIL images, batch by batch, and the frames of the first batch's chains."""
    from tqdm.auto import tqdm

    from ..inference.studio import keyed_generators

    pipeline.set_progress_bar_config(desc="steps", leave=False, disable=num_images > batch_size)
    images: list[Any] = []
    frames: list[Any] = []
    starts = range(0, num_images, batch_size)
    for first in tqdm(starts, desc="batches", disable=len(starts) == 1):
        indices = range(first, min(first + batch_size, num_images))
        output = conditions.sample(
            pipeline,
            indices,
            generator=keyed_generators(pipeline.device, seed, indices),
            num_inference_steps=steps,
            num_frames=num_frames if first == 0 else 0,
            eta=eta,
            output_type="preview",
        )
        images += output.images
        frames = output.frames or frames
    return images, frames


def images_between(
    pipeline: "DiffusionPipeline", files: tuple[Path, Path], timestep: int, count: int, seed: int, steps: int | None
) -> list:
    """PIL images on the way from one to another (Ho et al. 2020, fig. 8), ends included."""
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    from ..data.pixels import prepare_image
    from ..inference.studio import keyed_generators

    ends = []
    for path in files:
        try:
            with Image.open(path) as image:
                ends.append(prepare_image(ImageOps.exif_transpose(image), pipeline.image_channels))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise ValueError(f"--interpolate {path}: not an image that can be read ({error})") from error
    if count < 2:
        raise ValueError(f"--num-images {count}: --interpolate makes 2 or more")
    weights = torch.linspace(0, 1, count).tolist()
    (generator,) = keyed_generators(pipeline.device, seed, [0])
    options = {"weights": weights, "generator": generator, "num_inference_steps": steps}
    return pipeline.interpolate(*ends, timestep, **options).images


def images_from_shared(pipeline: "DiffusionPipeline", count: int, timestep: int, seed: int, steps: int | None) -> list:
    """PIL images that have the chain down to a timestep in common (Ho et al. 2020, fig. 7)."""
    from ..inference.studio import keyed_generators

    (generator,) = keyed_generators(pipeline.device, seed, [0])
    return pipeline.sample_from_shared(count, timestep, generator, num_inference_steps=steps).images
