"""The page of a Space that restores: an image and what to undo on the left, solutions and their spread on the right.

Gradio comes with the Space (`sdk_version` in its README); this module imports it when the page is made.
"""

import functools
import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...inference.studio import MOST_IMAGES, Step, streamed
from ...restoration.studio import RestorationRequest, RestorationStudio, Restored, fitted
from ...restoration.tasks import TASKS, Settings
from .frame import headline, new_page, small_images

if TYPE_CHECKING:
    import gradio as gr

NO_CLASS = "none"  # in addition to "class NAME"
DEFAULT_SOLUTIONS, DEFAULT_STEPS = 4, 50
CANVAS = (320, 768)  # pixels of an image's longer side, at least and at most, so that it can be painted on
READY = "The image is ready to paint on."
TOGETHER = "### What they say together\nThe mean, the deviation (white where solutions differ most), the 90% interval."


def introduction(studio: RestorationStudio, settings: dict) -> str:
    """Markdown: which model it is and what it does."""
    tasks = ", ".join(task.note for task in studio.tasks.values())
    how = f"{tasks}, without having been trained for it. Several solutions show what the image leaves open"
    return headline(settings, "restores images", studio.image_size, how)


def to_paint(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An upload with the model's proportions (width, height), large enough to paint on and not larger than needed.

    Small images are enlarged a whole number of times, which `fitted` undoes exactly.
    """
    width, height = image.size
    scale = min(width / size[0], height / size[1])
    cropped = fitted(image, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
    longer, (least, most) = max(cropped.size), CANVAS
    if longer > most:
        cropped.thumbnail((most, most))
        return cropped
    times = -(-least // longer) if longer < least else 1
    return cropped.resize((cropped.width * times, cropped.height * times), Image.Resampling.NEAREST)


def read_editor(value: dict | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The image of an editor, and what is painted over it, white on black; None where there is none."""
    image = (value or {}).get("background")
    if image is None:
        return None, None
    painted = Image.new("L", image.size)
    for layer in (value or {}).get("layers") or []:
        if layer is not None:
            alpha = layer.convert("RGBA").getchannel("A").resize(image.size)
            painted.paste(255, mask=alpha.point(lambda level: 255 if level > 127 else 0))
    return image, painted


def task_controls(gr: Any, studio: RestorationStudio) -> dict:
    """The controls of what to undo, by the names that `request_of` reads."""
    choices = [(task.title, name) for name, task in studio.tasks.items()]
    controls = {"task": gr.Dropdown(choices, value=choices[0][1], label="Task", elem_id="task")}
    if studio.factors:
        controls["factor"] = gr.Dropdown(
            studio.factors, value=studio.factors[0], label="Times larger", visible=False, elem_id="factor"
        )
        filters = [("bicubic", "bicubic"), ("means of pixels", "average")]
        controls["filter"] = gr.Dropdown(filters, value="bicubic", label="Made small by", visible=False)
    blurs = ["gaussian", "motion", "anisotropic"]
    controls["blur"] = gr.Dropdown(blurs, value="gaussian", label="Blur", visible=False, elem_id="blur")
    controls["blur_size"] = gr.Slider(
        0.3, 10, 1, step=0.1, label="Deviation or length of the blur, in pixels", visible=False, elem_id="blur_size"
    )
    controls["blur_angle"] = gr.Slider(
        -90, 90, 0, step=5, label="Direction of the blur, in degrees", visible=False, elem_id="blur_angle"
    )
    controls["degrade"] = gr.Checkbox(
        True, label="Degrade the image first, restore, and compare", visible=False, elem_id="degrade"
    )
    hint = "For pixels from -1 to 1. 0: what is known stays as it is."
    controls["estimate"] = gr.Checkbox(True, label="Estimate the noise of the image", elem_id="estimate")
    controls["sigma_y"] = gr.Slider(0, 1, 0, step=0.01, label="Noise", info=hint, visible=False, elem_id="noise")
    return controls


def shown_for(values: dict) -> dict[str, bool]:
    """Which of the controls a task uses, by their names."""
    task = values["task"]
    shown = {name: name in TASKS[task].reads for name in ("factor", "filter", "blur", "blur_size")}
    shown["blur_angle"] = shown["blur"] and values["blur"] != "gaussian"
    shown["degrade"] = task != "inpaint"
    degrades = shown["degrade"] and values["degrade"]
    return {**shown, "estimate": not degrades, "sigma_y": degrades or not values["estimate"]}


def chain_controls(gr: Any, studio: RestorationStudio) -> dict:
    """The controls of how to restore, by the names that `request_of` reads."""
    controls = {
        "solutions": gr.Slider(1, MOST_IMAGES, DEFAULT_SOLUTIONS, step=1, label="Solutions", elem_id="solutions")
    }
    if studio.classes:
        choices = [("No class", NO_CLASS)] if studio.knows_no_class else []
        choices += [(name, f"class {name}") for name in studio.classes]
        controls["class"] = gr.Dropdown(choices, value=choices[0][1], label="Class", elem_id="class")
    methods = [(f"{name}: {row.title}", name) for name, row in studio.methods.items()]
    controls["method"] = gr.Dropdown(methods, value=methods[0][1], label="Method", elem_id="method")
    most = studio.max_steps
    controls["steps"] = gr.Slider(1, most, min(DEFAULT_STEPS, most), step=1, label="Steps", elem_id="steps")
    controls["random"] = gr.Checkbox(True, label="A new seed each time", elem_id="random")
    controls["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
    return controls


def request_of(values: dict) -> RestorationRequest:
    """The request that the controls' values, by their names, make; a random seed is chosen here.

    Raises:
        ValueError: there is no image.
    """
    image, painted = read_editor(values["image"])
    if image is None:
        raise ValueError("upload an image, or sample one")
    chosen, shown = values.get("class", NO_CLASS), shown_for(values)
    used = {name: values[name] for name in ("factor", "filter", "blur", "blur_size", "blur_angle") if shown[name]}
    return RestorationRequest(
        image,
        values["task"],
        painted,
        Settings(**used),
        degrade=shown["degrade"] and values["degrade"],
        sigma_y=float(values["sigma_y"]) if shown["sigma_y"] else None,
        method=values["method"],
        steps=int(values["steps"]),
        solutions=int(values["solutions"]),
        seed=random.randrange(2**31) if values["random"] else int(values["seed"] or 0),
        class_label=None if chosen == NO_CLASS else chosen.removeprefix("class "),
    )


def summary(request: RestorationRequest, restored: Restored, seconds: float) -> str:
    """A line on a restoration: its seed, noise, and figures."""
    figures = restored.figures
    estimated = " (estimated)" if request.sigma_y is None and not request.degrade else ""
    words = [
        f"Seed {request.seed}, {request.steps} steps, {seconds:.1f} seconds.",
        f"Noise {figures['sigma_y']:.3g}{estimated}, residual {figures['residual']:.3g}.",
    ]
    if "psnr" in figures:
        mean = f", of their mean {figures['psnr_of_mean']:.1f}" if "psnr_of_mean" in figures else ""
        words.append(f"PSNR of the solutions {figures['psnr']:.1f} dB{mean}.")
    return " ".join(words)


def make_page(studio: RestorationStudio, settings: dict) -> "gr.Blocks":
    """The page, as Gradio's `Blocks`."""
    import gradio as gr

    small = small_images(studio.image_size)
    with new_page(gr, settings) as page:
        gr.Markdown(introduction(studio, settings))
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                editor = gr.ImageEditor(
                    type="pil", label="Image; paint over a part", sources=["upload", "clipboard"],
                    transforms=(), layers=False, format="png", buttons=[], elem_id="editor", height=420,
                    canvas_size=(CANVAS[0], CANVAS[0]),
                    brush=gr.Brush(colors=["#ff3366"], color_mode="fixed", default_size=24),
                )  # fmt: skip
                own = gr.Button("Sample an image to try", size="sm", elem_id="own")
                with gr.Row():
                    button = gr.Button("Restore", variant="primary", elem_id="draw", min_width=100)
                    stop = gr.Button("Stop", elem_id="stop", min_width=60)
                controls = {"image": editor, **task_controls(gr, studio), **chain_controls(gr, studio)}
            with gr.Column(scale=6, min_width=300):
                look = {"format": "png", "height": "auto", "object_fit": "contain", "interactive": False}
                look |= {"show_label": False, "columns": 4, "elem_classes": small}
                gallery = gr.Gallery(elem_id="images", **look)
                progress_bar = gr.HTML(elem_id="progress")
                gr.Markdown(TOGETHER)
                views = gr.Gallery(elem_id="views", **look)

        def show(values: dict) -> dict:
            """Show the controls that the task uses."""
            known = {name: values[component] for name, component in controls.items() if component in values}
            return {controls[name]: gr.update(visible=on) for name, on in shown_for(known).items() if name in controls}

        def prepare(value: dict | None) -> dict:
            """The upload at a size to paint on."""
            image, _ = read_editor(value)
            return {} if image is None else ready(image)

        def sample_own() -> dict:
            """An image of the model's own, to paint on."""
            return ready(studio.sample_image(random.randrange(2**31)))

        def ready(image: Image.Image) -> dict:
            return {editor: editor_value(to_paint(image, studio.image_size)), progress_bar: READY}

        # Gradio finds `progress` by its default
        def restore(values: dict, progress: Any = gr.Progress()) -> Iterator[dict]:  # noqa: B008
            begun = time.monotonic()
            try:
                request = request_of({name: values[component] for name, component in controls.items()})
                for step in streamed(functools.partial(studio.restore, request)):
                    if isinstance(step, Restored):
                        line = summary(request, step, time.monotonic() - begun)
                        yield {gallery: step.solutions, views: step.views, progress_bar: line}
                        break
                    if isinstance(step, Step):
                        if step.predictions is not None and step.done < step.total:
                            yield {gallery: step.predictions, controls["seed"]: request.seed, progress_bar: ""}
                        progress((step.done, step.total), desc="Restoring")  # last: a yield hides the bar
            except ValueError as error:
                raise gr.Error(str(error), title="Not restored", print_exception=False) from error

        restoring = button.click(
            restore, set(controls.values()), [gallery, views, controls["seed"], progress_bar],
            show_progress_on=progress_bar,
            concurrency_limit=1,  # a pipeline's scheduler holds the state of one chain
        )  # fmt: skip
        stop.click(None, cancels=[restoring])
        private = {"api_visibility": "private"}
        # No progress on the editor: the overlay that Gradio puts on it sometimes stays there
        editor.upload(prepare, editor, [editor, progress_bar], show_progress="hidden", **private)
        own.click(sample_own, None, [editor, progress_bar], show_progress_on=progress_bar, **private)
        decide = [controls[name] for name in ("task", "blur", "degrade", "estimate")]
        names = ("factor", "filter", "blur", "blur_size", "blur_angle", "degrade", "estimate", "sigma_y")
        gr.on(
            [one.change for one in decide], show, set(decide), [controls[name] for name in names if name in controls],
            show_progress="hidden", **private,
        )  # fmt: skip
    return page


def editor_value(image: Image.Image) -> dict:
    """An editor's value: the image, with nothing painted."""
    return {"background": image, "layers": [], "composite": image}
