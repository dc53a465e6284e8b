"""A small HTTP server on the loopback interface, with byte ranges, that records what it was asked."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """One thing that the server answers with.

    Attributes:
        content: the bytes.
        headers: sent along, for example ETag and Last-Modified.
        status: 200, or the status of an error.
        location: where a redirect leads.
        ranges: whether requests for a range get one.
    """

    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    location: str | None = None
    ranges: bool = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients hang up when they have read enough."""


class Httpd:
    """Serves ``files`` (path without query -> what is there).

    Attributes:
        files: may be changed while the server runs.
        requests: method and raw target of every request, in order.
        url: of the server, without a slash at its end.
    """

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str]] = []
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serve() -> Iterator[Httpd]:
    """Run a server for the length of a ``with`` block."""
    server = Httpd()
    server.start()
    try:
        yield server
    finally:
        server.close()


def _handler(server: Httpd) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            server.requests.append((self.command, self.path))
            served = server.files.get(self.path.partition("?")[0], Served(b"not here", status=404))
            status, content, headers = served.status, served.content, dict(served.headers)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if served.location is not None:
                headers["Location"] = served.location
            elif asked and served.ranges and status == 200:
                first = int(asked[1])
                last = min(int(asked[2] or len(content)), len(content) - 1)
                status = 206
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content = content[first : last + 1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    return Handler
