"""The one table of what a run writes into its output folder."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoints import SETTINGS, is_complete, list_checkpoints

RUN_FILE, RESULTS_FILE = "run.json", "evaluation.json"
METRICS_FILE, TIMINGS_FILE = "metrics.jsonl", "timings.jsonl"
SAMPLES, CHAIN, LOSS_CURVE = "assets/samples.png", "assets/chain.png", "assets/loss.png"
EMA_SNAPSHOTS = "ema-snapshots"  # averaged weights of some steps, for `ddpm-hf ema`
EARLIER = "earlier-run"  # holds a run that is being replaced
AUTOENCODER = "autoencoder"  # the autoencoder's own run, inside the folder of the model's


def json_or_none(path: Path) -> Any:
    """The content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _has(*keys: str) -> Callable[[Path], bool]:
    """A test whether a file is a JSON object with these keys."""

    def test(path: Path) -> bool:
        value = json_or_none(path)
        return isinstance(value, dict) and set(keys) <= set(value)

    return test


def _logs(*keys: str) -> Callable[[Path], bool]:
    """A test whether the first line of a file is a JSON object with these keys."""

    def test(path: Path) -> bool:
        try:
            with open(path, encoding="utf-8") as file:
                line = json.loads(file.readline())
        except (OSError, ValueError):
            return False
        return isinstance(line, dict) and set(keys) <= set(line)

    return test


def _is_results(path: Path) -> bool:
    results, keys = json_or_none(path), {"metric", "value", "samples", "dataset"}
    return isinstance(results, list) and all(isinstance(one, dict) and keys <= set(one) for one in results)


def _is_card(path: Path) -> bool:
    try:
        return "<!-- ddpm_hf" in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def is_model_config(path: Path) -> bool:
    """Whether it is the config of a single model: a classifier or an autoencoder."""
    config = json_or_none(path)
    return isinstance(config, dict) and config.get("_class_name") in ("NoisyClassifier", "AutoencoderKL")


def _is_file(path: Path) -> bool:
    return path.is_file()


class Entry(NamedTuple):
    """A kind of file in an output folder.

    Attributes:
        pattern: its path; `*` stands for any characters but a slash, `#` for digits; a folder ends with a slash.
        published: whether it is uploaded with the model.
        recognised: whether a file belongs to a run, for runs older than the manifest.
    """

    pattern: str
    published: bool = False
    recognised: Callable[[Path], bool] = _is_file


CHECKPOINT = Entry("checkpoint-#/", recognised=is_complete)
TRAINING_CONFIG = Entry(SETTINGS, recognised=_has("output_dir", "checkpointing_steps"))
STEPS = Entry(METRICS_FILE, published=True, recognised=_logs("step", "epoch"))
TIMINGS = Entry(TIMINGS_FILE, recognised=_logs("step", "seconds"))
GRIDS = "samples/step-#.png"
TRAINING = (
    CHECKPOINT,
    Entry("checkpoint-#.superseded/", recognised=is_complete),
    Entry("checkpoint-#.partial/", recognised=Path.is_dir),
    TRAINING_CONFIG,
    STEPS,
    TIMINGS,
    Entry(GRIDS),
    Entry("samples/chain-#.png"),
    Entry(f"{EMA_SNAPSHOTS}/*.safetensors"),
)
PIPELINE = (
    Entry("model_index.json", published=True, recognised=_has("_class_name", "scheduler")),
    Entry("pipeline_*ddpm_hf.py", published=True),
    *(
        Entry(f"{name}_ddpm_hf.py", published=True)
        for name in (
            "hub",
            "acceleration",
            "guidance",
            "multistep",
            "sampling",
            "coefficients",
            "scheduling",
            "schedules",
            "networks",
            "text_encoding",
            "restoration",
            "linear",
            "operators",
            "conditioning",
            "image_to_image",
        )
    ),
    Entry(RUN_FILE, published=True, recognised=_has("sessions")),
    Entry(RESULTS_FILE, published=True, recognised=_is_results),
    Entry("README.md", published=True, recognised=_is_card),
    *(Entry(picture, published=True) for picture in (SAMPLES, CHAIN, LOSS_CURVE)),
)
# Of a single model, and of each component of a pipeline
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index*.json")
MODEL = (Entry("config.json", recognised=is_model_config), *map(Entry, WEIGHTS))
COMPONENTS = (
    "unet", "vae", "scheduler", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder",
    "classifier", "unet_2", "unet_3", "scheduler_2", "scheduler_3",
)  # fmt: skip
COMPONENT_FILES = (
    "config.json", *WEIGHTS, "model*.safetensors", "model*.index*.json", "scheduler_config.json",
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "networks_ddpm_hf.py",
)  # fmt: skip
VARIANT = re.compile(r"\.(fp16|non_ema)[.-]")  # weights beside the usual ones
KEPT_IN_PLACE = ("README.md",)  # users write into it: only its marked block is renewed


def layout(*components: str, autoencoder: bool = False, model: bool = False) -> tuple[Entry, ...]:
    """The files that a training writes.

    Args:
        components: those of the pipeline that it saves.
        autoencoder: whether it trains one first.
        model: whether it saves a single model instead of a pipeline.
    """
    entries = TRAINING + (MODEL if model else PIPELINE)
    entries += tuple(Entry(f"{name}/{file}") for name in components for file in COMPONENT_FILES)
    if autoencoder:
        nested = (one._replace(pattern=f"{AUTOENCODER}/{one.pattern}", published=False) for one in TRAINING + MODEL)
        entries += tuple(nested)
    return entries


LAYOUT = layout(*COMPONENTS, autoencoder=True) + MODEL


def matching(folder: Path, pattern: str) -> list[str]:
    """The names in a folder that an entry's pattern matches, as posix paths; a folder's ends with a slash."""
    bare = pattern.removesuffix("/")
    expression = re.escape(bare).replace(r"\*", "[^/]*").replace(r"\#", r"\d+").replace("#", r"\d+")
    paths = folder.glob(bare.replace("#", "*")) if set(bare) & set("*#") else [folder / bare]
    names = [path.relative_to(folder).as_posix() for path in paths if os.path.lexists(path)]
    return sorted(name + pattern[len(bare) :] for name in names if re.fullmatch(expression, name))


def is_record(folder: Path, name: str) -> bool:
    """Whether a file holds what a run writes under its name, and is not another program's."""
    return any(one.pattern == name and (folder / name).is_file() and one.recognised(folder / name) for one in LAYOUT)


def holds_run(folder: Path) -> bool:
    """Whether a folder has what a training writes besides its model: checkpoints, or its log."""
    return bool(list_checkpoints(folder)) or (folder / METRICS_FILE).exists()
