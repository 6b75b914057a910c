"""A Hugging Face Hub in memory and on localhost, for the real `huggingface_hub` client, with faults on demand."""

import base64
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from types import SimpleNamespace, TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote

import pytest
import yaml
from huggingface_hub import HfApi, constants, file_download, hf_api
from huggingface_hub.utils import _http


LFS_SUFFIXES = (".arrow", ".bin", ".parquet", ".pt", ".safetensors", ".sqlite3", ".zip")
LFS_SIZE = 10 * 2**20
INVALID_TOKEN = "Invalid credentials in Authorization header"  # the client tells it from a missing repo by this text

_API = re.compile(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?")
_RESOLVE = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")

Role = Literal["read", "write"] | None
Status = int | Literal["drop", "lose", "cut", "break"]


@dataclass(frozen=True)
class Reply:
    """An HTTP response; a `cut` one ends in the middle of its body."""

    content: Any = b""
    status: int = HTTPStatus.OK
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


class HubError(Exception):
    """An answer other than success, with the Hub's `X-Error-Code` and `X-Error-Message`."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        errors = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply({"error": message}, status, errors | dict(headers or {}))


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Blob:
    """A file's content, in git or, with a pointer to it in git, in LFS."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def in_git(self) -> bytes:
        if not self.lfs:
            return self.content
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return pointer.format(self.sha256, len(self.content)).encode()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """What the Hub lists of this file."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.in_git)}
        return entry

    def sibling(self, path: str) -> dict[str, Any]:
        """The same in the words of `repo_info`."""
        sibling: dict[str, Any] = {"rfilename": path, "size": len(self.content), "blobId": self.oid}
        if self.lfs:
            sibling["lfs"] = {"sha256": self.sha256, "size": len(self.content), "pointerSize": len(self.in_git)}
        return sibling


@dataclass(frozen=True)
class Commit:
    title: str
    message: str
    parent: str | None
    files: dict[str, Blob]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @property
    def sha(self) -> str:
        tree = sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(repr((self.title, self.message, self.parent, tree, self.date)).encode()).hexdigest()

    def entry(self, user: str) -> dict[str, Any]:
        """What the Hub lists of this commit."""
        text = {"title": self.title, "message": self.message}
        return {"id": self.sha, "authors": [{"user": user}], "date": self.date, **text}


@dataclass
class Repo:
    """A repository: its commits by sha, and the branches and tags that name them."""

    kind: str
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> Commit:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a sha names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def log(self, revision: str) -> Iterator[Commit]:
        """The commits from a revision back to the first one."""
        sha: str | None = self.at(revision).sha
        while sha is not None:
            yield self.commits[sha]
            sha = self.commits[sha].parent

    def refs(self) -> dict[str, Any]:
        """What the Hub lists of the branches and tags."""
        refs: dict[str, Any] = {"converts": []}
        for key, folder, names in (("branches", "heads", self.branches), ("tags", "tags", self.tags)):
            refs[key] = [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in names.items()
            ]
        return refs


@dataclass
class Fault:
    times: int
    status: Status
    path_contains: str
    method: str | None
    retry_after: int

    def hits(self, request: Request) -> bool:
        return self.times > 0 and self.path_contains in request.path and self.method in (None, request.method)


class HubServer:
    """
    Serves repositories from memory. Uploads go through git or basic LFS: Xet, which the client would use without
    asking the server, has to be off, as [`HubServer.connect`] and `env` see to.

    `token` may write and the `read_only_tokens` may not, all as the same user; any other token is refused. What was
    asked is in `requests`, as `(method, path)` and in order.

    Example:

    ```python
    >>> with HubServer() as hub:
    ...     hub.connect(monkeypatch)
    ...     hub.api().create_repo("tester/bank", repo_type="dataset")
    ...     hub.fail(1, "lose", path_contains="/commit/")
    ```
    """

    def __init__(self) -> None:
        self.user = "tester"
        self.token = "hf_write"
        self.read_only_tokens = {"hf_read"}
        self.waits: list[float] = []
        self.requests: list[tuple[str, str]] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self._faults: list[Fault] = []
        self._uploads: dict[str, tuple[Repo, str]] = {}
        self._lock = threading.Lock()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops answering: from here on, connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def env(self) -> dict[str, str]:
        """The environment in which another process talks to this server only."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def connect(self, patch: pytest.MonkeyPatch) -> None:
        """
        Makes this process talk to this server only, also where nobody passes an endpoint, and retry without waiting:
        the seconds it would have waited are in `waits`.

        Args:
            patch (`pytest.MonkeyPatch`):
                What undoes it.
        """
        for name, value in self.env.items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(hf_api.api, "endpoint", self.url)
        for module in (_http, file_download):
            patch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": self.waits.append}))

    def api(self, token: str | Literal[False] | None = None) -> HfApi:
        """A client of this server, with `token` unless told otherwise."""
        return HfApi(endpoint=self.url, token=self.token if token is None else token)

    def fail(
        self,
        times: int = 1,
        status: Status = 503,
        *,
        path_contains: str = "",
        method: str | None = None,
        retry_after: int = 1,
    ) -> None:
        """
        Makes the next matching requests fail.

        Args:
            times (`int`, *optional*, defaults to 1):
                How many of them.
            status (`int` or `str`, *optional*, defaults to 503):
                The status to answer instead of doing what was asked; or `"break"` to close the connection in the
                middle of the request, `"drop"` to close it before doing what was asked, `"lose"` to do it and close
                the connection without an answer, or `"cut"` to do it and close it in the middle of the answer.
            path_contains (`str`, *optional*):
                A part of the path, without the query.
            method (`str`, *optional*):
                The HTTP method, any by default.
            retry_after (`int`, *optional*, defaults to 1):
                The seconds in the `Retry-After` of a 429.
        """
        with self._lock:
            self._faults.append(Fault(times, status, path_contains, method, retry_after))

    def head(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> str:
        """The sha of a revision."""
        return self.repos[repo_type, repo_id].at(revision).sha

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The content of each file of a revision."""
        files = self.repos[repo_type, repo_id].at(revision).files
        return {path: blob.content for path, blob in files.items()}

    def answer(self, request: Request) -> Reply | None:
        """Answers one request; `None` where the connection is to close without an answer."""
        with self._lock:
            self.requests.append((request.method, request.path))
            fault = next((fault for fault in self._faults if fault.hits(request)), None)
            if fault is not None:
                fault.times -= 1
                if isinstance(fault.status, int):
                    headers = {"Retry-After": str(fault.retry_after)} if fault.status == 429 else {}
                    return HubError(fault.status, HTTPStatus(fault.status).phrase, headers=headers).reply
                if fault.status == "drop":
                    return None
            try:
                reply = self._route(request)
            except HubError as error:
                reply = error.reply
            if fault is None:
                return reply
            return None if fault.status == "lose" else replace(reply, cut=True)

    def breaks(self, request: Request) -> bool:
        """Whether the connection is to close before all of a request is read."""
        with self._lock:
            fault = next((fault for fault in self._faults if fault.hits(request)), None)
            if fault is None or fault.status != "break":
                return False
            fault.times -= 1
            self.requests.append((request.method, request.path))
            return True

    def _route(self, request: Request) -> Reply:
        if request.path.startswith("/upload/"):  # signed by its ticket: the client sends no token here
            return self._upload(request)
        role = self._role(request)
        match request.method, request.path:
            case "GET", "/api/whoami-v2":
                if role is None:
                    raise HubError(401, "Invalid username or password.")
                return Reply({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": role}}})
            case "POST", "/api/validate-yaml":
                return Reply({"errors": [], "warnings": []})
            case "POST", "/api/repos/create":
                return self._create(request.json(), role)
        if found := _API.fullmatch(request.path):
            kind, name, action, revision, path = (part and unquote(part) for part in found.groups())
            repo = self._repo(kind, name, role)
            return self._act(request, role, repo, action or "revision", revision or "main", path or "")
        if found := _RESOLVE.fullmatch(request.path):
            kind, name, revision, path = (part and unquote(part) for part in found.groups())
            return self._resolve(request, self._repo(kind or "model", name, role), revision, path)
        if found := _BATCH.fullmatch(request.path):
            repo = self._repo(found[1] or "model", found[2], role)
            self._require_write(role)
            return self._batch(request.json(), repo)
        raise HubError(404, f"Not served here: {request.method} {request.path}")

    def _role(self, request: Request) -> Role:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token == self.token:
            return "write"
        if token in self.read_only_tokens:
            return "read"
        raise HubError(401, INVALID_TOKEN)

    def _require_write(self, role: Role, code: str = "RepoNotFound") -> None:
        if role is None:
            raise HubError(401, "Invalid username or password.", code)
        if role == "read":
            raise HubError(403, "Forbidden: you must use a write token to write to this namespace")

    def _repo(self, kind: str, name: str, role: Role) -> Repo:
        repo = self.repos.get((kind, name))
        if role is None and (repo is None or repo.private):
            # Over HTTPS the client reads a bare 401 as a missing repo, over HTTP only one with this code.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def _create(self, asked: dict[str, Any], role: Role) -> Reply:
        self._require_write(role, code="")
        kind, name = asked.get("type", "model"), f"{asked.get('organization') or self.user}/{asked['name']}"
        url = self._page(kind, name)
        if (kind, name) in self.repos:
            return Reply({"error": f"You already created this {kind} repo", "url": url}, HTTPStatus.CONFLICT)
        repo = self.repos[kind, name] = Repo(kind, name, private=asked.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.add("main", Commit("initial commit", "", None, {".gitattributes": Blob(attributes.encode())}))
        return Reply({"url": url, "name": name, "private": repo.private})

    def _page(self, kind: str, name: str) -> str:
        return f"{self.url}/{name}" if kind == "model" else f"{self.url}/{kind}s/{name}"

    def _act(self, request: Request, role: Role, repo: Repo, action: str, name: str, path: str) -> Reply:
        """Serves `/api/{kind}s/{repo}/{action}/{name}/{path}`, where `name` is mostly a revision."""
        if request.method != "GET" and action != "paths-info":
            self._require_write(role)
        match request.method, action:
            case "GET", "revision":
                return Reply(self._info(repo, repo.at(name), blobs="blobs" in request.query))
            case "GET", "tree":
                return Reply(self._tree(repo.at(name), path, recursive=request.query.get("recursive") == ["true"]))
            case "POST", "paths-info":
                files = repo.at(name).files
                wanted = parse_qs(request.body.decode()).get("paths", [])
                return Reply([files[path].entry(path) for path in wanted if path in files])
            case "GET", "commits":
                return Reply([commit.entry(self.user) for commit in repo.log(name)])
            case "GET", "refs":
                return Reply(repo.refs())
            case "POST", "tag":
                return self._name(repo.tags, request.json()["tag"], repo.at(name))
            case "POST", "branch":
                return self._name(repo.branches, name, repo.at(request.json().get("startingPoint", "main")))
            case "POST", "preupload":
                return Reply({"files": [self._preupload(file, repo.at(name)) for file in request.json()["files"]]})
            case "POST", "commit" if "create_pr" not in request.query:
                return self._commit(request, repo, name)
        raise HubError(404, f"Not served here: {request.method} {request.path}")

    def _info(self, repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
        files = sorted(commit.files.items())
        siblings = [blob.sibling(path) if blobs else {"rfilename": path} for path, blob in files]
        card = commit.files.get("README.md", Blob(b"")).content.decode().split("---\n")
        return {
            "cardData": yaml.safe_load(card[1]) if len(card) > 2 else None,
            "id": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "private": repo.private,
            "tags": [],
            "siblings": siblings,
        }

    def _tree(self, commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        files = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
        if folder and not files:
            raise HubError(404, f"{folder} does not exist on {commit.sha}", "EntryNotFound")
        folders = {
            parent
            for path in files
            for parent in accumulate(path.split("/")[:-1], "{}/{}".format)
            if parent.startswith(prefix)
        }
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "size": 0, "oid": commit.sha} for path in sorted(folders)
        ]
        entries += [blob.entry(path) for path, blob in files.items()]
        return [entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(prefix)]

    def _name(self, names: dict[str, str], name: str, commit: Commit) -> Reply:
        if name in names:
            raise HubError(409, f"Reference already exists: {name}")
        names[name] = commit.sha
        return Reply(status=HTTPStatus.CREATED)

    def _preupload(self, file: dict[str, Any], head: Commit) -> dict[str, Any]:
        path, there = file["path"], head.files.get(file["path"])
        lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
        return {
            "path": path,
            "uploadMode": "lfs" if lfs else "regular",
            "shouldIgnore": False,
            "oid": there.etag if there else None,
        }

    def _batch(self, asked: dict[str, Any], repo: Repo) -> Reply:
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.objects:
                ticket = secrets.token_hex(8)
                self._uploads[ticket] = repo, wanted["oid"]
                answer["actions"] = {"upload": {"href": f"{self.url}/upload/{ticket}"}}
            objects.append(answer)
        return Reply({"transfer": "basic", "objects": objects})

    def _upload(self, request: Request) -> Reply:
        repo, oid = self._uploads.get(request.path.removeprefix("/upload/"), (None, ""))
        if request.method != "PUT" or repo is None:
            raise HubError(403, "No such upload")
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, f"The content is not that of {oid}")
        repo.objects[oid] = request.body
        return Reply()

    def _commit(self, request: Request, repo: Repo, branch: str) -> Reply:
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo.at(branch)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        about = header["value"]
        if not head.sha.startswith(about.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files, repo)
        commit = repo.add(branch, Commit(about["summary"], about["description"], head.sha, files))
        url = f"{self._page(repo.kind, repo.name)}/commit/{commit.sha}"
        return Reply({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Blob], repo: Repo) -> None:
        path = value["path"]
        match key:
            case "file":
                files[path] = Blob(base64.b64decode(value["content"], validate=True))
            case "lfsFile":
                if value["oid"] not in repo.objects:
                    raise HubError(400, f"LFS pointer of {path} points to a file that was not uploaded")
                files[path] = Blob(repo.objects[value["oid"]], lfs=True)
            case "deletedFile" | "deletedFolder":
                folder = path.rstrip("/") + "/"
                gone = [each for each in files if (each == path if key == "deletedFile" else each.startswith(folder))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for each in gone:
                    del files[each]
            case _:
                raise HubError(400, f"Unknown operation: {key}")

    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        size = len(blob.content)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if span is None:
            return Reply(blob.content, headers=headers)
        first, last = int(span[1]), min(int(span[2] or size), size - 1)
        if first > last:
            raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Reply(blob.content[first : last + 1], HTTPStatus.PARTIAL_CONTENT, headers)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    """One request per connection, so that none outlives the server in the client's pool."""

    server: _Server

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        path, _, query = self.path.partition("?")
        request = Request(self.command, path, parse_qs(query), self.headers, b"")
        if self.server.hub.breaks(request):
            self.rfile.read(length // 2)
            return
        body = self.rfile.read(length)
        if len(body) < length:
            return
        reply = self.server.hub.answer(replace(request, body=body))
        if reply is None:
            return
        content = reply.body
        self.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(content))} | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if reply.cut else content)

    do_DELETE = do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet: what was asked is in `HubServer.requests`."""
