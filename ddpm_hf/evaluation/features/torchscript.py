"""A network in a TorchScript file, such as the Inception network that StyleGAN's and EDM's tools use."""

from pathlib import Path

import torch

from ...common.errors import DataError, UsageError, one_line
from ..protocols import Protocol
from . import Features
from .network import display_name, full_precision, on_cpu, sha256_of
from .resizing import as_rgb

OUTPUTS = {"Tensor": ("pool",), "Tuple[Tensor, Tensor]": ("pool", "logits")}


def load(
    argument: str, *, protocol: Protocol, device: torch.device | str, weights: str | None, trust_remote_code: bool
) -> "ScriptExtractor":
    """The network of a file; TorchScript is a program, so the user must say that it is trusted.

    Raises:
        UsageError: it is not trusted, cannot be read, or returns something else.
    """
    path = Path(argument)
    if not path.is_file():
        raise UsageError(f"features 'torchscript:{argument}': no such file")
    if not trust_remote_code:
        raise UsageError(
            f"features 'torchscript:{argument}': a TorchScript file is a program, which runs when it is loaded; add"
            " --trust_remote_code if you trust its source"
        )
    try:
        script = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"{argument} is not a TorchScript file that can be loaded: {one_line(error, 200)}") from error
    return ScriptExtractor(path, script, device)


class ScriptExtractor:
    """`script(images)` of uint8 RGB images [N, 3, H, W], which it resizes itself, is features or (features, logits).

    Where `forward` takes `return_features`, as StyleGAN's Inception does, it is set.
    """

    def __init__(self, path: Path, script: torch.jit.ScriptModule, device: torch.device | str = "cpu"):
        self.name = display_name("torchscript", str(path))
        self.script, self.device = script.eval(), torch.device(device)
        schema = script.forward.schema
        returned = str(schema.returns[0].type)
        if returned not in OUTPUTS:
            raise UsageError(f"{path} returns {returned}; features require {' or '.join(OUTPUTS)}")
        self.provides = frozenset(OUTPUTS[returned])
        flagged = any(argument.name == "return_features" for argument in schema.arguments)
        self.options = {"return_features": True} if flagged else {}
        self.fingerprint = sha256_of(path)[:16]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        """Images uint8 [N, C, H, W], C of 1 or 3.

        Raises:
            DataError: the network fails on them, or returns something else than a row for each.
        """
        try:
            with full_precision(self.device):
                output = self.script(as_rgb(images).to(self.device).contiguous(), **self.options)
        except (RuntimeError, torch.jit.Error) as error:
            reason = one_line(str(error).strip().rpartition("\n")[2], 200)
            raise DataError(
                f"features {self.name}: the network fails on images {list(images.shape)}: {reason}"
            ) from error
        parts = output if isinstance(output, tuple) else (output,)
        for part in parts:
            if part.ndim != 2 or len(part) != len(images):
                raise DataError(
                    f"features {self.name}: the network returns a tensor {list(part.shape)} for {len(images)} images;"
                    " it must return a row of features for each"
                )
        return on_cpu(dict(zip(("pool", "logits"), parts)))
