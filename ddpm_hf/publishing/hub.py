"""Uploads a pipeline's folder to the Hub as one commit."""

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import portable
from ..common.errors import one_line
from ..common.files import write_atomically
from ..common.layout import CHAIN, LOSS_CURVE, SAMPLES
from ..common.ownership import claim_files, digest
from .card.facts import read_facts
from .card.merging import make_card, newer_card
from .files import publishable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from huggingface_hub import HfApi, ModelInfo

LFS_PATTERNS = ("*.safetensors", "*.png", "*.gif")
CODE = tuple(path.name for path in Path(portable.__file__).parent.glob("*_ddpm_hf.py"))
RENEWED = (*CODE, SAMPLES, CHAIN, LOSS_CURVE)  # files of an earlier upload to delete if this one lacks them


class Upload(NamedTuple):
    """A commit on the Hub: the repository's address, and its files with their sizes in bytes."""

    address: str
    files: dict[str, int]


def attributes(before: str) -> str:
    """A `.gitattributes` that also lists our file types."""
    lines = before.splitlines()
    known = {line.split()[0] for line in lines if "filter=lfs" in line}
    lines += [f"{kind} filter=lfs diff=lfs merge=lfs -text" for kind in LFS_PATTERNS if kind not in known]
    return "\n".join(lines) + "\n"


def open_repository(repository: str, token: str | None, private: bool = False) -> str:
    """Create the repository if it does not exist; return its full name, with the user.

    Raises:
        ValueError: it should be private, but exists and is public.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(name).private:
        raise ValueError(f"{name} exists and is public; make it private on the Hub, or name another repository")
    return name


def read_remote(api: "HfApi", info: "ModelInfo", name: str) -> str:
    """A text file of the repository that `info` describes; empty if it does not exist."""
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
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error


def push_folder(
    folder: Path, repository: str, token: str | None, pipeline: "DiffusionPipeline", **options: Any
) -> Upload:
    """Write the card, and upload a pipeline's folder in one commit; the options are those of `push_files`."""
    with publishable(folder, options.pop("include", ())) as files:
        return push_files(files, folder, repository, token, pipeline, **options)


def push_files(
    files: dict[str, Path],
    folder: Path,
    repository: str,
    token: str | None,
    pipeline: "DiffusionPipeline",
    *,
    license: str | None = None,
    tag: str | None = None,
    message: str = "Upload the pipeline",
) -> Upload:
    """Upload files, and a card written for them, in one commit.

    Args:
        repository: user/name; it must exist.
        license: the license for the card.
        tag: names the commit, for `from_pretrained(..., revision=tag)`.

    Raises:
        ValueError: the card was edited both in the folder and on the Hub; the tag names another commit.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    before = api.model_info(repository, files_metadata=bool(tag))
    refs = api.list_repo_refs(repository) if tag else None
    tags = {one.name: one.target_commit for one in refs.tags} if refs else {}
    if refs and tag in {one.name for one in refs.branches}:
        raise ValueError(f"{repository} has a branch {tag}; give another name for the tag")
    if tag in tags and (tags[tag] != before.sha or weights_differ(before, files)):
        raise ValueError(f"{repository} has a tag {tag} already; give another one")
    local_card = read_card(folder)
    latest = newer_card(local_card, read_remote(api, before, "README.md"))
    frozen = files["model_index.json"].parent  # these files do not change, whatever a run writes meanwhile
    card = make_card(read_facts(frozen, repository, pipeline, license), latest)
    git = attributes(read_remote(api, before, ".gitattributes"))
    content: dict[str, Path | bytes] = {**files, "README.md": card.encode(), ".gitattributes": git.encode()}
    operations = [
        CommitOperationAdd(name, str(one) if isinstance(one, Path) else one) for name, one in content.items()
    ]
    operations += [
        CommitOperationDelete(name) for name in outdated([one.rfilename for one in before.siblings], content)
    ]
    # upload_folder may make several commits, and a model loaded in between would be incomplete
    commit = api.create_commit(repository, operations, commit_message=message, parent_commit=before.sha)
    if read_card(folder) == local_card:  # else it was edited meanwhile
        claim_files(folder, ["README.md"])
        write_atomically(folder / "README.md", card)
    if tag in tags and commit.oid != tags[tag]:
        raise ValueError(f"uploaded, but the tag {tag} names the commit before and is not moved; give another one")
    if tag is not None and tag not in tags:
        api.create_tag(repository, tag=tag, revision=commit.oid)
    sizes = {name: one.stat().st_size if isinstance(one, Path) else len(one) for name, one in content.items()}
    return Upload(f"{api.endpoint}/{repository}", sizes)


def weights_differ(before: "ModelInfo", files: dict[str, Path]) -> bool:
    """Whether the weights on the Hub, read with their metadata, are others than these files'."""
    there = {one.rfilename: one.lfs.sha256 for one in before.siblings or () if one.lfs is not None}
    for name, path in files.items():
        if name.endswith(".safetensors") and there.get(name) != digest(path.read_bytes()):
            return True
    return False


def outdated(existing: list[str], content: dict[str, Any]) -> list[str]:
    """Files of an earlier upload that this one no longer has: weights and their variants, code, pictures."""
    folders = {name.rpartition("/")[0] for name in content if name.endswith(".safetensors")}

    def is_weights(name: str) -> bool:
        parent, _, file = name.rpartition("/")
        return parent in folders and any(fnmatch(file, kind) for kind in ("*.safetensors", "*.index*.json"))

    return [name for name in existing if name not in content and (name in RENEWED or is_weights(name))]


def read_card(folder: Path) -> str:
    """The folder's `README.md`; empty if it does not exist."""
    path = folder / "README.md"
    return read_text(path) if path.is_file() else ""


def reason_of(error: Exception) -> str:
    """An error of the Hub, in one line."""
    text = one_line(error).partition(" For more information")[0][:300]
    return f"{error.__class__.__name__}: {text}"


def refuses(error: Exception) -> bool:
    """Whether the Hub rejected the request (token, name, permission), so that a retry cannot succeed."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if isinstance(error, HfHubHTTPError):
        status = 0 if error.response is None else error.response.status_code
        return 400 <= status < 500 and status not in (408, 429)  # a timeout and a rate limit pass
    return isinstance(error, (LocalTokenNotFoundError, HFValidationError)) or type(error) is ValueError


def check_name(repository: str) -> None:
    """Raise ValueError for what cannot be the name of a repository; asks nobody."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(
            f"{repository!r} cannot be the name of a repository; give user/name, of letters, digits, -, _ and ."
        ) from error


def check_account(repository: str, token: str | None) -> None:
    """Raise the Hub's error for a token or a name that it rejects; creates nothing."""
    from huggingface_hub import HfApi

    check_name(repository)
    account = HfApi(token=token).whoami()
    user = repository.rpartition("/")[0]
    known = [account["name"], *(one["name"] for one in account.get("orgs", []))]
    if user and user not in known:
        raise ValueError(f"the token belongs to {account['name']}, who is not a member of {user}")


def check_tag(repository: str, tag: str, token: str | None) -> None:
    """Raise ValueError for a tag that already exists, or the name of a branch."""
    from huggingface_hub import HfApi

    refs = HfApi(token=token).list_repo_refs(repository)
    if tag in {one.name for one in refs.tags}:
        raise ValueError(f"it has a tag {tag} already")
    if tag in {one.name for one in refs.branches}:
        raise ValueError(f"it has a branch {tag}; give another name for the tag")
