"""From a trained pipeline to a repository that a stranger can use."""

import contextlib
import json
import math
import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from . import portable
from .model_card import (
    CHAIN,
    LOSS_CURVE,
    METRICS_FILE,
    RESULTS_FILE,
    RUN_FILE,
    SAMPLES,
    make_card,
    newer_card,
    read_facts,
    write_pictures,
)
from .saving import save_half_precision, save_image, save_model, save_pipeline
from .sources import find_place
from .training.averaging import raw_weights
from .training.checkpointing import MANIFEST, SCRAP, checkpoint_step, truncate_jsonl, write_whole
from .training.config import PipelineConfig, UsageError
from .training.ownership import GRIDS, LAYOUT, claim_files, matching, may_write
from .training.setup import log, public_settings

ATTRIBUTES = ("*.safetensors", "*.png", "*.gif")  # what the repository keeps outside of git
PUBLISHED = (*(entry.pattern for entry in LAYOUT if entry.published and entry.pattern != "README.md"), "LICENSE*")
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
CHAIN_ROWS = 8  # of the card's strip of predictions, where the run has sampled none
CODE = tuple(path.name for path in Path(portable.__file__).parent.glob("*_ddpm_hf.py"))
RENEWED = (*CODE, SAMPLES, CHAIN, LOSS_CURVE)  # what of an earlier upload goes where this one has it no more


class Upload(NamedTuple):
    """A commit on the Hub: the repository's address, and the files that it holds now, with their sizes in bytes."""

    address: str
    files: dict[str, int]


def component_folders(folder: Path) -> list[str]:
    """The names of the components that a pipeline's folder holds."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    names = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
    return [name for name in names if (folder / name).is_dir()]


def files_to_publish(folder: Path, include: tuple[str, ...] = ()) -> dict[str, Path]:
    """What of a folder goes up, by path in the repository: the pipeline, its code, card, pictures and figures.

    A run's checkpoints, optimizer states, logs and settings, and whatever else lies there, stay; `include` names more
    files by patterns.
    """
    patterns = [*PUBLISHED, *include]
    patterns += [f"{name}/{kind}" for name in component_folders(folder) for kind in COMPONENT_FILES]
    found = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                found[name.as_posix()] = path
    return found


@contextlib.contextmanager
def frozen_copy(files: dict[str, Path], folder: Path) -> Iterator[dict[str, Path]]:
    """The files as they are now, whatever a run writes meanwhile; weights by hard links, since they are replaced."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".publishing-", suffix=SCRAP) as scratch:
        copies = {}
        for name, path in files.items():
            copies[name] = Path(scratch) / name
            copies[name].parent.mkdir(parents=True, exist_ok=True)
            copy_or_link(path.resolve(), copies[name])
        yield copies


def copy_or_link(path: Path, target: Path) -> None:
    """The file's content at another place, whatever becomes of the first."""
    if path.name != METRICS_FILE:  # which alone is written to in place
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(path, target)
            return
    shutil.copyfile(path, target)


def attributes(before: str) -> str:
    """A `.gitattributes` that also names our kinds of files."""
    lines = before.splitlines()
    known = {line.split()[0] for line in lines if "filter=lfs" in line}
    lines += [f"{kind} filter=lfs diff=lfs merge=lfs -text" for kind in ATTRIBUTES if kind not in known]
    return "\n".join(lines) + "\n"


def open_repository(repository: str, token: str | None, private: bool = False) -> str:
    """Create the repository if it does not exist; its full name, with the user.

    Raises:
        ValueError: it is to be private, and exists in public.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(name).private:
        raise ValueError(f"{name} exists and is public; make it private on the Hub, or name another repository")
    return name


def read_remote(api, info, name: str) -> str:
    """A text file of a repository that `info` describes; empty where there is none."""
    if name not in {one.rfilename for one in info.siblings}:
        return ""
    return read_text(Path(api.hf_hub_download(info.id, name, revision=info.sha)))


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); save it as such") from error


def push_folder(folder: Path, repository: str, token: str | None, pipeline, **options) -> Upload:
    """Write the card, and upload a pipeline's folder in one commit; the options are those of `push_files`."""
    with publishable(folder, options.pop("include", ())) as files:
        return push_files(files, folder, repository, token, pipeline, **options)


@contextlib.contextmanager
def publishable(folder: Path, include: tuple[str, ...] = ()) -> Iterator[dict[str, Path]]:
    """What goes up of a folder but its card, with pictures, as it is now."""
    write_pictures(folder)
    with frozen_copy(files_to_publish(folder, include), folder) as files:
        yield files


def push_files(
    files: dict[str, Path],
    folder: Path,
    repository: str,
    token: str | None,
    pipeline,
    *,
    license: str | None = None,
    tag: str | None = None,
    message: str = "Upload the pipeline",
) -> Upload:
    """Upload files, and the card that is written for them, in one commit.

    Args:
        repository: user/name, which exists.
        license: for the card.
        tag: a name for the commit, for `from_pretrained(..., revision=tag)`.

    Raises:
        ValueError: a card that was edited in both places; a tag that another commit has.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    before = api.model_info(repository)
    tags = {one.name: one.target_commit for one in api.list_repo_refs(repository).tags} if tag else {}
    if tags.get(tag, before.sha) != before.sha:
        raise ValueError(f"{repository} has a tag {tag} already; name another")
    here = read_card(folder)
    latest = newer_card(here, read_remote(api, before, "README.md"))
    frozen = files["model_index.json"].parent  # the facts of these files, whatever a run does meanwhile
    card = make_card(read_facts(frozen, repository, pipeline, license), latest)
    git = attributes(read_remote(api, before, ".gitattributes"))
    content = {**files, "README.md": card.encode(), ".gitattributes": git.encode()}
    operations = [CommitOperationAdd(name, str(it) if isinstance(it, Path) else it) for name, it in content.items()]
    operations += [
        CommitOperationDelete(name) for name in outdated([one.rfilename for one in before.siblings], content)
    ]
    # upload_folder may make several commits: who loads in between would get half a model
    commit = api.create_commit(repository, operations, commit_message=message, parent_commit=before.sha)
    if read_card(folder) == here:  # or someone is writing there
        claim_files(folder, ["README.md"])
        write_whole(folder / "README.md", card)
    if tag in tags and commit.oid != tags[tag]:
        raise ValueError(f"it is uploaded, but the tag {tag} is of the commit before, and stays there; name another")
    if tag is not None and tag not in tags:
        api.create_tag(repository, tag=tag, revision=commit.oid)
    sizes = {name: it.stat().st_size if isinstance(it, Path) else len(it) for name, it in content.items()}
    return Upload(f"{api.endpoint}/{repository}", sizes)


def outdated(there: list[str], content: dict[str, Any]) -> list[str]:
    """What of an earlier upload this one has no more: weights, variants of them, code, pictures."""
    folders = {name.rpartition("/")[0] for name in content if name.endswith(".safetensors")}

    def is_weights(name: str) -> bool:
        parent, _, file = name.rpartition("/")
        return parent in folders and any(fnmatch(file, kind) for kind in ("*.safetensors", "*.index*.json"))

    return [name for name in there if name not in content and (name in RENEWED or is_weights(name))]


def read_card(folder: Path) -> str:
    """The folder's `README.md`; empty where there is none."""
    path = folder / "README.md"
    return read_text(path) if path.is_file() else ""


@contextlib.contextmanager
def checkpoint_as_folder(checkpoint: Path, ema: bool | None) -> Iterator[Path]:
    """A temporary folder with the pipeline of a run's checkpoint, and what its run knows up to that step.

    Args:
        ema: as for `inference.load`, which also says what is raised.
    """
    from .inference import load

    run = checkpoint.resolve().parent
    manifest = find_place(str(checkpoint)).json(MANIFEST) or {}
    facts = find_place(str(run)).json(RUN_FILE)
    step = manifest.get("step", checkpoint_step(checkpoint.resolve()))
    with tempfile.TemporaryDirectory(prefix="ddpm_hf-") as temporary:
        folder = Path(temporary) / run.name
        load(checkpoint, ema=ema).save_pretrained(folder)
        for name in ("README.md", METRICS_FILE, RESULTS_FILE):
            if (run / name).is_file():
                shutil.copyfile(run / name, folder / name)
        truncate_jsonl(folder / METRICS_FILE, step)
        (folder / "samples").mkdir()
        for path in (run / "samples").glob("*-*.png"):
            if path.stem.rpartition("-")[2].isdecimal() and int(path.stem.rpartition("-")[2]) <= step:
                shutil.copyfile(path, folder / "samples" / path.name)
        if facts is not None:
            facts |= {"step": step, "sessions": manifest.get("sessions", [])}
            write_whole(folder / RUN_FILE, json.dumps(facts, indent=1) + "\n")
        yield folder


def draw_missing_pictures(studio, folder: Path) -> None:
    """Draw a grid and its chains for the card of a model that has none; not of a text, which nobody has given.

    Args:
        studio: the model, as `space.drawing.Studio`.
    """
    from tqdm.auto import tqdm

    from .data import image_grid
    from .space.drawing import MOST_IMAGES, Wish

    if studio.by_text or (folder / SAMPLES).is_file() or matching(folder, GRIDS):
        return
    sampler = "ddim" if "ddim" in studio.samplers else "ddpm"
    moments = []
    with tqdm(total=studio.samplers[sampler], desc="sampling images for the card", leave=False) as bar:

        def watch(step) -> None:
            bar.update(1)
            moments.extend([step.predictions] if step.predictions else [])

        images = studio.draw(Wish(MOST_IMAGES, sampler, studio.samplers[sampler]), watch)
    scale = max(1, 64 // images[0].width)
    chains = [moment[i] for i in range(CHAIN_ROWS) for moment in moments]
    for name, grid in (
        (SAMPLES, image_grid(images, scale=scale)),
        (CHAIN, image_grid(chains, len(moments), scale=scale)),
    ):
        if may_write(folder, name):
            claim_files(folder, [name])
            save_image(grid, folder / name)


def reason_of(error: Exception) -> str:
    """An error of the Hub in a line."""
    text = " ".join(str(error).split()).partition(" For more information")[0][:300]
    return f"{error.__class__.__name__}: {text}"


def refuses(error: Exception) -> bool:
    """Whether the Hub said no, so that trying again later is of no use: a token, a name, a right."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if isinstance(error, HfHubHTTPError):
        status = 0 if error.response is None else error.response.status_code
        return 400 <= status < 500 and status not in (408, 429)  # too slow, too often: not for ever
    return isinstance(error, (LocalTokenNotFoundError, HFValidationError)) or type(error) is ValueError


def reserve_repository(config: PipelineConfig, held_out: bool, accelerator) -> str:
    """Before training: the name of the repository to upload to, once the Hub has said that it accepts the upload.

    It has the user's name too where it is to be uploaded. With --dry_run the repository is not created.

    Args:
        held_out: whether images are held out.

    Raises:
        UsageError: variants that cannot be saved, or the Hub says no. Where it does not answer, training goes on; the
            upload is tried at its end.
    """
    if accelerator.is_fsdp2 and "non_ema" in config.save_variants:
        raise UsageError("--save_variants non_ema: not with FSDP; the checkpoints' unet/ holds these weights")
    if config.hub_strategy == "best" and not held_out:
        raise UsageError("--hub_strategy best requires held-out images: give --validation_split 0.1, for example")
    repository = config.hub_model_id or Path(config.output_dir).resolve().name
    if not config.push_to_hub or not accelerator.is_main_process:
        return repository
    try:
        if config.dry_run:
            check_account(repository, config.hub_token)
            return repository
        repository = open_repository(repository, config.hub_token, config.hub_private_repo)
        if config.hub_revision and not config.resume_from_checkpoint:
            check_tag(repository, config.hub_revision, config.hub_token)
    except Exception as error:
        if refuses(error):
            raise UsageError(
                f"--push_to_hub: {repository} cannot be written to ({reason_of(error)}); see --hub_model_id,"
                " --hub_token, --hub_private_repo and --hub_revision, or log in with `hf auth login`"
            ) from error
        log(accelerator, f"warning: the Hub does not answer ({reason_of(error)}); trying again at the end")
    return repository


def check_account(repository: str, token: str | None) -> None:
    """Raise what the Hub says of a token or a name that it does not take; creates nothing."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repository)
    account = HfApi(token=token).whoami()
    user = repository.rpartition("/")[0]
    known = [account["name"], *(one["name"] for one in account.get("orgs", []))]
    if user and user not in known:
        raise ValueError(f"the token is of {account['name']}, who is no member of {user}")


def check_tag(repository: str, tag: str, token: str | None) -> None:
    """Raise ValueError for a tag that the repository has."""
    from huggingface_hub import HfApi

    if tag in {one.name for one in HfApi(token=token).list_repo_refs(repository).tags}:
        raise ValueError(f"it has a tag {tag} already")


class Publisher:
    """Saves the pipeline of a run while it trains and at its end, and uploads it as the flags say.

    Args:
        config: a script's, with `DataFlags`.
        state: the run's `TrainingState`.
        pipeline_of: trained model -> pipeline.
        facts: what `describe_run` gave.
        total_steps: of the whole training.
    """

    def __init__(
        self,
        config: PipelineConfig,
        state,
        pipeline_of: Callable,
        facts: dict[str, Any],
        total_steps: int,
        repository: str,
        accelerator,
    ):
        self.config, self.state, self.pipeline_of, self.facts = config, state, pipeline_of, facts
        self.total_steps, self.accelerator = total_steps, accelerator
        self.folder, self.repository = Path(config.output_dir), repository
        self.saved_at: int | None = None
        self.uploading: threading.Thread | None = None

    def save(self, model, step: int) -> None:
        """Save the pipeline if `--hub_strategy` asks for this one, and upload it if it asks for that too."""
        config, at_checkpoint = self.config, step % self.config.checkpointing_steps == 0
        none_yet = not (self.folder / "model_index.json").is_file()
        if config.hub_strategy == "best" and not self.is_best(step) and not (none_yet and step == self.total_steps):
            return
        pipeline = self.pipeline_of(model)
        save_pipeline(pipeline, self.folder)
        if "fp16" in config.save_variants:
            save_half_precision(pipeline, self.folder)
        if "non_ema" in config.save_variants:
            for name, part in self.state.parts.items():
                with raw_weights(self.state.emas[name], part):
                    save_model(part, self.folder / name, "*.non_ema[.-]*", within=self.folder, variant="non_ema")
        run = {**self.facts, "step": step, "sessions": self.state.sessions.until(step)}
        claim_files(self.folder, [RUN_FILE])
        write_whole(self.folder / RUN_FILE, json.dumps(run, indent=1) + "\n")
        self.saved_at = step
        if config.push_to_hub and config.hub_strategy != "end" and at_checkpoint and step < self.total_steps:
            self.upload_beside(pipeline, step)

    def is_best(self, step: int) -> bool:
        """Whether the held-out loss at a checkpoint is the lowest of those at checkpoints so far."""
        lines = [json.loads(line) for line in (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
        every = self.config.checkpointing_steps
        losses = {
            line["step"]: line["validation_loss"]
            for line in lines
            if math.isfinite(line.get("validation_loss", math.nan))
            and (line["step"] % every == 0 or line["step"] == step)
        }
        return step in losses and losses[step] <= min(losses.values())

    def upload_beside(self, pipeline, step: int) -> None:
        """Upload while training goes on; an upload that is still under way is not waited for."""
        if self.uploading is not None and self.uploading.is_alive():
            log(self.accelerator, f"step {step}: the last upload is still under way, so this one is left out")
            return

        files = contextlib.ExitStack()
        frozen = files.enter_context(publishable(self.folder))  # before training writes there again

        def upload() -> None:
            with files:
                try:
                    self.push(pipeline, f"Step {step}", frozen)
                except Exception as error:  # training is not to end by it
                    log(self.accelerator, f"warning: the upload at step {step} failed ({reason_of(error)})")

        self.uploading = threading.Thread(target=upload, daemon=True)
        self.uploading.start()

    def finish(self, model, step: int) -> None:
        """Save what is not saved yet, write the card, and upload it if that was asked for; a failure loses nothing.

        Raises:
            UsageError: the upload failed; how to repeat it.
        """
        config = self.config
        if self.saved_at != step:
            self.save(model, step)
        pipeline = self.pipeline_of(model)
        try:
            write_pictures(self.folder)
            facts = read_facts(self.folder, self.repository, pipeline, config.hub_license)
            claim_files(self.folder, ["README.md"])
            write_whole(self.folder / "README.md", make_card(facts, read_card(self.folder), to_hub=False))
        except ValueError as error:
            raise UsageError(f"the model is saved to {self.folder}, but not its card: {error}") from error
        how = "" if pipeline.stock_class_name() else ", trust_remote_code=True"
        log(
            self.accelerator,
            f"saved to {self.folder}: DiffusionPipeline.from_pretrained('{self.folder}'{how}) loads it",
        )
        if not config.push_to_hub:
            return
        if self.uploading is not None:
            self.uploading.join()
        try:
            self.repository = open_repository(self.repository, config.hub_token, config.hub_private_repo)
            with publishable(self.folder) as files:
                upload = self.push(pipeline, "Upload the pipeline", files, config.hub_revision)
        except Exception as error:  # whatever the network does, the trained model is on disk
            raise UsageError(
                f"the upload to {self.repository} failed ({reason_of(error)}); {self.folder} is complete:"
                f" `{self.command()}` uploads it"
            ) from error
        log(self.accelerator, f"published at {upload.address}")

    def stopped(self) -> None:
        """Where training ends before its end: say what becomes of a background upload."""
        if self.uploading is not None and self.uploading.is_alive():
            log(self.accelerator, f"an upload was under way and is given up; `{self.command()}` repeats it")

    def command(self) -> str:
        """What uploads the folder as the flags say; the token is not shown."""
        config = self.config
        options = ["--private"] * config.hub_private_repo
        for name, value in (("--license", config.hub_license), ("--revision", config.hub_revision)):
            options += [name, value] if value else []
        return shlex.join(["ddpm-hf", "push", str(self.folder), self.repository, *options])

    def push(self, pipeline, message: str, files: dict[str, Path], tag: str | None = None) -> Upload:
        """Upload the files to the run's repository."""
        options = {"license": self.config.hub_license, "tag": tag, "message": message}
        return push_files(files, self.folder, self.repository, self.config.hub_token, pipeline, **options)


def describe_run(
    config: PipelineConfig, images, plan, model, shown: tuple[str, ...], rows: list[str], base_model: str | None = None
) -> dict[str, Any]:
    """What is known of a run before it starts, for its card.

    Args:
        config: a script's, with `DataFlags`.
        images: what it trains on, as `open_images` gave it.
        shown: the settings that the card lists.
        rows: what the rows of its grids show: classes or prompts.
        base_model: the checkpoint that it starts from.
    """
    local = config.train_data_dir or (config.dataset_name if os.path.exists(config.dataset_name or "") else None)
    settings = {name: value for name, value in public_settings(config).items() if name in shown}
    return {
        "dataset": {
            "name": Path(local).resolve().name if local else images.rows.name,
            "on_hub": bool(config.dataset_name and not local),
            "images": images.count,
            "fingerprint": images.rows.fingerprint(),
        },
        "held_out": len(images.held_out) if images.held_out else 0,
        "seed": config.seed,
        "batch": plan.global_batch * plan.accumulation,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": rows,
        "base_model": None if os.path.exists(base_model or "") else base_model,
        "settings": {name: value for name, value in settings.items() if value is not None},
    }
