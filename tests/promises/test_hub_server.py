"""The test Hub as huggingface_hub's client sees it: names of revisions, histories, listings, cards."""

import pytest

from tests.support.fixtures_hub import TOKEN, run
from tests.support.hub_server import Hub

CLIENT = """
import json, os
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

api, name, results = HfApi(), "user/model", {}

def refused(action, *arguments, **options):
    try:
        action(*arguments, **options)
    except (HfHubHTTPError, ValueError) as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None), str(error)]
    return None

def listed():
    refs = api.list_repo_refs(name)
    kinds = {"branches": refs.branches, "tags": refs.tags}
    return {kind: [[ref.name, ref.ref, ref.target_commit] for ref in named] for kind, named in kinds.items()}

def add(path, content):
    return CommitOperationAdd(path, content)

api.create_repo(name)
results["again"] = refused(api.create_repo, name)
results["exist_ok"] = str(api.create_repo(name, exist_ok=True))
first = api.model_info(name).sha
files = [add("unet/a.safetensors", b"weights"), add("unet/deep/b.json", b"{}"), add("c.json", b"{}")]
second = api.create_commit(name, files, commit_message="second").oid
results["shas"] = [first, second]
results["stale"] = refused(api.create_commit, name, [add("d.json", b"{}")], commit_message="x", parent_commit=first)

api.create_tag(name, tag="v1", revision=first)
api.create_tag(name, tag="runs/2")
results["tag again"] = refused(api.create_tag, name, tag="v1")
api.create_tag(name, tag="v1", exist_ok=True)
results["tag of nothing"] = refused(api.create_tag, name, tag="v9", revision="nowhere")
api.create_branch(name, branch="try/it", revision="v1")
results["branch again"] = refused(api.create_branch, name, branch="try/it")
results["refs"] = listed()
results["tagged"] = [sorted(api.list_repo_files(name, revision=tag)) for tag in ("v1", "runs/2")]
api.delete_tag(name, tag="runs/2")
api.delete_branch(name, branch="try/it")
results["refs left"] = listed()
results["no tag"] = refused(api.delete_tag, name, tag="runs/2")
results["no main"] = refused(api.delete_branch, name, branch="main")
results["commits"] = [[commit.commit_id, commit.title] for commit in api.list_repo_commits(name)]

info = api.repo_info(name, files_metadata=True)
results["sizes"] = {one.rfilename: [one.size, one.lfs and one.lfs.sha256] for one in info.siblings}
expanded = api.model_info(name, expand=["sha", "author"])
results["expanded"] = [expanded.sha, expanded.author, expanded.private]
results["top"] = sorted(entry.path for entry in api.list_repo_tree(name))
results["inside"] = sorted(entry.path for entry in api.list_repo_tree(name, "unet", recursive=True))

data = ModelCardData(
    license="apache-2.0", library_name="diffusers", pipeline_tag="text-to-image", tags=["ddpm"], model_name="model",
    datasets=["user/pictures"], base_model="user/base",
    eval_results=[EvalResult("unconditional-image-generation", "user/pictures", "Pictures", "fid", 3.5)],
)
good = ModelCard(f"---\\n{data.to_yaml()}\\n---\\n# A long title\\n" + "words " * 50)
good.validate()
good.push_to_hub(name)
results["card"] = [api.model_info(name).pipeline_tag, api.model_info(name).card_data.to_dict()["base_model"]]
for case, head in {
    "not yaml": "tags: [a",
    "a list": "- a",
    "a path": "base_model: /home/user/model",
    "results": "model-index: [{name: a}]",
}.items():
    content = f"---\\n{head}\\n---\\n"
    body = {"repoType": "model", "content": content}
    answer = get_session().post(os.environ["HF_ENDPOINT"] + "/api/validate-yaml", json=body)
    results[f"card {case}"] = answer.status_code
    results[f"push {case}"] = refused(
        api.create_commit, name, [add("README.md", content.encode())], commit_message="bad card"
    )
results["files"] = sorted(api.list_repo_files(name))

api.create_commit(name, [CommitOperationDelete("unet/", is_folder=True)], commit_message="less")
results["less"] = sorted(api.list_repo_files(name))
many = [add(f"many/{number}.txt", b"") for number in range(1100)]
api.create_commit(name, many, commit_message="many")
results["many"] = len(list(api.list_repo_tree(name, "many")))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the client said."""
    with Hub({TOKEN: "user"}) as hub:
        return run(hub, tmp_path_factory.mktemp("client"), CLIENT, HF_TOKEN=TOKEN)


def test_a_repository_is_made_once(told):
    """Else a script that runs twice fails, or never learns where its repository is."""
    assert told["again"][1] == 409
    assert told["exist_ok"].endswith("/user/model")


def test_a_commit_on_what_is_no_longer_there_is_refused(told):
    """Else a push over somebody else's would not be noticed."""
    assert told["stale"][1] == 412


def test_revisions_have_names(told):
    """Else tags of `--hub_revision` show nothing."""
    first, second = told["shas"]
    assert told["refs"]["branches"] == [["main", "refs/heads/main", second], ["try/it", "refs/heads/try/it", first]]
    assert told["refs"]["tags"] == [["v1", "refs/tags/v1", first], ["runs/2", "refs/tags/runs/2", second]]
    assert told["tagged"][0] == [".gitattributes"]
    assert len(told["tagged"][1]) == 4
    assert [told[case][1] for case in ("tag again", "branch again")] == [409, 409]
    assert told["tag of nothing"][0] == "RevisionNotFoundError"


def test_names_of_revisions_go_but_for_main(told):
    """Else a wrong tag stays for ever."""
    assert [ref[0] for ref in told["refs left"]["branches"] + told["refs left"]["tags"]] == ["main", "v1"]
    assert told["no tag"][0] == "RevisionNotFoundError"
    assert told["no main"][1] == 403


def test_the_history_is_listed_from_its_end(told):
    """Else nobody sees how often a push changed the files."""
    first, second = told["shas"]
    assert told["commits"] == [[second, "second"], [first, "initial commit"]]


def test_listings_tell_sizes_and_folders(told):
    """Else the list of a repository's files with their sizes is a guess."""
    assert told["sizes"]["c.json"] == [2, None]
    size, sha256 = told["sizes"]["unet/a.safetensors"]
    assert size == 7
    assert len(sha256) == 64
    assert told["expanded"] == [told["shas"][1], "user", None]
    assert told["top"] == [".gitattributes", "c.json", "unet"]
    assert told["inside"] == ["unet/a.safetensors", "unet/deep", "unet/deep/b.json"]


def test_long_listings_come_in_pages(told):
    """Else files beyond the first thousand are never downloaded."""
    assert told["many"] == 1100


def test_folders_are_deleted_whole(told):
    """Else a model that lost a part keeps its files."""
    assert told["less"] == [".gitattributes", "README.md", "c.json"]


@pytest.mark.parametrize("case", ["not yaml", "a list", "a path", "results"])
def test_a_broken_card_is_refused_and_nothing_committed(told, case):
    """Else a card that the Hub refuses passes here."""
    assert told[f"card {case}"] == 400
    assert told[f"push {case}"][0] in ("BadRequestError", "ValueError")
    assert told["files"] == [".gitattributes", "README.md", "c.json", "unet/a.safetensors", "unet/deep/b.json"]


def test_a_good_card_is_read(told):
    """Else the test Hub refuses what huggingface_hub itself writes."""
    assert told["card"] == ["text-to-image", "user/base"]
