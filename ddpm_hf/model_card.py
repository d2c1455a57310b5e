"""The model card: what is known of a run, section by section, and what people wrote into it, which stays."""

import hashlib
import io
import json
import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._package import package_url
from .space.samplers import SAMPLERS, usable_samplers
from .training.checkpointing import write_whole
from .training.ownership import GRIDS, claim_files, matching, may_write, release_files, remove

RUN_FILE, RESULTS_FILE, METRICS_FILE = "run.json", "evaluation.json", "metrics.jsonl"
SAMPLES, CHAIN, LOSS_CURVE = "assets/samples.png", "assets/chain.png", "assets/loss.png"
KINDS = {
    "DDPMPipeline": "unconditional-image-generation",
    "ClassConditionalDDPMPipeline": "class-conditional-image-generation",
    "TextToImageDDPMPipeline": "text-to-image",
}
PIPELINE_TAGS = ("unconditional-image-generation", "text-to-image")  # those of ours that the Hub knows


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Args:
        repository: user/name on the Hub, or a folder.
        pipeline: the trained one.
        folder: where it is saved, with its pictures.
        run: what `run.json` says of the training; empty where it is not known.
        metrics: the lines of `metrics.jsonl`.
        results: those of `evaluation.json`, as `record_result` wrote them.
        license: the model's, if one was chosen.
    """

    repository: str
    pipeline: Any
    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    license: str | None = None

    @property
    def class_name(self) -> str:
        """The pipeline's class among ours."""
        return self.pipeline._portable_class().__name__

    @property
    def kind(self) -> str:
        """What it is conditioned on: nothing, a class or a text."""
        return KINDS[self.class_name]

    @property
    def dataset(self) -> dict[str, Any]:
        """Name, number of images and so on of what it was trained on."""
        return self.run.get("dataset", {})

    def has(self, picture: str) -> bool:
        """Whether a picture of the card is there."""
        return (self.folder / picture).is_file()


def read_facts(folder: Path, repository: str, pipeline, license: str | None = None) -> Facts:
    """What a folder tells of its model."""
    run, results = (_read_json(folder / name) for name in (RUN_FILE, RESULTS_FILE))
    return Facts(repository, pipeline, folder, run or {}, read_metrics(folder), results or [], license)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, but for one that is being written."""
    path = folder / METRICS_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend it, or remove it") from error


def record_result(
    folder: str | Path,
    metric: str,
    value: float,
    samples: int,
    dataset: str,
    split: str = "test",
    settings: str | None = None,
) -> None:
    """Note a figure of a saved model in its `evaluation.json`; the card and its metadata then show it.

    They do as long as these are the weights: after more training they wait for a new figure.

    Args:
        folder: the pipeline's.
        metric: what was measured, with its unit: "bits/dim", "FID".
        value: the figure; one of the same metric, dataset, split and settings is replaced.
        samples: how many images it was measured on.
        dataset: of the images that it was measured on or against.
        settings: how the samples were generated, for example "DDIM, 50 steps".

    Raises:
        ValueError: there is an `evaluation.json` that holds something else.
    """
    step = (_read_json(Path(folder) / RUN_FILE) or {}).get("step")
    key = {"metric": metric, "dataset": dataset, "split": split, "settings": settings, "step": step}
    before = _read_json(Path(folder) / RESULTS_FILE) or []
    if not isinstance(before, list) or not all(isinstance(one, dict) and "metric" in one for one in before):
        raise ValueError(f"{Path(folder) / RESULTS_FILE} does not hold results of ours; move it, or remove it")
    results = [one for one in before if {**one, **key} != one]
    results += [{**key, "value": float(value), "samples": int(samples)}]
    claim_files(folder, [RESULTS_FILE])
    write_whole(Path(folder) / RESULTS_FILE, json.dumps(results, indent=1) + "\n")


def all_results(facts: Facts) -> list[dict[str, Any]]:
    """What was recorded of these weights, and the last held-out loss of the training itself."""
    held_out = [line for line in facts.metrics if "validation_loss" in line]
    step, images = facts.run.get("step"), facts.run.get("held_out", 0)
    own = [
        {
            "metric": "held-out loss",
            "value": line["validation_loss"],
            "samples": images,
            "dataset": facts.dataset.get("name", "unknown"),
            "split": "held out",
            "settings": None,
        }
        for line in held_out
        if line["step"] == step and images and math.isfinite(line["validation_loss"])
    ]
    return own + [one for one in facts.results if one.get("step") == step]


# Pictures


def write_pictures(folder: Path) -> None:
    """A run's newest grid and chain up to the saved step, and its loss curve, under names that do not change."""
    metrics, run = read_metrics(folder), _read_json(folder / RUN_FILE)
    run = run if isinstance(run, dict) and "step" in run else None
    grids = {int(name[len("samples/step-") : -len(".png")]): folder / name for name in matching(folder, GRIDS)}
    drawn = max((step for step in grids if run is None or step <= run["step"]), default=None)
    for kind, target in (("step", SAMPLES), ("chain", CHAIN)):
        source = None if drawn is None else grids[drawn].with_name(grids[drawn].name.replace("step", kind))
        if source is not None and source.is_file():
            write_picture(folder, target, source.read_bytes())
        elif grids and may_write(folder, target):  # what lies there is of other weights
            remove(folder, target)
            release_files(folder, [target])
    if run is not None and run.get("pictures_step") != drawn and (grids or may_write(folder, RUN_FILE)):
        write_whole(folder / RUN_FILE, json.dumps({**run, "pictures_step": drawn}, indent=1) + "\n")
    if any("loss" in line for line in metrics):
        write_picture(folder, LOSS_CURVE, loss_curve(metrics))


def write_picture(folder: Path, name: str, data: bytes) -> None:
    """Write a picture of the card, but over one of somebody else's."""
    if may_write(folder, name):
        claim_files(folder, [name])
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, data)


def loss_curve(metrics: list[dict[str, Any]]) -> bytes:
    """A PNG of training and held-out loss over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        """0.2 instead of 2 × 10⁻¹, at the ticks that have room for a label."""

        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure = Figure(figsize=(7, 3), dpi=120)
    axes = figure.add_axes((0.1, 0.16, 0.87, 0.74))  # a computed layout takes as long as everything else
    for name, label in (("loss", "training"), ("validation_loss", "held out")):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points), label=label, linewidth=1, marker="." if len(points) < 20 else None)
    positive = all(line.get("loss", 1) > 0 for line in metrics)
    axes.set(xlabel="optimizer step", yscale="log" if positive else "linear")
    axes.set_title("loss", loc="left", fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if positive:
        axes.yaxis.set_major_formatter(PlainNumbers())
        axes.yaxis.set_minor_formatter(PlainNumbers(minor_thresholds=(2, 0.6)))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# Metadata


def metadata(facts: Facts) -> dict[str, Any]:
    """The card's YAML head, as the Hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    name = facts.repository.split("/")[-1]
    results = [
        EvalResult(
            task_type=facts.kind,
            dataset_type=one["dataset"],
            dataset_name=one["dataset"],
            dataset_split=one["split"],
            metric_type=re.sub(r"\W+", "_", one["metric"].lower()).strip("_"),
            metric_name=f"{one['metric']} ({one['samples']:,} images{_after_comma(one['settings'])})",
            metric_value=one["value"],
        )
        for one in all_results(facts)
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.kind if facts.kind in PIPELINE_TAGS else None,
        license=facts.license,
        tags=["ddpm", "ddpm_hf", "diffusion", facts.kind],
        datasets=[facts.dataset["name"]] if facts.dataset.get("on_hub") else None,
        base_model=facts.run.get("base_model"),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_dict()


def _after_comma(text: str | None) -> str:
    return f", {text}" if text else ""


def merge_metadata(own: dict[str, Any], before: dict[str, Any], model: str = "") -> dict[str, Any]:
    """Ours over what a card says already: lists are joined, and what is not ours stays, its license too.

    What we said of other weights goes: the results of the same `model`, the task of another kind of it.
    """
    merged = {name: value for name, value in before.items() if name != "model-index"}
    if merged.get("pipeline_tag") in PIPELINE_TAGS and "pipeline_tag" not in own:
        del merged["pipeline_tag"]
    other_kinds = set(KINDS.values()) - set(own.get("tags") or [])
    for name, value in ((name, value) for name, value in own.items() if name != "model-index"):
        there = before.get(name)
        if isinstance(value, list) and there is not None:
            there = there if isinstance(there, list) else [there]
            value = [one for one in there if str(one) not in other_kinds] + [one for one in value if one not in there]
        merged[name] = value
    listed = before.get("model-index") if isinstance(before.get("model-index"), list) else []
    results = [entry for entry in listed if not (isinstance(entry, dict) and entry.get("name") == model)]
    merged["model-index"] = results + own.get("model-index", [])
    return {name: value for name, value in merged.items() if name != "model-index" or value}


# Sections: each a function from Facts to Markdown, or to nothing


def about(facts: Facts) -> str:
    """What the model is."""
    what = {
        "unconditional-image-generation": "samples images",
        "class-conditional-image-generation": "samples images of a class",
        "text-to-image": "samples images from a text",
    }[facts.kind]
    height, width = image_size(facts.pipeline)
    dataset = facts.dataset.get("name")
    like = f" like those of {_linked(facts.dataset)}" if dataset else ""
    space = " in the latents of an autoencoder" if getattr(facts.pipeline, "vae", None) is not None else ""
    base = facts.run.get("base_model")
    start = f", fine-tuned from [{base}](https://huggingface.co/{base})" if base else ""
    title = facts.repository.split("/")[-1]
    return (
        f"# {title}\n\nThis diffusion model {what}{like}, at {height}×{width} pixels. It is a DDPM"
        f" ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)){space}, trained with ddpm_hf{start}."
    )


def _linked(dataset: dict[str, Any]) -> str:
    name = dataset["name"]
    return f"[{name}](https://huggingface.co/datasets/{name})" if dataset.get("on_hub") else name


def image_size(pipeline) -> tuple[int, int]:
    """(height, width) of the images that a pipeline samples by default."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    vae = getattr(pipeline, "vae", None)
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    return height * factor, width * factor


def pictures(facts: Facts) -> str:
    """What it samples."""
    shown = []
    if facts.has(SAMPLES):
        rows = ", ".join(f"“{_as_text(name)}”" for name in facts.run.get("rows", []))
        by_row = f" One row each for {rows}." if rows else ""
        drawn = facts.run.get("pictures_step")
        when = f" at step {drawn:,}" if drawn not in (None, facts.run.get("step")) else ""
        shown.append(f"![Samples]({SAMPLES})\n\nSamples{when}, not chosen by hand.{by_row}")
    if shown and not has_pictures(facts):
        shown[0] += f" They show the first three of {facts.pipeline.image_channels} channels."
    if facts.has(CHAIN):
        shown.append(
            f"![The predicted image along the chain]({CHAIN})\n\nThe predicted x̂₀ along the chain, from pure noise"
            " (left) to the image (right)."
        )
    return "\n\n".join(shown)


def _as_text(words: str) -> str:
    """Words of a dataset as Markdown that means nothing but them."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&])", r"\\\1", " ".join(words.split()))


def _as_string(words: str) -> str:
    """A Python string that does not end a block of code."""
    return json.dumps(words, ensure_ascii=False).replace("`", "\\u0060")


def use(facts: Facts) -> str:
    """The ways to load it, as code that runs as it stands."""
    call = f"pipeline({call_arguments(facts)}).images[0]"
    lines = ["## Use", ""]
    if facts.pipeline.stock_class_name():
        lines += ["With Diffusers alone:", "", *_python(facts, "", call), ""]
    lines += [
        f"With the package `ddpm_hf`{_where_to_get_it()}, which adds previews along the chain and more:",
        "",
        "```python",
        f"from ddpm_hf import {facts.class_name}",
        "",
        f'pipeline = {facts.class_name}.from_pretrained("{facts.repository}")',
        f"image = {call}",
        saving(facts),
        "```",
        "",
    ]
    module = facts.pipeline._portable_class().__module__.rpartition(".")[2]
    if (facts.folder / f"{module}.py").is_file():
        custom = f', custom_pipeline="{module}"' if facts.pipeline.stock_class_name() else ""
        trusted = f"{custom}, trust_remote_code=True"
        lines += ["With the same code from this repository:", "", *_python(facts, trusted, call), ""]
    example = {
        "class-conditional-image-generation": ["--class", first_class(facts.pipeline)],
        "text-to-image": ["--prompt", first_prompt(facts)],
    }.get(facts.kind, [])
    lines += [
        "From the shell:",
        "",
        "```bash",
        shlex.join(["ddpm-hf", "sample", facts.repository, *example, "--num-images", "16", "--out", "pictures"]),
        "```",
        "",
        samplers(facts),
    ]
    return "\n".join(lines)


def samplers(facts: Facts) -> str:
    """Which samplers run the model, by their names on the command line."""
    usable = [f"`{name}` ({SAMPLERS[name].title})" for name in usable_samplers(facts.pipeline)]
    return f"Samplers that run it, for `--sampler`: {', '.join(usable)}."


def _where_to_get_it() -> str:
    """How to install the package, in brackets, where its address is known."""
    url = package_url()
    return f" (`pip install '{url}'`)" if url else ""


def _python(facts: Facts, options: str, call: str) -> list[str]:
    load = f'pipeline = DiffusionPipeline.from_pretrained("{facts.repository}"{options})'
    code = ["from diffusers import DiffusionPipeline", "", load, f"image = {call}", saving(facts)]
    return ["```python", *code, "```"]


def call_arguments(facts: Facts) -> str:
    """What to call the pipeline with, so that any of the classes that load it samples an image."""
    T = facts.pipeline.scheduler.config.num_train_timesteps
    if facts.kind == "text-to-image":
        usual = [] if T >= 50 else [f"num_inference_steps={T - 1}"]
        # Stable Diffusion's pipeline does not read the default that ours saves
        scale = facts.pipeline.config.guidance_scale
        usual += [] if scale == 7.5 else [f"guidance_scale={scale:g}"]
        return ", ".join([_as_string(first_prompt(facts)), *usual])
    by_class = facts.kind == "class-conditional-image-generation"
    classes = [f"[{_as_string(first_class(facts.pipeline))}]"] if by_class else []
    # stock's pipeline would take 1000 steps
    steps = [f"num_inference_steps={T}"] if T != 1000 else []
    return ", ".join(classes + steps + ([] if has_pictures(facts) else ['output_type="np"']))


def has_pictures(facts: Facts) -> bool:
    """Whether PIL and PNG have as many channels as the images."""
    return facts.pipeline.image_channels <= 4


def saving(facts: Facts) -> str:
    """The code that saves the image that a call gave."""
    if has_pictures(facts):
        return 'image.save("sample.png")'
    return 'import numpy\n\nnumpy.save("sample.npy", image)  # [height, width, channels] in [0, 1]'


def first_prompt(facts: Facts) -> str:
    """A prompt like those it was trained on."""
    return " ".join(next(iter(facts.run.get("rows", [])), "").split()) or "a picture"


def first_class(pipeline) -> str:
    """The name of its first class that was trained; "0" for a model without classes."""
    return pipeline.config.id2label[str(pipeline.default_classes[0])] if hasattr(pipeline, "default_classes") else "0"


def training(facts: Facts) -> str:
    """How it was trained: data, settings, time, hardware, loss."""
    if not facts.run:
        return ""
    dataset, sessions = facts.dataset, facts.run.get("sessions", [])
    images = f"{dataset['images']:,} images" if dataset.get("images") else "a stream"
    rows = {
        "dataset": f"{_linked(dataset)}, {images}",
        "data fingerprint": f"`{dataset['fingerprint']}`" if dataset.get("fingerprint") else None,
        "steps": f"{facts.run['step']:,}",
        "batch": facts.run.get("batch"),
        "parameters": f"{facts.run['parameters']:,}",
        "seed": facts.run.get("seed"),
        **facts.run.get("settings", {}),
        "time": duration(sum(one["seconds"] for one in sessions)),
        "hardware": "; ".join(dict.fromkeys(one["hardware"] for one in sessions)),
        "versions": ", ".join(f"{name} {number}" for name, number in sessions[-1]["versions"].items()),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    text = ["## Training", "", "| | |", "|---|---|", *table]
    if len(sessions) > 1:
        text += ["", "It was resumed; its sessions were", "", "| steps | on | took | hardware |", "|---|---|---|---|"]
        text += [
            f"| {one['first_step']:,} to {one['last_step']:,} | {one['date']} | {duration(one['seconds'])}"
            f" | {one['hardware']} |"
            for one in sessions
        ]
    if facts.has(LOSS_CURVE):
        text += ["", f"![Loss over the steps]({LOSS_CURVE})"]
    return "\n".join(text)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(59.4), duration(3601), duration(90061)
    ('59 s', '1 h 0 min', '25 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def evaluation(facts: Facts) -> str:
    """What was measured, with the number of images."""
    results = all_results(facts)
    if not results:
        return ""
    rows = [
        f"| {one['metric']} | {one['value']:.4g} | {one['samples']:,} | {one['dataset']}, {one['split']}"
        f"{_after_comma(one['settings'])} |"
        for one in results
    ]
    return "\n".join(["## Evaluation", "", "| metric | value | images | on |", "|---|---|---|---|", *rows])


def limits(facts: Facts) -> str:
    """What it is not for."""
    dataset = facts.dataset.get("name", "its training data")
    words = {
        "text-to-image": " It knows the words of its captions, and no others.",
        "class-conditional-image-generation": " It knows its classes, and no others.",
    }.get(facts.kind, "")
    untrained = facts.pipeline.untrained() if hasattr(facts.pipeline, "untrained") else []
    if untrained:
        words += f" These classes had no training image and are untrained: {', '.join(map(_as_text, untrained))}."
    few = facts.dataset.get("images") or 0
    memory = (
        f" With {few:,} images it may reproduce some of them: compare before sharing, if any of them is private."
        if 0 < few < 50_000
        else " It may reproduce images that its data holds many times."
    )
    return (
        f"## Limits\n\nThe model knows {dataset} and nothing else: what is rare there is rare here, what is missing"
        f" cannot be sampled, and its biases are kept.{words}{memory}\n\nIt is not for presenting its images as"
        " photographs or records of real people, places or events, nor for decisions about people, medical or legal"
        " evidence, or content that deceives or harms. Nothing filters its output."
    )


SECTIONS = {
    "about": about,
    "pictures": pictures,
    "use": use,
    "training": training,
    "evaluation": evaluation,
    "limits": limits,
}


# The whole card, over what is there already

_HEAD = re.compile(r"\A---[ \t]*\n(.*?\n|)---[ \t]*\n", re.DOTALL)
_SECTION = re.compile(r"<!-- ddpm_hf:(\w+) (\w{8}) -->\n(.*?)\n<!-- /ddpm_hf -->", re.DOTALL)
_SEAL = re.compile(r"\n*<!-- ddpm_hf wrote ([\w ]*) beside (\w{8}) -->\n*")


NO_DIGEST = "0" * 8  # of a card with edits that have not been to the Hub


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _marked(name: str, text: str) -> str:
    return f"<!-- ddpm_hf:{name} {_digest(text)} -->\n{text}\n<!-- /ddpm_hf -->"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text.

    Raises:
        ValueError: metadata that are not YAML, or no mapping.
    """
    import yaml

    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    head = _HEAD.match(card)
    try:
        said = (yaml.safe_load(head[1]) if head else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the head of README.md is not YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(said, dict):
        raise ValueError("the head of README.md is not YAML of names and values; mend it")
    return said, card[head.end() :] if head else card


def personal_text(card: str) -> str:
    """What of a card's text is a person's: the sections that were edited, and what stands around the sections."""
    text = _SEAL.sub("\n", _split(card)[1])
    return _SECTION.sub(lambda found: found[3] if _digest(found[3]) != found[2] else "", text).strip()


def _state(card: str) -> str:
    """A digest of all that a person may change: metadata, text, and which sections there are."""
    said, text = _split(card)
    there = [found[1] for found in _SECTION.finditer(text)]
    return _digest(json.dumps([said, there, personal_text(card)], sort_keys=True, default=str))


def was_edited(card: str) -> bool:
    """Whether a person changed the card since it was last the same in the folder and on the Hub."""
    seal = _SEAL.search(_split(card)[1])
    return _state(card) != seal[2] if seal else bool(card.strip())


def newer_card(here: str, on_hub: str) -> str:
    """Of the card in the folder and that on the Hub, the one with what a person wrote last.

    Raises:
        ValueError: both were edited since they were the same.
    """
    if not here or not on_hub or not was_edited(here):
        return on_hub or here
    if was_edited(on_hub) and _state(on_hub) != _state(here):
        raise ValueError(
            "README.md was edited here and on the Hub; copy what is to stay of it into the Hub's, and remove it here"
        )
    return here


def merge_sections(own: dict[str, str | None], before: str) -> str:
    """Our sections in the places where a card has them, but for those that a person edited or took out.

    A section is marked with a digest of its text, so that an edited one is known by its own. What stands between or
    around the sections is a person's, and stays. The last line names what was written, to know what was taken out.

    Args:
        own: the sections' texts; an empty one goes, and None stays as it is.
    """
    seal = _SEAL.search(before)
    known = seal[1].split() if seal else []
    there = {found[1] for found in _SECTION.finditer(before)}

    def renewed(found: re.Match) -> str:
        name, edited = found[1], _digest(found[3]) != found[2]
        if edited or own.get(name) is None:
            return found[0]
        return _marked(name, own[name]) + found[4] if own[name] else ""

    text = re.sub(_SECTION.pattern + r"(\n*)", renewed, _SEAL.sub("\n", before), flags=re.DOTALL).strip("\n")
    new = [_marked(name, section) for name, section in own.items() if section and name not in there | set(known)]
    left = {found[1] for found in _SECTION.finditer(text)}
    taken_out = set(known) - there
    names = " ".join(name for name in SECTIONS if name in left | taken_out or own.get(name))
    return "\n\n".join([*([text] if text else []), *new, f"<!-- ddpm_hf wrote {names} beside {NO_DIGEST} -->"]) + "\n"


def make_card(facts: Facts, before: str = "", to_hub: bool = True) -> str:
    """The card's text.

    Args:
        before: a card that is there, of which all that a person wrote stays.
        to_hub: whether it goes there, so that the folder's card and the Hub's are the same.

    Raises:
        ValueError: one whose head is not YAML.
    """
    import yaml

    said, text = _split(before)
    model = facts.repository.split("/")[-1]
    head = yaml.safe_dump(merge_metadata(metadata(facts), said, model), sort_keys=False, allow_unicode=True)
    sections = {name: write(facts) for name, write in SECTIONS.items()}
    if not facts.run:  # not known here, and so left as they are
        sections |= {name: sections[name] or None for name in ("training", "evaluation")}
    card = f"---\n{head}---\n\n{merge_sections(sections, text.strip())}"
    sealed = to_hub or not before or not was_edited(before)
    return card.replace(f"beside {NO_DIGEST} -->", f"beside {_state(card)} -->") if sealed else card
