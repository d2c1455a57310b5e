"""A small Hub on the loopback interface: the real client of huggingface_hub talks to it through `HF_ENDPOINT`.

Repositories of models and Spaces (`spaces/user/name`) live in memory, with commits, branches, tags, large files behind
the LFS protocol, and owners who may hide them. A commit replaces a branch's state at once or not at all. Faults happen
on request.

    with Hub({"secret": "user"}) as hub:
        hub.fail("POST /api/models/user/model/commit/", 500)
        ...  # a process with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1 uploads, in vain
        hub.files("user/model")
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

LARGE = ("*.safetensors", "*.png", "*.bin", "*.pt")  # what goes up by LFS
CARD_HEAD = re.compile(r"---\n(.*?)\n---(\n|$)", re.DOTALL)
REPOSITORY_ID = r"[\w.-]+(/[\w.-]+)?"
CARD_VALUES = {
    "license": r"[a-z0-9.-]+", "datasets": REPOSITORY_ID, "base_model": REPOSITORY_ID, "library_name": ".+",
    "pipeline_tag": r"[a-z0-9-]+", "tags": ".+", "metrics": ".+", "language": ".+",
}  # fmt: skip
PAGE = 1000  # entries of a listing
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()


class Blob(NamedTuple):
    """A file's content, and whether it went up by LFS."""

    data: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        """What LFS calls the file by."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls the file by; of a large one it has only a pointer."""
        data = self.sha256.encode() if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_entry(path: str, blob: Blob) -> dict:
    """How a listing tells of a file."""
    entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
    return entry


def metadata_of(card: str) -> dict:
    """A README's head as YAML; empty where there is none, or none that can be read."""
    head = CARD_HEAD.match(card)
    try:
        return (head and yaml.safe_load(head[1])) or {}
    except yaml.YAMLError:
        return {}


def card_errors(card: str) -> list[str]:
    """What the Hub refuses in a README's head: what is not YAML, and values of another kind than it knows."""
    head = CARD_HEAD.match(card)
    if head is None:
        return []
    try:
        metadata = yaml.safe_load(head[1]) or {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["YAML metadata must be a mapping"]
    errors = []
    for key, pattern in CARD_VALUES.items():
        values = metadata.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not (isinstance(value, str) and re.fullmatch(pattern, value)):
                errors.append(f'"{key}" with value {json.dumps(value, default=str)} is not valid')
    index = metadata.get("model-index", [])
    for model in index if isinstance(index, list) else [None]:
        results = model.get("results") if isinstance(model, dict) and isinstance(model.get("name"), str) else None
        if not isinstance(results, list) or not all(map(is_result, results)):
            errors.append('"model-index" must hold names, and results with task.type, dataset.name and .type, metrics')
    return errors


def is_result(result: Any) -> bool:
    """Whether this is one of a model-index's results."""
    try:
        named = (result["task"]["type"], result["dataset"]["name"], result["dataset"]["type"])
        metrics = [(metric["type"], metric["value"]) for metric in result["metrics"]]
    except (KeyError, TypeError):
        return False
    return all(isinstance(name, str) for name in (*named, *(kind for kind, _ in metrics))) and bool(metrics)


class Refusal(Exception):
    """An answer that says no: status, the code that the client's error classes go by, and a sentence."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Request(NamedTuple):
    """What a client asks."""

    user: str | None
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    def json(self) -> dict:
        """The body's object."""
        return json.loads(self.body)


class Reply(NamedTuple):
    """What it hears."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = {}


def answer(content: Any, status: int = 200, **headers: str) -> Reply:
    """A reply in JSON."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(json.dumps(content).encode(), status, {"Content-Type": "application/json", **headers})


@dataclass
class Repository:
    """Commits, each a whole tree by path, and the names that point at them."""

    private: bool = False
    sdk: str | None = None  # of a Space
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    history: dict[str, tuple[str | None, str]] = field(default_factory=dict)  # a commit's parent and title
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], title: str = "initial commit") -> str:
        """Make these the files of a branch; the commit's name."""
        tree = "".join(f"{path} {files[path].oid}\n" for path in sorted(files))
        sha = hashlib.sha1(f"{len(self.commits)} {self.branches.get(branch)}\n{tree}".encode()).hexdigest()
        self.commits[sha] = files
        self.history[sha] = self.branches.get(branch), title
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit's own name means."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


@dataclass
class Fault:
    """What goes wrong with requests, how often, and from which on; see `Hub.fail`."""

    pattern: str
    kind: int | str
    times: float
    after: int = 0
    then: Callable | None = None


class Hub:
    """The state, and what each address does. `tokens` maps tokens to users."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by sha256
        self.signatures: dict[str, int] = {}  # of upload addresses, with the size announced
        self.requests: list[str] = []  # as `METHOD /path`
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(
        self, pattern: str, kind: int | str = 500, times: float = 1, after: int = 0, then: Callable | None = None
    ) -> None:
        """Let the next requests whose `METHOD /path` matches go wrong.

        Args:
            kind: a status; or `cut`: no answer, or `half`: done as asked, but the answer breaks off.
            after: how many of them go well first.
            then: called when it has happened, before the client hears of it.
        """
        self.faults.append(Fault(pattern, kind, times, after, then))

    def fault_of(self, line: str) -> "Fault | None":
        """What is to go wrong with a request, counted down."""
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, line):
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def put(self, name: str, folder: Path) -> None:
        """Make a folder's files those of a repository, without a client."""
        blobs = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        large = {path for path in blobs if any(fnmatch(path, pattern) for pattern in LARGE)}
        self.repositories.setdefault(name, Repository()).commit(
            "main", {path: Blob(data, path in large) for path, data in blobs.items()}
        )

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """A repository's files, by path."""
        repository = self.repositories[name]
        return {path: blob.data for path, blob in repository.commits[repository.resolve(revision)].items()}

    def handle(self, method: str, address: str, headers, body: bytes) -> "tuple[Reply, Fault | None]":
        """The reply, and how it is to be spoilt if at all."""
        parts = urlsplit(address)
        line = f"{method} {parts.path}"
        with self.lock:
            self.requests.append(line)
            fault = self.fault_of(line)
            if fault and fault.kind == "cut":
                return Reply(b""), fault
            if fault and fault.kind != "half":
                return answer({"error": "a fault, as asked for"}, fault.kind), fault
            try:
                request = Request(self.user_of(headers), parse_qs(parts.query), headers, body)
                reply = self.dispatch(method, parts.path, request)
            except Refusal as refusal:
                code = {"X_Error_Code": refusal.code} if refusal.code else {}
                reply = answer({"error": str(refusal)}, refusal.status, X_Error_Message=str(refusal), **code)
            return reply, fault

    def user_of(self, headers) -> str | None:
        """Who asks; None without a token."""
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def dispatch(self, method: str, path: str, request: Request) -> Reply:
        """The address's own method, with the parts of the path."""
        for methods, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in methods.split("|"):
                found = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                return action(self, request, **found)
        raise Refusal(404, None, f"nothing answers {method} {path}")

    def repository(self, name: str, user: str | None, write: bool = False) -> Repository:
        """A repository that the user may read, or write."""
        repository, owner = self.repositories.get(name), name.split("/")[-2]
        if repository is None or (repository.private and user != owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise Refusal(403 if user else 401, None, f"You have no right to write to {name}")
        return repository

    # Accounts and repositories

    def whoami(self, request: Request) -> Reply:
        """Whose token it is."""
        if request.user is None:
            raise Refusal(401, None, "Invalid username or password.")
        return answer({"type": "user", "name": request.user, "orgs": []})

    def create(self, request: Request) -> Reply:
        """Make a repository with git's first file; one that is there is refused, with its address."""
        wanted = request.json()
        owner = wanted.get("organization") or request.user
        if request.user is None or owner != request.user:
            raise Refusal(403 if request.user else 401, None, f"You have no right to create for {owner}")
        kind = wanted.get("type", "model")
        if kind == "space" and not wanted.get("sdk"):
            raise Refusal(400, None, "a Space needs an sdk")
        name = f"{owner}/{wanted['name']}"
        path = f"spaces/{name}" if kind == "space" else name
        content = {"name": name, "url": f"{self.url}/{path}"}
        if path in self.repositories:
            return answer({"error": f"You already created this {kind} repo", **content}, 409)
        self.repositories[path] = Repository(wanted.get("visibility") == "private", wanted.get("sdk"))
        self.repositories[path].commit("main", {".gitattributes": Blob(ATTRIBUTES)})
        return answer(content)

    def validate_card(self, request: Request) -> Reply:
        """Look at a README's head."""
        content = request.json()["content"]
        errors = [{"message": error} for error in card_errors(content)]
        missing = [] if CARD_HEAD.match(content) else ["empty or missing yaml metadata in repo card"]
        warnings = [{"message": warning} for warning in missing]
        return answer({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def info(self, request: Request, name: str, revision: str = "main") -> Reply:
        """What a repository is and which files it has: all of it, or the properties asked for."""
        repository = self.repository(name, request.user)
        sha = repository.resolve(revision)
        files = repository.commits[sha]
        card = metadata_of(files["README.md"].data.decode()) if "README.md" in files else {}
        siblings = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in request.query:
            for sibling in siblings:
                entry = file_entry(sibling["rfilename"], files[sibling["rfilename"]])
                sibling |= {"blobId": entry["oid"], "size": entry["size"]}
                if "lfs" in entry:
                    lfs = entry["lfs"]
                    sibling["lfs"] = {**lfs, "sha256": lfs["oid"]}
        title = name.removeprefix("spaces/")
        about = {"id": title, "author": title.split("/")[0], "private": repository.private, "sha": sha}
        about |= {"sdk": repository.sdk} if repository.sdk else {"modelId": title}
        about |= {"cardData": card, "tags": card.get("tags", []), "downloads": 0, "likes": 0, "siblings": siblings}
        about |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        if "expand" in request.query:
            about = {key: about[key] for key in ("id", *request.query["expand"]) if key in about}
        return answer(about)

    def tree(self, request: Request, name: str, revision: str, path: str = "") -> Reply:
        """The files of a commit, a page at a time; what lies in folders only on request."""
        repository, inside = self.repository(name, request.user), f"{path}/" if path else ""
        files = repository.commits[repository.resolve(revision)]
        files = {path: files[path] for path in sorted(files) if path.startswith(inside)}
        if path and not files:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        folders = {folder for file in files for folder in map(str, PurePosixPath(file).parents) if folder != "."}
        folders = {folder for folder in folders if folder.startswith(inside)}
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        entries += [file_entry(*item) for item in files.items()]
        if request.query.get("recursive") != ["true"]:
            entries = [entry for entry in entries if "/" not in entry["path"][len(inside) :]]
        begin = int(request.query.get("cursor", ["0"])[0])
        if begin + PAGE >= len(entries):
            return answer(entries[begin:])
        query = urlencode({**{key: values[0] for key, values in request.query.items()}, "cursor": begin + PAGE})
        address = f"{self.url}/api/{name if repository.sdk else f'models/{name}'}/tree/{quote(revision, safe='')}"
        address += f"/{quote(path, safe='')}" if path else ""
        return answer(entries[begin : begin + PAGE], Link=f'<{address}?{query}>; rel="next"')

    def log(self, request: Request, name: str, revision: str) -> Reply:
        """The commits that led to a revision, the last first."""
        repository, commits = self.repository(name, request.user), []
        sha = repository.resolve(revision)
        while sha:
            parent, title = repository.history[sha]
            about = {"id": sha, "title": title, "message": "", "date": "2026-01-01T00:00:00.000Z"}
            commits.append({**about, "authors": [{"user": name.split("/")[0]}]})
            sha = parent
        return answer(commits)

    def drop_ref(self, request: Request, name: str, branch: str | None = None, tag: str | None = None) -> Reply:
        """Delete a branch or a tag."""
        repository = self.repository(name, request.user, write=True)
        if branch == "main":
            raise Refusal(403, None, "the main branch cannot be deleted")
        names, ref = (repository.branches, branch) if branch else (repository.tags, tag)
        if ref not in names:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {ref}")
        del names[ref]
        return answer({})

    def add_ref(self, request: Request, name: str, branch: str | None = None, revision: str = "main") -> Reply:
        """A new branch from a starting point, or a new tag on a revision."""
        repository, wanted = self.repository(name, request.user, write=True), request.json()
        names = repository.branches if branch else repository.tags
        ref, revision = branch or wanted["tag"], wanted.get("startingPoint", revision)
        if ref in names:
            raise Refusal(409, None, f"Reference already exists: {ref}")
        names[ref] = repository.resolve(revision)
        return answer({})

    def refs(self, request: Request, name: str) -> Reply:
        """The branches and tags, and their commits."""
        repository = self.repository(name, request.user)

        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": sha} for ref, sha in names.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        return answer({"branches": branches, "converts": [], "tags": tags})

    # Uploads

    def preupload(self, request: Request, name: str, revision: str) -> Reply:
        """For each file: by LFS or with the commit; and what lies there already."""
        repository = self.repository(name, request.user, write=True)
        there = repository.commits[repository.resolve(revision)]
        files = []
        for path in [file["path"] for file in request.json()["files"]]:
            mode = "lfs" if any(fnmatch(path, pattern) for pattern in LARGE) else "regular"
            blob = there.get(path)
            oid = blob and (blob.sha256 if blob.large else blob.oid)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return answer({"files": files})

    def lfs_batch(self, request: Request, name: str) -> Reply:
        """Where to put large files; nowhere for those that are there."""
        self.repository(name, request.user, write=True)
        objects = []
        for wanted in request.json()["objects"]:
            one = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.large_files:
                signature = secrets.token_hex(8)
                self.signatures[signature] = wanted["size"]
                upload = {"href": f"{self.url}/lfs/{wanted['oid']}?signature={signature}"}
                one["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/{name}.git/info/lfs/verify"}}
            objects.append(one)
        return answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> Reply:
        """Take a large file, if it is the one announced."""
        size = self.signatures.get(request.query.get("signature", [""])[0])
        if size is None:
            raise Refusal(403, None, "no such upload was announced")
        if len(request.body) != size or hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, None, f"{len(request.body)} bytes that are not the file of {size} bytes announced")
        self.large_files[oid] = request.body
        return answer({})

    def lfs_verify(self, request: Request, name: str) -> Reply:
        """Whether a large file arrived."""
        self.repository(name, request.user, write=True)
        wanted = request.json()
        if len(self.large_files.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, None, "the file has not arrived")
        return answer({})

    def commit(self, request: Request, name: str, revision: str) -> Reply:
        """Change files, all or none."""
        repository = self.repository(name, request.user, write=True)
        if revision not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, title = dict(repository.commits[repository.branches[revision]]), ""
        for operation in map(json.loads, request.body.splitlines()):
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                title = value.get("summary", "")
                if value.get("parentCommit") not in (None, repository.branches[revision]):
                    raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True))
            elif kind == "lfsFile":
                if value["oid"] not in self.large_files:
                    raise Refusal(400, None, f"{value['path']}: its LFS file has not arrived")
                files[value["path"]] = Blob(self.large_files[value["oid"]], large=True)
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            elif kind == "deletedFolder":
                inside = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
                if not inside:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                for path in inside:
                    del files[path]
            else:
                raise Refusal(400, None, f"unknown operation {kind}")
        errors = card_errors(files["README.md"].data.decode()) if "README.md" in files else []
        if errors:
            raise Refusal(400, None, f"Invalid metadata in README.md: {errors[0]}")
        sha = repository.commit(revision, files, title)
        return answer({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"})

    # Downloads

    def resolve(self, request: Request, name: str, revision: str, path: str) -> Reply:
        """A file, or the part of it from where a download broke off."""
        repository = self.repository(name, request.user)
        sha = repository.resolve(revision)
        blob = repository.commits[sha].get(path)
        if blob is None:
            error = {"error": "Entry not found"}
            return answer(error, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.sha256 if blob.large else blob.oid}"'}
        if blob.large:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(blob.data))}
        begin = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if begin is None:
            return Reply(blob.data, 200, headers)
        headers["Content-Range"] = f"bytes {begin[1]}-{len(blob.data) - 1}/{len(blob.data)}"
        return Reply(blob.data[int(begin[1]) :], 206, headers)


NAME, REVISION = "(?P<name>(?:spaces/)?[^/]+/[^/]+)", "(?P<revision>[^/]+)"
API = "/api/(?:models/|(?=spaces/))"  # a Space's name here begins with `spaces/`
ROUTES = [
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.validate_card),
    ("GET", f"{API}{NAME}(/revision/{REVISION})?", Hub.info),
    ("GET", f"{API}{NAME}/tree/{REVISION}(/(?P<path>.+))?", Hub.tree),
    ("GET", f"{API}{NAME}/refs", Hub.refs),
    ("GET", f"{API}{NAME}/commits/{REVISION}", Hub.log),
    ("DELETE", f"{API}{NAME}/branch/(?P<branch>[^/]+)", Hub.drop_ref),
    ("DELETE", f"{API}{NAME}/tag/(?P<tag>[^/]+)", Hub.drop_ref),
    ("POST", f"{API}{NAME}/branch/(?P<branch>[^/]+)", Hub.add_ref),
    ("POST", f"{API}{NAME}/tag/{REVISION}", Hub.add_ref),
    ("POST", f"{API}{NAME}/preupload/{REVISION}", Hub.preupload),
    ("POST", f"{API}{NAME}/commit/{REVISION}", Hub.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("POST", rf"/{NAME}\.git/info/lfs/verify", Hub.lfs_verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Hub.lfs_put),
    ("GET|HEAD", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests whole, and writes replies, or spoils them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer's body waits 40 ms for its head to be acknowledged

    def do_GET(self) -> None:
        """Answer a request of any method."""
        reply, fault = self.server.hub.handle(self.command, self.path, self.headers, self.read_body())
        if fault and fault.then:
            fault.then()
        spoilt = fault and fault.kind in ("cut", "half")
        if spoilt:
            self.close_connection = True
        if spoilt and fault.kind == "cut":
            return
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if spoilt else reply.body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self) -> bytes:
        """The request's body, also one that comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *arguments) -> None:
        """Say nothing."""
