"""How our pipelines are saved: so that stock Diffusers loads them, with or without this package.

A component recorded under a foreign library never loads from the Hub. So our scheduler is recorded as Diffusers' own
(its config is one that stock can express), the pipeline under a stock name where stock samples the same images, and
the code in the same folder in any case. A pipeline converts the scheduler back when it is made.

This file is copied into published repositories: it imports diffusers alone.
"""

import contextlib
import hashlib
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict

if TYPE_CHECKING:  # the mixins stand before it
    from diffusers import DiffusionPipeline as MixinBase
else:
    MixinBase = object
Pipeline = TypeVar("Pipeline", bound="PortablePipelineMixin")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def portable_sources(file: Path) -> dict[str, str]:
    """The texts, by file name, of a portable module and of all `*_ddpm_hf` modules that it imports."""
    sources: dict[str, str] = {}
    pending = [file]
    while pending:
        path = pending.pop()
        if path.name in sources:
            continue
        sources[path.name] = path.read_text(encoding="utf-8")
        pending += [
            path.with_name(f"{name}.py") for name in re.findall(r"^from \.(\w+) import", sources[path.name], re.M)
        ]
    return sources


def module_file(cls: type) -> Path:
    """The file that defines a class."""
    return Path(str(sys.modules[cls.__module__].__file__))


@contextlib.contextmanager
def without_origins(components: dict[str, Any]) -> Iterator[None]:
    """While it lasts, no component's config says where it was loaded from: often a path on its owner's machine."""
    configs = {}
    for name, component in components.items():
        config = getattr(component, "_internal_dict", None)
        if config is not None and "_name_or_path" in config:
            configs[name] = config
            component._internal_dict = FrozenDict({key: config[key] for key in config if key != "_name_or_path"})
    try:
        yield
    finally:
        for name, config in configs.items():
            components[name]._internal_dict = config


# Which of our pipelines samples the models of a class of Diffusers
SAMPLED_BY = {
    "DDPMPipeline": "DDPMPipeline",
    "DDIMPipeline": "DDPMPipeline",
    "StableDiffusionPipeline": "TextToImageDDPMPipeline",
}


def model_name(index_file: Path) -> str:
    """What a user calls the model of a `model_index.json`: its folder, or a repository in the Hub's cache.

    >>> model_name(Path("hub/models--user--name/snapshots/1a2b/model_index.json")), model_name(Path("a/b.json"))
    ('user/name', 'a')
    """
    folder = index_file.parent
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return str(folder)


NETWORKS = "networks_ddpm_hf"  # the module of networks that Diffusers does not have; a copy lies with each of them
# Of a pipeline's config: what Diffusers' own classes would warn of in a `model_index.json`, but for the underscore
PRIVATE_SETTINGS = ("guidance_scale",)
_LOADED: dict[str, str] = {}  # digests of the files that this process runs, where Diffusers loaded them


class PortablePipelineMixin(MixinBase):
    """Saving for a `DiffusionPipeline` whose folder is to load anywhere. Put it before `DiffusionPipeline`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a mixture of two versions of this code, which Diffusers makes of two repositories in one process.

        It puts the files of both into one folder, and runs the second's pipeline file with what the first's imported.
        """
        super().__init_subclass__(**kwargs)
        folder, _, module = cls.__module__.rpartition(".")
        if not (folder.startswith("diffusers_modules") and module.endswith("_ddpm_hf")):
            return
        sources = portable_sources(module_file(cls))
        del sources[f"{module}.py"]  # is run anew each time
        for name, text in sources.items():
            digest = hashlib.sha256(text.encode()).hexdigest()
            if _LOADED.setdefault(f"{folder}.{name}", digest) != digest:
                raise ImportError(
                    f"this process runs another version of {name}, from a repository loaded before; load this model in"
                    " a new process, or with ddpm_hf installed, by its own class"
                )

    def stock_class_name(self) -> str | None:
        """The pipeline class of Diffusers that samples the same images from this folder, or None."""
        return None

    def own_networks(self) -> dict[str, Path]:
        """The components that are networks of this code, with its file: who loads the folder without it must trust it.

        Diffusers looks for that file in the component's folder.
        """
        types = {name: type(component) for name, component in self.components.items()}
        return {name: module_file(cls) for name, cls in types.items() if cls.__module__.rpartition(".")[2] == NETWORKS}

    def needs_trust(self) -> bool:
        """Whether Diffusers alone loads the folder with `trust_remote_code=True` only."""
        return self.stock_class_name() is None or bool(self.own_networks())

    @classmethod
    def portable_class(cls) -> type:
        """The class of ours that this pipeline is, also where a user derived from it."""
        for base in cls.__mro__:
            if base.__module__.endswith("_ddpm_hf") and issubclass(base, DiffusionPipeline):
                return base
        raise TypeError(f"{cls.__name__} derives from no pipeline of ddpm_hf")

    @classmethod
    def from_pretrained(
        cls: type[Pipeline], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Pipeline:
        """As Diffusers', for a folder or a name on the Hub.

        Raises:
            ValueError: the folder is for another pipeline class; it is named before any weights are downloaded.
        """
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def check_class(cls, index: dict[str, Any], name: str) -> None:
        """Raise ValueError, with the way out, for the `model_index.json` of a model that another pipeline samples."""
        entry = index.get("_class_name")
        saved_by = entry[-1] if isinstance(entry, list) and entry else entry
        if saved_by is None:
            return
        if not isinstance(saved_by, str):
            raise ValueError(f"{name}: the _class_name in model_index.json must name a class (got {saved_by!r})")
        ours = isinstance(entry, list) and str(entry[0]).endswith("_ddpm_hf")  # [file, class] of this code
        this, other = cls.portable_class().__name__, saved_by if ours else SAMPLED_BY.get(saved_by)
        if other == this:
            return
        if other == "DDPMPipeline" and this == "ClassConditionalDDPMPipeline":
            return  # whether its UNet embeds classes, its config says, and `__init__` reads it
        if other is not None:
            raise ValueError(
                f"{name} is for {other}, not {this}: load it with ddpm_hf.{other}.from_pretrained({name!r}), or with"
                f" ddpm_hf.load({name!r}), which picks the class"
            )
        expected, _ = cls._get_signature_keys(cls)
        parts = {
            part
            for part, entry in index.items()
            if isinstance(entry, list) and len(entry) == 2 and all(isinstance(one, str) for one in entry)
        } - {"_class_name"}
        missing, unknown = set(expected) - set(cls._optional_components) - parts, parts - set(expected)
        if missing or unknown:
            why = f"requires {', '.join(sorted(missing))}" if missing else f"has no {', '.join(sorted(unknown))}"
            raise ValueError(
                f"{name} is for {saved_by}, not {this}, which {why}: load it with"
                f" diffusers.DiffusionPipeline.from_pretrained({name!r})"
            )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As Diffusers', but the files do not say where the components came from."""
        with without_origins(self.components):
            super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` and the code that it may name, before any upload."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in portable_sources(module_file(self.portable_class())).items():
            write_atomically(directory / name, text)
        for component, file in self.own_networks().items():
            (directory / component).mkdir(exist_ok=True)
            write_atomically(directory / component / f"{NETWORKS}.py", file.read_text(encoding="utf-8"))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """The pipeline's config as a stock loader reads it."""
        index = json.loads(self.to_json_string())
        index.pop("_name_or_path", None)  # a path on the machine that trained it
        for name, entry in list(index.items()):
            if not (isinstance(entry, list) and len(entry) == 2):
                continue
            if entry == [None, None] and name in self._optional_components:
                del index[name]  # stock warns of components it does not know, also of absent ones
            elif str(entry[0]).endswith(("scheduling_ddpm_hf", "multistep_ddpm_hf")):
                index[name] = ["diffusers", "DDPMScheduler"]  # as which both are saved
            elif str(entry[0]).endswith(NETWORKS):
                index[name] = [NETWORKS, entry[1]]
        for name in PRIVATE_SETTINGS:
            if name in index:
                index[f"_{name}"] = index.pop(name)
        cls = self.portable_class()
        index["_class_name"] = self.stock_class_name() or [cls.__module__.rpartition(".")[2], cls.__name__]
        write_atomically(Path(json_file_path), json.dumps(index, indent=2, sort_keys=True) + "\n")

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs: Any) -> tuple[dict, dict, dict]:
        """As Diffusers', with the settings that are saved with an underscore (`from_pipe` saves some so too).

        Networks of this code are this package's own, and nothing of the folder is executed; without the package, that
        is where this code itself lies in Diffusers' cache, they come from the folder and need its reader's trust.
        """
        private = {f"_{name}": name for name in PRIVATE_SETTINGS if name in cls._get_init_keys(cls)}
        config = {private.get(name, name): value for name, value in config_dict.items()}
        package = cls.portable_class().__module__.rpartition(".")[0]
        if not package.startswith("diffusers_modules"):
            for name, entry in config.items():
                if isinstance(entry, (list, tuple)) and len(entry) == 2 and entry[0] == NETWORKS:
                    config[name] = [importlib.import_module(f"{package}.{NETWORKS}").__name__, entry[1]]
        return super().extract_init_dict(config, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        """`[file, class]` becomes the class's name: callers of our class have its code, so no trust is needed."""
        index = super()._dict_from_json_file(json_file)
        cls.check_class(index, model_name(Path(json_file)))
        named = index.get("_class_name")
        if isinstance(named, list) and len(named) == 2:
            index["_class_name"] = index["_class_name"][1]
        return index
