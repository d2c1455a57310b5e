"""A Gradio Space for a published model: its files and their upload."""

import contextlib
import functools
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._version import __version__
from ..common.errors import one_line
from ..common.ownership import MANIFEST, check_replaceable, listed, replace_files
from ..inference.kinds import pipeline_class
from ..training.earlier_run import settle
from .files import weights_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PACKAGE = Path(__file__).parents[1]
GRADIO_VERSION = "6.31.0"  # what the app was tested with
PYTHON_VERSION = "3.11"
PART = "space"  # of the folder's manifest
MODEL_FOLDER = "ddpm_hf_model"  # of a model that the Space itself holds
CODE = "ddpm_hf_space"  # the package that the copied modules form
COPIED = (
    *(f"common/{name}.py" for name in ("__init__", "errors", "randomness")),
    "portable/*.py",
    *(f"inference/{name}.py" for name in ("__init__", "kinds", "samplers", "studio")),
    *(f"restoration/{name}.py" for name in ("__init__", "figures", "pictures", "problems", "studio", "tasks")),
    "publishing/__init__.py",
    "publishing/space/*.py",
)

APP = f'''"""The Space's page; its code is in {CODE}/."""

from pathlib import Path

from {CODE}.publishing.space.serving import main

if __name__ == "__main__":
    main(Path(__file__).parent)
'''
README = """# {title}

An app that {does} {model}, made by `ddpm-hf push-space`: denoising diffusion (DDPM) in the Hugging Face
ecosystem.

To run it on your own machine, from this folder:

```bash
pip install -r requirements.txt gradio=={gradio}
python app.py
```
"""
NEEDED_IN_README = ("sdk", "sdk_version", "python_version", "app_file", "models")  # the owner may edit the rest


class Model(NamedTuple):
    """The model of a Space.

    Args:
        name: on the Hub, or its folder.
        address: its page on the Hub; None for a folder.
        license: from its card.
        restores: whether the app restores images with it, instead of sampling them.
        files: of a folder's model that the Space is to hold itself, by path; empty if the app reads the folder.
    """

    name: str
    address: str | None = None
    private: bool = False
    license: str | None = None
    restores: bool = False
    files: dict[str, Path] = {}

    @property
    def app(self) -> str:
        """The usual name of its Space: the model's, so that a restoring one does not replace a sampling one."""
        name = self.name if self.address else Path(self.name).name
        return f"{name}-restore" if self.restores else name


def look_up(
    name: str,
    token: str | None = None,
    examples: Sequence[str] = (),
    restores: bool = False,
    held: bool = False,
) -> Model:
    """A model on the Hub or in a folder.

    Args:
        held: whether the Space is to hold a folder's model itself.

    Raises:
        ValueError: it cannot be reached, or this package cannot load it, or it does not take prompts but examples are
            given, or it cannot restore.
    """
    from huggingface_hub import HfApi, ModelCard, constants
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from ..portable.pipeline_restoration_ddpm_hf import RESTORED

    settle(name)
    cls = pipeline_class(name, token=token)
    parameters = inspect.signature(cls.__call__).parameters
    if "image" in parameters:
        raise ValueError(
            f"{name} reads an image, which the app has no field for; `ddpm-hf sample {name} --image` does"
        )
    reads_text = "prompt" in parameters
    if examples and not reads_text:
        raise ValueError(f"--example {examples[0]}: {name} has no text encoder; leave it out")
    if restores and cls.__name__ not in RESTORED:
        raise ValueError(
            f"--restore requires a model that is unconditional or by class, and {name} is for {cls.__name__}; leave it"
            " out, or name another model"
        )
    if Path(name).is_dir():
        folder = Path(name).resolve()
        files = weights_files(folder) if held else {}
        return Model(str(folder), license=license_of(folder), restores=restores, files=files)
    with hub_errors_named(f"{name} could not be looked up"):
        info = HfApi(token=token).model_info(name)
        try:
            license = ModelCard.load(name, token=token, ignore_metadata_errors=True).data.license
        except RemoteEntryNotFoundError:
            license = None
    return Model(info.id, f"{constants.ENDPOINT}/{info.id}", bool(info.private), license, restores)


def license_of(folder: Path) -> str | None:
    """The license in the card of a model's folder."""
    from huggingface_hub import ModelCard

    if not (folder / "README.md").is_file():
        return None
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license


def write_space(folder: str | Path, model: Model, examples: Sequence[str] = ()) -> None:
    """Write a Space's folder, atomically.

    Args:
        folder: created if it does not exist; else it must be empty, or hold an app written by this function.
        examples: prompts to offer; the first is the default.

    Raises:
        ValueError: the folder holds other files, or files of the app that were edited.
    """
    folder = Path(folder).resolve()
    files = {name: functools.partial(read, source) for name, source in space_files(model, examples).items()}
    if folder.is_dir() and listed(folder, PART):
        check_replaceable(folder, PART, list(files), "out")
        replace_files(folder, PART, files)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        replace_files(scratch, PART, files)
        scratch.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read(source: str | Path) -> bytes:
    """The content of one of `space_files`."""
    return source.encode() if isinstance(source, str) else source.read_bytes()


def space_files(model: Model, examples: Sequence[str] = ()) -> dict[str, str | Path]:
    """The files of a Space, by their paths in it: texts, and the paths of a model's files."""
    from huggingface_hub import SpaceCardData

    title = Path(model.app).name
    card = SpaceCardData(
        title=title,
        emoji="🧩" if model.restores else "🎲",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license=model.license,
        models=[model.name] if model.address else None,
        tags=["ddpm", "ddpm_hf", "diffusers"],
    )
    named = f"[{model.name}]({model.address})" if model.address else Path(model.name).name
    does = "restores images with" if model.restores else "samples from"
    text = README.format(title=title, model=named, does=does, gradio=GRADIO_VERSION)
    settings: dict[str, Any] = {"model": MODEL_FOLDER if model.files else model.name, "title": title}
    settings |= {"address": model.address, "examples": list(examples)}
    settings |= {"restores": model.restores, "holds_model": bool(model.files)}
    files: dict[str, str | Path] = {
        "app.py": APP,
        "README.md": f"---\n{card.to_yaml()}\n---\n\n{text}",
        "requirements.txt": (PACKAGE / "publishing/space/requirements.txt").read_text(encoding="utf-8"),
        "space.json": json.dumps({name: value for name, value in settings.items() if value}, indent=2) + "\n",
        f"{CODE}/__init__.py": f'"""The parts of ddpm_hf {__version__} that the app needs."""\n',
    }
    for path in sorted(path for pattern in COPIED for path in PACKAGE.glob(pattern)):
        files[f"{CODE}/{path.relative_to(PACKAGE).as_posix()}"] = path.read_text(encoding="utf-8")
    return files | {f"{MODEL_FOLDER}/{name}": path for name, path in model.files.items()}


def push_space(
    model: Model, space: str, token: str | None = None, private: bool = False, examples: Sequence[str] = ()
) -> str:
    """Upload a Space in one commit, new or over an earlier app of this function; return its address.

    The owner's edits of an earlier app's README stay.

    Args:
        space: its name, user/name or in the token's account. A private model's Space is made private too.

    Raises:
        ValueError: the Space holds another app, or is public but should be private; the Hub cannot be reached, or
            rejects the request.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with hub_errors_named(f"the Space {space} could not be uploaded"), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "space"
        write_space(folder, model, examples)
        name = open_space(api, space, private or model.private, folder / "README.md")
        files = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_file() and path.name != MANIFEST
        }
        existing = api.list_repo_files(name, repo_type="space")
        operations = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
        operations += [CommitOperationDelete(path) for path in existing if is_outdated(path, files)]
        # upload_folder may make several commits, and the Space would start an incomplete app
        api.create_commit(name, operations, repo_type="space", commit_message="Upload the app")
    return f"{api.endpoint}/spaces/{name}"


def is_outdated(path: str, files: Container[str]) -> bool:
    """Whether a file of the Space is code or weights of an earlier version that this one no longer has."""
    return path.startswith((f"{CODE}/", f"{MODEL_FOLDER}/")) and path not in files


def open_space(api: "HfApi", space: str, private: bool, readme: Path) -> str:
    """Create the Space, or check the existing one and adopt its README; return its full name.

    Raises:
        ValueError: it holds another app, or is public but should be private.
    """
    from huggingface_hub import SpaceCard
    from huggingface_hub.errors import RepositoryNotFoundError

    name = space if "/" in space else f"{api.whoami()['name']}/{space}"
    try:
        info = api.space_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        return name
    if private and not info.private:
        raise ValueError(f"the Space {name} exists and is public; make it private on the Hub, or name another --space")
    paths = {file.rfilename for file in info.siblings}
    if f"{CODE}/__init__.py" in paths:
        if "README.md" in paths:
            card, new = SpaceCard.load(name, token=api.token), SpaceCard.load(readme)
            for key in NEEDED_IN_README:
                setattr(card.data, key, new.data.get(key))
            card.save(readme)
    elif paths - {".gitattributes", "README.md"}:
        raise ValueError(f"the Space {name} exists and holds another app; name another --space")
    return name


@contextlib.contextmanager
def hub_errors_named(what: str) -> Iterator[None]:
    """Turn any error of the network or the Hub into a ValueError that says what failed, and why."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = one_line(error).partition(" For more information")[0][:300]
        raise ValueError(
            f"{what} ({error.__class__.__name__}: {reason}); check the name, your network, and --token"
        ) from error
