"""From a trained pipeline to a folder and a repository that a stranger can use."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .training.checkpointing import write_whole

# What never goes up: a run's own files, and whatever an interrupted write left behind
PRIVATE_PATTERNS = ["checkpoint-*", "checkpoint-*/**", "logs/**", "**/events.out.tfevents*", ".*", "timings.jsonl"]


def save_model(model, folder: str | Path) -> None:
    """Save what has a `save_pretrained` so that each of its files is whole: written beside, then moved into place."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        model.save_pretrained(beside)
        for path in sorted(beside.rglob("*")):
            target = folder / path.relative_to(beside)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


save_pipeline = save_model  # a pipeline is a folder of models


def save_image(image, path: Path) -> None:
    """Write a PIL picture whole, in the format that the name says."""
    import io

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    image.save(buffer, format=path.suffix[1:].upper())
    write_whole(path, buffer.getvalue())


CARD = """# {title}

An unconditional image model of {resolution} pixels, trained with ddpm_hf: denoising diffusion (DDPM,
[Ho et al. 2020](https://arxiv.org/abs/2006.11239)) in the Hugging Face ecosystem.

{picture}

## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repository}"{trust})
pipeline(batch_size=4).images[0].save("sample.png")
```

## Training

| | |
|---|---|
{settings}
"""


def write_model_card(
    folder: Path, title: str, repository: str, settings: dict[str, Any], dataset: str | None, trust: bool
) -> None:
    """Write `README.md`: what the model is, a picture, how to load it, how it was trained.

    Args:
        settings: rows of the training table.
        dataset: its name on the Hub, for the metadata, if it has one.
        trust: whether loading without this package runs code from the repository.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "ddpm_hf", "diffusers", "unconditional-image-generation"],
        datasets=[dataset] if dataset else None,
    )
    grids = sorted((folder / "samples").glob("*.png"))
    text = CARD.format(
        title=title,
        resolution=settings["resolution"],
        repository=repository,
        picture=f"![samples](samples/{grids[-1].name})" if grids else "",
        trust=", trust_remote_code=True" if trust else "",
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
    )
    write_whole(folder / "README.md", f"---\n{data.to_yaml()}\n---\n\n{text}")


def push_folder(folder: Path, repository: str, token: str | None, private: bool) -> str:
    """Upload the pipeline's folder in one commit; the address of the repository."""
    from huggingface_hub import create_repo, upload_folder

    created = create_repo(repository, private=private, token=token, exist_ok=True)
    upload_folder(
        repo_id=created.repo_id,
        folder_path=folder,
        token=token,
        commit_message="Upload the pipeline",
        ignore_patterns=PRIVATE_PATTERNS,
    )
    return str(created)
