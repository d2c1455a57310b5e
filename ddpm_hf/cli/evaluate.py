"""`ddpm-hf evaluate`: how good a model is, in figures with intervals."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.errors import DataError, UsageError
from .common import check_revision, clean_token, quiet
from .evaluation_bound import bound_of, bound_sections
from .evaluation_data import DataOptions, generated_images, read_data
from .evaluation_samples import STORES, How, conditions_of, of_chain, of_folder, read_chains, weights_digest
from .exits import reports_stop
from .image_conditions import refuse_image_models
from .sample import DEFAULT_BATCH, Acceleration, Precision, Sampler, checked_device, option, use_all_cores

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..evaluation.evaluate import Measure, Reference

DEFAULT_SAMPLES = 10_000
DEFAULT_METRICS = "fid,kid,precision,recall"

# Panels of --help
AGAINST, WHAT, HOW, WHERE = "Compare with", "What to measure", "How to sample", "Where from, where to"
EPILOG = """Examples:

ddpm-hf evaluate photos-ddpm --num-samples 50000 --protocol adm --metrics fid,sfid,is,precision,recall

ddpm-hf evaluate google/ddpm-cifar10-32 --dataset cifar10 --sampler ddim --steps 100

ddpm-hf evaluate photos-ddpm --sweep "ddpm:1000,250 ddim:50,25,10 dpm++:20,10" --num-samples 5000

ddpm-hf evaluate samples --dataset photos --resolution 64

accelerate launch --multi_gpu -m ddpm_hf evaluate photos-ddpm --num-samples 50000"""


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run's folder or checkpoint-N, a model on the Hub (user/name), or a folder of generated images."
        ),
    ],
    dataset: Annotated[
        str | None,
        option(
            AGAINST,
            "A folder of images, a dataset on the Hub, or an npz file. Default: what the run was trained on.",
            "--dataset",
            "--dataset-name",
            "--train-data-dir",
        ),
    ] = None,
    dataset_config_name: Annotated[str | None, option(AGAINST, "The dataset's configuration.")] = None,
    split: Annotated[str | None, option(AGAINST, "The split to compare with. Default: train.")] = None,
    held_out_split: Annotated[
        str | None,
        option(AGAINST, "A split that the model was not trained on. Default: the run's held-out images."),
    ] = None,
    image_column: Annotated[str | None, option(AGAINST, "Default: the column that holds images.")] = None,
    label_column: Annotated[
        str | None, option(AGAINST, "The column of the classes, which are sampled as often as they occur.")
    ] = None,
    caption_column: Annotated[str | None, option(AGAINST, "The column of the captions: the prompts.")] = None,
    resolution: Annotated[
        str | None, option(AGAINST, "Of a folder of images: bring both sets to this size: 64, or HEIGHTxWIDTH.")
    ] = None,
    metrics: Annotated[
        str, option(WHAT, "Names with commas; all; or none, for the likelihood alone.")
    ] = DEFAULT_METRICS,
    features: Annotated[
        str, option(WHAT, "The network whose features are compared.", "--features", "--extractor")
    ] = "inception",
    features_weights: Annotated[Path | None, option(WHAT, "A file of the network's weights.")] = None,
    trust_remote_code: Annotated[
        bool, option(WHAT, "Load a network from a format that can execute code.", "--trust-remote-code")
    ] = False,
    protocol: Annotated[str, option(WHAT, "The tool whose resizing and conventions are followed.")] = "adm",
    likelihood_calls: Annotated[
        int | None,
        option(
            WHAT,
            "Also the likelihood of real images, from so many network calls for each; 0 calls the network at every"
            " timestep.",
            min=0,
        ),
    ] = None,
    likelihood_steps: Annotated[
        int | None,
        option(
            WHAT,
            "The likelihood of a chain of so many steps: of `ddpm-hf fit-timesteps --objective likelihood` where it"
            " was run for that number, else evenly spaced. Default: all timesteps.",
            min=2,
        ),
    ] = None,
    likelihood_images: Annotated[
        int, option(WHAT, "Measure the likelihood of at most so many images, held out where there are any.", min=2)
    ] = 1000,
    num_samples: Annotated[
        int | None, option(WHAT, f"Default: {DEFAULT_SAMPLES:,}, or all images of a folder.", min=1, max=10_000_000)
    ] = None,
    sampler: Annotated[Sampler, option(HOW, "As in `ddpm-hf sample`.")] = Sampler["ddpm"],
    steps: Annotated[int | None, option(HOW, "Number of steps. Default: the sampler's usual one.", min=1)] = None,
    sweep: Annotated[
        str | None,
        option(HOW, 'Several samplers and numbers of steps, such as "ddpm:1000,250 ddim:50,25,10".'),
    ] = None,
    eta: Annotated[float, option(HOW, "Noise of DDIM.", min=0.0, max=1.0)] = 0.0,
    class_: Annotated[
        list[str] | None, option(HOW, "Sample these classes in turn, instead of the dataset's.", "--class")
    ] = None,
    prompt: Annotated[list[str] | None, option(HOW, "Sample these prompts in turn, instead of the captions.")] = None,
    guidance_scale: Annotated[float | None, option(HOW, "Classifier-free guidance: 1 disables it.")] = None,
    guidance_rescale: Annotated[float, option(HOW, "Against over-exposure at high scales.", min=0, max=1)] = 0.0,
    guidance_interval: Annotated[
        tuple[int, int] | None, option(HOW, "Guide only between these timesteps.", metavar="LOW HIGH")
    ] = None,
    seed: Annotated[
        int, option(HOW, "Image i depends on the seed and i alone, whatever the batch.", min=0, max=2**63 - 1)
    ] = 0,
    batch_size: Annotated[int, option(HOW, "Images at once.", min=1)] = DEFAULT_BATCH,
    precision: Annotated[Precision, option(HOW, "What the model computes in.")] = Precision.fp32,
    acceleration: Annotated[Acceleration, option(HOW, "As in `ddpm-hf sample`.")] = Acceleration.auto,
    device: Annotated[str | None, option(HOW, "cuda, mps or cpu. Default: the best of this machine.")] = None,
    out: Annotated[Path, option(WHERE, "The folder for metrics.json, report.html and the sampled images.")] = Path(
        "evaluation"
    ),
    record: Annotated[
        bool, option(WHERE, "Record a run's figures in its folder, for its model card.", "--record/--no-record")
    ] = True,
    ema: Annotated[
        bool | None,
        option(WHERE, "Of a checkpoint-N, use the EMA weights. Default: if it has them.", "--ema/--no-ema"),
    ] = None,
    revision: Annotated[str | None, option(WHERE, "Branch, tag or commit on the Hub.")] = None,
    token: Annotated[
        str | None, option(WHERE, "For a private model or dataset. Default: your login.", envvar="HF_TOKEN")
    ] = None,
) -> None:
    """Measure a model or a folder of images against a dataset: a table, metrics.json and report.html.

    The sampled images stay in OUT/samples: the same command goes on after it was stopped, and other metrics need no
    new samples.
    """
    from ..common.arguments import check_word
    from ..data.flags import DataFlags

    for name, word in (("MODEL", model), ("dataset", dataset), ("out", out), ("features", features)):
        if word is not None:
            check_word(name, str(word))
    if likelihood_steps is not None and likelihood_calls is None:
        raise UsageError(f"--likelihood-steps {likelihood_steps} requires --likelihood-calls; 0 calls each step")
    check_revision(model, revision)
    chains = read_chains(sweep, sampler.value, steps, eta)
    quiet()
    from ..evaluation.evaluate import Reference, check_counts, evaluate
    from ..evaluation.ranks import launched_ranks
    from ..evaluation.report import NOTHING_MORE, check_out, write_report

    ranks, device = launched_ranks(), checked_device(device)
    if ranks.world == 1:
        use_all_cores()
    check_out(out)
    names = read_metrics(metrics, likelihood_calls)
    pipeline: Any = None
    images = generated_images(model, None if resolution is None else DataFlags(resolution=resolution).size())
    if images is None:
        refuse(f"the dataset is brought to the size of {model}", resolution=resolution)
        pipeline = load_model(model, ema, revision, token)
    else:
        why = f"{model} holds images, and nothing is sampled"
        refuse(why, sweep=sweep, steps=steps, class_=class_, prompt=prompt, ema=ema, likelihood_calls=likelihood_calls,
               guidance_scale=guidance_scale, guidance_interval=guidance_interval,
               guidance_rescale=guidance_rescale or None, eta=eta or None,
               sampler=None if sampler.value == "ddpm" else sampler.value)  # fmt: skip
    where = DataOptions(
        dataset, dataset_config_name, split, held_out_split, image_column, label_column, caption_column, token
    )
    shape = images.shape if images is not None else (pipeline.image_channels, *pipeline.image_size)
    sized = pipeline is not None or resolution is not None
    data = read_data(where, model, shape, sized, of_images=images is not None)
    weights = None if features_weights is None else str(features_weights)
    measure = load_measure(names, features, protocol, device, weights, trust_remote_code, seed)
    count = num_samples or (images.count if images is not None else DEFAULT_SAMPLES)
    if images is not None and count > images.count:
        raise DataError(f"--num-samples {count:,}: {model} holds {images.count:,} images")
    counts = data.reference.count, None if data.held_out is None else data.held_out.count, count
    if metrics == "all":
        measure = without_impossible(measure, *counts)
    check_counts(measure, *counts)
    bound, everything = None, []
    if images is not None:
        everything = [of_folder(images.part(count))]
    else:
        pipeline = ready(pipeline, device, acceleration)
    if pipeline is not None and names:
        guidance = (guidance_scale, guidance_rescale, guidance_interval)
        conditions = conditions_of(pipeline, data.reference, class_, prompt, guidance, seed)
        how, digest = How(seed, eta, precision, device, batch_size), weights_digest(pipeline)
        everything = [of_chain(pipeline, digest, chain, conditions, count, how, out) for chain in chains]
        asked = {"classes": class_, "prompts": prompt}
        asked = {name: list(words) for name, words in asked.items() if words}
        everything = [dataclasses.replace(one, labels={**one.labels, **asked}) for one in everything]
    if likelihood_calls is not None:
        bound = bound_of(pipeline, data, likelihood_calls, likelihood_images, seed, batch_size, likelihood_steps)

    def say(line: str) -> None:
        typer.echo(line, err=True)

    reference = Reference(measure, data.reference, data.held_out)
    with reports_stop(lambda: remaining(out)):
        results = evaluate(reference, everything, ranks, say)
        measured = bound and bound.measure(ranks)
        if ranks.is_main:
            more = bound_sections(bound, measured, data.held_out is not None) if bound and measured else NOTHING_MORE
            typer.echo(write_report(out, model, reference, everything, results, more))
            recorded = record_results(model, reference, results, more.record, split or "train") if record else []
            for line in recorded:
                typer.echo(line)


def remaining(out: Path) -> str:
    """What a stopped evaluation leaves."""
    if not (out / STORES).is_dir():
        return "nothing was sampled yet; features of real images that were computed are kept"
    return f"what was sampled is in {out / STORES}; the same command goes on from there"


def load_measure(
    names: list[str],
    features: str,
    protocol: str,
    device: str,
    weights: str | None,
    trust_remote_code: bool,
    seed: int,
) -> "Measure":
    """The metrics, and the network whose features they compare.

    Raises:
        UsageError: an unknown protocol, metric or network, or a metric that the network's features do not serve.
    """
    from ..evaluation.evaluate import Measure, NoFeatures, check_metrics, reads_pixels_alone, serves
    from ..evaluation.features import load_extractor
    from ..evaluation.metrics import METRICS
    from ..evaluation.protocols import PROTOCOLS

    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol {protocol}: must be one of {', '.join(PROTOCOLS)}")
    if reads_pixels_alone(names):
        return Measure(check_metrics(names, NoFeatures()), NoFeatures(), PROTOCOLS[protocol], seed)
    extractor = load_extractor(
        features, protocol=PROTOCOLS[protocol], device=device, weights=weights, trust_remote_code=trust_remote_code
    )
    if names == list(METRICS):
        names = [name for name in METRICS if serves(extractor, METRICS[name])]
        if missing := [METRICS[name].label for name in METRICS if name not in names]:
            typer.echo(f"left out: {', '.join(missing)}, which --features {features} does not serve", err=True)
    return Measure(check_metrics(names, extractor), extractor, PROTOCOLS[protocol], seed)


def without_impossible(measure: "Measure", real: int, held_out: int | None, samples: int) -> "Measure":
    """The metrics of `all` for which there are images enough; the others are named."""
    from ..evaluation.evaluate import check_counts

    possible = []
    for name in measure.metrics:
        try:
            check_counts(dataclasses.replace(measure, metrics=(name,)), real, held_out, samples)
            possible.append(name)
        except DataError as error:
            typer.echo(f"left out: {error}", err=True)
    if not possible:
        raise DataError(f"--metrics all: too few images for any metric ({samples:,} samples, {real:,} real images)")
    return dataclasses.replace(measure, metrics=tuple(possible))


def record_results(
    model: str, reference: "Reference", results: list[dict[str, Any]], more: dict[str, Any], split: str
) -> list[str]:
    """Record the figures of a run's model in its folder, for its card; a line that says so."""
    from ..common.layout import RUN_FILE
    from ..evaluation.metrics import METRICS
    from ..evaluation.results import record_result

    folder, measure = Path(model), reference.measure
    if not (folder / RUN_FILE).is_file() or not (results or more):
        return []
    for result in results:
        how = f"{how_sampled(result)}; {measure.conventions}"
        for name, figure in result["figures"].items():
            title = METRICS[name].title
            record_result(folder, title, figure["value"], result["samples"], reference.images.name, split, how)
    bound = more.get("likelihood")
    if bound:
        part = "held out" if reference.held_out else split
        how = f"{bound['timesteps']} steps, {bound['calls']} calls for an image"
        record_result(folder, bound["unit"], bound["value"], bound["images"], bound["dataset"], part, how)
    return [f"recorded in {folder / 'evaluation.json'}: the model's card shows them after `ddpm-hf push`"]


def how_sampled(result: dict[str, Any]) -> str:
    """A result's sampler and steps, and what else changes its figures: η, guidance, the classes or prompts asked for.

    >>> how_sampled({"title": "ddim, 50 steps", "eta": 0.5, "guidance_scale": 1.0, "classes": ["cat", "dog"]})
    'ddim, 50 steps, eta 0.5, classes cat, dog'
    """
    usual = {"eta": 0, "guidance_scale": 1.0}
    parts = [result["title"]]
    for name in ("eta", "variance", "guidance_scale", "guidance_rescale", "guidance_interval", "classes", "prompts"):
        value = result.get(name)
        if value is not None and value != usual.get(name):
            said = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}"
            parts.append(f"{name.replace('_', ' ')} {said}")
    return ", ".join(parts)


def read_metrics(text: str, likelihood_calls: int | None) -> list[str]:
    """The names in --metrics; `none` is for the likelihood alone.

    Raises:
        UsageError: one that is not a metric.
    """
    from ..evaluation.metrics import METRICS

    if text == "none" and likelihood_calls is not None:
        return []
    names = list(METRICS) if text == "all" else [one.strip() for one in text.split(",") if one.strip()]
    unknown = [one for one in names if one not in METRICS]
    if unknown or not names:
        raise UsageError(f"--metrics {text}: each must be one of {', '.join(METRICS)}")
    return names


def load_model(model: str, ema: bool | None, revision: str | None, token: str | None) -> "DiffusionPipeline":
    """The pipeline of a run, a checkpoint or a model on the Hub."""
    from ..inference.loading import load
    from ..training.earlier_run import settle

    settle(model)
    pipeline = load(model, ema=ema, revision=revision, token=clean_token(token))
    refuse_image_models(pipeline, "evaluate")
    pipeline.set_progress_bar_config(desc="steps", leave=False, disable=True)
    return pipeline


def ready(pipeline: "DiffusionPipeline", device: str, acceleration: Acceleration) -> "DiffusionPipeline":
    """The pipeline on its device."""
    pipeline = pipeline.to(device)
    if acceleration.value == "auto":
        pipeline.enable_acceleration()
    return pipeline


def refuse(why: str, **options: Any) -> None:
    """Raise UsageError for an option that would have no effect."""
    for name, value in options.items():
        if value is not None:
            flag = name.strip("_").replace("_", "-")
            raise UsageError(f"--{flag}: {why}; leave it out")
