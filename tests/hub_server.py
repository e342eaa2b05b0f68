"""A stand-in for the Hugging Face hub: the parts of its HTTP API that reading and pushing use, on loopback.

Large files go by git LFS; the hub's own newer protocol (Xet) is not imitated, so it is switched off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "stand" + "in" * 8
OWNER = "team"


@dataclass
class Repository:
    """Files by path at each commit, the newest last; `refs` are branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool | None = None
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = files
        self.refs["main"] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


class Hub:
    """The server with its repositories by name, `datasets/owner/name` for data sets. Close it at the end."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refusals: dict[str, tuple[int, str]] = {}
        """Status and message for requests whose path contains a text."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def add(self, name: str, files: dict[str, bytes], **options) -> Repository:
        repository = self.repositories[name] = Repository(**options)
        repository.commit(files)
        return repository

    def answer(self, request) -> None:
        """Answers any request."""
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        header = request.headers.get("Authorization")
        authorized = header == f"Bearer {TOKEN}"
        if header and not authorized:
            refusal = "Invalid credentials in Authorization header"
            return reply(request, 401, {"error": refusal}, {"X-Error-Message": refusal})
        for text, (status, message) in self.refusals.items():
            if text in path:
                return reply(request, status, {"error": message}, {"X-Error-Message": message})
        for pattern, act in self.routes():
            if match := re.fullmatch(pattern, path):
                return act(request, body, authorized, *match.groups())
        return reply(request, 404, {"error": f"no such page {path}"})

    def routes(self):
        name = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
        api = r"/api/(models|datasets)/([\w.-]+/[\w.-]+)"
        yield r"/api/whoami-v2", self.whoami
        yield r"/api/repos/create", self.create
        yield r"/api/validate-yaml", self.validate
        yield rf"{api}/auth-check/write", self.may_write
        yield rf"{api}/preupload/(.+)", self.preupload
        yield rf"{api}/commit/(.+)", self.take_commit
        yield rf"{api}/tree/([^/]+)(?:/.*)?", self.tree
        yield rf"{api}/paths-info/(.+)", self.paths
        yield rf"{api}(?:/revision/(.+))?", self.info
        yield rf"/{name}\.git/info/lfs/objects/batch", self.batch
        yield r"/large/(\w+)", self.store
        yield rf"/{name}/resolve/([^/]+)/(.+)", self.resolve

    def whoami(self, request, body, authorized):
        if not authorized:
            return reply(request, 401, {"error": "Invalid username or password."})
        return reply(request, 200, {"type": "user", "name": OWNER, "orgs": [], "auth": {}})

    def create(self, request, body, authorized):
        asked = json.loads(body)
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not authorized:
            return reply(request, 401, {"error": "Invalid username or password."})
        if name in self.repositories:
            return reply(
                request, 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            )
        if not name.startswith(f"{OWNER}/"):
            return reply(request, 403, {"error": f"You don't have the rights to create a model under {name}"})
        private = asked.get("private", {"private": True, "public": False}.get(asked.get("visibility")))
        self.add(name, {".gitattributes": b"*.safetensors filter=lfs"}, private=private)
        return reply(request, 200, {"url": f"{self.url}/{name}", "name": name})

    def validate(self, request, body, authorized):
        return reply(request, 200, {"errors": [], "warnings": []})

    def may_write(self, request, body, authorized, kind, name):
        if not name.startswith(f"{OWNER}/"):
            return reply(
                request, 403, {"error": "no right to write"}, {"X-Error-Message": "no right to write"}
            )
        return reply(request, 200, {})

    def preupload(self, request, body, authorized, kind, name, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        return reply(request, 200, {"files": files})

    def batch(self, request, body, authorized, name):
        objects = [
            item | {"actions": {"upload": {"href": f"{self.url}/large/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        return reply(request, 200, {"transfer": "basic", "objects": objects})

    def store(self, request, body, authorized, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.large[oid] = body
        return reply(request, 200, {})

    def take_commit(self, request, body, authorized, kind, name, revision):
        repository = self.repositories[name]
        files = dict(repository.files)
        for line in filter(None, body.split(b"\n")):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        url = f"{self.url}/{name}/commit/{sha}"
        return reply(request, 200, {"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def look_up(self, request, name, revision, authorized):
        """The repository and commit; None where an error was answered."""
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not authorized):
            reply(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        sha = repository.refs.get(revision or "main", revision)
        if sha not in repository.commits:
            reply(request, 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, sha

    def info(self, request, body, authorized, kind, name, revision):
        full = name if kind == "models" else f"datasets/{name}"
        if snapshot := self.look_up(request, full, revision, authorized):
            repository, sha = snapshot
            siblings = [{"rfilename": path} for path in repository.commits[sha]]
            about = {
                "id": name,
                "sha": sha,
                "siblings": siblings,
                "private": bool(repository.private),
                "tags": [],
            }
            reply(request, 200, about | {"gated": "manual" if repository.gated else False})

    def tree(self, request, body, authorized, kind, name, revision):
        full = name if kind == "models" else f"datasets/{name}"
        if snapshot := self.look_up(request, full, revision, authorized):
            repository, sha = snapshot
            reply(request, 200, [entry(path, data) for path, data in repository.commits[sha].items()])

    def paths(self, request, body, authorized, kind, name, revision):
        full = name if kind == "models" else f"datasets/{name}"
        if snapshot := self.look_up(request, full, revision, authorized):
            repository, sha = snapshot
            files = repository.commits[sha]
            asked = json.loads(body)["paths"]
            reply(request, 200, [entry(path, files[path]) for path in asked if path in files])

    def resolve(self, request, body, authorized, name, revision, file):
        if snapshot := self.look_up(request, name, revision, authorized):
            repository, sha = snapshot
            if repository.gated:
                message = {
                    "X-Error-Code": "GatedRepo",
                    "X-Error-Message": "Access to this model is restricted",
                }
                return reply(request, 403 if authorized else 401, {"error": "gated"}, message)
            if file not in repository.commits[sha]:
                return reply(request, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            data = repository.commits[sha][file]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha}
            return reply(request, 200, data, headers | {"Accept-Ranges": "bytes"})
        return None


def entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def reply(request, status: int, content: object, headers: dict[str, str] | None = None) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    request.send_header("Content-Length", str(len(data)))
    request.send_header("Content-Type", "application/json")
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
