"""`ddpm-hf ema`: a model with an average of its weights of any width, after training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.errors import UsageError
from .common import quiet
from .exits import reports_stop
from .image_conditions import refuse_image_models
from .sample import DEFAULT_BATCH, Sampler, checked_device, option, use_all_cores

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WHICH, SWEEP, WHERE = "Which average", "Compare widths", "Where to"
EPILOG = """Examples:

ddpm-hf train --train_data_dir photos --ema_snapshot_steps 1000

ddpm-hf ema ddpm-model-64 --std 0.05 --out photos-ema

ddpm-hf ema ddpm-model-64 --sweep 0.02,0.05,0.10,0.20 --num-samples 5000"""


def ema(
    run: Annotated[str, typer.Argument(help="The folder of a run with --ema_snapshot_steps.", metavar="RUN")],
    std: Annotated[
        float | None,
        option(WHICH, "The average's width, as a share of the steps: 0.05 weighs about the last tenth of them."),
    ] = None,
    step: Annotated[int | None, option(WHICH, "The step it ends at. Default: the last snapshot's.", min=1)] = None,
    sweep: Annotated[
        str | None, option(SWEEP, "Widths with commas: sample and measure each, as `ddpm-hf evaluate` does.")
    ] = None,
    dataset: Annotated[str | None, option(SWEEP, "Default: what the run was trained on.")] = None,
    metrics: Annotated[str, option(SWEEP, "Names with commas.")] = "fid,kid",
    features: Annotated[str, option(SWEEP, "The network whose features are compared.")] = "inception",
    features_weights: Annotated[Path | None, option(SWEEP, "A file of the network's weights.")] = None,
    protocol: Annotated[str, option(SWEEP, "The tool whose conventions are followed.")] = "adm",
    num_samples: Annotated[int, option(SWEEP, "Images of each width.", min=1, max=10_000_000)] = 10_000,
    sampler: Annotated[Sampler, option(SWEEP, "As in `ddpm-hf sample`.")] = Sampler["ddpm"],
    steps: Annotated[int | None, option(SWEEP, "Number of steps. Default: the sampler's usual one.", min=1)] = None,
    seed: Annotated[int, option(SWEEP, "Of the noise, which each width gets.", min=0, max=2**63 - 1)] = 0,
    batch_size: Annotated[int, option(SWEEP, "Images at once.", min=1)] = DEFAULT_BATCH,
    device: Annotated[str | None, option(SWEEP, "cuda, mps or cpu. Default: the best of this machine.")] = None,
    out: Annotated[
        Path | None,
        option(WHERE, "Default: RUN-ema-STD; of a sweep, RUN-ema-sweep, for report.html and metrics.json."),
    ] = None,
    token: Annotated[
        str | None, option(WHERE, "For a private dataset. Default: your login.", envvar="HF_TOKEN")
    ] = None,
) -> None:
    """Make a model whose weights are an average of any width, from the snapshots of a run (Karras et al. 2024).

    The folder is a pipeline like the run's own: sample from it, evaluate it, push it. A sweep measures several widths,
    beside the run's weights, and writes no model.
    """
    from ..common.arguments import check_word
    from ..common.layout import holds_run
    from ..inference.loading import load
    from ..models.fits import use_fits
    from ..training.earlier_run import settle
    from ..training.post_hoc import Averages

    for name, word in (("RUN", run), ("out", out)):
        if word is not None:
            check_word(name, str(word))
    widths = read_widths(std, sweep)
    if not (Path(run) / "model_index.json").is_file():
        raise UsageError(f"{run} is not the folder of a finished run: it has no model_index.json")
    out = out or Path(f"{run.rstrip('/')}-ema-{'sweep' if std is None else f'{std:g}'}")
    if out.resolve() == Path(run).resolve():
        raise UsageError(f"--out {out}: is the run's own folder, whose weights would be lost; name another")
    if std is not None and holds_run(out):
        raise UsageError(f"--out {out}: holds a training run, which stays; name another folder")
    quiet()
    settle(run)
    averages = Averages(Path(run), step)
    for width in widths:
        averages.check(width)
    if std is not None:
        pipeline = load(run)
        averages.put(pipeline.components, std)
        use_fits(pipeline, {})  # a fit is of the run's weights alone
        save_averaged(pipeline, run, out, std, averages.step)
        typer.echo(f"written to {out}: the average of width {std:g} at step {averages.step:,}; `ddpm-hf sample {out}`")
        return
    from .ema_sweep import SweepOptions, compare_widths

    device, wanted = checked_device(device), str(features_weights) if features_weights else None
    use_all_cores()
    how = SweepOptions(
        dataset,
        metrics,
        features,
        wanted,
        protocol,
        num_samples,
        sampler.value,
        steps,
        seed,
        batch_size,
        device,
        token,
    )
    pipeline = load(run)
    use_fits(pipeline, {})  # all widths are sampled alike
    refuse_image_models(pipeline, "ema --sweep")
    with reports_stop(lambda: f"what was sampled is in {out}; the same command goes on from there"):
        typer.echo(compare_widths(pipeline, run, averages, widths, how, out))


def read_widths(std: float | None, sweep: str | None) -> list[float]:
    """The widths of --std or --sweep.

    Raises:
        UsageError: none, both, or a width that no average has.
    """
    if (std is None) == (sweep is None):
        raise UsageError("give --std WIDTH, such as 0.05, or --sweep WIDTHS, such as 0.02,0.05,0.10")
    flag, words = (
        ("--std", [str(std)]) if sweep is None else ("--sweep", [one for one in sweep.split(",") if one.strip()])
    )
    widths = []
    for word in words:
        try:
            widths.append(float(word))
        except ValueError as error:
            raise UsageError(
                f"{flag} {word!r}: is not a number; a width is a share of the steps, such as 0.05"
            ) from error
        if not 0.001 <= widths[-1] <= 0.28:  # the average of all steps alike has 1/√12
            raise UsageError(
                f"{flag} {word}: a width is from 0.001 to 0.28; 0.05 weighs about the last tenth of the steps"
            )
    if not widths:
        raise UsageError(f"--sweep {sweep!r} is empty; give widths such as 0.02,0.05,0.10")
    return list(dict.fromkeys(widths))


def sessions_until(sessions: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The sessions of a run up to a step; of the one that it lies in, a share of its time."""
    found: list[dict[str, Any]] = []
    for one in sessions:
        first, last = one.get("first_step", 0), one.get("last_step", step)
        if first >= step and found:
            break
        if last > step:
            share = (step - first) / (last - first)
            one = {**one, "last_step": step, "seconds": round(one.get("seconds", 0) * share, 1)}
        found.append(one)
    return found


def save_averaged(pipeline: "DiffusionPipeline", run: str, out: Path, std: float, step: int) -> None:
    """Save the pipeline, with what the run's folder says of its training: for its card, and to evaluate it."""
    from ..common.checkpoints import SETTINGS
    from ..common.files import read_json, write_atomically
    from ..common.layout import RUN_FILE
    from ..common.ownership import claim_files
    from ..models.saving import forget_records, save_pipeline

    save_pipeline(pipeline, out)
    forget_records(out)
    for name in (RUN_FILE, SETTINGS):
        record = read_json(Path(run) / name)
        if not isinstance(record, dict):
            continue
        if name == RUN_FILE:
            record |= {"step": step, "settings": {**record.get("settings", {}), "ema_std": std}}
            record["sessions"] = sessions_until(record.get("sessions", []), step)
        claim_files(out, [name])
        write_atomically(out / name, json.dumps(record, indent=1) + "\n")
