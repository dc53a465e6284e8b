"""What one request may bring along, and how many may be under way."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import PATIENCE_S, until
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from geocentroids_tiler.app import create_app
from geocentroids_tiler.commands import _protocol
from geocentroids_tiler.limits import LimitsMiddleware, client_of
from geocentroids_tiler.settings import Settings

MESSAGE_BYTES = 700


@dataclass
class Asked:
    """An application that reads bodies, and remembers what it was given."""

    bodies: list[bytes] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    entered: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.entered += 1
        if scope["path"] == "/wait":
            await self.gate.wait()
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answered"})


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pulled: int = 0


def scope_of(path: str = "/", client: str | None = "192.0.2.1", **fields: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "client": None if client is None else (client, 1),
    } | fields


async def ask(app: Any, scope: dict[str, Any], chunks: Sequence[bytes] = ()) -> Answer:
    """Send a request whose body comes in pieces."""
    answer, left = Answer(), list(chunks)

    async def receive() -> dict[str, Any]:
        answer.pulled += 1
        if not chunks and answer.pulled == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert not answer.status, "answered once"
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message["body"]

    await app(scope, receive, send)
    return answer


def refused(answer: Answer, status: int, setting: str) -> str:
    assert answer.status == status
    assert answer.headers["cache-control"] == "no-store"
    document = json.loads(answer.body)
    assert list(document) == ["detail"]
    assert setting in document["detail"]
    return str(document["detail"])


CHUNKED = [(b"transfer-encoding", b"chunked")]


class TestBodies:
    @pytest.mark.parametrize(("size", "status"), [(2048, 200), (2049, 413)])
    def test_by_its_length(self, size: int, status: int) -> None:
        app = Asked()
        limits = LimitsMiddleware(app, Settings(max_body_bytes=2048))
        headers = [(b"content-length", str(size).encode())]
        answer = asyncio.run(ask(limits, scope_of(headers=headers), [b"x" * size]))
        assert answer.status == status
        if status == 413:
            assert "2048 bytes" in refused(answer, 413, "GEOCENTROIDS_MAX_BODY_BYTES")
            assert (app.entered, answer.pulled) == (0, 0), "neither asked nor read"
        else:
            assert app.bodies == [b"x" * size]

    @pytest.mark.parametrize("headers", [CHUNKED, [(b"content-length", b"5")]], ids=["chunked", "a length that lies"])
    def test_as_it_comes(self, headers: list[tuple[bytes, bytes]]) -> None:
        app = Asked()
        limits = LimitsMiddleware(app, Settings(max_body_bytes=2048))
        answer = asyncio.run(ask(limits, scope_of(headers=headers), [b"x" * MESSAGE_BYTES] * 100))
        refused(answer, 413, "GEOCENTROIDS_MAX_BODY_BYTES")
        assert answer.pulled == 3, "the third piece is the first too many, and the last that is read"
        assert app.bodies == [b"x" * 2 * MESSAGE_BYTES], "the application sees no byte of the piece that is too much"

    def test_http_2_announces_nothing(self) -> None:
        limits = LimitsMiddleware(Asked(), Settings(max_body_bytes=1024))
        answer = asyncio.run(ask(limits, scope_of(http_version="2"), [b"x" * MESSAGE_BYTES] * 2))
        refused(answer, 413, "GEOCENTROIDS_MAX_BODY_BYTES")

    def test_pieces_that_fit(self) -> None:
        app = Asked()
        limits = LimitsMiddleware(app, Settings(max_body_bytes=4 * MESSAGE_BYTES))
        answer = asyncio.run(ask(limits, scope_of(headers=CHUNKED), [b"x" * MESSAGE_BYTES] * 4))
        assert (answer.status, app.bodies) == (200, [b"x" * 4 * MESSAGE_BYTES])

    def test_an_answer_that_has_begun_is_not_replaced(self) -> None:
        async def early(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 202, "headers": []})
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.body", "body": b"end"})

        limits = LimitsMiddleware(early, Settings(max_body_bytes=1024))
        answer = asyncio.run(ask(limits, scope_of(headers=CHUNKED), [b"x" * MESSAGE_BYTES] * 9))
        assert (answer.status, answer.body, answer.pulled) == (202, b"end", 2)

    def test_an_error_of_its_own_is_not_hidden(self) -> None:
        async def broken(scope: Any, receive: Any, send: Any) -> None:
            raise LookupError("mine")

        limits = LimitsMiddleware(broken, Settings())
        with pytest.raises(LookupError, match="mine"):
            asyncio.run(ask(limits, scope_of(headers=CHUNKED), [b"x"]))
        assert limits.clients == {}

    def test_a_framework_that_turns_everything_into_400(self) -> None:
        """FastAPI answers 400 to a body that breaks off; what counts is why it broke off."""
        app = FastAPI()
        app.add_middleware(LimitsMiddleware, settings=Settings(max_body_bytes=1024))

        @app.post("/")
        async def read(request: Request, body: dict[str, int]) -> int:
            return len(body)

        def pieces() -> Iterator[bytes]:
            yield b"x" * MESSAGE_BYTES
            yield b"x" * MESSAGE_BYTES

        answer = TestClient(app).post("/", content=pieces(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413


@pytest.mark.parametrize(("size", "status"), [(1024, 200), (1025, 414)])
def test_path_and_query(size: int, status: int) -> None:
    limits = LimitsMiddleware(Asked(), Settings(max_target_bytes=1024))
    answer = asyncio.run(ask(limits, scope_of("/" + "p" * 23, query_string=b"q" * (size - 24))))
    assert answer.status == status
    if status == 414:
        assert "1025 bytes" in refused(answer, 414, "GEOCENTROIDS_MAX_TARGET_BYTES")


@pytest.mark.parametrize(("size", "status"), [(1024, 200), (1025, 431)])
def test_headers_in_all(size: int, status: int) -> None:
    limits = LimitsMiddleware(Asked(), Settings(max_header_bytes=1024))
    lines = [(b"a", b"x" * 500), (b"b", b"x" * (size - 505 - 5))]
    answer = asyncio.run(ask(limits, scope_of(headers=lines)))
    assert answer.status == status
    if status == 431:
        assert "1025 bytes" in refused(answer, 431, "GEOCENTROIDS_MAX_HEADER_BYTES")


class TestAtOnce:
    async def wait_for(self, app: Asked, entered: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while app.entered < entered:
                await asyncio.sleep(0)

    def test_of_one_client(self) -> None:
        async def check() -> None:
            app = Asked()
            limits = LimitsMiddleware(app, Settings(client_requests=2))
            waiting = [asyncio.create_task(ask(limits, scope_of("/wait"))) for _ in range(2)]
            await self.wait_for(app, 2)
            assert limits.clients == {"192.0.2.1": 2}
            answer = await ask(limits, scope_of())
            assert "2 requests of one client" in refused(answer, 429, "GEOCENTROIDS_CLIENT_REQUESTS")
            assert answer.headers["retry-after"] == "1"
            assert (await ask(limits, scope_of(client="192.0.2.2"))).status == 200
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await ask(limits, scope_of(path))).status == 200
            app.gate.set()
            assert [answer.status for answer in await asyncio.gather(*waiting)] == [200, 200]
            assert limits.clients == {}, "nothing is kept of a client that has gone"
            assert (await ask(limits, scope_of())).status == 200

        asyncio.run(check())

    def test_in_all(self) -> None:
        async def check() -> None:
            app = Asked()
            limits = LimitsMiddleware(app, Settings(requests_at_once=2))
            waiting = [asyncio.create_task(ask(limits, scope_of("/wait", f"192.0.2.{n}"))) for n in (1, 2)]
            await self.wait_for(app, 2)
            answer = await ask(limits, scope_of(client="192.0.2.3"))
            refused(answer, 503, "GEOCENTROIDS_REQUESTS_AT_ONCE")
            assert answer.headers["retry-after"] == "1"
            assert (await ask(limits, scope_of("/healthz"))).status == 200
            app.gate.set()
            await asyncio.gather(*waiting)
            assert (await ask(limits, scope_of())).status == 200

        asyncio.run(check())

    def test_a_request_that_is_cancelled_counts_no_more(self) -> None:
        async def check() -> None:
            app = Asked()
            limits = LimitsMiddleware(app, Settings(client_requests=1))
            waiting = asyncio.create_task(ask(limits, scope_of("/wait")))
            await self.wait_for(app, 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert limits.clients == {}

        asyncio.run(check())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::2", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_what_one_client_is(one: str, other: str, same: bool) -> None:
    assert (client_of(scope_of(client=one)) == client_of(scope_of(client=other))) is same


def test_without_an_address_there_is_no_client() -> None:
    assert client_of(scope_of(client=None)) is None
    limits = LimitsMiddleware(Asked(), Settings(client_requests=1))
    assert asyncio.run(ask(limits, scope_of(client=None))).status == 200
    assert limits.clients == {}


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    """The application as ``serve`` runs it."""
    settings = Settings(max_target_bytes=2048, max_header_bytes=4096, max_body_bytes=4096)
    config = uvicorn.Config(create_app(settings), port=0, log_level="critical", **_protocol(settings))
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    until(lambda: running.started)
    yield running
    running.should_exit = True
    thread.join()


class TestOverTheNetwork:
    """Through uvicorn, which has limits of its own."""

    def address(self, server: uvicorn.Server) -> tuple[str, int]:
        return server.servers[0].sockets[0].getsockname()[:2]

    def url(self, server: uvicorn.Server) -> str:
        return "http://{}:{}".format(*self.address(server))

    @pytest.mark.parametrize(
        ("path", "headers", "status"),
        [
            ("/healthz", {"X-Long": "x" * 5000}, 431),
            ("/healthz?q=" + "x" * 3000, {}, 414),
            ("/healthz", {"X-Long": "x" * 3000}, 200),
        ],
    )
    def test_what_people_get(self, server: uvicorn.Server, path: str, headers: dict[str, str], status: int) -> None:
        answer = httpx.get(self.url(server) + path, headers=headers)
        assert answer.status_code == status
        if status != 200:
            assert "GEOCENTROIDS_" in answer.json()["detail"]
            assert answer.headers["x-content-type-options"] == "nosniff"

    def test_headers_without_an_end_are_not_collected(self, server: uvicorn.Server) -> None:
        with socket.create_connection(self.address(server), PATIENCE_S) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 20_000)
            assert connection.recv(12) == b"HTTP/1.1 400"

    def test_a_body_without_a_length(self, server: uvicorn.Server) -> None:
        def pieces() -> Iterator[bytes]:
            for _ in range(8):
                yield b"x" * 1000

        answer = httpx.post(self.url(server) + "/cog/geocentroids/statistics?url=a.tif", content=pieces())
        assert answer.status_code == 413
        assert "4096 bytes" in answer.json()["detail"]
        assert httpx.get(self.url(server) + "/healthz").status_code == 200

    def test_a_page_of_another_origin_may_read_why(self, server: uvicorn.Server) -> None:
        headers = {"Origin": "https://example.org", "X-Long": "x" * 5000}
        answer = httpx.get(self.url(server) + "/healthz", headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (431, "*")


def test_statuses_are_documented() -> None:
    app = create_app(Settings())
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            missing = {"400", "401", "404", "413", "414", "422", "429", "431", "503"} - set(operation["responses"])
            assert not missing, (method, path)
    app.state.service.close()
