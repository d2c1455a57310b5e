"""From a trained pipeline to a folder and a repository that a stranger can use."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .training.checkpointing import flush, flush_tree, write_whole
from .training.config import TrainingConfig, UsageError
from .training.setup import log, public_settings

# What never goes up: a run's own files, which hold paths of the machine, and what an interrupted write left behind
PRIVATE_PATTERNS = (
    "checkpoint-*", "checkpoint-*/**", "*.tfevents*", "**/*.tfevents*", "hparams.yml", "**/hparams.yml", ".*", "**/.*",
    "timings.jsonl", "training_config.json", "autoencoder/**", "cache/**",
)  # fmt: skip


def save_model(model, folder: str | Path) -> None:
    """Save what has a `save_pretrained` so that each of its files is whole: written beside, then moved into place."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-", suffix=".partial"))
    try:
        model.save_pretrained(beside)
        for path in beside.rglob("config.json"):
            forget_origin(path)
        flush_tree(beside)
        places = [path.relative_to(beside) for path in beside.rglob("*") if path.is_file()]
        for last in (False, True):  # a config says that the model beside it is there: it goes last
            moved = [place for place in places if (place.suffix == ".json") == last]
            for place in moved:
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                os.replace(beside / place, folder / place)
            for parent in {(folder / place).parent for place in moved} | {folder}:
                flush(parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def forget_origin(config: Path) -> None:
    """Drop where a model was loaded from: a path of this machine, or another one where its training was resumed."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.pop("_name_or_path", None) is not None:
        write_whole(config, json.dumps(settings, indent=2, sort_keys=True) + "\n")


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
    by_text = hasattr(pipeline, "tokenizer")
    T = pipeline.scheduler.config.num_train_timesteps
    arguments = ['"..."'] if by_text else [repr(labels[:1])] if labels else []
    if T != 1000 and not by_text:  # stock's pipeline would take 1000 steps
        arguments.append(f"num_inference_steps={T}")
    elif by_text and T < 50:
        arguments.append(f"num_inference_steps={T - 1}")
    kind = "text-to-image" if by_text else "class-conditional" if labels else "unconditional-image-generation"
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=None if labels else kind,
        tags=["ddpm", "ddpm_hf", kind],
        datasets=[dataset] if dataset else None,
    )
    grids = sorted((folder / "samples").glob("*.png"))
    text = CARD.format(
        title=repository.split("/")[-1],
        what={
            "text-to-image": "Images of texts",
            "class-conditional": f"Images by class ({len(labels)} classes)",
        }.get(kind, "An unconditional image model"),
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


def publish(config: TrainingConfig, data: str, steps: int, pipeline, shown: tuple[str, ...], accelerator) -> None:
    """Save, write the model card, and upload if that was asked for; a failed upload loses nothing.

    Args:
        config: a script's, with `DataFlags`.
        data: the name of what was trained on.
        steps: how many were trained.
        shown: the settings that the card lists.

    Raises:
        UsageError: the upload failed; how to repeat it.
    """
    folder = Path(config.output_dir)
    save_pipeline(pipeline, folder)
    local = config.train_data_dir or (config.dataset_name if os.path.exists(config.dataset_name or "") else None)
    settings = {
        "dataset": Path(local).resolve().name if local else data,
        "steps": steps,
        **{name: value for name, value in public_settings(config).items() if name in shown},
    }
    dataset = None if local else config.dataset_name
    repository = config.hub_model_id or folder.resolve().name
    write_model_card(folder, repository, pipeline, settings, dataset)
    how = "" if pipeline.stock_class_name() else ", trust_remote_code=True"
    log(accelerator, f"saved to {folder}: DiffusionPipeline.from_pretrained({str(folder)!r}{how}) loads it")
    if config.push_to_hub:
        try:
            repository = open_repository(repository, config.hub_token, config.hub_private_repo)
            write_model_card(folder, repository, pipeline, settings, dataset)
            address = push_folder(folder, repository, config.hub_token, keep_back=config.logging_dir)
        except Exception as error:  # whatever the network does, the trained model is on disk
            reason = " ".join(str(error).split()).partition(" For more information")[0][:300]
            raise UsageError(
                f"the upload to {repository} failed ({error.__class__.__name__}: {reason}); {folder} is complete,"
                " upload it with the same command line, --resume_from_checkpoint latest and no --overwrite_output_dir"
            ) from error
        log(accelerator, f"published at {address}")
