"""Stores of labels below the memory: what they promise, the form they keep labels in, and several as one.

Labels are kept under a digest of their key, so a source's address is in no store, and in a form of their own that is
checked as a whole when it is read. What cannot be read is a miss, never wrong labels.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from itertools import islice
from numbers import Integral, Real
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler import __version__
from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.labels.store import ChunkKey, ChunkLabels
from geocentroids_tiler.settings import Settings

FORMAT_VERSION = 1
"""Of keys, stored values and the layout of stores. Another one is never read."""
DIGEST_BYTES = 16
"""Of SHA-256: 2^64 keys made on purpose until two are alike."""
MAX_KEYS_PER_CALL = 512
"""Keys that a store handles at a time, so that no transaction and no answer grows large."""
MAX_SIDE = 1024
"""Patches along a stored chunk; codebooks have 8 to 30."""

_HEADER = struct.Struct("<BBH8s")
"""Version, kind, patches along a side, checksum."""
_NO_DATA, _PLANES = 0, 1
_NAN_BITS = np.uint32(0x7FC00000)
"""The NaN that numpy writes."""
_DIGESTS_REMEMBERED = 8192
_REMEDY = "pip install 'geocentroids-tiler[store]'"

T = TypeVar("T")


class LabelTier(Protocol):
    """A store of labels slower than memory. Safe for threads.

    What goes wrong in it is counted and otherwise a miss or a write that is dropped: these methods raise nothing that
    a disk or a network can cause. They wait for a disk or a network, so an event loop never calls them.
    """

    @property
    def name(self) -> str:
        """What metrics call it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes taken on this machine; 0 if unknown."""
        ...

    @property
    def errors(self) -> int:
        """Calls that failed and values that could not be read, since the start."""
        ...

    @property
    def away(self) -> bool:
        """Whether it could not be reached when it was last asked, so that labels are computed meanwhile."""
        ...

    def get_many(self, keys: Sequence[ChunkKey]) -> list[ChunkLabels | None]:
        """Return the labels of each key, None where there are none."""
        ...

    def put_many(self, items: Sequence[tuple[ChunkKey, ChunkLabels]]) -> None:
        """Keep labels."""
        ...

    def close(self) -> None:
        """Let go of files and connections; afterwards every call is a miss."""
        ...


class Tally:
    """A number that threads count up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self, count: int = 1) -> None:
        """Count ``count`` more."""
        with self._lock:
            self._count += count

    @property
    def count(self) -> int:
        """The number so far."""
        return self._count


@dataclass(frozen=True, slots=True)
class TierFigures:
    """What a store did since the start, and what it takes.

    Attributes:
        name: of the store.
        hits: keys found.
        misses: keys looked for and not found.
        errors: calls that failed and values that could not be read.
        nbytes: bytes taken on this machine; 0 if unknown.
        away: whether it could not be reached when it was last asked.
    """

    name: str
    hits: int
    misses: int
    errors: int
    nbytes: int
    away: bool


class TierChain:
    """Stores one behind the other, the fastest first. Safe for threads."""

    def __init__(self, tiers: Sequence[LabelTier]) -> None:
        self.tiers = tuple(tiers)
        self._hits = [Tally() for _ in self.tiers]
        self._misses = [Tally() for _ in self.tiers]

    def get_many(self, keys: Sequence[ChunkKey]) -> list[ChunkLabels | None]:
        """Return the labels of each key from the first store that has them; the stores before it get them, too."""
        found: list[ChunkLabels | None] = [None] * len(keys)
        missing = list(range(len(keys)))
        for depth, tier in enumerate(self.tiers):
            if not missing:
                break
            for i, chunk in zip(missing, tier.get_many([keys[i] for i in missing]), strict=True):
                found[i] = chunk
            here = [(keys[i], chunk) for i in missing if (chunk := found[i]) is not None]
            missing = [i for i in missing if found[i] is None]
            self._hits[depth].add(len(here))
            self._misses[depth].add(len(missing))
            if here:
                for before in self.tiers[:depth]:
                    before.put_many(here)
        return found

    def put_many(self, items: Sequence[tuple[ChunkKey, ChunkLabels]]) -> None:
        """Keep labels in every store."""
        for tier in self.tiers:
            tier.put_many(items)

    def figures(self) -> list[TierFigures]:
        """Return what each store did, in the order they are asked."""
        return [
            TierFigures(tier.name, hits.count, misses.count, tier.errors, tier.nbytes, tier.away)
            for tier, hits, misses in zip(self.tiers, self._hits, self._misses, strict=True)
        ]

    def close(self) -> None:
        """Close every store."""
        for tier in self.tiers:
            tier.close()


def open_tiers(settings: Settings) -> TierChain | None:
    """Open the stores that the settings name: LMDB in front of Redis. None where they name none.

    Raises:
        InputError: if a store cannot be used as set, or what it needs is not installed.
    """
    tiers: list[LabelTier] = []
    try:
        if settings.label_store_dir is not None:
            try:
                from geocentroids_tiler.labels.lmdb_tier import LmdbTier
            except ModuleNotFoundError as error:
                raise InputError(f"GEOCENTROIDS_LABEL_STORE_DIR needs the package lmdb: {_REMEDY}") from error
            tiers.append(LmdbTier(settings.label_store_dir, settings.label_store_bytes))
        if settings.redis_url is not None:
            try:
                from geocentroids_tiler.labels.redis_tier import RedisTier
            except ModuleNotFoundError as error:
                raise InputError(f"GEOCENTROIDS_REDIS_URL needs the package redis: {_REMEDY}") from error
            tiers.append(RedisTier(settings.redis_url.get_secret_value(), settings.redis_ttl_s))
    except InputError:
        TierChain(tiers).close()
        raise
    return TierChain(tiers) if tiers else None


@lru_cache(_DIGESTS_REMEMBERED)
def key_digest(key: ChunkKey) -> bytes:
    """Return what a key is called in stores: ``DIGEST_BYTES`` bytes.

    All fields of the key are in it, whatever fields it has, and the release of this package: another one may compute
    other labels. Keys that are equal have the same digest.

    Raises:
        TypeError: if a field is of a type that has no canonical form here.
    """
    text = _canonical(("geocentroids labels", FORMAT_VERSION, __version__, key))
    return hashlib.sha256(text).digest()[:DIGEST_BYTES]


def encode_labels(digest: bytes, chunk: ChunkLabels) -> bytes:
    """Return labels as they are stored under ``digest``.

    After the header come the bytes of all labels and similarities in planes, most significant first: likeness of
    neighbours is in the first four, which are compressed; the last two of similarities are noise. Measured with the
    embedded codebook: 65 % of the arrays' bytes, against 71 % with all planes compressed, in less time. A chunk
    without data is a header alone.

    Raises:
        ValueError: if the arrays are not square, of one shape, of their types, or larger than ``MAX_SIDE``.
    """
    side = len(chunk.labels)
    if not chunk.labels.shape == chunk.similarity.shape == (side, side) or not 1 <= side <= MAX_SIDE:
        raise ValueError(f"labels {chunk.labels.shape}, similarity {chunk.similarity.shape}: not square or too large")
    if chunk.labels.dtype != np.dtype(np.uint16) or chunk.similarity.dtype != np.dtype(np.float32):
        raise ValueError(f"labels {chunk.labels.dtype}, similarity {chunk.similarity.dtype}: not uint16 and float32")
    if (chunk.labels == NODATA_LABEL).all() and (chunk.similarity.view(np.uint32) == _NAN_BITS).all():
        kind, body = _NO_DATA, b""
    else:
        labels = _to_planes(chunk.labels.astype(">u2", copy=False))
        similarity = _to_planes(chunk.similarity.astype(">f4", copy=False))
        kind = _PLANES
        body = zlib.compress(labels.tobytes() + similarity[:2].tobytes(), 1) + similarity[2:].tobytes()
    return _HEADER.pack(FORMAT_VERSION, kind, side, _checksum(digest, kind, side, body)) + body


def decode_labels(digest: bytes, value: bytes) -> ChunkLabels | None:
    """Return the labels that ``value`` holds, None unless it is whole and was stored under ``digest``."""
    if len(value) < _HEADER.size:
        return None
    version, kind, side, checksum = _HEADER.unpack_from(value)
    body = value[_HEADER.size :]
    if version != FORMAT_VERSION or not 1 <= side <= MAX_SIDE or checksum != _checksum(digest, kind, side, body):
        return None
    if kind == _NO_DATA and not body:
        return ChunkLabels.empty(side)
    count = side * side
    packed, noise = body[: -2 * count], body[-2 * count :]
    if kind != _PLANES or not packed:
        return None
    try:
        unpacking = zlib.decompressobj()
        planes = unpacking.decompress(packed, 4 * count) + noise
    except zlib.error:
        return None
    if not unpacking.eof or unpacking.unused_data or len(planes) != 6 * count:
        return None
    rows = np.frombuffer(planes, np.uint8).reshape(6, count)
    return ChunkLabels(
        _from_planes(rows[:2]).view(">u2").astype(np.uint16).reshape(side, side),
        _from_planes(rows[2:]).view(">f4").astype(np.float32).reshape(side, side),
    )


def batches(items: Sequence[T], size: int = MAX_KEYS_PER_CALL) -> Iterator[list[T]]:
    """Yield items in order, up to ``size`` at a time."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _canonical(value: object) -> bytes:
    """Return a form that no other value has, those equal to it left out: a type, a length, the content."""
    if value is None:
        tag, content = b"N", b""
    elif isinstance(value, str):
        tag, content = b"S", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, Integral):
        tag, content = b"I", b"%d" % int(value)
    elif isinstance(value, Real):
        number = float(value)
        if number.is_integer():  # 255.0 == 255
            tag, content = b"I", b"%d" % int(number)
        else:
            tag, content = b"F", number.hex().encode()
    elif isinstance(value, tuple):
        tag, content = b"T", b"".join(map(_canonical, value))
    elif is_dataclass(value):
        parts = (part for field in fields(value) for part in (field.name, getattr(value, field.name)))
        tag, content = b"D", b"".join(map(_canonical, parts))
    else:
        raise TypeError(f"a key may not hold {type(value).__name__}")
    return tag + len(content).to_bytes(8, "big") + content


def _checksum(digest: bytes, kind: int, side: int, body: bytes) -> bytes:
    hashed = hashlib.blake2b(digest, digest_size=8)
    hashed.update(bytes((FORMAT_VERSION, kind)) + side.to_bytes(2, "little"))
    hashed.update(body)
    return hashed.digest()


def _to_planes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return the bytes of big-endian numbers, of shape (itemsize, n), most significant first."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize).T


def _from_planes(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the bytes of each number one after the other, of shape (n * itemsize,)."""
    return np.ascontiguousarray(planes.T).reshape(-1)
