"""Mosaics in memory: read, their images placed, and asked again whether they changed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import shapely
from cachetools import LRUCache

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import GeocentroidsError, MosaicError, SourceUnavailableError
from geocentroids_tiler.grid import WGS84, authority_code, outline, wrap_longitude
from geocentroids_tiler.labels.futures import then
from geocentroids_tiler.labels.host_queues import HostQueues
from geocentroids_tiler.labels.once import Once, Work
from geocentroids_tiler.labels.recent_failures import RecentFailures
from geocentroids_tiler.mosaic import Document, Member, Mosaic, Problem, box, read_document
from geocentroids_tiler.pools import full_pool
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Dataset, Deadline, ReadOptions, Source

CACHE_BYTES = 256 * 2**20
"""Memory for mosaics, as they are estimated; one of as many images as a setting allows fits in."""
MEMBER_BYTES, VERTEX_BYTES = 1500, 16
"""An image of a mosaic in memory: address, shape, date, its share in the tree; and each vertex of its shape."""
THREADS, HOST_THREADS = 16, 2
"""Documents that are read at once, and those of them that come from one host."""
MAX_PAGES = 1000
MAX_PROBLEMS = 1000
"""Images of one mosaic that are known to be broken; further ones are left out unmentioned."""

_Key = tuple[str, ReadOptions, str]


@dataclass(frozen=True)
class _Read:
    mosaic: Mosaic
    digest: str
    asked_at: float


class Mosaics:
    """Reads mosaics and keeps them. Safe for threads.

    Args:
        settings: bound their size.
        source: from a URL to a source that may be opened.
        dataset: opens an image.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        source: Callable[[str], Source],
        dataset: Callable[[str, ReadOptions, Codebook], Future[Dataset]],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._source = source
        self._dataset = dataset
        self._clock = clock
        self._lock = threading.Lock()
        self.cache: ByteCache[_Key, _Read] = ByteCache(CACHE_BYTES, _bytes_of)
        self._reading: Once[_Key, _Read] = Once(_Fresh(self))
        self._failures = RecentFailures(settings.failure_ttl_s)
        self._problems: LRUCache[str, dict[str, str]] = LRUCache(MAX_PROBLEMS)
        self._pool = full_pool(THREADS, "geocentroids-mosaic")
        self._by_host = HostQueues(self._pool, HOST_THREADS)

    def close(self) -> None:
        """End all threads."""
        self._pool.shutdown(cancel_futures=True)

    def known(self, url: str, options: ReadOptions, codebook: Codebook) -> Mosaic | None:
        """Return a mosaic that is in memory and was asked for not long ago, or None."""
        read = self.fresh((url, options, codebook.digest))
        return None if read is None else read.mosaic

    def get(self, url: str, options: ReadOptions, codebook: Codebook) -> Future[Mosaic]:
        """Return a mosaic, read or known.

        Images of which its document does not say where they lie are opened to find out, up to a number of them.

        Args:
            url: of the document.
            options: how its images are read.
            codebook: what they are opened for.

        Raises:
            SourceRefusedError: if the policy forbids the URL.
            SourceUnavailableError: if a local file does not exist.
        """
        source = self._source(url)
        key = (url, options, codebook.digest)
        self._failures.check(key, self._clock())

        def read() -> _Read:
            try:
                return self._read(source, options, codebook, self.cache.peek(key))
            except GeocentroidsError as error:
                self._failures.remember(key, error, self._clock())
                raise

        def start(work: Work[_Read]) -> None:
            self._by_host.submit(source.host, read).add_done_callback(
                lambda done: work.go_on(lambda: work.finish(done.result()))
            )

        return then(self._reading.get(key, start), lambda found: found.mosaic)

    def fresh(self, key: _Key) -> _Read | None:
        """Return what was read not long ago, or None."""
        read = self.cache.get(key)
        return read if read is not None and self._clock() - read.asked_at < self._settings.source_ttl_s else None

    def fresh_until(self, mosaic: Mosaic, options: ReadOptions, codebook: Codebook) -> float | None:
        """Return when, by the clock, a mosaic's document has to be asked for again; None if it was not kept."""
        read = self.cache.peek((mosaic.url, options, codebook.digest))
        return None if read is None else read.asked_at + self._settings.source_ttl_s

    def note(self, mosaic: Mosaic, url: str, reason: str | None) -> None:
        """Remember that an image of a mosaic cannot be used, or with no reason that it can."""
        with self._lock:
            known = self._problems.setdefault(mosaic.identity, {})
            if reason is None:
                known.pop(url, None)
            elif len(known) < MAX_PROBLEMS:
                known[url] = reason

    def problems(self, mosaic: Mosaic) -> list[Problem]:
        """Return the images of a mosaic that are known not to be usable, and why."""
        with self._lock:
            later = dict(self._problems.get(mosaic.identity, {}))
        found = {problem.url: problem.reason for problem in mosaic.problems} | later
        return [Problem(url, reason) for url, reason in found.items()]

    def _read(self, source: Source, options: ReadOptions, codebook: Codebook, known: _Read | None) -> _Read:
        asked_at = self._clock()
        documents, digest = self._documents(source)
        members = _in_order(documents)
        if source.remote is None and self._settings.root is not None:
            members = [_below(member, self._settings.root) for member in members]
        placeless = any(member.footprint is None for member in members)
        if known is not None and known.digest == digest and not placeless:
            return _Read(known.mosaic, digest, asked_at)
        # Those without a place are asked anew each time: they may have moved, or be there again.
        placed, problems = self._placed(members, options, codebook)
        if not placed:
            reasons = "; ".join(f"{problem.url}: {problem.reason}" for problem in problems[:3])
            raise MosaicError(f"none of the {len(members)} images of {source.url!r} can be used ({reasons})")
        made_of = [
            source.url,
            digest,
            repr(options),
            codebook.digest,
            *(f"{each.url} {each.footprint}" for each in placed),
        ]
        identity = hashlib.sha256("\n".join(made_of).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        if known is not None and known.mosaic.identity == identity and known.mosaic.problems == problems:
            return _Read(known.mosaic, digest, asked_at)
        patch_m = codebook.manifest.preprocess.gsd_m * codebook.manifest.encoder.patch_px
        mosaic = Mosaic(source.url, identity, placed, patch_m, problems)
        mosaic.prepare()
        if not mosaic.zones:
            raise MosaicError(f"none of the images of {source.url!r} lies where UTM is defined (80 S to 84 N)")
        return _Read(mosaic, digest, asked_at)

    def _documents(self, source: Source) -> tuple[list[Document], str]:
        """Read a document, and the further pages of a search, all within the time and the bytes of one."""
        documents: list[Document] = []
        hashed = hashlib.sha256()
        seen: set[str] = set()
        url: str | None = source.url
        deadline = Deadline(self._settings.source_total_timeout_s)
        images, left_bytes = self._settings.mosaic_images, self._settings.mosaic_bytes
        while url is not None:
            if url in seen or len(seen) >= MAX_PAGES:
                raise MosaicError(f"the pages of {source.url!r} do not end")
            seen.add(url)
            content = self._content(source if url == source.url else self._source(url), left_bytes, deadline)
            hashed.update(content)
            page = read_document(content, url, self._settings.mosaic_bytes, images)
            documents.append(page)
            images, left_bytes = images - len(page.members), left_bytes - len(content)
            url = page.next_url
        if not any(document.members for document in documents):
            raise MosaicError(f"{source.url!r} names no image")
        return documents, hashed.hexdigest()

    def _content(self, source: Source, max_bytes: int, deadline: Deadline) -> bytes:
        if source.remote is not None:
            return source.remote.document(source.url, max_bytes, deadline)
        try:
            with Path(source.path or "").open("rb") as file:
                content = file.read(max_bytes + 1)
        except OSError as error:
            raise SourceUnavailableError(f"cannot open {source.url!r}") from error
        if len(content) > max_bytes:
            raise MosaicError(f"{source.url!r} has more than {max_bytes} bytes (GEOCENTROIDS_MOSAIC_BYTES)")
        return content

    def _placed(
        self, members: list[Member], options: ReadOptions, codebook: Codebook
    ) -> tuple[tuple[Member, ...], tuple[Problem, ...]]:
        """Open the images whose place is not known."""
        unknown = [member for member in members if member.footprint is None]
        limit = self._settings.mosaic_unplaced
        if len(unknown) > limit:
            raise MosaicError(
                f"it is not said where {len(unknown)} of the {len(members)} images lie, and this server opens at most "
                f"{limit} to find out; name them with their bounds (a table with west,south,east,north, or STAC items)"
            )
        opening = {member.url: self._try_open(member.url, options, codebook) for member in unknown}
        placed, problems = [], []
        for member in members:
            if member.footprint is None:
                try:
                    member = _placed_at(member, opening[member.url].result())
                except GeocentroidsError as error:
                    problems.append(Problem(member.url, str(error)))
                    continue
            placed.append(member)
        return tuple(placed), tuple(problems)

    def _try_open(self, url: str, options: ReadOptions, codebook: Codebook) -> Future[Dataset]:
        try:
            return self._dataset(url, options, codebook)
        except GeocentroidsError as error:
            failed: Future[Dataset] = Future()
            failed.set_exception(error)
            return failed


class _Fresh:
    """Those of the mosaics in memory that were asked for not long ago."""

    def __init__(self, mosaics: Mosaics) -> None:
        self.get = mosaics.fresh
        self.put = mosaics.cache.put


def _in_order(documents: list[Document]) -> list[Member]:
    """Return the images of all pages, each once, where it is named first."""
    found: dict[str, Member] = {}
    for document in documents:
        for member in document.members:
            found.setdefault(member.url, member)
    return list(found.values())


def _below(member: Member, root: Path) -> Member:
    """Return a member of a local document with its whole path, if it has one, as a path below the root folder."""
    if not member.url.startswith("/"):
        return member
    for folder in (root.absolute(), root.resolve()):
        if Path(member.url).is_relative_to(folder):
            return replace(member, url=Path(member.url).relative_to(folder).as_posix())
    return member


def _placed_at(member: Member, dataset: Dataset) -> Member:
    """Return a member with what its image's header says."""
    points = outline(dataset.crs, dataset.transform, dataset.width_px, dataset.height_px, WGS84)
    lon = points[0, 0] + (points[:, 0] - points[0, 0] + 180) % 360 - 180  # no jump along the edge
    west, east = (wrap_longitude(float(value)) for value in (lon.min(), lon.max()))
    south, north = float(points[:, 1].min()), float(points[:, 1].max())
    return replace(
        member,
        footprint=box((west, south, east, north), member.url),
        crs=member.crs or authority_code(dataset.crs),
    )


def _bytes_of(read: _Read) -> int:
    members = read.mosaic.members
    vertices = int(shapely.get_num_coordinates([member.footprint for member in members]).sum())
    return MEMBER_BYTES * (1 + len(members) + len(read.mosaic.problems)) + VERTEX_BYTES * vertices
