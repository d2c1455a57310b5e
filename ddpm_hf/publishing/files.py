"""Which files of a run's folder are published."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.checkpoints import MANIFEST, checkpoint_step
from ..common.files import PARTIAL_SUFFIX, truncate_jsonl, write_atomically
from ..common.layout import (
    CHAIN,
    COMPONENT_FILES,
    GRIDS,
    LAYOUT,
    METRICS_FILE,
    RESULTS_FILE,
    RUN_FILE,
    SAMPLES,
    VARIANT,
    is_record,
    matching,
)
from ..common.locations import find_location
from ..common.ownership import claim_files, may_write
from ..common.pictures import save_image
from ..evaluation.results import weights_digest
from .card.illustrations import write_pictures

if TYPE_CHECKING:
    from ..inference.studio import Step, Studio

logger = logging.getLogger(__name__)

LICENSES = ("LICENSE", "LICENSE.*", "LICENSE-*")
PUBLISHED = (*(entry.pattern for entry in LAYOUT if entry.published and entry.pattern != "README.md"), *LICENSES)
RECORDS = (METRICS_FILE, RUN_FILE, RESULTS_FILE)  # names that other programs use too
COMPONENT_PATTERNS = (*COMPONENT_FILES, "*.model", "vocab.txt")
WEIGHTS = "ddpm_hf weights"  # in a picture's metadata: the digest of those that sampled it
CHAIN_ROWS = 8  # of the card's strip of predictions, if the run has none


def component_folders(folder: Path) -> list[str]:
    """The names of the components in a pipeline's folder."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    names = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    return [name for name in names if (folder / name).is_dir()]


def files_to_publish(folder: Path, include: tuple[str, ...] = ()) -> dict[str, Path]:
    """The files of a folder to upload, by path in the repository: the pipeline, its code, card, pictures and figures.

    A run's checkpoints, optimizer states, logs and settings, and all other files, are not uploaded; `include` has
    patterns of additional files.
    """
    patterns = [*PUBLISHED, *include]
    patterns += [f"{name}/{kind}" for name in component_folders(folder) for kind in COMPONENT_PATTERNS]
    files = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            name = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts)
            ours = name.as_posix() not in RECORDS or is_record(folder, name.as_posix())
            if path.is_file() and not hidden and ours and not is_outdated(path):
                files[name.as_posix()] = path
    return files


def is_outdated(path: Path) -> bool:
    """Whether a file of weights in half precision is of other weights than the file beside it, with a warning.

    Diffusers' `save_pretrained` leaves earlier variants where they are.
    """
    from safetensors import SafetensorError, safe_open

    whole = path.with_name(path.name.replace(".fp16.", "."))
    if ".fp16.safetensors" not in path.name or not whole.is_file():
        return False
    try:
        with safe_open(path, "pt") as half, safe_open(whole, "pt") as full:
            names = half.keys()
            same = set(names) == set(full.keys()) and all(
                half.get_tensor(name).equal(full.get_tensor(name).to(half.get_tensor(name).dtype)) for name in names
            )
    except SafetensorError:
        same = False  # damaged
    if not same:
        logger.warning(f"{path} is of other weights than {whole.name}, and not uploaded; --variant fp16 makes it anew")
    return not same


@contextlib.contextmanager
def frozen_copy(files: dict[str, Path], folder: Path) -> Iterator[dict[str, Path]]:
    """A snapshot of the files, by hard links where possible: a continuing run replaces files, and changes none."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".publishing-", suffix=PARTIAL_SUFFIX) as scratch:
        copies = {}
        for name, path in files.items():
            copies[name] = Path(scratch) / name
            copies[name].parent.mkdir(parents=True, exist_ok=True)
            copy_or_link(path.resolve(), copies[name])
        yield copies


def copy_or_link(path: Path, target: Path) -> None:
    """Link or copy a file, so that replacing it does not affect `target`."""
    if path.name != METRICS_FILE:  # the only file that is appended to
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(path, target)
            return
    shutil.copyfile(path, target)


@contextlib.contextmanager
def publishable(folder: Path, include: tuple[str, ...] = ()) -> Iterator[dict[str, Path]]:
    """A snapshot of the files to upload, with pictures and without the card."""
    write_pictures(folder)
    with frozen_copy(files_to_publish(folder, include), folder) as files:
        yield files


@contextlib.contextmanager
def checkpoint_as_folder(checkpoint: Path, ema: bool | None) -> Iterator[Path]:
    """A temporary folder with the pipeline of a run's checkpoint, and the run's records up to that step.

    Args:
        ema: as in `inference.load`, which lists the errors raised.
    """
    from ..inference.loading import load

    run = checkpoint.resolve().parent
    manifest = find_location(str(checkpoint)).json(MANIFEST) or {}
    record = find_location(str(run)).json(RUN_FILE)
    step = manifest.get("step", checkpoint_step(checkpoint.resolve()))
    raw = ema is False and (checkpoint / "unet_ema").is_dir()  # figures and grids are of the averaged weights
    with tempfile.TemporaryDirectory(prefix="ddpm_hf-") as temporary:
        folder = Path(temporary) / run.name
        load(checkpoint, ema=ema).save_pretrained(folder)
        licenses = [path.name for pattern in LICENSES for path in run.glob(pattern)]
        for name in ("README.md", METRICS_FILE, *([] if raw else [RESULTS_FILE]), *licenses):
            if (run / name).is_file():
                shutil.copyfile(run / name, folder / name)
        truncate_jsonl(folder / METRICS_FILE, step)
        (folder / "samples").mkdir()
        if raw:
            forget_averaged(folder / METRICS_FILE, record)
        for path in () if raw else (run / "samples").glob("*-*.png"):
            if path.stem.rpartition("-")[2].isdecimal() and int(path.stem.rpartition("-")[2]) <= step:
                shutil.copyfile(path, folder / "samples" / path.name)
        if record is not None:
            record |= {"step": step, "sessions": manifest.get("sessions", [])}
            write_atomically(folder / RUN_FILE, json.dumps(record, indent=1) + "\n")
        yield folder


def forget_averaged(metrics: Path, record: dict[str, Any] | None) -> None:
    """Leave out of a run's figures and record what is of its averaged weights."""
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    own = [{k: v for k, v in line.items() if not k.startswith(("validation_", "evaluation_"))} for line in lines]
    if lines:
        write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in own))
    if record is not None:
        record["settings"] = {**record.get("settings", {}), "use_ema": "False: the weights are not averaged"}
        record.pop("evaluation", None)


def has_root_layout(folder: Path) -> bool:
    """Whether a pipeline's components lie at the root of its folder, as in the Hub's first models."""
    config, index = folder / "config.json", folder / "model_index.json"
    return config.is_file() and index.is_file() and not (folder / "unet").is_dir()


@contextlib.contextmanager
def resaved(folder: Path) -> Iterator[Path]:
    """A temporary folder with the pipeline of a folder of another layout, as it is saved today, and its card."""
    from ..inference.loading import load

    with tempfile.TemporaryDirectory(prefix="ddpm_hf-") as temporary:
        target = Path(temporary) / folder.resolve().name
        load(folder).save_pretrained(target)
        for path in (one for pattern in ("README.md", *LICENSES) for one in folder.glob(pattern)):
            shutil.copyfile(path, target / path.name)
        yield target


@contextlib.contextmanager
def pipeline_folder(folder: Path, ema: bool | None = None) -> Iterator[Path]:
    """The folder of a pipeline: itself, or a temporary one for a run's checkpoint or a folder of another layout.

    Args:
        ema: of a checkpoint, as in `inference.load`.
    """
    from ..inference.loading import is_checkpoint

    if is_checkpoint(folder):
        with checkpoint_as_folder(folder, ema) as made:
            yield made
    elif has_root_layout(folder):
        with resaved(folder) as made:
            yield made
    else:
        yield folder


def weights_files(folder: Path) -> dict[str, Path]:
    """The files that a pipeline is loaded from, by path in its folder; without its code and other variants."""
    names = [f"{name}/{kind}" for name in component_folders(folder) for kind in COMPONENT_PATTERNS]
    paths = sorted(path for name in ("model_index.json", *names) for path in folder.glob(name))
    return {path.relative_to(folder).as_posix(): path for path in paths if not VARIANT.search(path.name)}


def sample_missing_pictures(studio: "Studio", folder: Path) -> None:
    """Sample a grid and its chains for the card of a model that has none, unless it reads a text or an image.

    Args:
        studio: the model.
    """
    from tqdm.auto import tqdm

    from ..common.pictures import image_grid
    from ..inference.studio import MOST_IMAGES, SampleRequest

    if (
        studio.by_text
        or hasattr(studio.pipeline, "conditioning")
        or ((folder / SAMPLES).is_file() and not of_other_weights(folder))
        or matching(folder, GRIDS)
    ):
        return
    sampler = "ddim" if "ddim" in studio.samplers else "ddpm"
    predictions = []  # of each shown step, the images' predictions
    with tqdm(total=studio.samplers[sampler], desc="sampling images for the card", leave=False) as bar:

        def watch(step: "Step") -> None:
            bar.update(1)
            predictions.extend([step.predictions] if step.predictions else [])

        images = studio.sample(SampleRequest(MOST_IMAGES, sampler, studio.samplers[sampler]), watch)
    scale = max(1, 64 // images[0].width)
    chains = [images_at_step[i] for i in range(CHAIN_ROWS) for images_at_step in predictions]
    for name, grid in (
        (SAMPLES, image_grid(images, scale=scale)),
        (CHAIN, image_grid(chains, len(predictions), scale=scale)),
    ):
        if may_write(folder, name):
            claim_files(folder, [name])
            save_image(grid, folder / name, text={WEIGHTS: weights_digest(folder)})


def of_other_weights(folder: Path) -> bool:
    """Whether the card's grid was sampled for it, by other weights than the folder has now."""
    from PIL import Image

    try:
        with Image.open(folder / SAMPLES) as image:
            digest = image.info.get(WEIGHTS)
    except OSError:
        return False  # no picture, and so none of ours
    return digest is not None and digest != weights_digest(folder)
