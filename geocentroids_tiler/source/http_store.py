"""Bytes of a file on a web server, fetched so that the server cannot lead us anywhere else or hold us up.

A connection goes to an address that was looked at, whatever a name resolves to later. Redirects are followed here and
judged like the first URL. Nothing takes longer than its deadline. An answer is the range asked for, or an error.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import certifi
import httpcore
import httpx
from cachetools import LRUCache

from geocentroids_tiler import __version__
from geocentroids_tiler.errors import SourceRefusedError
from geocentroids_tiler.pools import full_pool
from geocentroids_tiler.source.addresses import Address, Resolver, checked, is_public, literal, resolve
from geocentroids_tiler.source.deadline import Deadline
from geocentroids_tiler.source.policy import RemotePolicy
from geocentroids_tiler.source.stores import Fetched, FetchError, SilentError, TooLargeError, identity_of

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 3
ATTEMPTS = 3
"""How often a request is made that meets a busy server or a connection that breaks."""
BACKOFF_S = 0.25
"""Wait before the second attempt where the server names none; doubled for the third."""
MAX_CONNECTIONS, MAX_IDLE_CONNECTIONS, IDLE_S = 512, 64, 30.0
RESOLVING = 16
"""Names resolved at once; a resolver cannot be given up, so a slow one holds its thread."""
MAX_TARGETS = 4096
"""Redirects that are remembered."""
_DRAINED_BYTES = 16 * 1024
"""A redirect's own text is read up to this size, so that its connection can be used again."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({429, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_DELAY = re.compile(r"\d{1,6}")

_BROKEN = (httpcore.NetworkError, httpcore.ProtocolError)
_SILENT = (httpcore.TimeoutException, httpcore.ConnectError, TimeoutError)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How long a server is waited for, and how many connections it gets.

    Attributes:
        connect_s: until a connection stands, its name resolved.
        silence_s: between two pieces of an answer.
        host_connections: at once to one host.
    """

    connect_s: float = 5.0
    silence_s: float = 10.0
    host_connections: int = 8


class HttpStore:
    """Fetches byte ranges over HTTP. Safe for threads.

    Args:
        policy: which URLs and addresses are allowed.
        limits: patience.
        proxy: URL of a proxy that all requests go through; it resolves names itself, so an address that was looked
            at is not sure to be the one that it connects to. None: none, whatever the environment says.
        resolver: from names to addresses.
    """

    def __init__(
        self,
        policy: RemotePolicy,
        limits: HttpLimits | None = None,
        *,
        proxy: str | None = None,
        resolver: Resolver = resolve,
    ) -> None:
        self._policy = policy
        self._limits = limits or HttpLimits()
        self._proxy = proxy
        self._backend = _CheckedBackend(policy, resolver)
        self._slots = _HostSlots(self._limits.host_connections)
        self._lock = threading.Lock()
        self._targets: LRUCache[str, httpx.URL] = LRUCache(MAX_TARGETS)
        self._opened: httpcore.ConnectionPool | None = None

    def close(self) -> None:
        """Close all connections."""
        if self._opened is not None:
            self._opened.close()
        self._backend.close()

    def fetch(self, url: str, start: int, stop: int, deadline: Deadline, *, ask_again: bool = False) -> Fetched:
        """Fetch one range of bytes; see ``ByteStore.fetch``."""
        headers = [("Range", f"bytes={start}-{stop - 1}")]
        return self._attempts(url, headers, lambda answer: _read(answer, start, stop), deadline, ask_again=ask_again)

    def fetch_all(self, url: str, max_bytes: int, deadline: Deadline) -> bytes:
        """Fetch a whole file; see ``ByteStore.fetch_all``."""
        return self._attempts(url, [], lambda answer: _read_all(answer, max_bytes), deadline, ask_again=True)

    def _attempts(
        self,
        url: str,
        headers: Sequence[tuple[str, str]],
        read: Callable[[httpcore.Response], T],
        deadline: Deadline,
        *,
        ask_again: bool,
    ) -> T:
        """Make a request, more than once where that may help, and return what ``read`` makes of the answer."""
        first = httpx.URL(url)
        with self._lock:
            target = first if ask_again else self._targets.get(url, first)
        for attempt in range(ATTEMPTS):
            problem: Exception
            try:
                return self._follow(url, target, headers, read, deadline)
            except _AnswerError as error:
                problem, wait_s = error, error.wait_s
                if wait_s is None and target != first:
                    target = first  # a redirect's target holds for a while only
                    continue
            except _SILENT as error:
                raise SilentError(_reason(error)) from error
            except _BROKEN as error:
                problem, wait_s = error, 0
            except (PermissionError, SourceRefusedError, httpx.InvalidURL, UnicodeError) as error:
                problem, wait_s = error, None
            if wait_s == 0:
                wait_s = BACKOFF_S * 2**attempt
            if wait_s is None or attempt + 1 == ATTEMPTS or not deadline.allows(wait_s):
                raise FetchError(_reason(problem)) from problem
            time.sleep(wait_s)
        raise FetchError("a redirect's target does not hold any more, and no attempt is left")

    def _connections(self) -> httpcore.ConnectionPool:
        """Return the pool of connections, opened when it is first needed: reading certificates takes its time."""
        with self._lock:
            if self._opened is None:
                context = ssl.create_default_context()
                context.load_verify_locations(certifi.where())
                shared: dict[str, Any] = {
                    "ssl_context": context,
                    "max_connections": MAX_CONNECTIONS,
                    "max_keepalive_connections": MAX_IDLE_CONNECTIONS,
                    "keepalive_expiry": IDLE_S,
                }
                self._opened = (
                    httpcore.ConnectionPool(network_backend=self._backend, **shared)
                    if self._proxy is None
                    else httpcore.HTTPProxy(self._proxy, network_backend=_TimedBackend(), **shared)
                )
            return self._opened

    def _follow(
        self,
        url: str,
        target: httpx.URL,
        headers: Sequence[tuple[str, str]],
        read: Callable[[httpcore.Response], T],
        deadline: Deadline,
    ) -> T:
        """Make one attempt, over as many redirects as are allowed."""
        first = target
        for _ in range(MAX_REDIRECTS + 1):
            self._policy.check(target)
            if self._proxy is not None:
                self._backend.addresses(target.host, _port(target), deadline.within(self._limits.connect_s))
            with self._answer(target, headers, deadline) as response:
                if response.status in _REDIRECTS:
                    target = _followed(target, response)
                    continue
                found = read(response)
            if target != first:
                with self._lock:
                    self._targets[url] = target
            return found
        raise _AnswerError(f"more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def _answer(
        self, target: httpx.URL, more: Sequence[tuple[str, str]], deadline: Deadline
    ) -> Iterator[httpcore.Response]:
        limits = self._limits
        headers = [
            ("Host", target.netloc.decode("ascii")),
            ("User-Agent", f"geocentroids-tiler/{__version__}"),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),  # offsets in a compressed stream are not offsets in the file
            *more,
        ]
        timeout = {
            "connect": limits.connect_s,
            "read": limits.silence_s,
            "write": limits.silence_s,
            "pool": deadline.left_s(),
        }
        place = httpcore.URL(
            scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path or b"/"
        )
        with (
            self._slots.one(f"{target.host}:{_port(target)}", deadline),
            _deadline_of_thread(deadline),
            self._connections().stream("GET", place, headers=headers, extensions={"timeout": timeout}) as response,
        ):
            yield response


class _AnswerError(Exception):
    """An answer that is not the range that was asked for.

    Attributes:
        wait_s: when another attempt may end better, 0 where the server does not say; None: never.
    """

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def _followed(target: httpx.URL, response: httpcore.Response) -> httpx.URL:
    """Return where a redirect leads."""
    location = _header(response, b"location")
    if not location:
        raise _AnswerError("a redirect to nowhere")
    size = 0
    for piece in response.iter_stream():
        size += len(piece)
        if size > _DRAINED_BYTES:
            break
    # The fragment is the browser's business; a name and password are refused by the policy.
    return target.join(location).copy_with(fragment=None)


def _read(response: httpcore.Response, start: int, stop: int) -> Fetched:
    """Read the range that was asked for, and not a byte more."""
    if response.status in _BUSY:
        raise _AnswerError(f"the server answered {response.status}", _retry_after_s(response))
    if response.status == 200:
        raise _AnswerError("the server does not answer range requests")
    if response.status != 206:
        raise _AnswerError(f"the server answered {response.status}")
    if _header(response, b"content-encoding") not in ("", "identity"):
        raise _AnswerError("the answer is compressed")
    found = _CONTENT_RANGE.fullmatch(_header(response, b"content-range"))
    if found is None:
        raise _AnswerError("the answer does not say which range it is, and of how many bytes")
    first, last, total = (int(number) for number in found.groups())
    if first != start or last + 1 != min(stop, total):
        raise _AnswerError(f"bytes {start} to {stop - 1} were asked for, {first} to {last} of {total} came")
    data = bytearray()
    for piece in response.iter_stream():
        data += piece
        if len(data) > last + 1 - first:
            break
    if len(data) != last + 1 - first:
        raise _AnswerError(f"{last + 1 - first} bytes were announced, {len(data)} or more came", 0.0)
    identity = identity_of(_header(response, b"etag"), _header(response, b"last-modified"), total)
    return Fetched(identity, bytes(data))


def _read_all(response: httpcore.Response, max_bytes: int) -> bytes:
    """Read a whole answer of a bounded size."""
    if response.status in _BUSY:
        raise _AnswerError(f"the server answered {response.status}", _retry_after_s(response))
    if response.status != 200:
        raise _AnswerError(f"the server answered {response.status}")
    if _header(response, b"content-encoding") not in ("", "identity"):
        raise _AnswerError("the answer is compressed")
    data = bytearray()
    for piece in response.iter_stream():
        data += piece
        if len(data) > max_bytes:
            raise TooLargeError(f"it has more than {max_bytes} bytes")
    return bytes(data)


def _header(response: httpcore.Response, name: bytes) -> str:
    return next((value.decode("latin-1").strip() for key, value in response.headers if key.lower() == name), "")


def _retry_after_s(response: httpcore.Response) -> float:
    """Return how long the server asks to be left alone; 0 if it does not say."""
    text = _header(response, b"retry-after")
    if _DELAY.fullmatch(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _port(target: httpx.URL) -> int:
    return target.port or (443 if target.scheme == "https" else 80)


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, _AnswerError) else f"{type(error).__name__} {error}".strip()


class _HostSlots:
    """At most so many requests to one host at once; hosts that nobody asks take no memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._hosts: dict[str, tuple[threading.Semaphore, int]] = {}

    @contextmanager
    def one(self, host: str, deadline: Deadline) -> Iterator[None]:
        with self._lock:
            semaphore, users = self._hosts.get(host) or (threading.Semaphore(self._limit), 0)
            self._hosts[host] = semaphore, users + 1
        taken = False
        try:
            taken = semaphore.acquire(timeout=deadline.left_s())
            if not taken:
                raise TimeoutError("too many requests to this host wait already")
            yield
        finally:
            if taken:
                semaphore.release()
            with self._lock:
                semaphore, users = self._hosts[host]
                if users == 1:
                    del self._hosts[host]
                else:
                    self._hosts[host] = semaphore, users - 1


_thread = threading.local()


@contextmanager
def _deadline_of_thread(deadline: Deadline) -> Iterator[None]:
    """Bound all that this thread waits for on connections, whose library knows of single steps only."""
    _thread.deadline = deadline
    try:
        yield
    finally:
        _thread.deadline = None


def _within(seconds: float | None, error: type[httpcore.TimeoutException]) -> float | None:
    deadline: Deadline | None = getattr(_thread, "deadline", None)
    if deadline is None:
        return seconds
    try:
        return deadline.within(seconds)
    except TimeoutError as over:
        raise error(str(over)) from over


class _TimedStream(httpcore.NetworkStream):
    """A connection on which no step goes beyond the thread's deadline: a server may send a byte a second for ever."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _within(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _within(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _TimedStream(
            self._stream.start_tls(ssl_context, server_hostname, _within(timeout, httpcore.ConnectTimeout))
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _TimedBackend(httpcore.NetworkBackend):
    """Connects wherever it is told to: to the operator's proxy."""

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        limit = Deadline(_within(timeout, httpcore.ConnectTimeout) or 0.0)
        problem: Exception = httpcore.ConnectError(f"{host} has no address")
        for place in self.places(host, port, limit.left_s()):
            try:
                stream = self._inner.connect_tcp(place, port, limit.left_s(), local_address, socket_options)
                return _TimedStream(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
        raise problem

    def places(self, host: str, port: int, timeout_s: float) -> list[str]:
        """Return what to connect to for a host, one after the other until one answers."""
        return [host]


class _CheckedBackend(_TimedBackend):
    """Connects to hosts all of whose addresses are allowed, at one of the addresses that were looked at."""

    def __init__(self, policy: RemotePolicy, resolver: Resolver) -> None:
        super().__init__()
        self._policy = policy
        self._resolver = resolver
        self._resolving = full_pool(RESOLVING, "geocentroids-resolve")

    def close(self) -> None:
        self._resolving.shutdown(cancel_futures=True)

    def places(self, host: str, port: int, timeout_s: float) -> list[str]:
        """Return the addresses of a host, all of which are allowed; raises as ``addresses`` does."""
        return [str(address) for address in self.addresses(host, port, timeout_s)]

    def addresses(self, host: str, port: int, timeout_s: float) -> list[Address]:
        """Return the addresses of a host, all of which are allowed.

        Raises:
            PermissionError: if one is not.
            httpcore.ConnectError: if it has none.
            httpcore.ConnectTimeout: if the resolver is too slow.
        """
        own = literal(host)
        if own is None:
            asked = self._resolving.submit(lambda: list(self._resolver(host, port)))
            try:
                texts = asked.result(timeout_s)
            except FutureTimeoutError as error:
                asked.cancel()
                raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from error
            except (OSError, UnicodeError) as error:
                raise httpcore.ConnectError(f"{host} has no address: {error}") from error
        else:
            texts = [str(own)]
        addresses = checked(texts, self._policy.networks)
        if port not in self._policy.ports and any(is_public(address) for address in addresses):
            raise PermissionError(f"port {port} is not allowed")
        return addresses
