"""Checkpoints of other programs as pipelines of ours, and back: one file and one row a source."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...common.locations import find_location
from .conversion import Conversion, Options, State
from .ho import EMA, convert_ho, is_ho, is_variable, of_tensorflow, read_tensorflow
from .lucidrains import convert_lucidrains, is_lucidrains
from .openai import convert_openai
from .openai_flags import GUIDED, IMPROVED
from .openai_layout import is_openai
from .pickled import convert_pickled
from .reading import TORCH_SUFFIXES, read_npz, read_safetensors, read_torch, tensors_of
from .tensor_bundle import is_bundle


class Source(NamedTuple):
    """A program whose checkpoints are converted.

    Args:
        title: for people.
        recognises: whether a state dict is of that program.
        convert: from its state dict to ours, or a ValueError that says why not.
    """

    title: str
    recognises: Callable[[State], bool]
    convert: Callable[[State, Options], Conversion]


SOURCES = {
    GUIDED: Source(
        "OpenAI's guided-diffusion", is_openai, lambda state, options: convert_openai(state, options, GUIDED)
    ),
    IMPROVED: Source(
        "OpenAI's improved-diffusion", is_openai, lambda state, options: convert_openai(state, options, IMPROVED)
    ),
    "ho": Source("Ho et al.'s TensorFlow code, or its PyTorch port", is_ho, convert_ho),
    "lucidrains": Source("lucidrains' denoising-diffusion-pytorch", is_lucidrains, convert_lucidrains),
}


def read_state(path: Path, options: Options) -> State:
    """The tensors of a checkpoint of any of the formats, by name; nothing in it is executed.

    Raises:
        ValueError: no such file, one that is damaged, or one that holds code.
    """
    if is_bundle(path):
        return read_tensorflow(path, options.ema)
    if path.is_dir():
        raise ValueError(
            f"{path}: a folder without a model (model_index.json, config.json) or a TensorFlow checkpoint"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        check_averaged(path, options)
        return read_safetensors(path)
    if path.suffix == ".npz":
        arrays = read_npz(path)
        names = {name.removesuffix(":0") for name in arrays}
        if any(is_variable(name) for name in names):
            averaged = options.ema and any(name.endswith(EMA) for name in names)
            return of_tensorflow({name: value.numpy() for name, value in arrays.items()}, averaged)
        check_averaged(path, options)
        return arrays
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(
            f"{path}: must be a file of torch.save ({', '.join(TORCH_SUFFIXES)}), .safetensors, .npz, or the .index of"
            " a TensorFlow checkpoint"
        )
    content = read_torch(path)
    if tensors_of(content):
        check_averaged(path, options)
        return tensors_of(content)
    inner = ("ema", "ema_state_dict", "state_dict", "model")  # of files that hold a whole training
    found = [name for name in (inner if options.ema else inner[::-1]) if isinstance(content.get(name), Mapping)]
    if found and found[0] in inner[:2]:
        check_averaged(path, options)
    return tensors_of(content[found[0]]) if found else {}


def check_averaged(path: Path, options: Options) -> None:
    """Raise ValueError for --no-ema and a file that holds one set of weights alone."""
    if not options.ema:
        raise ValueError(f"{path}: --no-ema is for files that hold averaged weights besides others")


def convert(path: str, options: Options, source: str | None = None, token: str | None = None) -> Conversion:
    """The pipeline, or the classifier, of another program's checkpoint.

    Args:
        path: a file, a TensorFlow checkpoint, or a folder or a model on the Hub with pickled weights.
        source: a row of `SOURCES`; None to see it from the tensors' names.
        token: for a private model on the Hub.

    Raises:
        ValueError: no checkpoint, a damaged one, one that holds code, another network, or flags that are missing or
            contradict it.
    """
    local = Path(path)
    is_model = (local / "model_index.json").is_file() or (local / "config.json").is_file()
    a_file = local.suffix in (*TORCH_SUFFIXES, ".safetensors", ".npz", ".index")
    if is_model or (not local.exists() and not is_bundle(local) and path.count("/") == 1 and not a_file):
        if options.flags is not None or source is not None or not options.ema:
            raise ValueError(
                f"{path}: --flags, --from and --no-ema are not for a model of Diffusers, which says it all"
            )
        return convert_pickled(find_location(path, token=token), options)
    options = options._replace(name=local.name)
    state = read_state(local, options)
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {len(broken)} of its tensors are not finite, such as {broken[0]}")
    rows = [name for name, row in SOURCES.items() if row.recognises(state)]
    if source is not None and source not in rows:
        raise ValueError(f"{path}: not a network of {SOURCES[source].title}{_sample_of(state)}")
    if not rows:
        titles = ", ".join(row.title for row in SOURCES.values())
        raise ValueError(f"{path}: not a network of {titles}{_sample_of(state)}")
    try:
        if source is None and rows[0] == GUIDED:  # which of the two, shapes and flags tell
            return convert_openai(state, options)
        return SOURCES[source or rows[0]].convert(state, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _sample_of(state: State) -> str:
    return (
        f" (it has {len(state)} tensors, such as {', '.join(sorted(state)[:2])})" if state else " (it has no tensors)"
    )
