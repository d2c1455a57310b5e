"""The page of a Space that samples: controls on the left, the images as they form on the right, their chains below.

Gradio comes with the Space (`sdk_version` in its README); this module imports it when the page is made.
"""

import base64
import functools
import io
import json
import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...inference.samplers import SAMPLERS
from ...inference.studio import MOMENTS, MOST_IMAGES, SampleRequest, Step, Studio, streamed
from .frame import headline, new_page, small_images

if TYPE_CHECKING:
    import gradio as gr
    from PIL import Image

EVERY_CLASS, NO_CLASS = "every", "none"  # in addition to "class NAME"
DEFAULT_IMAGES = 8
ROWS = 4  # images whose chain is shown
THUMBNAIL = 96  # pixels of an image in a chain
CHAIN_HEADING = "### How they formed\nThe predicted images at timesteps from noise to the end."


def thumbnail(image: "Image.Image") -> str:
    """A PIL image as a data URI of at most `THUMBNAIL` pixels."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chain_picture(moments: list[tuple[int, list[str]]], columns: int) -> str:
    """HTML of chains, a row for each image and a column for each moment: (timestep, thumbnails)."""
    heads = [f"<span>{timestep}</span>" for timestep, _ in moments] + ["<span></span>"] * (columns - len(moments))
    cells = []
    for row in range(len(moments[0][1])):
        cells += [f'<img src="{images[row]}" alt="image {row} at t = {timestep}">' for timestep, images in moments]
        cells += ["<span></span>"] * (columns - len(moments))
    style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr))"
    return f'<div class="chain" style="{style}">{"".join(heads + cells)}</div>'


def introduction(studio: Studio, settings: dict) -> str:
    """Markdown: which model it is and what it does."""
    what = "from a text" if studio.by_text else f"of {len(studio.classes)} classes" if studio.classes else ""
    return headline(settings, f"samples images {what}", studio.image_size, "from pure noise, step by step")


def condition_controls(gr: Any, studio: Studio, settings: dict) -> dict:
    """The controls of what to sample, by the names that `request_of` reads."""
    controls = {}
    if studio.by_text:
        examples = settings.get("examples", [])
        first = examples[0] if examples else ""
        controls["prompt"] = gr.Textbox(first, label="Prompt", placeholder="What to show", elem_id="prompt")
        if len(examples) > 1:
            gr.Examples(examples, controls["prompt"])
    if studio.classes:
        choices = [("Every class in turn", EVERY_CLASS), *((name, f"class {name}") for name in studio.classes)]
        if studio.knows_no_class:
            choices.append(("No class", NO_CLASS))
        controls["class"] = gr.Dropdown(choices, value=EVERY_CLASS, label="Class", elem_id="class")
    controls["count"] = gr.Slider(1, MOST_IMAGES, DEFAULT_IMAGES, step=1, label="Images", elem_id="count")
    return controls


def sampling_controls(gr: Any, studio: Studio) -> dict:
    """The controls of how to sample, by the names that `request_of` reads; only what the model supports."""
    controls = {}
    titles = [(SAMPLERS[name].title, name) for name in studio.samplers]
    chosen = "ddim" if "ddim" in studio.samplers else titles[0][1]
    controls["sampler"] = gr.Dropdown(titles, value=chosen, label="Sampler", elem_id="sampler")
    most_steps = max(2, studio.max_steps)
    controls["steps"] = gr.Slider(1, most_steps, studio.samplers[chosen], step=1, label="Steps", elem_id="steps")
    # in the browser, so that no late answer undoes a choice
    usual_steps = f"name => ({json.dumps(studio.samplers)})[name]"
    controls["sampler"].input(None, controls["sampler"], controls["steps"], js=usual_steps, api_visibility="private")
    if studio.guided:
        most = 15 if studio.by_text else 8
        scale = min(max(studio.guidance_scale, 1), most)
        hint = f"1 disables guidance; higher values follow the {'text' if studio.by_text else 'class'} more strongly."
        controls["guidance"] = gr.Slider(1, most, scale, step=0.5, label="Guidance", info=hint, elem_id="guidance")
    if studio.by_text:
        controls["negative"] = gr.Textbox(label="Negative prompt", placeholder="What not to show", elem_id="negative")
    controls["random"] = gr.Checkbox(True, label="A new seed each time", elem_id="random")
    controls["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
    return controls


def request_of(values: dict, studio: Studio) -> SampleRequest:
    """The request that the controls' values, by their names, make; a random seed is chosen here.

    The images have the labels in turn: the chosen class, all classes, or no class.
    """
    chosen = values.get("class", EVERY_CLASS)
    labels = {EVERY_CLASS: None, NO_CLASS: [None]}.get(chosen, [chosen.removeprefix("class ")])
    return SampleRequest(
        count=int(values["count"]),
        sampler=values["sampler"],
        steps=int(values["steps"]),
        seed=random.randrange(2**31) if values["random"] else int(values["seed"] or 0),
        class_labels=labels,
        prompt=values.get("prompt") or "",
        negative_prompt=values.get("negative") or "",
        guidance_scale=values.get("guidance"),
    )


def captions_of(request: SampleRequest, studio: Studio) -> list[str | None]:
    """The caption of each image: its class."""
    if not studio.classes:
        return [None] * request.count
    labels = request.class_labels or studio.classes
    return [labels[index % len(labels)] for index in range(request.count)]


def make_page(studio: Studio, settings: dict) -> "gr.Blocks":
    """The page, as Gradio's `Blocks`."""
    import gradio as gr

    small = small_images(studio.image_size)
    with new_page(gr, settings) as page:
        gr.Markdown(introduction(studio, settings))
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                controls = condition_controls(gr, studio, settings)
                with gr.Row():
                    button = gr.Button("Sample", variant="primary", elem_id="draw", min_width=100)
                    stop = gr.Button("Stop", elem_id="stop", min_width=60)
                controls |= sampling_controls(gr, studio)
            with gr.Column(scale=7, min_width=300):
                gallery = gr.Gallery(
                    show_label=False, format="png", columns=4, height="auto", object_fit="contain", interactive=False,
                    elem_id="images", elem_classes=small,
                )  # fmt: skip
                progress_bar = gr.HTML(elem_id="progress")
                gr.Markdown(CHAIN_HEADING)
                chain = gr.HTML(elem_id="chain", elem_classes=small)

        # Gradio finds `progress` by its default
        def sample(values: dict, progress: Any = gr.Progress()) -> Iterator[dict]:  # noqa: B008
            request = request_of({name: values[component] for name, component in controls.items()}, studio)
            captions, moments, begun = captions_of(request, studio), [], time.monotonic()
            try:
                for step in streamed(functools.partial(studio.sample, request)):
                    if not isinstance(step, Step):
                        took = f"Seed {request.seed}, {request.steps} steps, {time.monotonic() - begun:.1f} seconds."
                        yield {gallery: list(zip(step, captions)), controls["seed"]: request.seed, progress_bar: took}
                        break
                    if step.predictions is not None:
                        moments.append((step.timestep, [thumbnail(image) for image in step.predictions[:ROWS]]))
                        seen = {chain: chain_picture(moments, min(MOMENTS, step.total)), progress_bar: ""}
                        if step.done < step.total:  # the last are the results, which Gradio must not store twice
                            seen |= {gallery: list(zip(step.predictions, captions)), controls["seed"]: request.seed}
                        yield seen
                    progress((step.done, step.total), desc="Sampling")  # last: a yield hides the bar
            except ValueError as error:
                raise gr.Error(str(error), title="Not sampled", print_exception=False) from error

        triggers = [button.click] + ([controls["prompt"].submit] if studio.by_text else [])
        sampling = gr.on(
            triggers,
            sample,
            set(controls.values()),
            [gallery, chain, controls["seed"], progress_bar],
            show_progress_on=progress_bar,
            concurrency_limit=1,  # a pipeline's scheduler holds the state of one chain
        )
        stop.click(None, cancels=[sampling])
    return page
