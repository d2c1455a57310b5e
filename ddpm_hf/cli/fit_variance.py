"""`ddpm-hf fit-variance`: the optimal reverse variance of a trained model, for chains of any length."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..common.errors import UsageError
from .common import clean_token, quiet
from .evaluation_bound import bound_of
from .evaluation_data import Data, DataOptions, read_data
from .exits import reports_stop
from .image_conditions import refuse_image_models
from .sample import option, ready_device

DATA, HOW, WHERE = "The images", "How to fit", "Where from, where to"
EPILOG = """Examples:

ddpm-hf fit-variance photos-ddpm

ddpm-hf fit-variance google/ddpm-cifar10-32 --dataset cifar10 --out cifar10-fitted

ddpm-hf sample photos-ddpm --steps 50"""


def fit_variance(
    model: Annotated[str, typer.Argument(help="A pipeline's folder; with --out also a checkpoint-N or a Hub name.")],
    dataset: Annotated[
        str | None,
        option(DATA, "A folder of images or a dataset on the Hub. Default: what the run was trained on."),
    ] = None,
    split: Annotated[str | None, option(DATA, "Default: train.")] = None,
    image_column: Annotated[str | None, option(DATA, "Default: the column that holds images.")] = None,
    label_column: Annotated[str | None, option(DATA, "The column of the classes, for a model by class.")] = None,
    caption_column: Annotated[str | None, option(DATA, "The column of the captions, for a model by text.")] = None,
    images: Annotated[
        int, option(HOW, "Images, evenly spaced over the dataset, each noised to each of --timesteps.", min=2)
    ] = 256,
    timesteps: Annotated[
        int,
        option(
            HOW,
            "Timesteps to measure at, evenly spaced in log SNR; those between are interpolated. The model's T measures"
            " at all of them.",
            min=3,
        ),
    ] = 50,
    estimate: Annotated[
        str,
        option(
            HOW,
            "error: the mean square error of the predicted x_0, optimal for the mean that is predicted; norm: the"
            " formula of Analytic-DPM, from the norm of the predicted noise.",
        ),
    ] = "error",
    seed: Annotated[int, option(HOW, "Of the noise.", min=0, max=2**63 - 1)] = 0,
    batch_size: Annotated[int, option(HOW, "Images at once.", min=1)] = 64,
    device: Annotated[str | None, option(HOW, "cuda, mps or cpu. Default: the best of this machine.")] = None,
    out: Annotated[Path | None, option(WHERE, "Write a fitted copy here. Default: the model's folder.")] = None,
    token: Annotated[
        str | None, option(WHERE, "For a private model or dataset. Default: your login.", envvar="HF_TOKEN")
    ] = None,
) -> None:
    """Fit the variance of the reverse steps to a trained model (Analytic-DPM), without training.

    `ddpm-hf sample --sampler ddpm` and likelihoods then use it, for any number of steps. The folder loads in stock
    Diffusers as before, which ignores it.
    """
    from ..common.arguments import check_word
    from ..few_steps.saving import check_target, save_fit
    from ..few_steps.variance import (
        ESTIMATES,
        check_fittable,
        fit_variances,
        measure_moments,
        measured_timesteps,
        rounded,
    )
    from ..inference.loading import load
    from ..portable.scheduling_ddpm_hf import X_START_VARIANCES, DDPMScheduler
    from ..training.earlier_run import settle

    for name, word in (("MODEL", model), ("dataset", dataset), ("out", out)):
        if word is not None:
            check_word(name, str(word))
    if estimate not in ESTIMATES:
        raise UsageError(f"--estimate {estimate}: must be one of {', '.join(ESTIMATES)}")
    check_target(model, out)
    quiet()
    device = ready_device(device)
    settle(model)
    pipeline = load(model, token=clean_token(token))
    refuse_image_models(pipeline, "fit-variance")
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    check_fittable(scheduler)
    nodes = measured_timesteps(scheduler, timesteps)
    shape = (pipeline.image_channels, *pipeline.image_size)
    where = DataOptions(dataset, None, split, None, image_column, label_column, caption_column, token)
    chosen = read_data(where, model, shape).reference
    pipeline = pipeline.to(device)
    pipeline.enable_acceleration()
    how = bound_of(pipeline, Data(chosen), 0, images, seed, batch_size)
    with reports_stop(lambda: f"{out or model} was not changed"):
        moments = measure_moments(pipeline.unet, scheduler, how.loaded(), timesteps=nodes, seed=seed, progress=True)
    fit = fit_variances(scheduler, moments, estimate)
    path = save_fit(model, pipeline, {X_START_VARIANCES: rounded(fit.variances)}, out)
    T = len(scheduler)
    shown = (f"{fit.variances[t]:.3g} (t={t})" for t in sorted({0, T // 10, T // 2, T - 1}))
    typer.echo(f"Var[x_0 | x_t] from {moments.images:,} images of {chosen.name} at {len(nodes):,} of {T:,} timesteps:")
    typer.echo(f"  {', '.join(shown)}")
    between = fit.interpolation_error
    more = "" if between is None else f"; interpolated: at most ± {100 * between:.1f}%"
    typer.echo(f"  measured: ± {100 * fit.standard_error:.1f}% (standard error over images){more}; medians")
    words = f"{shlex.quote(str(out or model))} --steps {min(50, T)}"
    typer.echo(f"written to {path}; `ddpm-hf sample {words}` samples with it")
