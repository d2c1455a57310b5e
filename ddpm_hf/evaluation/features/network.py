"""A network as an `Extractor`: its input prepared, its outputs on the CPU; and its weights."""

import contextlib
import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common.errors import UsageError, one_line
from . import PARTS, Features
from .resizing import RESIZES, as_rgb

WAYS = (
    "give the file with --features_weights FILE, or name features that need no download: efficientnet-lite0,"
    " classifier:FOLDER or torchscript:FILE"
)
TIMEOUT = 30  # seconds without an answer
CPU_BATCH = 8  # images at once: activations of more leave a processor's cache, and take up to twice as long


class NetworkExtractor:
    """A network with the preparation of its input.

    Args:
        name: as in `--features`.
        forward: from prepared images [N, 3, height, width] to the parts of `Features`, each [N, ...].
        network: whose parameters and buffers are the weights.
        provides: the parts that `forward` returns.
        size: (height, width) that the network reads.
        resize: a key of `RESIZES`.
        mean, deviation: of the scaling of values in 0..255, for all channels or for each.
        settings: what else decides the features.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
        network: torch.nn.Module,
        *,
        provides: Sequence[str] = ("pool",),
        size: tuple[int, int],
        resize: str,
        mean: float | Sequence[float],
        deviation: float | Sequence[float],
        device: torch.device | str,
        settings: Sequence[Any] = (),
    ):
        self.name, self.provides, self.size = name, frozenset(provides), size
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.forward, self.resize = forward, RESIZES[resize]
        self.mean, self.deviation = (_per_channel(one, self.device) for one in (mean, deviation))
        preparation = (size, resize, mean, deviation, *settings)
        self.fingerprint = fingerprint(name.partition(":")[0], network.state_dict(), preparation)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        """Images uint8 [N, C, H, W], C of 1 or 3."""
        at_once = CPU_BATCH if self.device.type == "cpu" else len(images)
        outputs = [self.outputs(some) for some in as_rgb(images).split(at_once)]
        return on_cpu({part: torch.cat([output[part] for output in outputs]) for part in outputs[0]})

    def outputs(self, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The network's outputs for RGB images, uint8 [N, 3, H, W], that it can take at once."""
        pixels = self.resize(images.to(self.device), self.size)  # [N, 3, height, width] in 0..255
        prepared = (pixels - self.mean) / self.deviation
        if self.device.type == "cpu":  # a third faster there
            prepared = prepared.contiguous(memory_format=torch.channels_last)
        with full_precision(self.device):
            return self.forward(prepared)


def _per_channel(value: float | Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1)


def on_cpu(parts: Mapping[str, torch.Tensor]) -> Features:
    """A network's outputs as `Features`: float32, one row an image."""
    return Features(**{name: _rows(parts[name]) for name in PARTS if name in parts})


def _rows(values: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().float().flatten(1).cpu().numpy())


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32: no autocast and no TF32, whose three digits move a Fréchet distance."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
                stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = False
        yield


def display_name(kind: str, argument: str | None) -> str:
    """An extractor's name with its argument, of a local path only the last part: results are published."""
    if argument is None:
        return kind
    return f"{kind}:{Path(argument).resolve().name if Path(argument).exists() else argument}"


# Weights


def fingerprint(name: str, state: Mapping[str, torch.Tensor], settings: Sequence[Any] = ()) -> str:
    """What tells the features of two networks apart: their weights and settings."""
    digest = hashlib.sha256(repr((name, *settings)).encode())
    for key, tensor in sorted(state.items()):
        if not key.endswith("num_batches_tracked"):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors or from what torch saved; nothing in the file is executed.

    Raises:
        UsageError: there is no such file, or it is neither.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not a file; name a state dict as safetensors or as torch saved it")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{path} holds no weights that can be read: {one_line(error, 250)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path} is not a state dict, which holds tensors by name")
    return state


def _unpickle(path: Path) -> Any:
    """What torch saved, if it holds tensors alone; one line for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # other bytes fail anywhere in the unpickler
        raise ValueError(
            "not saved by torch, damaged, or with objects other than tensors, which can be code"
        ) from error


def load_weights(network: torch.nn.Module, path: str | Path, what: str) -> None:
    """Load a network's weights from a file.

    Args:
        what: the network, for the message.

    Raises:
        UsageError: the file cannot be read, or holds the weights of another network.
    """
    state = read_state(path)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"{path} does not hold the weights of {what}: {one_line(error, 250)}") from error


def downloaded(url: str, sha256: str, also: Sequence[str] = ()) -> Path:
    """A file from the web, downloaded once to torch's cache folder, where other tools of the field look for it.

    Args:
        sha256: of its content, which is checked before each use.
        also: other names that tools give it there.

    Raises:
        UsageError: it cannot be downloaded; the message says which ways are left.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = url.rpartition("/")[2]
    for path in (folder / one for one in (name, *also)):
        if path.is_file() and sha256_of(path) == sha256:
            return path
    try:
        import huggingface_hub

        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        folder.mkdir(parents=True, exist_ok=True)
        with _timeout(TIMEOUT):
            torch.hub.download_url_to_file(url, str(folder / name), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:  # the network, the disk, or another content
        raise UsageError(f"{name} cannot be downloaded ({one_line(error, 150)}): {WAYS}") from error
    return folder / name


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
