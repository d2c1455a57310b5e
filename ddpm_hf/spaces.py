"""A Space for a published model: the folder of its app, and its upload."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ._version import __version__
from .space.drawing import pipeline_class

PACKAGE = Path(__file__).parent
GRADIO_VERSION = "6.31.0"  # what the app was tested with
PYTHON_VERSION = "3.11"
CODE = "ddpm_hf_space"  # the folder, and package, of what is copied
COPIED = ("portable/*.py", "space/*.py", "training/__init__.py", "training/randomness.py")

APP = f'''"""The Space's page; what it does lies in {CODE}/."""

from pathlib import Path

from {CODE}.space.page import main

if __name__ == "__main__":
    main(Path(__file__).parent)
'''
README = """# {title}

An app that draws with {model}, made by `ddpm-hf push-space`: denoising diffusion (DDPM) in the Hugging Face ecosystem.

To run it on your own machine, from this folder:

```bash
pip install -r requirements.txt gradio=={gradio}
python app.py
```
"""


def write_space(
    folder: str | Path, model: str, license: str | None = None, examples: Sequence[str] = (), address: str | None = None
) -> None:
    """Write a Space's folder, whole or not at all.

    Args:
        folder: is made; it must not hold anything.
        model: its name on the Hub, or a local folder for an app that is not uploaded.
        license: the model's, as its card says.
        examples: prompts to offer, the first of which is filled in.
        address: the model's page, if it has one.

    Raises:
        ValueError: there are files in the folder already.
    """
    from huggingface_hub import SpaceCardData

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty; name a new folder")
    title = Path(model).name
    card = SpaceCardData(
        title=title,
        emoji="🎲",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license=license,
        models=[model] if address else None,
        tags=["ddpm", "ddpm_hf", "diffusers"],
    )
    named = f"[{model}]({address})" if address else title
    settings = {"model": model, "title": title, "address": address, "examples": list(examples)}
    texts = {
        "app.py": APP,
        "README.md": f"---\n{card.to_yaml()}\n---\n\n{README.format(title=title, model=named, gradio=GRADIO_VERSION)}",
        "requirements.txt": (PACKAGE / "space" / "requirements.txt").read_text(encoding="utf-8"),
        "space.json": json.dumps({name: value for name, value in settings.items() if value}, indent=2) + "\n",
        f"{CODE}/__init__.py": f'"""The parts of ddpm_hf {__version__} that the app needs."""\n',
    }
    for path in sorted(path for pattern in COPIED for path in PACKAGE.glob(pattern)):
        texts[f"{CODE}/{path.relative_to(PACKAGE).as_posix()}"] = path.read_text(encoding="utf-8")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, text in texts.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_text(text, encoding="utf-8")
        beside.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
