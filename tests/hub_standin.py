"""A loopback server that answers like GitHub's raw files and like the part of the Hugging Face Hub that pulls use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class StandIn:
    """What the server has, how it misbehaves and what it was asked."""

    url: str = ""
    raw: dict[str, bytes] = field(default_factory=dict)
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lfs: tuple[str, ...] = (".safetensors", ".onnx")
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # path -> bytes sent by each of the next answers
    status: dict[str, list[int]] = field(default_factory=dict)  # path -> status of each of the next answers
    corrupt: set[str] = field(default_factory=set)
    etags: bool = True
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def asked(self, path: str, method: str = "GET") -> list[dict[str, str]]:
        """Return the headers of the requests for a path."""
        return [headers for made, asked, headers in self.requests if asked == path and made == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stand_in: StandIn

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.stand_in.requests.append((self.command, path, dict(self.headers)))
        if self.stand_in.status.get(path):
            self.answer(self.stand_in.status[path].pop(0), b"busy")
        elif path in self.stand_in.raw:
            self.send_content(path, self.stand_in.raw[path], {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.send_listing(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_resolved(path, match[1], match[2], match[3])
        else:
            self.answer(404, b"404: Not Found")

    def send_listing(self, repo_id: str, what: str | None, revision: str | None) -> None:
        files = self.stand_in.repos.get(repo_id)
        if files is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", COMMIT):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            self.answer_json([self.tree_entry(path, content) for path, content in files.items()])
        else:
            siblings = [self.sibling(path, content) for path, content in files.items()]
            self.answer_json({"id": repo_id, "modelId": repo_id, "sha": COMMIT, "tags": [], "siblings": siblings})

    def tree_entry(self, path: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
        if path.endswith(self.stand_in.lfs):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def sibling(self, path: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": git_blob(content)}
        if path.endswith(self.stand_in.lfs):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def send_resolved(self, path: str, repo_id: str, revision: str, name: str) -> None:
        content = self.stand_in.repos.get(repo_id, {}).get(name)
        if content is None or revision not in ("main", COMMIT):
            self.answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.send_content(path, content, {"X-Repo-Commit": COMMIT})

    def send_content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if path in self.stand_in.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.stand_in.etags:
            headers["ETag"] = etag
        headers["Accept-Ranges"] = "bytes"
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.headers.get("If-Range", etag) == etag:
            start = int(wanted[1])
            if start >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cuts = self.stand_in.cut_after.get(path) if self.command == "GET" else None
        self.answer(status, content[start:], headers, cut_after=cuts.pop(0) if cuts else None)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut_after is None else body[:cut_after])
        if cut_after is not None:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are part of the tests."""


@contextmanager
def serve_stand_in() -> Iterator[StandIn]:
    """Run the server on a free loopback port."""
    stand_in = StandIn()
    handler = type("Handler", (_Handler,), {"stand_in": stand_in})
    with _Server(("127.0.0.1", 0), handler) as server:
        stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
