"""A small Hub on loopback: the part of its API that making a repository and uploading a folder use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """What was pushed: each commit's paths, and each path's bytes."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)


@dataclass
class Hub:
    """All that the server was told."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    requests: list[str] = field(default_factory=list)


def git_hash(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        self.hub.requests.append(f"{self.command} {self.path}")
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_POST(self) -> None:
        body, path = self.body(), self.path.split("?")[0]
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif "/preupload/" in path:
            self.preupload(self.repository(path), json.loads(body)["files"])
        elif "/commit/" in path:
            self.commit(self.repository(path), body)
        elif path == "/api/validate-yaml":  # of the model card
            self.answer({"warnings": [], "errors": []})
        else:
            self.answer({"error": path}, 404)

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        self.body()
        path = self.path.split("?")[0]
        name = "/".join(path.split("/")[3:5])
        if name not in self.hub.repositories:
            self.answer({"error": path}, 404)
        else:
            self.answer({"id": name, "sha": f"{len(self.hub.repositories[name].commits):040x}"})

    def repository(self, path: str) -> Repository:
        return self.hub.repositories["/".join(path.split("/")[3:5])]

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(
            name, Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        )
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status)

    def preupload(self, repository: Repository, files: list[dict[str, Any]]) -> None:
        answers = []
        for file in files:
            held = repository.files.get(file["path"])
            large = is_large(file["path"])
            oid = None if held is None else hashlib.sha256(held).hexdigest() if large else git_hash(held)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/blob/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, body: bytes) -> None:
        paths = []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.blobs[value["oid"]]
            if line["key"] != "header":
                paths.append(value["path"])
        repository.commits.append(sorted(paths))
        oid = f"{len(repository.commits):040x}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/user/x/commit/{oid}"})


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs a Hub for a while."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
