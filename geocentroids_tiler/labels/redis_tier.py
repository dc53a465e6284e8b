"""Labels of chunks in a Redis that machines share.

A Redis that is away must cost nothing: calls wait half a second at most, and after one that failed it is left alone for
some seconds, in which everything is a miss at once. Its address may hold a password, so no error text of the client is
shown or logged, only its kind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.labels.store import ChunkKey, ChunkLabels
from geocentroids_tiler.labels.tiers import (
    FORMAT_VERSION,
    Tally,
    batches,
    decode_labels,
    encode_labels,
    key_digest,
)

logger = logging.getLogger(__name__)

TIMEOUT_S = 0.5
"""Longest wait for a connection, and for each piece of an answer."""
PAUSE_S = 5.0
"""How long a Redis that failed is left alone."""
KEY_PREFIX = b"geocentroids:labels:%d:" % FORMAT_VERSION

T = TypeVar("T")
_FAILURES = (redis.RedisError, OSError, ValueError)
"""ValueError is what the client raises for an answer that is not Redis."""


class Breaker:
    """Leaves something alone for a while after it failed. Safe for threads."""

    def __init__(self, pause_s: float, clock: Callable[[], float]) -> None:
        self._pause_s = pause_s
        self._clock = clock
        self._lock = threading.Lock()
        self._until: float | None = None

    @property
    def open(self) -> bool:
        """Whether it failed and has not succeeded since."""
        return self._until is not None

    def allows(self) -> bool:
        """Tell whether to try now. After the pause one caller may, and the others when it has succeeded."""
        with self._lock:
            if self._until is None:
                return True
            if self._clock() < self._until:
                return False
            self._until = self._clock() + self._pause_s
            return True

    def failed(self) -> bool:
        """Begin a pause; true if all was well before."""
        with self._lock:
            first = self._until is None
            self._until = self._clock() + self._pause_s
            return first

    def succeeded(self) -> bool:
        """End the outage; true if there was one."""
        with self._lock:
            ended = self._until is not None
            self._until = None
            return ended


class RedisTier:
    """A label store in Redis. Safe for threads."""

    name = "redis"
    nbytes = 0
    """Nothing on this machine."""

    def __init__(self, url: str, ttl_s: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Talk to the Redis at ``url`` (redis:// or rediss://), and let it forget labels after ``ttl_s`` seconds.

        No connection is made yet: a Redis that is away keeps nothing from starting.

        Raises:
            InputError: if the address cannot be understood.
        """
        try:
            parts = urlsplit(url)
            self._where = f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
            self._client: Any = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
            self._client.connection_pool.make_connection()  # without connecting: finds unknown options of the address
        except (*_FAILURES, TypeError):
            raise InputError("GEOCENTROIDS_REDIS_URL is no address of a Redis that can be understood") from None
        self._ttl_s = ttl_s
        self._errors = Tally()
        self._breaker = Breaker(PAUSE_S, clock)
        self._refuses_writes = False
        self._closed = False

    @property
    def errors(self) -> int:
        """Calls that failed, writes refused and values that could not be read, since the start."""
        return self._errors.count

    @property
    def away(self) -> bool:
        """Whether it could not be reached when it was last asked."""
        return self._breaker.open

    def get_many(self, keys: Sequence[ChunkKey]) -> list[ChunkLabels | None]:
        """Return the labels of each key, None where there are none that can be read."""
        found: list[ChunkLabels | None] = []
        for batch in batches(keys):
            digests = [key_digest(key) for key in batch]
            nothing: list[object] = [None] * len(digests)
            values = self._attempt(partial(self._read, digests), nothing)
            for digest, value in zip(digests, values, strict=True):
                chunk = decode_labels(digest, value) if isinstance(value, bytes) else None
                self._errors.add(value is not None and chunk is None)
                found.append(chunk)
        return found

    def put_many(self, items: Sequence[tuple[ChunkKey, ChunkLabels]]) -> None:
        """Keep labels for the time to live; what Redis does not take is dropped and counted.

        Raises:
            ValueError: if labels are not what ``encode_labels`` takes.
        """
        for batch in batches(items):
            entries = [(digest := key_digest(key), encode_labels(digest, chunk)) for key, chunk in batch]
            self._attempt(partial(self._write, entries), None)

    def close(self) -> None:
        """Close connections that are not in use."""
        self._closed = True
        self._client.close()

    def _read(self, digests: Sequence[bytes]) -> list[object]:
        values = self._client.mget([KEY_PREFIX + digest for digest in digests])
        if not isinstance(values, list) or len(values) != len(digests):
            raise ValueError("not the answer to MGET")
        return values

    def _write(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Write entries. One that Redis refuses, for example because it is full, is no reason not to read from it."""
        pipeline = self._client.pipeline(transaction=False)
        for digest, value in entries:
            pipeline.set(KEY_PREFIX + digest, value, ex=self._ttl_s)
        refusals = [answer for answer in pipeline.execute(raise_on_error=False) if isinstance(answer, Exception)]
        self._errors.add(len(refusals))
        if refusals and not self._refuses_writes:
            logger.warning("Redis at %s refuses labels: %s", self._where, type(refusals[0]).__name__)
        self._refuses_writes = bool(refusals)

    def _attempt(self, work: Callable[[], T], otherwise: T) -> T:
        """Do something with Redis; where it fails or is left alone, return ``otherwise``."""
        if self._closed or not self._breaker.allows():
            return otherwise
        try:
            result = work()
        except _FAILURES as error:
            self._errors.add()
            self._client.connection_pool.disconnect(inuse_connections=False)  # an answer may still be on its way
            if self._breaker.failed():
                logger.warning("Redis at %s is away: %s; labels are computed", self._where, type(error).__name__)
            return otherwise
        if self._breaker.succeeded():
            logger.info("Redis at %s is back", self._where)
        return result
