"""What the pages of Spaces share: their style, and their heading."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

PIXELATED_BELOW = 128  # pixels; smaller images are enlarged without smoothing

CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: auto}
.small-images img {image-rendering: pixelated}
#images .caption-label {font-size: 11px; padding: 1px 6px}
#images .grid-wrap {min-height: 0; max-height: none; overflow: hidden}
@media (max-width: 640px) {#images .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}}
#progress {min-height: 76px; overflow: hidden; font-size: 13px; opacity: .8}
.chain {display: grid; gap: 3px; margin-top: 4px}
.chain img {width: 100%; border-radius: 3px; display: block}
.chain span {font-size: 11px; text-align: center; opacity: .65; white-space: nowrap}
"""


def small_images(size: tuple[int, int]) -> list[str]:
    """The style of galleries of images of (width, height) pixels."""
    return ["small-images"] if max(size) < PIXELATED_BELOW else []


def new_page(gr: Any, settings: dict) -> "gr.Blocks":
    """An empty page."""
    return gr.Blocks(title=settings["title"], analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True)


def headline(settings: dict, does: str, size: tuple[int, int], how: str) -> str:
    """Markdown: which model it is, what it does, at which size, and how."""
    width, height = size
    name, address, title = settings["model"], settings.get("address"), settings["title"]
    model = f"[{name}]({address})" if address else f"`{title if settings.get('holds_model') else Path(name).name}`"
    return (
        f"# {title}\n{model} {does} in {width}×{height} pixels by denoising diffusion"
        f" ([DDPM](https://arxiv.org/abs/2006.11239)): {how}."
    ).replace("  ", " ")
