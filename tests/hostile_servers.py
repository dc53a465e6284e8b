"""Servers on the loopback interface that misbehave on purpose, and canaries that count who comes near them."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        path: with its query.
        headers: names in lower case.
        start: first byte of the range.
        stop: one past its last byte.
    """

    path: str
    headers: dict[str, str]
    start: int = 0
    stop: int = 2**62


Behaviour = Callable[[socket.socket, Asked], bool]
"""Answers on a connection; False: and hangs up."""


@dataclass
class Listener:
    """A server whose answers are written byte by byte.

    Attributes:
        routes: path without query -> what it does; may be changed while the server runs.
        connections: accepted so far.
        asked: requests so far.
    """

    host: str = "127.0.0.1"
    family: int = socket.AF_INET
    routes: dict[str, Behaviour] = field(default_factory=dict)
    connections: int = 0
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._socket = socket.socket(self.family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.family == socket.AF_INET6:
            self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._socket.bind((self.host, 0))
        self._socket.listen(256)
        self.port: int = self._socket.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End all connections."""
        self._over.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while (asked := _read_request(connection)) is not None:
                self.asked.append(asked)
                behaviour = self.routes.get(asked.path.partition("?")[0], missing)
                if not behaviour(connection, asked):
                    break
        self._open.discard(connection)


def _read_request(connection: socket.socket) -> Asked | None:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return None
        data += piece
    lines = data.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
    span = (int(asked[1]), int(asked[2]) + 1) if asked else (0, 2**62)
    return Asked(lines[0].split(" ")[1], headers, *span)


@contextmanager
def listening(listener: Listener) -> Iterator[Listener]:
    """Run a server for the length of a ``with`` block."""
    try:
        yield listener
    finally:
        listener.close()


def head(status: str, **headers: object) -> bytes:
    """Return the head of an answer."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def missing(connection: socket.socket, _: Asked) -> bool:
    """There is nothing here."""
    connection.sendall(head("404 Not Found", Content_Length=4) + b"none")
    return True


def file(content: bytes, etag: str | None = None) -> Behaviour:
    """Answer range requests as a good server does, with an ETag that is the content's unless another is given."""
    etag = f'"{hashlib.sha256(content).hexdigest()}"' if etag is None else etag

    def answer(connection: socket.socket, asked: Asked) -> bool:
        stop = min(asked.stop, len(content))
        part = content[asked.start : stop]
        place = f"bytes {asked.start}-{stop - 1}/{len(content)}"
        connection.sendall(head("206 Partial Content", Content_Range=place, Content_Length=len(part), ETag=etag) + part)
        return True

    return answer


def redirect(location: str, status: int = 302) -> Behaviour:
    """Lead somewhere else."""

    def answer(connection: socket.socket, _: Asked) -> bool:
        connection.sendall(head(f"{status} Found", Location=location, Content_Length=2) + b"go")
        return True

    return answer


def reply(data: bytes, *, keep: bool = False) -> Behaviour:
    """Answer everything with the same bytes."""

    def answer(connection: socket.socket, _: Asked) -> bool:
        connection.sendall(data)
        return keep

    return answer


def silent(connection: socket.socket, _: Asked) -> bool:
    """Take the request and say nothing until the client hangs up."""
    return bool(connection.recv(1)) and False


def drip(data: bytes, interval_s: float = 0.2) -> Behaviour:
    """Send a byte, wait, send a byte."""

    def answer(connection: socket.socket, _: Asked) -> bool:
        for value in data:
            connection.sendall(bytes([value]))
            time.sleep(interval_s)
        return False

    return answer


def endless(start: bytes, piece: bytes) -> Behaviour:
    """Send without end."""

    def answer(connection: socket.socket, _: Asked) -> bool:
        connection.sendall(start)
        while True:
            connection.sendall(piece)

    return answer


def first_then(first: Behaviour, then: Behaviour, times: int = 1) -> Behaviour:
    """Behave one way for the first requests, and another way for all that follow."""
    lock = threading.Lock()
    count = 0

    def answer(connection: socket.socket, asked: Asked) -> bool:
        nonlocal count
        with lock:
            count += 1
            early = count <= times
        return (first if early else then)(connection, asked)

    return answer


def hanging_up(behaviour: Behaviour) -> Behaviour:
    """Answer, and close the connection: the next request needs a new one."""

    def answer(connection: socket.socket, asked: Asked) -> bool:
        behaviour(connection, asked)
        return False

    return answer
