"""Uploading a pipeline's folder to a repository that a stranger can use, as one commit."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from .. import portable
from ..common.errors import one_line
from ..common.files import write_whole
from ..common.layout import CHAIN, LOSS_CURVE, SAMPLES
from ..common.ownership import claim_files
from .card.facts import read_facts
from .card.merging import make_card, newer_card
from .folder import publishable

ATTRIBUTES = ("*.safetensors", "*.png", "*.gif")  # what the repository keeps outside of git
CODE = tuple(path.name for path in Path(portable.__file__).parent.glob("*_ddpm_hf.py"))
RENEWED = (*CODE, SAMPLES, CHAIN, LOSS_CURVE)  # what of an earlier upload goes where this one has it no more


class Upload(NamedTuple):
    """A commit on the Hub: the repository's address, and the files that it holds now, with their sizes in bytes."""

    address: str
    files: dict[str, int]


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


def reason_of(error: Exception) -> str:
    """An error of the Hub in a line."""
    text = one_line(error).partition(" For more information")[0][:300]
    return f"{error.__class__.__name__}: {text}"


def refuses(error: Exception) -> bool:
    """Whether the Hub said no, so that trying again later is of no use: a token, a name, a right."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if isinstance(error, HfHubHTTPError):
        status = 0 if error.response is None else error.response.status_code
        return 400 <= status < 500 and status not in (408, 429)  # too slow, too often: not for ever
    return isinstance(error, (LocalTokenNotFoundError, HFValidationError)) or type(error) is ValueError


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
