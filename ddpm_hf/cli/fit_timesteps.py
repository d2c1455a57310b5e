"""`ddpm-hf fit-timesteps`: the timesteps, and the solver's weights, for a given number of network calls."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.errors import UsageError
from .common import clean_token, quiet
from .exits import reports_stop
from .image_conditions import refuse_image_models
from .sample import option, ready_device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..few_steps.trajectories import Predict

DEFAULT_TRAJECTORIES, DEFAULT_TEACHER_STEPS = 64, 60
HOW, WHERE = "How to fit", "Where from, where to"
EPILOG = """Examples:

ddpm-hf fit-timesteps photos-ddpm --calls 5 --calls 8 --calls 10

ddpm-hf sample photos-ddpm --sampler fitted --steps 8

ddpm-hf fit-variance photos-ddpm, then ddpm-hf fit-timesteps photos-ddpm --calls 32 --objective likelihood"""


class Objective(str, enum.Enum):
    """What the timesteps are for."""

    pictures = "pictures"
    likelihood = "likelihood"


def fit_timesteps(
    model: Annotated[str, typer.Argument(help="A pipeline's folder; with --out also a checkpoint-N or a Hub name.")],
    calls: Annotated[
        list[int],
        option(HOW, "Network calls for an image; repeat it for several.", "--calls", "--steps", min=2),
    ],
    objective: Annotated[
        Objective,
        option(
            HOW,
            "pictures: for --sampler fitted, near to the model's own trajectories in many steps; likelihood: the chain"
            " of the lowest bound, of a model with a fitted variance.",
        ),
    ] = Objective.pictures,
    trajectories: Annotated[
        int | None,
        option(HOW, f"For pictures: how many, half of them to judge by. Default: {DEFAULT_TRAJECTORIES}.", min=2),
    ] = None,
    teacher_steps: Annotated[
        int | None, option(HOW, f"For pictures: the steps of a trajectory. Default: {DEFAULT_TEACHER_STEPS}.")
    ] = None,
    seed: Annotated[int | None, option(HOW, "Of the noise they start from. Default: 0.", min=0, max=2**63 - 1)] = None,
    batch_size: Annotated[int, option(HOW, "Images at once.", min=1)] = 64,
    device: Annotated[str | None, option(HOW, "cuda, mps or cpu. Default: the best of this machine.")] = None,
    out: Annotated[Path | None, option(WHERE, "Write a fitted copy here. Default: the model's folder.")] = None,
    token: Annotated[str | None, option(WHERE, "For a private model. Default: your login.", envvar="HF_TOKEN")] = None,
) -> None:
    """Fit the timesteps of a short chain to a trained model, and the weights of its steps, without data or training.

    `ddpm-hf sample --sampler fitted --steps N` then samples in N calls. The timesteps are plain numbers, which
    set_timesteps(timesteps=...) of Diffusers' DPMSolverMultistepScheduler takes as well.
    """
    from ..common.arguments import check_word
    from ..few_steps.saving import check_target
    from ..inference.loading import load
    from ..training.earlier_run import settle

    for name, word in (("MODEL", model), ("out", out)):
        if word is not None:
            check_word(name, str(word))
    if objective.value == "likelihood":
        for name, value in (("trajectories", trajectories), ("teacher-steps", teacher_steps), ("seed", seed)):
            if value is not None:
                raise UsageError(f"--{name} {value} is for --objective pictures; leave it out")
    check_target(model, out)
    quiet()
    device = ready_device(device)
    settle(model)
    pipeline = load(model, token=clean_token(token))
    refuse_image_models(pipeline, "fit-timesteps")
    if objective.value == "likelihood":
        fits, lines = likelihood_fits(pipeline, calls)
    else:
        pipeline = pipeline.to(device)
        pipeline.enable_acceleration()
        with reports_stop(lambda: f"{out or model} was not changed"):
            number = DEFAULT_TRAJECTORIES if trajectories is None else trajectories
            steps = min(DEFAULT_TEACHER_STEPS, pipeline.scheduler.config.num_train_timesteps)
            steps = steps if teacher_steps is None else teacher_steps
            fits, lines = picture_fits(pipeline, calls, number, steps, seed or 0, batch_size)
    typer.echo("\n".join(lines))
    typer.echo(f"written to {write(model, pipeline, fits, out)}")


def write(model: str, pipeline: "DiffusionPipeline", fits: dict[str, dict[str, Any]], out: Path | None) -> Path:
    """Save fits, together with those for other numbers of calls that the model has; the file's path."""
    from ..few_steps.saving import save_fit

    known = {key: dict(pipeline.scheduler.config.get(key) or {}) for key in fits}
    calls = next(iter(fits.values()))
    merged = {key: {k: v for k, v in known[key].items() if k not in calls} | fits[key] for key in fits}
    return save_fit(model, pipeline, merged, out)


def likelihood_fits(pipeline: "DiffusionPipeline", calls: list[int]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The chains of the lowest bound, and what is said of them."""
    from ..evaluation.model_bound import even_timesteps
    from ..few_steps.timesteps import likelihood_timesteps, steps_cost
    from ..portable.multistep_ddpm_hf import LIKELIHOOD_TIMESTEPS
    from ..portable.scheduling_ddpm_hf import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    found = {number: likelihood_timesteps(scheduler, number) for number in calls}
    T, lines = len(scheduler), []
    every = steps_cost(scheduler, range(T - 1, -1, -1))
    for number, timesteps in found.items():
        even = steps_cost(scheduler, even_timesteps(T, number)) - every
        lines.append(f"{number} calls: {steps_cost(scheduler, timesteps) - every:.4f} bits/dim more than {T} (evenly"
                     f" spaced: {even:.4f}): {timesteps}")  # fmt: skip
    return {LIKELIHOOD_TIMESTEPS: {str(number): timesteps for number, timesteps in found.items()}}, lines


def picture_fits(
    pipeline: "DiffusionPipeline", calls: list[int], trajectories: int, teacher_steps: int, seed: int, batch_size: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The timesteps and weights that come nearest to the teacher, and what is said of them."""
    import torch

    from ..common.randomness import StepKeys
    from ..few_steps.pictures import fit_pictures
    from ..portable.multistep_ddpm_hf import FITTED_TIMESTEPS, FITTED_WEIGHTS, EpsilonMultistepScheduler
    from ..portable.sampling_ddpm_hf import check_sampler

    scheduler = EpsilonMultistepScheduler.from_config(pipeline.scheduler.config)
    check_sampler(scheduler, [len(scheduler) - 1])
    predict = predictor(pipeline)
    like = torch.zeros(trajectories, *pipeline.sample_shape, device=pipeline.device)
    noise = StepKeys(seed, len(scheduler), 0, trajectories).normal_like(like, "fit_noise")  # not that of any sample
    fitted = fit_pictures(
        predict, scheduler, noise, calls, teacher_steps=teacher_steps, batch_size=batch_size, progress=True
    )
    lines: list[str] = []
    fits: dict[str, dict[str, Any]] = {FITTED_TIMESTEPS: {}, FITTED_WEIGHTS: {}}
    for number, candidates in fitted.items():
        best = candidates[0]
        lines.append(f"{number} calls, distance to the images of {teacher_steps}:")
        lines += [f"  {one.error:.4f}  {one.name}: {one.timesteps}" for one in candidates]
        fits[FITTED_TIMESTEPS][str(number)] = best.timesteps
        if best.weights is not None:
            fits[FITTED_WEIGHTS][str(number)] = best.weights
    return fits, lines


def predictor(pipeline: "DiffusionPipeline") -> "Predict":
    """The network as a function of x_t and t: of the classes in turn for a model by class, without guidance.

    Raises:
        UsageError: a model by text.
    """
    import torch

    if hasattr(pipeline, "tokenizer"):
        raise UsageError("fit-timesteps for pictures supports models without text; this one samples by prompt")
    classes = list(getattr(pipeline, "default_classes", []))

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditions = {}
        if classes:
            labels = (classes * len(x_t))[: len(x_t)]
            conditions["class_labels"] = torch.tensor(labels, device=x_t.device)
        output = pipeline.unet(x_t.to(pipeline.unet.dtype), t, **conditions).sample.float()
        return output[:, : x_t.shape[1]]

    return predict
