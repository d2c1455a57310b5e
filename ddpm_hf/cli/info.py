"""`ddpm-hf info`: describe a folder or a model on the Hub, from its small files alone."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..inference.kinds import KINDS, SAMPLED_BY
from .common import check_revision, clean_token

EPILOG = """Examples:

ddpm-hf info ddpm-model-64

ddpm-hf info user/photos-ddpm"""
MODELS = {
    "NoisyClassifier": "a classifier of noised images, for `ddpm-hf sample --classifier`",
    "AutoencoderKL": "an autoencoder, for --vae_name_or_path",
    "UNet2DModel": "a UNet, without its scheduler",
    "OpenAIUNet2DModel": "a UNet, without its scheduler",
    "UNet2DConditionModel": "a UNet for text, without the rest of its pipeline",
}
MAX_CLASSES_SHOWN = 20


class Source(NamedTuple):
    """A model's files, in a folder or downloaded from the Hub.

    Args:
        name: as the user gave it.
        paths: the available files, by their names in the folder.
    """

    name: str
    paths: dict[str, Path]
    folder: Path | None = None  # None: on the Hub

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file; empty if it does not exist.

        Raises:
            ValueError: it is malformed.
        """
        if name not in self.paths:
            return {}
        try:
            content = json.loads(self.paths[name].read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.name}: {name} is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.name}: {name} is not a JSON object")
        return content

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl."""
        path = self.paths.get("metrics.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def info(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER_OR_NAME", help="A folder, or a model on the Hub (user/name).")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    token: Annotated[str | None, typer.Option(help="For a private model.", envvar="HF_TOKEN")] = None,
) -> None:
    """Describe a model or a run: kind, sizes, diffusion, classes, data, losses, checkpoints, and how to use it."""
    from ..common.arguments import check_word

    check_word("FOLDER_OR_NAME", model)
    check_revision(model, revision)
    source = local_source(Path(model)) if Path(model).is_dir() else hub_source(model, revision, clean_token(token))
    typer.echo("\n".join(describe(source)))


def local_source(folder: Path) -> Source:
    """The small files of a folder."""
    names = [*SMALL_FILES, *(f"{part.name}/config.json" for part in folder.iterdir() if part.is_dir())]
    return Source(str(folder), {name: folder / name for name in names if (folder / name).is_file()}, folder)


SMALL_FILES = (
    "model_index.json", "config.json", "scheduler/scheduler_config.json", "run.json", "training_config.json",
    "metrics.jsonl", "scheduler_config.json",
)  # fmt: skip


def hub_source(name: str, revision: str | None, token: str | None) -> Source:
    """The small files of a repository, downloaded.

    Raises:
        ValueError: it cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download

    from ..common.errors import readable_load_errors

    with readable_load_errors(name):
        listed = {file.rfilename for file in HfApi(token=token).model_info(name, revision=revision).siblings}
        small = [one for one in listed if one in SMALL_FILES or (one.count("/") == 1 and one.endswith("/config.json"))]
        return Source(
            name, {one: Path(hf_hub_download(name, one, revision=revision, token=token)) for one in sorted(small)}
        )


def describe(source: Source) -> list[str]:
    """The lines to print.

    Raises:
        ValueError: it is neither a model nor a run.
    """
    index, config, settings = (source.json(one) for one in ("model_index.json", "config.json", "training_config.json"))
    checkpoints = list_runs(source)
    if index:
        rows = [*pipeline_rows(source, index), *run_rows(source, settings, checkpoints)]
    elif config.get("_class_name") in MODELS:
        rows = [("kind", MODELS[config["_class_name"]]), *model_rows(source, "", config)]
        rows += run_rows(source, settings, checkpoints)
    elif settings or checkpoints:
        rows = [("kind", "a run without a saved pipeline yet"), *run_rows(source, settings, checkpoints)]
    else:
        raise ValueError(
            f"{source.name} is neither a model nor a run: it has no model_index.json, config.json of a model, or"
            " checkpoint-N; give the --output_dir of a training run"
        )
    width = max(len(name) for name, _ in rows)
    lines = [source.name, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return [*lines, "", *usage(source, index, config, checkpoints)]


def list_runs(source: Source) -> list[Path]:
    """The complete checkpoints of a local run, oldest first."""
    from ..common.checkpoints import list_checkpoints

    return list_checkpoints(source.folder) if source.folder else []


Rows = list[tuple[str, Any]]


def class_name(index: dict[str, Any]) -> str:
    """The name of the class that saved a pipeline."""
    named = index.get("_class_name")
    return str(named[-1] if isinstance(named, list) and named else named)


def pipeline_rows(source: Source, index: dict[str, Any]) -> Rows:
    """A pipeline's kind, networks, diffusion and classes."""
    name = class_name(index)
    at_root = "unet/config.json" not in source.paths and "config.json" in source.paths  # the Hub's first models
    unet = source.json("config.json" if at_root else "unet/config.json")
    scheduler = source.json("scheduler/scheduler_config.json") or source.json("scheduler_config.json")
    latents = "vae/config.json" in source.paths
    title = KINDS[SAMPLED_BY[name]].title if name in SAMPLED_BY else "a pipeline of another library"
    kind = f"{title} ({name}){', in latents' if latents else ''}"
    conditionings = conditionings_of(index)
    part = "" if at_root else max(conditionings, default="unet")  # of a cascade, the last
    network = unet if part in ("", "unet") else source.json(f"{part}/config.json")
    rows = [("kind", kind), *model_rows(source, part, network, source.json("vae/config.json"))]
    for part, config in conditionings.items():
        rows += conditioning_rows("reads" if part == "unet" else f"{part} reads", config)
    rows += diffusion_rows(scheduler)
    classes = list((index.get("id2label") or {}).values())
    if classes:
        shown = ", ".join(classes[:MAX_CLASSES_SHOWN]) + (", ..." if len(classes) > MAX_CLASSES_SHOWN else "")
        null = unet.get("num_class_embeds") == len(classes) + 1
        rows.append(("classes", f"{len(classes)}: {shown}{'' if null else ' (without classifier-free guidance)'}"))
    if "_guidance_scale" in index:
        rows.append(("guidance", f"{index['_guidance_scale']:g} by default"))
    return rows


def model_rows(source: Source, part: str, config: dict[str, Any], vae: dict[str, Any] | None = None) -> Rows:
    """The shape and the size of a network."""
    network = config.get("unet", config)  # a classifier's config holds its UNet's arguments there
    size = network.get("sample_size")
    height, width = (size, size) if isinstance(size, int) else size or (None, None)
    conditioning = conditionings_of(source.json("model_index.json")).get(part)
    channels, rows = image_channels(network, conditioning), []
    if vae and height:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        pixels = f"{height * factor}×{width * factor}, {vae.get('in_channels')} channels"
        rows.append(("images", f"{pixels}, as latents of {height}×{width}, {channels} channels"))
    elif height and part is not None:
        rows.append(("images", f"{height}×{width}, {channels} channel{'' if channels == 1 else 's'}"))
    widths = network.get("block_out_channels")
    count = parameters(source, part)
    size = f"{count:,} parameters, " if count else ""
    if widths:
        rows.append(("network", f"{size}widths {', '.join(map(str, widths))}"))
    return rows


def conditionings_of(index: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a pipeline's networks read besides x_t, by their folders."""
    several = index.get("conditionings") or {}
    return {"unet": index["conditioning"]} if "conditioning" in index else several


def image_channels(network: dict[str, Any], conditioning: dict[str, Any] | None) -> int | None:
    """How many channels an image has, or its latents: those of x_t."""
    channels = network.get("in_channels")
    if conditioning is None or network.get("condition_channels"):
        return channels
    from ..portable.conditioning_ddpm_hf import Conditioning

    return Conditioning.from_config(conditioning).image_channels(channels or 0)


def parameters(source: Source, part: str) -> int | None:
    """The number of parameters, from the headers of local weights or from what the run recorded."""
    if source.folder is None:
        return source.json("run.json").get("parameters")
    files = [path for path in (source.folder / part).glob("*.safetensors") if path.name.count(".") == 1]
    return sum(map(count_parameters, files)) or None


def count_parameters(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header: its length in 8 bytes, then JSON.

    Raises:
        ValueError: a malformed file.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a safetensors file") from error
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for side in entry["shape"]:
                size *= side
            total += size
    return total


def conditioning_rows(name: str, config: dict[str, Any]) -> Rows:
    """What a network reads besides x_t."""
    from ..models.conditioning import describe_conditioning
    from ..portable.conditioning_ddpm_hf import Conditioning

    return [(name, describe_conditioning(Conditioning.from_config(config)))]


def diffusion_rows(scheduler: dict[str, Any]) -> Rows:
    """The forward process, and what the network predicts."""
    if not scheduler:
        return []
    schedule = "as in trained_betas" if scheduler.get("trained_betas") else scheduler.get("beta_schedule", "linear")
    zero = ", zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
    predicts = scheduler.get("prediction_type", "epsilon")
    variance = scheduler.get("variance_type", "fixed_small")
    return [
        ("diffusion", f"T = {scheduler.get('num_train_timesteps', 1000):,}, {schedule}{zero}"),
        ("predicts", f"{predicts}, variance {variance}"),
        ("sampler", scheduler.get("_class_name", "DDPMScheduler")),
    ]


def run_rows(source: Source, settings: dict[str, Any], checkpoints: list[Path]) -> Rows:
    """How it was trained, as far as the folder records it."""
    from ..publishing.card.facts import datasets_of

    run = source.json("run.json")
    rows = []
    for dataset in datasets_of(run):
        images = f", {dataset['images']:,} images" if dataset.get("images") else ""
        rows.append(("dataset", f"{dataset.get('name')}{images}"))
    if run.get("step") is not None:
        rows.append(("trained", f"{run['step']:,} steps of batch {run.get('batch')}, seed {run.get('seed')}"))
    shown = {name: value for name, value in (run.get("settings") or {}).items() if value not in (None, "")}
    if shown:
        rows.append(("settings", ", ".join(f"{name} {value}" for name, value in shown.items())))
    elif settings:
        rows.append(("settings", "training_config.json"))
    rows += loss_rows(source.metrics())
    for path in checkpoints:
        averaged = "with EMA" if (path / "unet_ema").is_dir() else "without EMA"
        rows.append(("checkpoint", f"{path.name}, {averaged}"))
    return rows


def loss_rows(metrics: Iterable[dict[str, Any]]) -> Rows:
    """The last loss, and the last held-out loss."""
    last = {}
    for line in metrics:
        for name in ("loss", "validation_loss"):
            if name in line:
                last[name] = f"{line[name]:.4g} at step {line['step']:,}"
    titles = {"loss": "loss", "validation_loss": "held-out loss"}
    return [(titles[name], value) for name, value in last.items()]


def usage(source: Source, index: dict[str, Any], config: dict[str, Any], checkpoints: list[Path]) -> list[str]:
    """Commands and code for using it."""
    name, lines = source.name, []
    named = class_name(index)
    if index and (isinstance(index.get("_class_name"), list) or named in SAMPLED_BY):
        cls = SAMPLED_BY.get(named, named)
        classes = list((index.get("id2label") or {}).values())
        example = ["--class", classes[0]] if classes else ["--prompt", "a picture"] if "tokenizer" in index else []
        example += ["--image", "IMAGE"] if "conditioning" in index else []
        lines += [
            f"load:    ddpm_hf.{cls}.from_pretrained({name!r})",
            f"sample:  {shlex.join(['ddpm-hf', 'sample', name, *example])}",
        ]
        if source.folder:
            lines.append(f"publish: {shlex.join(['ddpm-hf', 'push', name])}")
    elif config.get("_class_name") in MODELS:
        lines.append(f"load:    {config['_class_name']}.from_pretrained({name!r})")
    if checkpoints:
        words = ["ddpm-hf", program_of(checkpoints[-1]), "--output_dir", name, "--resume_from_checkpoint", "latest"]
        lines.append(f"resume:  {shlex.join(words)}")
    return lines


def program_of(checkpoint: Path) -> str:
    """The command that resumes a checkpoint, judged by its contents."""
    if (checkpoint / "classifier").is_dir():
        return "train-classifier"
    name = "unet/config.json"
    unet = Source(str(checkpoint), {name: checkpoint / name} if (checkpoint / name).is_file() else {}).json(name)
    return "train-text2image" if unet.get("_class_name") == "UNet2DConditionModel" else "train"
