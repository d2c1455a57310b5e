"""A local folder, or a folder of a repository on the Hub, and the files in it."""

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import one_line

MODEL_INDEX, MODEL_CONFIG = "model_index.json", "config.json"
UNET_FOLDERS = ("unet_ema", "unet")  # of a checkpoint, the averaged weights first
OTHER_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl")


@dataclass(frozen=True)
class Location:
    """A local folder, or a folder of a repository on the Hub.

    Args:
        root: the folder, or the repository's user/name.
        local: whether it is a local folder.
        subfolder: within the repository.
        revision: branch, tag or commit of the repository.
        unreachable: why files could not be fetched from the Hub; shared by all locations made from this one.
    """

    root: str
    local: bool
    subfolder: str = ""
    revision: str | None = None
    token: str | None = None
    unreachable: list[str] = field(default_factory=list, compare=False)

    def __str__(self) -> str:
        return f"{self.root}/{self.subfolder}" if self.subfolder else self.root

    def __truediv__(self, name: str) -> "Location":
        if self.local:
            return replace(self, root=str(Path(self.root) / name))
        return replace(self, subfolder=f"{self.subfolder}/{name}" if self.subfolder else name)

    @property
    def parent(self) -> "Location | None":
        """The parent folder; None for a repository."""
        if self.local:
            return replace(self, root=str(Path(self.root).resolve().parent))
        return replace(self, subfolder=self.subfolder.rpartition("/")[0]) if self.subfolder else None

    @property
    def name(self) -> str:
        """The folder's name."""
        return Path(self.root).resolve().name if self.local else str(self).rpartition("/")[2]

    def file(self, name: str) -> Path | None:
        """A file's local path, downloaded if necessary; None if it does not exist.

        Raises:
            ValueError: no such repository, or no access to it.
        """
        if self.local:
            path = Path(self.root) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            HTTPError,
            LocalEntryNotFoundError,
        )

        inner = f"{self.subfolder}/{name}" if self.subfolder else name
        try:
            # the client retries an unanswered request for half a minute: do so once
            cached = bool(self.unreachable)
            return Path(
                hf_hub_download(self.root, inner, revision=self.revision, token=self.token, local_files_only=cached)
            )
        except LocalEntryNotFoundError as error:  # offline, or the file does not exist
            self.unreachable.append(error.__class__.__name__)
        except EntryNotFoundError:
            pass
        except (HFValidationError, OSError, HTTPError) as error:
            raise ValueError(
                f"neither a folder nor a model that can be reached on the Hub ({error.__class__.__name__}); check the"
                " name, the revision and your network, and log in with `hf auth login` for a private one"
            ) from error
        return None

    def json(self, name: str) -> dict[str, Any] | None:
        """A file's JSON object; None if the file does not exist.

        Raises:
            ValueError: it is not a JSON object, or what `file` raises.
        """
        path = self.file(name)
        if path is None:
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON ({one_line(error, 100)})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{name} is not a JSON object")
        return value


def find_location(
    name: str, revision: str | None = None, subfolder: str | None = None, token: str | None = None
) -> Location:
    """A folder or a repository by its name.

    Raises:
        ValueError: it is a file, or neither a folder nor a name on the Hub.
    """
    if os.path.isfile(name):
        raise ValueError(f"a file; {way_out(name)}")
    if not os.path.isdir(name) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError("no such folder, and not a name on the Hub, which is user/name")
    location = Location(name, os.path.isdir(name), revision=revision, token=token)
    location = location / subfolder.strip("/") if subfolder else location
    if location.local and not os.path.isdir(location.root):
        raise ValueError(f"no folder {subfolder} in it")
    return location


def name_from_run(name: str, run: Path) -> str:
    """A model's name in the settings of a run, for any working directory.

    A relative path is relative to where the run was started, which is mostly a folder above its output.

    Args:
        run: the output folder.
    """
    if os.path.isabs(name) or os.path.exists(name):
        return name
    above = (parent / name for parent in run.resolve().parents)
    return next((str(path) for path in above if path.is_dir()), name)


def way_out(name: str) -> str:
    """Advice for a path that is not a model."""
    return (
        "give the folder of a pipeline (model_index.json), of a checkpoint (checkpoint-N) or of a UNet2DModel"
        " (config.json and safetensors)"
        + ("; `ddpm-hf convert` reads the weights of other programs" if name.endswith(OTHER_WEIGHTS) else "")
    )
