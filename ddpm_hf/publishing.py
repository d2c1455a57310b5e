"""From a trained pipeline to a folder and a repository that a stranger can use."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .training.checkpointing import write_whole

# What never goes up: a run's own files, which hold paths of the machine, and what an interrupted write left behind
PRIVATE_PATTERNS = (
    "checkpoint-*", "checkpoint-*/**", "*.tfevents*", "**/*.tfevents*", "hparams.yml", "**/hparams.yml", ".*", "**/.*",
    "timings.jsonl", "training_config.json",
)  # fmt: skip


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

{what} of {resolution} pixels, trained with ddpm_hf: denoising diffusion (DDPM,
[Ho et al. 2020](https://arxiv.org/abs/2006.11239)) in the Hugging Face ecosystem.

{picture}

## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repository}"{trust})
image = pipeline({arguments}).images[0]
image.save("sample.png")
```

## Training

| | |
|---|---|
{settings}
"""


def write_model_card(
    folder: Path, repository: str, pipeline, settings: dict[str, Any], dataset: str | None = None
) -> None:
    """Write `README.md`: what the model is, a picture, how to load it, how it was trained.

    Args:
        repository: its name on the Hub, user/name, or the folder's.
        pipeline: the trained one, for its kind, its classes and its timesteps.
        settings: rows of the training table.
        dataset: its name on the Hub, for the metadata, if it has one.
    """
    from huggingface_hub import ModelCardData

    labels = list(getattr(pipeline, "labels", []))
    T = pipeline.scheduler.config.num_train_timesteps
    arguments = [repr(labels[:1])] if labels else []
    if T != 1000:  # stock's pipeline would take 1000 steps
        arguments.append(f"num_inference_steps={T}")
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=None if labels else "unconditional-image-generation",
        tags=["ddpm", "ddpm_hf", "class-conditional" if labels else "unconditional-image-generation"],
        datasets=[dataset] if dataset else None,
    )
    grids = sorted((folder / "samples").glob("*.png"))
    text = CARD.format(
        title=repository.split("/")[-1],
        what=f"Images by class ({len(labels)} classes)" if labels else "An unconditional image model",
        resolution=settings["resolution"],
        repository=repository,
        picture=f"![samples](samples/{grids[-1].name})" if grids else "",
        trust="" if pipeline.stock_class_name() else ", trust_remote_code=True",
        arguments=", ".join(arguments),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
    )
    write_whole(folder / "README.md", f"---\n{data.to_yaml()}\n---\n\n{text}")


def open_repository(repository: str, token: str | None, private: bool) -> str:
    """Create the repository if it does not exist; its full name, with the user.

    Raises:
        ValueError: it is to be private, and exists in public.
    """
    from huggingface_hub import create_repo, model_info

    name = create_repo(repository, private=private or None, token=token, exist_ok=True).repo_id
    if private and not model_info(name, token=token).private:
        raise ValueError(f"{name} exists and is public; make it private on the Hub, or name another --hub_model_id")
    return name


def push_folder(folder: Path, repository: str, token: str | None, keep_back: str | None = None) -> str:
    """Upload a pipeline's folder in one commit, but for a run's own files and those below `keep_back`; its address."""
    from huggingface_hub import upload_folder

    patterns = [*PRIVATE_PATTERNS, *([f"{keep_back}/**"] if keep_back else [])]
    return upload_folder(
        repo_id=repository,
        folder_path=folder,
        token=token,
        commit_message="Upload the pipeline",
        ignore_patterns=patterns,
    ).repo_url
