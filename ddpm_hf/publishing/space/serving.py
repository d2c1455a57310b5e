"""What a Space's app.py runs: the page that its space.json names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .frame import CSS


def open_page(settings: dict, model: str) -> Callable[[], Any]:
    """Load the model; a function that makes its page."""
    if settings.get("restores"):
        from ...restoration.studio import RestorationStudio
        from . import restoration_page

        restorer = RestorationStudio(model)
        return lambda: restoration_page.make_page(restorer, settings)
    from ...inference.studio import Studio
    from . import page

    studio = Studio(model)
    return lambda: page.make_page(studio, settings)


def main(folder: Path) -> None:
    """Serve the page of the Space that a folder holds."""
    import gradio as gr
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    model = str(folder / settings["model"]) if settings.get("holds_model") else settings["model"]
    try:
        make_page = open_page(settings, model)
    except ValueError as error:
        raise SystemExit(f"{error} (a Space reads a private model with its secret HF_TOKEN)") from error
    plain = ("system-ui", "sans-serif")
    theme = gr.themes.Soft(primary_hue="indigo", font=plain, font_mono=("ui-monospace", "monospace"))
    make_page().queue(max_size=32).launch(theme=theme, css=CSS, max_file_size="100mb")
