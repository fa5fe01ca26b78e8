"""
A Hub on the loopback interface: of the Hub's HTTP protocol what its own client libraries use to push and to load.

It knows two users by their tokens, model and dataset repositories (public, private or gated), commits with small files
inside and large ones through the batch API of git-lfs, branches, tags, listings, and downloads with redirects. It has
no Xet storage, which `HF_HUB_DISABLE_XET=1` tells the client, no pull requests, no web pages and no search. All is in
memory; requests of several clients are served at a time.

Source: the requests that huggingface_hub 2.4 makes and the headers it reads (`hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`, `utils/_http.py`); https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md.
"""

import base64
import json
import re
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


OWNER, STRANGER = "owner", "stranger"
TOKENS = {"hf_owner": OWNER, "hf_stranger": STRANGER}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet")  # of those that the Hub keeps apart, what is pushed here
BEGINNING = "2024-01-01T00:00:00.000Z"


class Refusal(Exception):
    """An answer other than success. `code` is what the client chooses its exception by."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """What git calls the file: of a large one it only has a pointer."""
        content = self.content
        if self.lfs:
            lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(content)}")
            content = "".join(f"{line}\n" for line in lines).encode()
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        """By what the client knows this content from other content."""
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        description = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.lfs:
            description["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return description


def describe_folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


@dataclass
class Commit:
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repository: commits by their hash, in the order they were made, and what branches and tags point at."""

    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)  # by SHA-256

    def commit(self, branch: str, title: str, files: dict[str, File]) -> str:
        name = sha1(f"{id(self)} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[name] = Commit(title, files)
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a hash means."""
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        if name not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name

    def contents(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.resolve(revision)].files.items()}

    def titles(self) -> list[str]:
        return [commit.title for commit in self.commits.values()]


class LoopbackHub(ThreadingHTTPServer):
    """
    The server, from entering a `with` statement to leaving it. Its threads are those of the test's own process, so
    that it cannot outlive it.

    Attributes:
        repos (`dict[str, Repo]`): by kind and id, such as `models/owner/name`.
        faults (`dict[str, str]`):
            Requests (`METHOD path`) that go wrong, once each: `"half"` hangs up in the middle of the request,
            `"unanswered"` does what it was asked and then hangs up.
        requests (`Counter[str]`): How often each was made.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()

    def add(self, name: str, folder: Path) -> None:
        """Makes a model repository of a folder, where pushing it is not what is tested."""
        repo = self.repos[f"models/{name}"] = Repo(name.split("/")[0])
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {str(path.relative_to(folder)): File(path.read_bytes(), path.suffix in LFS_SUFFIXES) for path in paths}
        repo.uploads = {file.sha256: file.content for file in files.values()}
        repo.commit("main", "Upload folder", files)

    def environment(self, home: Path, user: str | None = OWNER) -> dict[str, str]:
        """The variables that send a client of `user`, or one without a token, here."""
        token = next((token for token, name in TOKENS.items() if name == user), "")
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": token}

    def handle_error(self, request, client_address):
        """Shows errors of this server; that a client is gone is none."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection of a client. Each route is a method that returns what goes into the answer as JSON."""

    server: LoopbackHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: the client's system waits 40 ms before it acknowledges half of one

    def log_message(self, *args):
        pass

    def handle_request(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = f"{self.command} {unquote(url.path)}"
        with self.server.lock:
            self.server.requests[request] += 1
            fault = self.server.faults.pop(request, None)
        length = int(self.headers["Content-Length"] or 0)
        if fault == "half":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        self.user = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        try:
            with self.server.lock:
                answer = self.route(url.path)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            answer = refusal.status, {"error": str(refusal)}, headers
        if fault == "unanswered":
            self.close_connection = True
            return
        self.answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self, path: str) -> tuple:
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return method(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise Refusal(404, "", f"This Hub does not know {self.command} {path}")

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        """A repository that the user may read, or write; others cannot tell a private one from none."""
        repo = self.server.repos.get(f"{kind}/{name}")
        if repo is None or (repo.private and self.user != repo.owner):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != repo.owner:
            raise Refusal(403 if self.user else 401, "", "You have no right to write here")
        return repo

    def whoami(self):
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        return 200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self):
        return 200, {"errors": [], "warnings": []}

    def create_repo(self):
        self.whoami()
        wish = self.json()
        owner, name = wish.get("organization") or self.user, wish["name"]
        if owner != self.user:
            raise Refusal(403, "", f"You have no right to create a repository of {owner}")
        kind = wish.get("type", "model") + "s"
        answer = {"url": f"{self.server.url}/{'' if kind == 'models' else f'{kind}/'}{owner}/{name}"}
        if f"{kind}/{owner}/{name}" in self.server.repos:
            return 409, answer
        repo = Repo(owner, private=bool(wish.get("private")) or wish.get("visibility") == "private")
        repo.commit("main", "initial commit", {})
        self.server.repos[f"{kind}/{owner}/{name}"] = repo
        return 200, answer

    def info(self, kind: str, name: str, revision: str = "main"):
        repo = self.repo(kind, name)
        commit = repo.resolve(revision)
        files = repo.commits[commit].files.items()
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in files]
        answer = {"id": name, "sha": commit, "siblings": siblings, "private": repo.private, "tags": []}
        return 200, {**answer, "lastModified": BEGINNING, "gated": "manual" if repo.gated else False}

    def history(self, kind: str, name: str, revision: str):
        """Newest first; those of other branches too, which is enough here."""
        self.repo(kind, name).resolve(revision)
        commits = self.repo(kind, name).commits.items()
        more = {"authors": [], "date": BEGINNING, "message": ""}
        return 200, [{"id": name, "title": commit.title, **more} for name, commit in reversed(commits)]

    def create_branch(self, kind: str, name: str, branch: str):
        repo = self.repo(kind, name, write=True)
        return self.point(repo, repo.branches, branch, self.json().get("startingPoint", "main"))

    def create_tag(self, kind: str, name: str, revision: str):
        repo = self.repo(kind, name, write=True)
        return self.point(repo, repo.tags, self.json()["tag"], revision)

    def point(self, repo: Repo, refs: dict[str, str], name: str, revision: str):
        if name in refs:
            raise Refusal(409, "", f"Reference already exists: {name}")
        refs[name] = repo.resolve(revision)
        return 200, None

    def tree(self, kind: str, name: str, revision: str, folder: str):
        repo = self.repo(kind, name)
        files = repo.commits[repo.resolve(revision)].files
        prefix = f"{folder}/" if folder else ""
        inside = {path.removeprefix(prefix): file for path, file in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = [] if deep else sorted({path.split("/")[0] for path in inside if "/" in path})
        here = [file.describe(prefix + path) for path, file in inside.items() if deep or "/" not in path]
        return 200, [*(describe_folder(prefix + path) for path in folders), *here]

    def paths_info(self, kind: str, name: str, revision: str):
        repo = self.repo(kind, name)
        files = repo.commits[repo.resolve(revision)].files
        answer = []
        for path in parse_qs(self.body.decode())["paths"]:
            if path in files:
                answer.append(files[path].describe(path))
            elif any(other.startswith(f"{path}/") for other in files):
                answer.append(describe_folder(path))
        return 200, answer

    def preupload(self, kind: str, name: str, revision: str):
        repo = self.repo(kind, name, write=True)
        known = repo.commits[repo.resolve(revision)].files
        answer = []
        for path in (wish["path"] for wish in self.json()["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            etag = known[path].etag if path in known else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": etag})
        return 200, {"files": answer}

    def lfs_batch(self, kind: str, name: str):
        repo = self.repo(kind or "models", name, write=True)
        objects = [{"oid": wish["oid"], "size": wish["size"]} for wish in self.json()["objects"]]
        for wish in objects:
            if wish["oid"] not in repo.uploads:
                url = f"{self.server.url}/lfs/{kind or 'models'}/{name}/{wish['oid']}"
                wish["actions"] = {"upload": {"href": url}}
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_object(self, kind: str, name: str, oid: str):
        """Where large files go to and come from; on the Hub another server, whose addresses are secrets."""
        repo = self.server.repos[f"{kind}/{name}"]
        if self.command == "PUT":
            if sha256(self.body).hexdigest() != oid:
                raise Refusal(400, "", "The content has another SHA-256")
            repo.uploads[oid] = self.body
            return 200, None
        return self.range_of(repo.uploads[oid])

    def range_of(self, content: bytes, headers: dict[str, str] | None = None):
        """The part of a file that was asked for, such as the rest of an interrupted download."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.command == "HEAD":
            return 200, content, headers
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        part = content[start:stop]
        return 206, part, {**(headers or {}), "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}

    def commit(self, kind: str, name: str, revision: str):
        """One JSON object a line: a header, then what changes."""
        repo = self.repo(kind, name, write=True)
        if revision not in repo.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repo.commits[repo.branches[revision]].files)
        title = ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repo.branches[revision]):
                    raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo.uploads:
                    raise Refusal(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = File(repo.uploads[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            else:
                raise Refusal(400, "", f"This Hub does not know the operation {key}")
        commit = repo.commit(revision, title, files)
        url = f"{self.server.url}/{'' if kind == 'models' else f'{kind}/'}{name}/commit/{commit}"
        return 200, {"commitOid": commit, "commitUrl": url}

    def download(self, kind: str, name: str, revision: str, path: str):
        repo = self.repo(kind or "models", name)
        if repo.gated and self.user != repo.owner:
            raise Refusal(403 if self.user else 401, "GatedRepo", f"Access to {name} is restricted.")
        commit = repo.resolve(revision)
        file = repo.commits[commit].files.get(path)
        if file is None:
            return 404, None, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return self.range_of(file.content, headers)
        linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": headers["ETag"]}
        # By another name of this machine: the client asks a host that is not the Hub for content only.
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")
        location = f"{elsewhere}/lfs/{kind or 'models'}/{name}/{file.sha256}"
        return 302, None, {**headers, **linked, "Location": location}


KIND, NAME, REVISION = "(?P<kind>models|datasets)", "(?P<name>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
ROUTES = {
    "/api/whoami-v2": Handler.whoami,
    "/api/validate-yaml": Handler.validate_yaml,
    "/api/repos/create": Handler.create_repo,
    f"/api/{KIND}/{NAME}": Handler.info,
    f"/api/{KIND}/{NAME}/revision/{REVISION}": Handler.info,
    f"/api/{KIND}/{NAME}/commits/{REVISION}": Handler.history,
    f"/api/{KIND}/{NAME}/branch/(?P<branch>[^/]+)": Handler.create_branch,
    f"/api/{KIND}/{NAME}/tag/{REVISION}": Handler.create_tag,
    f"/api/{KIND}/{NAME}/tree/{REVISION}(?:/(?P<folder>.+))?": Handler.tree,
    f"/api/{KIND}/{NAME}/paths-info/{REVISION}": Handler.paths_info,
    f"/api/{KIND}/{NAME}/preupload/{REVISION}": Handler.preupload,
    f"/api/{KIND}/{NAME}/commit/{REVISION}": Handler.commit,
    rf"/(?:(?P<kind>datasets)/)?{NAME}\.git/info/lfs/objects/batch": Handler.lfs_batch,
    f"/lfs/{KIND}/{NAME}/(?P<oid>[0-9a-f]+)": Handler.lfs_object,
    f"/(?:(?P<kind>datasets)/)?{NAME}/resolve/{REVISION}/(?P<path>.+)": Handler.download,
}
