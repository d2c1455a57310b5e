"""The sections of a model card: each is a function from `Facts` to Markdown, which may be empty."""

import json
import re
import shlex
from typing import Any

from ...common.layout import CHAIN, LOSS_CURVE, SAMPLES
from ...common.package import package_url
from ...inference.kinds import KINDS
from ...inference.samplers import SAMPLERS, usable_samplers
from ...models.conditioning import describe_conditioning
from .facts import Facts, all_results, datasets_of
from .metadata import after_comma


def about(facts: Facts) -> str:
    """What the model is."""
    does = KINDS[facts.class_name].does
    if facts.kind == "image-to-image":
        does += f" ({describe_conditioning(facts.pipeline.conditioning)})"
    height, width = facts.pipeline.image_size
    dataset = facts.dataset.get("name")
    like = f" like those of {_linked(facts.dataset)}" if dataset else ""
    space = " in the latents of an autoencoder" if getattr(facts.pipeline, "vae", None) is not None else ""
    base = facts.run.get("base_model")
    start = f", fine-tuned from [{base}](https://huggingface.co/{base})" if base else ""
    start = start or (f", fine-tuned from the local model {facts.base_run['name']}" if facts.base_run else "")
    trained = f", trained with ddpm_hf{start}" if facts.run else ""  # else it may be another program's, converted
    title = facts.repository.split("/")[-1]
    return (
        f"# {title}\n\nThis diffusion model {does}{like}, at {height}×{width} pixels. It is a DDPM"
        f" ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)){space}{trained}."
    )


def _linked(dataset: dict[str, Any]) -> str:
    name = dataset["name"]
    return f"[{name}](https://huggingface.co/datasets/{name})" if dataset.get("on_hub") else name


def pictures(facts: Facts) -> str:
    """Samples, and predictions along the chain."""
    shown = []
    if facts.has(SAMPLES):
        rows = ", ".join(f"“{_as_text(name)}”" for name in facts.run.get("rows", []))
        by_row = f" One row each for {rows}." if rows else ""
        step = facts.run.get("pictures_step")
        when = f" at step {step:,}" if step not in (None, facts.run.get("step")) else ""
        strips = " Input, output and truth side by side." if facts.kind == "image-to-image" else ""
        shown.append(f"![Samples]({SAMPLES})\n\nSamples{when}, not chosen by hand.{strips}{by_row}")
    if shown and not has_pictures(facts):
        shown[0] += f" They show the first three of {facts.pipeline.image_channels} channels."
    if facts.has(CHAIN):
        shown.append(
            f"![The predicted image along the chain]({CHAIN})\n\nThe predicted x̂₀ along the chain, from pure noise"
            " (left) to the image (right)."
        )
    return "\n\n".join(shown)


def _as_text(words: str) -> str:
    """A text of the dataset with Markdown escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&])", r"\\\1", " ".join(words.split()))


def _as_string(words: str) -> str:
    """A Python string literal that cannot end a code block."""
    return json.dumps(words, ensure_ascii=False).replace("`", "\\u0060")


def use(facts: Facts) -> str:
    """The ways to load it, as runnable code."""
    call = f"pipeline({call_arguments(facts)}).images[0]"
    lines = ["## Use", ""]
    if facts.pipeline.stock_class_name():
        trusting = ", trust_remote_code=True" if facts.pipeline.own_networks() else ""
        title = "With Diffusers, and the network's code from this repository:" if trusting else "With Diffusers alone:"
        lines += [title, "", *_python(facts, trusting, call), ""]
    lines += [
        f"With the package `ddpm_hf`{_where_to_get_it()}, which adds previews along the chain and more:",
        "",
        "```python",
        *pictures_import(facts),
        f"from ddpm_hf import {facts.class_name}",
        "",
        f'pipeline = {facts.class_name}.from_pretrained("{facts.repository}")',
        f"image = {call}",
        saving(facts),
        "```",
        "",
    ]
    module = facts.pipeline.portable_class().__module__.rpartition(".")[2]
    if (facts.folder / f"{module}.py").is_file():
        custom = f', custom_pipeline="{module}"' if facts.pipeline.stock_class_name() else ""
        trusted = f"{custom}, trust_remote_code=True"
        lines += ["With the same code from this repository:", "", *_python(facts, trusted, call), ""]
    example = {
        "class-conditional-image-generation": ["--class", first_class(facts.pipeline)],
        "text-to-image": ["--prompt", first_prompt(facts)],
        "image-to-image": ["--image", "input.png", *(["--mask", "mask.png"] if reads_mask(facts) else [])],
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
    """The samplers that support the model, by their names on the command line."""
    usable = [f"`{name}` ({SAMPLERS[name].title})" for name in usable_samplers(facts.pipeline)]
    return f"Supported samplers, for `--sampler`: {', '.join(usable)}."


def _where_to_get_it() -> str:
    """How to install the package, in brackets; empty if its address is unknown."""
    url = package_url()
    return f" (`pip install '{url}'`)" if url else ""


def _python(facts: Facts, options: str, call: str) -> list[str]:
    load = f'pipeline = DiffusionPipeline.from_pretrained("{facts.repository}"{options})'
    code = [
        *pictures_import(facts),
        "from diffusers import DiffusionPipeline",
        "",
        load,
        f"image = {call}",
        saving(facts),
    ]
    return ["```python", *code, "```"]


def call_arguments(facts: Facts) -> str:
    """The arguments of the pipeline's call, valid for every class that can load it."""
    T = facts.pipeline.scheduler.config.num_train_timesteps
    if facts.kind == "text-to-image":
        usual = [] if T >= 50 else [f"num_inference_steps={T - 1}"]
        # Stable Diffusion's pipeline ignores the default in our config
        scale = facts.pipeline.config.guidance_scale
        usual += [] if scale == 7.5 else [f"guidance_scale={scale:g}"]
        return ", ".join([_as_string(first_prompt(facts)), *usual])
    by_class = facts.kind == "class-conditional-image-generation"
    classes = [f"[{_as_string(first_class(facts.pipeline))}]"] if by_class else []
    if facts.kind == "image-to-image":
        classes = [f'Image.open("{name}.png")' for name in ("input", *(["mask"] if reads_mask(facts) else []))]
        if facts.pipeline.has_classes:
            classes.append(f"class_labels={_as_string(first_class(facts.pipeline))}")
    # Diffusers' pipeline would take 1000 steps
    steps = [f"num_inference_steps={T}"] if T != 1000 else []
    return ", ".join(classes + steps + ([] if has_pictures(facts) else ['output_type="np"']))


def reads_mask(facts: Facts) -> bool:
    """Whether it inpaints."""
    return facts.kind == "image-to-image" and facts.pipeline.conditioning.task == "inpaint"


def pictures_import(facts: Facts) -> list[str]:
    """What the code imports for the images that it opens."""
    return ["from PIL import Image"] if facts.kind == "image-to-image" else []


def has_pictures(facts: Facts) -> bool:
    """Whether PIL and PNG have as many channels as the images."""
    return facts.pipeline.image_channels <= 4


def saving(facts: Facts) -> str:
    """The code that saves the sampled image."""
    if has_pictures(facts):
        return 'image.save("sample.png")'
    return 'import numpy\n\nnumpy.save("sample.npy", image)  # [height, width, channels] in [0, 1]'


def first_prompt(facts: Facts) -> str:
    """A prompt like those of the training data."""
    return " ".join(next(iter(facts.run.get("rows", [])), "").split()) or "a picture"


def first_class(pipeline: Any) -> str:
    """The name of its first trained class; "0" for a model without classes."""
    by_class = getattr(pipeline, "has_classes", False)
    return pipeline.class_names[str(pipeline.default_classes[0])] if by_class else "0"


def training(facts: Facts) -> str:
    """How it was trained: data, settings, time, hardware, loss."""
    if not facts.run:
        return ""
    dataset, sessions = facts.dataset, facts.run.get("sessions", [])
    datasets = datasets_of(facts.run)
    rows = {
        "dataset": "; ".join(f"{_linked(one)}, {_amount(one)}" for one in datasets),
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
        columns = ["steps", "date", "took", "hardware", *(["dataset"] if len(datasets) > 1 else [])]
        text += [
            "",
            "It was resumed; its sessions were",
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
        ]
        for one in sessions:
            steps = f"{one['first_step']:,} to {one['last_step']:,}"
            cells = [steps, one["date"], duration(one["seconds"]), one["hardware"]]
            if len(datasets) > 1:
                cells.append(f"{one['dataset']['name']}, {_amount(one['dataset'])}" if one.get("dataset") else "")
            text.append(f"| {' | '.join(cells)} |")
    if facts.has(LOSS_CURVE):
        text += ["", f"![Loss over the steps]({LOSS_CURVE})"]
    return "\n".join(text)


def _amount(dataset: dict[str, Any]) -> str:
    return f"{dataset['images']:,} images" if dataset.get("images") else "a stream"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(59.4), duration(3601), duration(90061)
    ('59 s', '1 h 0 min', '25 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def evaluation(facts: Facts) -> str:
    """The results, with the number of images."""
    results = all_results(facts)
    if not results:
        return ""
    rows = [
        f"| {one['metric']} | {one['value']:.4g} | {one['samples']:,} | {one['dataset']}, {one['split']}"
        f"{after_comma(one['settings'])} |"
        for one in results
    ]
    return "\n".join(["## Evaluation", "", "| metric | value | images | on |", "|---|---|---|---|", *rows])


def limits(facts: Facts) -> str:
    """Limits and misuse."""
    datasets, base = datasets_of(facts.run, base=True), facts.run.get("base_model")
    known = list(dict.fromkeys(one["name"] for one in datasets)) or ["its training data"]
    if base or (facts.base_run and not facts.base_run["datasets"]):
        known.append(f"what {base or facts.base_run['name']} knows")
    words = f" {KINDS[facts.class_name].limits}".rstrip()
    untrained = facts.pipeline.untrained() if hasattr(facts.pipeline, "untrained") else []
    if untrained:
        words += f" These classes had no training image and are untrained: {', '.join(map(_as_text, untrained))}."
    few = 0 if base else sum({one["name"]: one.get("images") or 0 for one in datasets}.values())
    memory = (
        f" With {few:,} images it may reproduce some of them: compare before sharing, if any of them is private."
        if 0 < few < 50_000
        else " It may reproduce images that its data holds many times."
    )
    return (
        f"## Limits\n\nThe model knows {' and '.join(known)} and nothing else: what is rare there is rare here, what"
        f" is missing cannot be sampled, and its biases are kept.{words}{memory}\n\nIt is not for presenting its"
        " images as photographs or records of real people, places or events, nor for decisions about people, medical"
        " or legal evidence, or content that deceives or harms. Nothing filters its output."
    )


SECTIONS = {
    "about": about,
    "pictures": pictures,
    "use": use,
    "training": training,
    "evaluation": evaluation,
    "limits": limits,
}
