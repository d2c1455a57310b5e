"""What a plan says of the other commands: options of `ddpm-hf evaluate`, real images to score, a script's flags."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import typer

from ..common.errors import UsageError
from .evaluation_data import EMBEDDED, DataOptions, read_data
from .evaluation_samples import read_chains
from .train import ROOT

if TYPE_CHECKING:
    from ..ablation.plan import Plan
    from ..training.flags import Flags

# Options of `ddpm-hf evaluate` that the ablation gives itself
GIVEN = ("model", "out", "features", "ema", "revision", "token", "resolution", "help")


def load_script(command: str) -> ModuleType:
    """The module of a training script, which need not be installed: a clone has it beside the package."""
    from ..ablation.plan import SCRIPTS

    name = SCRIPTS[command]
    path = ROOT / f"{name}.py"
    known = sys.modules.get(name)
    if known is not None and Path(known.__file__ or "").resolve() == path.resolve():
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{path}: the training script is not there; install ddpm_hf again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_diffusion(flags: "Flags") -> None:
    """Raise UsageError for a diffusion or a loss that cannot be trained."""
    from ..models.diffusion import make_scheduler
    from ..objectives.flags import ObjectiveFlags, ScheduleFlags

    if getattr(flags, "pretrained_model_name_or_path", None) is None:  # else the model to start from decides
        make_scheduler(flags[ScheduleFlags], flags[ObjectiveFlags], bool(getattr(flags, "vae_name_or_path", None)))


def evaluation_words(options: Mapping[str, Any]) -> list[str]:
    """Options of `ddpm-hf evaluate` as words.

    Raises:
        UsageError: an unknown option, or a value that it refuses.
    """
    command, words = _evaluate_command(), []
    known = {_plain(one.opts[0]): one for one in command.params if _plain(one.opts[0]) not in GIVEN}
    for name, value in options.items():
        if name == "features":
            words += ["--features", str(value)]
            continue
        parameter = known.get(_plain(name))
        if parameter is None:
            raise UsageError(f"{name}: unknown option of ddpm-hf evaluate; it has {', '.join(sorted(known))}")
        words += _words_of(parameter, value)
    return words


def _plain(name: str) -> str:
    return name.strip("-_").replace("-", "_")


def _words_of(parameter: Any, value: Any) -> list[str]:
    flag = parameter.opts[0]
    if value is None:
        return []
    several = parameter.multiple or parameter.nargs > 1 or _plain(flag) == "metrics"
    if isinstance(value, dict) or (isinstance(value, list) and not several):
        raise UsageError(f"{flag}: must be one value")
    if getattr(parameter, "is_flag", False):
        return [flag] if str(value).lower() in ("true", "on", "yes") else list(parameter.secondary_opts[:1])
    values = value if isinstance(value, list) else [value]
    if parameter.multiple:
        return [word for one in values for word in (flag, str(one))]
    if parameter.nargs > 1:
        return [flag, *map(str, values)]
    return [flag, ",".join(map(str, values))]


def _evaluate_command() -> Any:
    from . import app

    return typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]


def check_evaluation(plan: "Plan") -> None:
    """Raise UsageError for an option of the plan's evaluation that cannot work; the message names its line."""
    from ..evaluation.features import EXTRACTORS, usage
    from ..evaluation.protocols import PROTOCOLS
    from .evaluate import read_metrics

    if plan.evaluate is None:
        return
    options, document, command = plan.evaluate, plan.document, _evaluate_command()
    for cell in plan.cells:
        if cell.flags.get("conditioning"):
            raise document.error(
                cell.paths["conditioning"], "models that read an image cannot be evaluated here; leave out evaluate"
            )
    for name, value in options.items():
        try:
            words = evaluation_words({name: value})
            command.make_context("evaluate", ["MODEL", *words])
        except (UsageError, ValueError) as error:
            raise _at_option(plan, name, str(error)) from error
        except Exception as error:  # what typer raises for words that it cannot parse
            if not hasattr(error, "format_message"):
                raise
            raise _at_option(plan, name, error.format_message()) from error
    for network in plan.networks:
        kind, _, argument = network.partition(":")
        row = EXTRACTORS.get(kind)
        if row is None or (row.required and not argument) or (row.argument is None and argument):
            known = ", ".join(map(usage, EXTRACTORS))
            raise document.error(("evaluate", "features"), f"must be one of {known} (got {network!r})")
    calls = options.get("likelihood_calls")
    metrics = options.get("metrics")
    if metrics is not None:
        try:
            read_metrics(",".join(metrics) if isinstance(metrics, list) else metrics, None if calls is None else 1)
        except UsageError as error:
            raise _at_option(plan, "metrics", str(error)) from error
    if options.get("protocol", "adm") not in PROTOCOLS:
        raise _at_option(plan, "protocol", f"must be one of {', '.join(PROTOCOLS)} (got {options['protocol']!r})")
    steps = options.get("steps")
    try:
        read_chains(
            options.get("sweep"), options.get("sampler", "ddpm"), steps and int(steps), _number(options, "eta")
        )
    except UsageError as error:
        raise _at_option(plan, "sweep" if "sweep" in options else "eta", str(error)) from error


def _number(options: Mapping[str, Any], name: str) -> float:
    return float(options.get(name) or 0)


def _at_option(plan: "Plan", name: str, message: str) -> UsageError:
    written = [(("evaluate", one)) for one in (name, name.replace("_", "-"))]
    path = next((one for one in written if one in plan.document.lines), written[0])
    return plan.document.error(path, message)


def network_calls(plan: "Plan", timesteps: int) -> int:
    """The network calls of one cell's evaluation, for all its samples and for the likelihood; an estimate."""
    from ..inference.samplers import SAMPLERS
    from .evaluate import DEFAULT_SAMPLES

    if plan.evaluate is None:
        return 0
    options, calls = plan.evaluate, 0
    steps = options.get("steps")
    for chain in read_chains(options.get("sweep"), options.get("sampler", "ddpm"), steps and int(steps), 0):
        calls += chain.steps or SAMPLERS[chain.sampler].steps or timesteps
    calls *= 0 if options.get("metrics") == "none" else int(options.get("num_samples") or DEFAULT_SAMPLES)
    if options.get("likelihood_calls") is not None:
        calls += (int(options["likelihood_calls"]) or timesteps) * int(options.get("likelihood_images") or 1000)
    return calls


# Real images


def training_dataset(plan: "Plan", flags: "Flags") -> dict[str, Any]:
    """Which images real images and all cells are compared with, as options of `ddpm-hf evaluate`.

    Without a row of real images, and where the plan names a dataset, the plan decides for itself.
    """
    if plan.real is None or "dataset" in (plan.evaluate or {}):
        return {}
    options = {"dataset": flags.train_data_dir or flags.dataset_name or EMBEDDED}
    if plan.real.get("dataset") in (None, options["dataset"]):
        options["held_out_split"] = plan.real.get("split") or "test"
    for name in ("dataset_config_name", "image_column", "label_column", "caption_column"):
        if getattr(flags, name, None):
            options[name] = getattr(flags, name)
    return options


def write_real_images(plan: "Plan", flags: "Flags", out: Path) -> tuple[Path, int]:
    """The held-out images that the plan scores, in an npz file, at the size of the cells; and how many there are.

    Raises:
        DataError: there are none.
    """
    import io

    import numpy as np

    from ..ablation.flags import digest
    from ..common.files import write_atomically
    from .evaluate import DEFAULT_SAMPLES

    given, options = plan.real or {}, plan.evaluate or {}
    named = {name.replace("-", "_"): value for name, value in options.items()}
    source = training_dataset(plan, flags) or {
        name: named[name] for name in ("dataset", "dataset_config_name", "image_column") if named.get(name)
    }
    source |= {"split": "test"} | {key: given[key] for key in ("dataset", "split") if given.get(key)}
    count = int(given.get("images") or options.get("num_samples") or DEFAULT_SAMPLES)
    shape = image_shape(plan, flags)
    path = out / f"{digest([source, count, shape])}.npz"
    if not path.is_file():
        where = DataOptions(
            source["dataset"], source.get("dataset_config_name"), source["split"], None, source.get("image_column")
        )
        images = read_data(where, "", shape).reference
        chosen = images.part(min(count, images.count))
        pixels = np.concatenate([batch.numpy() for batch in chosen.batches()]).transpose(0, 2, 3, 1)
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=pixels)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    with np.load(path) as file:
        return path, len(file["arr_0"])


def image_shape(plan: "Plan", flags: "Flags") -> tuple[int, int, int]:
    """(C, H, W) of the images that the cells are trained on."""
    import torch

    from ..data.flags import DataFlags
    from ..models.design import design_model

    data = flags[DataFlags]
    if plan.script != "train":
        return (3, *data.size())
    design, _ = design_model(flags, data, None, torch.device("cpu"), None)
    return (design.image_channels, *data.size())
