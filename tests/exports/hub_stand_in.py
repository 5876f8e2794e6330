"""The hub's HTTP interface as far as publishing needs it, on loopback: repositories in memory, and what was received.

Written after what the client of `huggingface_hub` sends and expects, without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_the_stand_in"
LFS = (".safetensors", ".gguf")


@dataclass
class Repo:
    """Files at the last commit, by name; every commit gives it another `head`."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    head: str = "0" * 40
    commits: int = 0


@dataclass
class Hub:
    """What the stand-in holds and was asked.

    Attributes:
        objects: large files by their sha256, whether or not a commit shows them.
        refuses: what part of a path -> status to answer with, once each unless it stays.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refuses: dict[str, int] = field(default_factory=dict)
    before: Callable[[str], None] = lambda path: None

    @property
    def received(self) -> Counter[str]:
        """How often each kind of request came: its last part."""
        return Counter(path.rpartition("/")[2].partition("?")[0] for path in self.asked)


@contextmanager
def running() -> Iterator[Hub]:
    """The hub in a thread of its own, on a free port of loopback."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms, until its header is acknowledged

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, body: bytes) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        self.hub.before(self.path)
        status, value = self._found(body)
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(data)

    def _found(self, body: bytes) -> tuple[int, Any]:
        for part, status in self.hub.refuses.items():
            if part in self.path:
                return status, {"error": f"no, by {self.hub.url}?signature=secret"}
        if not self.path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.path.partition('?')[0]}"):
                return answer(self.hub, body, *match.groups())
        return 404, {"error": f"no such route: {self.path}"}


def _create(hub: Hub, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    known = name in hub.repos
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.repos.setdefault(name, Repo(private))
    return (409 if known else 200), {"url": f"{hub.url}/{name}", "error": "You already created this model repo"}


def _info(hub: Hub, body: bytes, name: str) -> tuple[int, Any]:
    if name not in hub.repos:
        return 404, {"error": "Repository not found"}
    repo = hub.repos[name]
    return 200, {"id": name, "sha": repo.head, "private": repo.private, "siblings": [], "tags": []}


def _tree(hub: Hub, body: bytes, name: str, revision: str) -> tuple[int, Any]:
    return 200, [_entry(path, data) for path, data in sorted(hub.repos[name].files.items())]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if path.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _git(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _validate(hub: Hub, body: bytes) -> tuple[int, Any]:
    yaml.safe_load(json.loads(body)["content"].split("---")[1])
    return 200, {"errors": [], "warnings": []}


def _preupload(hub: Hub, body: bytes, name: str, revision: str) -> tuple[int, Any]:
    def one(file: dict[str, Any]) -> dict[str, Any]:
        there = hub.repos[name].files.get(file["path"])
        mode = "lfs" if file["path"].endswith(LFS) else "regular"
        known = {} if there is None else {"oid": _entry(file["path"], there).get("lfs", {}).get("oid", _git(there))}
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known}

    return 200, {"files": [one(file) for file in json.loads(body)["files"]]}


def _batch(hub: Hub, body: bytes, name: str) -> tuple[int, Any]:
    def one(asked: dict[str, Any]) -> dict[str, Any]:
        known = asked["oid"] in hub.objects
        upload = {"actions": {"upload": {"href": f"{hub.url}/objects/{asked['oid']}?signature=secret"}}}
        return {"oid": asked["oid"], "size": asked["size"], **({} if known else upload)}

    return 200, {"transfer": "basic", "objects": [one(asked) for asked in json.loads(body)["objects"]]}


def _put(hub: Hub, body: bytes, digest: str) -> tuple[int, Any]:
    if hashlib.sha256(body).hexdigest() != digest:
        return 400, {"error": "content does not have this hash"}
    hub.objects[digest] = body
    return 200, {}


def _commit(hub: Hub, body: bytes, name: str, revision: str) -> tuple[int, Any]:
    repo, lines = hub.repos[name], [json.loads(line) for line in body.splitlines()]
    header, operations = lines[0]["value"], lines[1:]
    if header.get("parentCommit") not in (None, repo.head):
        return 412, {"error": "A commit has happened since."}
    if missing := [o for o in operations if o["key"] == "lfsFile" and o["value"]["oid"] not in hub.objects]:
        return 400, {"error": f"LFS pointer pointed to a file that does not exist: {missing[0]['value']['path']}"}
    for operation in operations:
        value = operation["value"]
        large = operation["key"] == "lfsFile"
        data = hub.objects[value["oid"]] if large else base64.b64decode(value["content"])
        repo.files[value["path"]] = data
    repo.commits += 1
    repo.head = f"{repo.commits:040x}"
    url = f"{hub.url}/{name}/commit/{repo.head}"
    return 200, {"commitUrl": url, "commitOid": repo.head, "hookOutput": ""}


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., tuple[int, Any]]]] = [
    (r"POST /api/repos/create", _create),
    (r"POST /api/validate-yaml", _validate),
    (rf"GET /api/models/{_NAME}", _info),
    (rf"GET /api/models/{_NAME}/revision/[^/]+", _info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _tree),
    (rf"POST /api/models/{_NAME}/preupload/([^/]+)", _preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /objects/([0-9a-f]{64})", _put),
    (rf"POST /api/models/{_NAME}/commit/([^/]+)", _commit),
]
