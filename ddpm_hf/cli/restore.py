"""`ddpm-hf restore`: inpainting, super-resolution, colorizing, deblurring and denoising with any pixel model."""

import enum
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..restoration.tasks import MASKS, TASKS, Settings
from .common import check_revision, clean_token, quiet
from .exits import reports_stop
from .restore_trained import TrainedRestorer, check_options, settings_of_model
from .sample import Acceleration, Precision, autocast, checked_device, option, use_all_cores

if TYPE_CHECKING:
    import torch

    from ..restoration.problems import Picture

MOST_NOISE = 2
OF_AN_IMAGE = 2**20  # keys of an image's solutions, so that they depend on no other number
METHODS = ("ddnm", "pigdm", "mmps", "diffpir", "dps", "gibbs", "repaint")
TaskName = enum.Enum("TaskName", {name: name for name in TASKS}, type=str)  # type: ignore[misc]  # of a table
MethodName = enum.Enum("MethodName", {name: name for name in METHODS}, type=str)  # type: ignore[misc]


class Filter(str, enum.Enum):
    """How a small image was made."""

    bicubic = "bicubic"
    average = "average"


class Blur(str, enum.Enum):
    """How an image was blurred."""

    gaussian = "gaussian"
    motion = "motion"
    anisotropic = "anisotropic"


# Panels of --help
WHAT, HOW, WHERE = "What to restore", "How to restore", "Where from, where to"
DEFAULTS = Settings()
EPILOG = """Examples:

ddpm-hf restore photos-ddpm --task inpaint --image in.png --mask mask.png

ddpm-hf restore photos-ddpm --task super-resolution --factor 4 --image small.png --num-solutions 8

ddpm-hf restore photos-ddpm --task colorize --image folder --out coloured

ddpm-hf restore photos-ddpm --task deblur --blur-size 1.5 --sigma-y 0.05 --image in.png

ddpm-hf restore photos-ddpm --task inpaint --mask left --image held-out --degrade

ddpm-hf restore photos-x2 --image small.png      (a model trained with --conditioning)"""


def restore(
    model: Annotated[str, typer.Argument(help="A run's folder or checkpoint-N, or a model on the Hub (user/name).")],
    image: Annotated[Path, option(WHAT, "The observed image, or a folder of images.")],
    task: Annotated[
        TaskName | None,
        option(
            WHAT,
            "; ".join(f"{name}: {one.note}" for name, one in TASKS.items())
            + ". Default: what the model was trained for.",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        option(WHAT, f"For inpaint: a picture, white where to paint (or a folder of them), or {', '.join(MASKS)}."),
    ] = None,
    hidden: Annotated[
        float | None, option(WHAT, "For --mask box and random: the share that is hidden. Default: 0.5.")
    ] = None,
    factor: Annotated[int | None, option(WHAT, "For super-resolution: how many times larger. Default: 2.")] = None,
    filter: Annotated[
        Filter | None, option(WHAT, "For super-resolution: how the small image was made. Default: bicubic.")
    ] = None,
    blur: Annotated[Blur | None, option(WHAT, "For deblur: the kind of blur. Default: gaussian.")] = None,
    blur_size: Annotated[
        float | None, option(WHAT, "For deblur: the blur's deviation or length in pixels. Default: 1.")
    ] = None,
    blur_angle: Annotated[
        float | None, option(WHAT, "For deblur: its direction in degrees from the horizontal. Default: 0.")
    ] = None,
    sigma_y: Annotated[
        float | None,
        option(
            WHAT,
            "Deviation of the observation's noise, for pixels from -1 to 1. Default: estimated from the image; 0 with"
            " --degrade.",
        ),
    ] = None,
    degrade: Annotated[
        bool, option(WHAT, "The images are true ones: make the observation from them, and compare.", "--degrade")
    ] = False,
    truth: Annotated[
        Path | None, option(WHAT, "The true image to compare with, or a folder of images of the same names.")
    ] = None,
    fit: Annotated[
        bool,
        option(
            WHAT,
            "Resize and crop images so that restored ones have the model's size; else larger ones are done in tiles.",
            "--fit",
        ),
    ] = False,
    class_: Annotated[
        str | None, option(WHAT, "For a model by class: what the images show. Default: no class.", "--class")
    ] = None,
    num_solutions: Annotated[int, option(HOW, "Solutions for each image.", min=1)] = 4,
    method: Annotated[MethodName, option(HOW, "How y guides the chain; see docs/restoration.md.")] = "ddnm",  # type: ignore[assignment]  # typer makes it a MethodName
    steps: Annotated[int, option(HOW, "Number of steps.", min=1)] = 100,
    eta: Annotated[
        float | None, option(HOW, "Share of new noise in each step. Default: by method.", min=0.0, max=1.0)
    ] = None,
    weight: Annotated[float | None, option(HOW, "Of the observation, in dps and diffpir. Default: by method.")] = None,
    iterations: Annotated[
        int | None, option(HOW, "Of conjugate gradients, in mmps; rounds of gibbs. Default: by method.", min=1)
    ] = None,
    start: Annotated[
        float, option(HOW, "Share of the chain to take, from the noised pseudo-inverse; 1 starts from noise.")
    ] = 1.0,
    time_travel: Annotated[
        tuple[int, int] | None,
        option(HOW, "After each LENGTH steps go back up; REPEATS times in all.", metavar="LENGTH REPEATS"),
    ] = None,
    features: Annotated[
        str | None, option(HOW, "A network of the evaluation, for a perceptual distance to the truth.")
    ] = None,
    seed: Annotated[
        int, option(HOW, "Solution i of image k depends on the seed, k and i alone.", min=0, max=2**63 - 1)
    ] = 0,
    batch_size: Annotated[int, option(HOW, "Solutions sampled at once.", min=1)] = 64,
    precision: Annotated[
        Precision, option(HOW, "bf16 and fp16 are faster where the hardware supports them.")
    ] = Precision.fp32,
    acceleration: Annotated[
        Acceleration, option(HOW, "auto: CUDA graphs on a GPU, attention by size on a CPU.")
    ] = Acceleration.auto,
    device: Annotated[str | None, option(HOW, "cuda, mps or cpu. Default: the best of this machine.")] = None,
    out: Annotated[Path, option(WHERE, "The folder to write to.")] = Path("restored"),
    ema: Annotated[
        bool | None,
        option(WHERE, "For a checkpoint-N: use the EMA weights. Default: if it has them.", "--ema/--no-ema"),
    ] = None,
    revision: Annotated[str | None, option(WHERE, "Branch, tag or commit on the Hub.")] = None,
    token: Annotated[str | None, option(WHERE, "For a private model. Default: your login.", envvar="HF_TOKEN")] = None,
) -> None:
    """Restore images with any model of pixels, or with one that was trained for the task.

    Writes solutions (0000.png, ...), their mean, deviation and 90% interval (low.png, high.png), a comparison, and a
    table (restored.json).
    """
    from ..common.arguments import check_word
    from ..inference.loading import load
    from ..portable.pipeline_restoration_ddpm_hf import DDPMRestorationPipeline
    from ..restoration.problems import measure, noise_of
    from ..training.earlier_run import settle
    from .pictures import check_out
    from .restore_inputs import check_names, list_images, read_picture
    from .restore_outputs import PART, SHARED, VIEWS, table, write_restored

    words = (
        ("out", out),
        ("MODEL", model),
        ("image", image),
        ("mask", mask),
        ("truth", truth),
        ("revision", revision),
    )
    for name, word in words:
        if word is not None:
            check_word(name, str(word))
    check_revision(model, revision)
    given = {
        "mask": mask, "hidden": hidden, "factor": factor, "filter": filter and filter.value,
        "blur": blur and blur.value, "blur_size": blur_size, "blur_angle": blur_angle,
    }  # fmt: skip
    settings = None if task is None else read_settings(task.value, given, seed)  # refused before the model is loaded
    check_numbers(sigma_y, degrade, truth, features)
    files = list_images(image, "image")
    check_names(files)
    folders = [f"{file.stem}/" for file in files] if len(files) > 1 else [""]
    check_out(out, PART, [*SHARED, *(f"{folder}{view}" for folder in folders for view in VIEWS)])
    quiet()
    use_all_cores()
    device = checked_device(device)
    settle(model)
    loaded = load(model, ema=ema, revision=revision, token=clean_token(token)).to(device)
    if hasattr(loaded, "conditionings"):
        raise ValueError(f"{model} is a cascade; give one of its models, as `ddpm-hf restore` restores with")
    if hasattr(loaded, "conditioning"):
        check_options(
            method.value, start, {"eta": eta, "weight": weight, "iterations": iterations, "time_travel": time_travel}
        )
        problem = task.value if task else loaded.conditioning.task
        settings = settings_of_model(loaded, problem, given, settings or read_settings(problem, given, seed))
        exact = not sigma_y if degrade else sigma_y == 0
        sigma_y = sigma_y or 0.0  # the model is told of noise, and reads what it is given as it is otherwise
        loaded.check_level(0.0, sigma_y)
        pipeline: Any = TrainedRestorer(loaded, exact)
    elif task is None or settings is None:
        raise ValueError(f"{model} was not trained for one task: give --task, one of {', '.join(TASKS)}")
    else:
        problem = task.value
        pipeline = DDPMRestorationPipeline.from_pipe(loaded)
    if acceleration.value == "auto":
        pipeline.enable_acceleration()
    options = {
        "method": method.value, "num_inference_steps": steps, "eta": eta, "weight": weight, "iterations": iterations,
        "start": start, "time_travel": time_travel, "class_labels": class_id(loaded, class_),
    }  # fmt: skip
    pictures = [
        read_picture(
            file, problem, settings, pipeline, mask=mask, truth=truth, degrade=degrade, fit=fit, sigma_y=sigma_y,
            generator=noise_of(seed, index),
        )
        for index, file in enumerate(files)
    ]  # fmt: skip
    describe = None if features is None else feature_function(features, device)
    if describe is not None and pictures[0].truth is not None:
        try:
            describe((255 * (pictures[0].truth / 2 + 0.5)).round().byte()[None])
        except ValueError as error:
            raise ValueError(f"--features {features}: {error}") from error
    with reports_stop(lambda: f"nothing was written to {out}"), autocast(device, precision):
        solutions = restore_pictures(pipeline, pictures, num_solutions, batch_size, seed, options)
    rows = [measure(picture, several, describe) for picture, several in zip(pictures, solutions)]
    record = {"task": problem, **{key: value for key, value in options.items() if value is not None}, "seed": seed}
    write_restored(out, pictures, solutions, rows, record)
    if sigma_y is None and not degrade:
        estimates = sorted({f"{one.sigma_y:.3g}" for one in pictures}, key=float)
        span = " to ".join(dict.fromkeys([estimates[0], estimates[-1]]))
        typer.echo(f"--sigma-y is estimated: {span}; give --sigma-y 0 for images without noise", err=True)
    typer.echo(table(rows))
    typer.echo(f"the solutions, comparison.png and restored.json are in {out}")


def read_settings(task: str, given: dict[str, Any], seed: int) -> Settings:
    """What the task's operator is made of.

    Raises:
        ValueError: an option that the task does not read, or a mask that is missing or takes no --hidden.
    """
    for name, value in given.items():
        if value is not None and name not in TASKS[task].reads:
            uses = next(one for one, row in TASKS.items() if name in row.reads)
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value} is for --task {uses}; leave --{flag} out")
    mask, hidden, factor, size = (given[name] for name in ("mask", "hidden", "factor", "blur_size"))
    if task == "inpaint" and mask is None:
        raise ValueError(f"--task inpaint requires --mask: a picture, white where to paint, or {', '.join(MASKS)}")
    if hidden is not None and mask not in ("box", "random"):
        raise ValueError(f"--hidden {hidden} is for --mask box and --mask random; leave --hidden out")
    if factor is not None and factor < 2:
        raise ValueError(f"--factor {factor}: must be 2 or more")
    if hidden is not None and not 0 < hidden < 1:
        raise ValueError(f"--hidden {hidden}: must be above 0 and below 1")
    if size is not None and not 0 < size < float("inf"):
        raise ValueError(f"--blur-size {size}: must be above 0")
    chosen = {name: value for name, value in given.items() if value is not None and name != "mask"}
    return Settings(**chosen, seed=seed)


def class_id(loaded: Any, name: str | None) -> int | None:
    """The class that --class names, by its name or id; None for no class.

    Raises:
        ValueError: an unknown class, one for a model without classes, or none where the model always has one.
    """
    from .conditions import class_ids

    if not getattr(loaded, "has_classes", False):
        if name is not None:
            raise ValueError(f"--class {name}: this model has no classes; leave it out")
        return None
    if name is None and loaded.null_class is None:
        raise ValueError(f"this model always has a class: give --class, one of {', '.join(loaded.labels)}")
    return None if name is None else class_ids([name], loaded.class_names)[0]  # the pipeline warns of untrained ones


def check_numbers(sigma_y: float | None, degrade: bool, truth: Path | None, features: str | None) -> None:
    """Raise ValueError for noise below 0 or of another unit, and for options that nothing would read."""
    if sigma_y is not None and not 0 <= sigma_y < float("inf"):
        raise ValueError(f"--sigma-y {sigma_y}: must be 0 or more")
    if sigma_y is not None and sigma_y > MOST_NOISE:
        raise ValueError(
            f"--sigma-y {sigma_y:g}: must be at most {MOST_NOISE}, of pixels from -1 to 1; divide that of 0 to 255 by"
            " 127.5"
        )
    if degrade and truth is not None:
        raise ValueError("--truth and --degrade, which makes the truth of --image: give one of them")
    if features is not None and not (degrade or truth is not None):
        raise ValueError(f"--features {features} compares with the truth; give --truth, or --degrade")


def feature_function(spec: str, device: str) -> Callable[["torch.Tensor"], "torch.Tensor"]:
    """uint8 images -> features, of a network of the evaluation."""
    import torch

    from ..evaluation.features import load_extractor
    from ..evaluation.protocols import PROTOCOLS

    extractor = load_extractor(spec, protocol=PROTOCOLS["clean-fid"], device=device)
    return lambda images: torch.from_numpy(extractor(images).pool)


def restore_pictures(
    pipeline: Any,
    pictures: Sequence["Picture"],
    num_solutions: int,
    batch_size: int,
    seed: int,
    options: dict[str, Any],
) -> list["torch.Tensor"]:
    """The solutions of each picture, [S, C, H, W] in [0, 1] on the CPU."""
    import torch
    from tqdm.auto import tqdm

    from ..inference.studio import keyed_generators

    total = len(pictures) * num_solutions
    pipeline.set_progress_bar_config(desc="steps", leave=False, disable=total > batch_size)
    solutions = []
    with tqdm(total=total, desc="solutions", disable=total <= batch_size) as bar:
        for number, picture in enumerate(pictures):
            parts = []
            for first in range(0, num_solutions, batch_size):
                count = min(batch_size, num_solutions - first)
                indices = range(number * OF_AN_IMAGE + first, number * OF_AN_IMAGE + first + count)
                output = pipeline(
                    picture.y,
                    picture.operator,
                    picture.sigma_y,
                    num_solutions=count,
                    generator=keyed_generators(pipeline.device, seed, indices),
                    output_type="latent",
                    **options,
                )
                with torch.no_grad():
                    parts.append((pipeline.pixels(output.images) / 2 + 0.5).float().cpu())
                bar.update(count)
            solutions.append(torch.cat(parts))
    return solutions
