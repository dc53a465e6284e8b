"""Fetch files over the network: whole and verified, or not at all; what broke off goes on where it stopped."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from geocentroids_tiler import __version__
from geocentroids_tiler.errors import DownloadError

if TYPE_CHECKING:
    import httpx
    from huggingface_hub import HfApi

PART_SUFFIX = ".part"
CHUNK_BYTES = 2**18
CONNECT_TIMEOUT_S = 10.0
_BUSY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file must be.

    Attributes:
        sha256: SHA-256 of the content in hex, or None where it is not known.
        git_blob: git's object id of the content in hex (SHA-1 of a header with the size, then the content), or None.
    """

    sha256: str | None = None
    git_blob: str | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """How to go on after a transfer broke off.

    Attributes:
        attempts: attempts in a row that may fail without a new byte.
        wait_s: wait before the second attempt; doubled for each further one.
        timeout_s: longest silence of the server.
    """

    attempts: int = 4
    wait_s: float = 1.0
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files of a hub repository at one commit, on disk and verified.

    Attributes:
        commit: the commit, 40 hex digits.
        path: the folder that holds the files.
        files: their paths in the repository.
    """

    commit: str
    path: Path
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _HubFile:
    path: str
    size_bytes: int
    digest: Digest


class _InterruptedTransferError(Exception):
    """A transfer that another attempt may finish."""


def fetch_file(
    url: str, destination: Path, *, digest: Digest, max_bytes: int, retry: Retry | None = None, progress: bool = True
) -> Path:
    """Fetch one file to ``destination``, or leave it where it is there already and right.

    What has arrived is kept in ``destination`` + ``.part``, so that the next attempt, in this call or in a later one,
    asks for the rest only (Range with If-Range). A file with a wrong digest is dropped.

    Args:
        url: http(s) URL. Redirects are followed, but not from https to http.
        destination: where the file goes; its folder is made if need be.
        digest: what the content must be.
        max_bytes: size beyond which the file is refused.
        retry: what to do when the transfer breaks off.
        progress: show a progress bar on a terminal.

    Raises:
        DownloadError: if the file cannot be fetched or stored, or is not what was expected.
    """
    retry = retry or Retry()
    part = destination.with_name(destination.name + PART_SUFFIX)
    with storing(destination.parent):
        if destination.is_file() and digest_problem(destination, digest) is None:
            return destination
        destination.parent.mkdir(parents=True, exist_ok=True)
        _fetch_part(url, part, max_bytes, retry, progress)
        problem = digest_problem(part, digest)
        _validator_file(part).unlink(missing_ok=True)
        if problem is not None:
            part.unlink()
            raise DownloadError(f"{url} is not the expected file: it has {problem}; what was fetched has been removed")
        part.replace(destination)
    return destination


def fetch_snapshot(
    repo_id: str,
    *,
    patterns: Sequence[str],
    required: Sequence[str],
    max_bytes: int,
    revision: str | None = None,
    local_dir: Path | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    progress: bool = True,
) -> Snapshot:
    """Fetch some files of a Hugging Face Hub model repository at one commit and verify them against its listing.

    Args:
        repo_id: ``owner/name``.
        patterns: which files, as shell patterns over the path in the repository; others are not fetched.
        required: paths that the repository must have.
        max_bytes: size of all of them together beyond which they are refused.
        revision: branch, tag or commit; none: the head of the main branch. It is resolved to a commit first.
        local_dir: folder for the files; none: the hub's own cache.
        cache_dir: the cache, if not the usual one.
        endpoint: base URL of the hub, if not the usual one.
        progress: show progress bars on a terminal, and say which commit a revision stands for.

    Raises:
        DownloadError: if a file is missing, cannot be fetched or stored, or is not what the listing says.
    """
    with storing(local_dir or cache_dir or Path.home()), _hub_errors(repo_id):
        commit, files = _hub_listing(repo_id, revision, endpoint)
        if progress and revision != commit:
            tqdm.write(f"{repo_id}: {revision or 'main'} is commit {commit}", file=sys.stderr)
        wanted = [file for file in files if any(fnmatchcase(file.path, pattern) for pattern in patterns)]
        _check_listing(repo_id, wanted, required, max_bytes)
        hub = _hub()
        path = Path(
            hub.snapshot_download(
                repo_id,
                revision=commit,
                allow_patterns=list(patterns),
                local_dir=local_dir,
                cache_dir=cache_dir,
                endpoint=endpoint,
                tqdm_class=None if progress else _NoBar,
                library_name="geocentroids-tiler",
                library_version=__version__,
                max_workers=4,
            )
        )
        for file in wanted:
            _verify_hub_file(repo_id, path / file.path, file)
    return Snapshot(commit, path, tuple(file.path for file in wanted))


def cached_snapshot(
    repo_id: str, *, commit: str, required: Sequence[str], cache_dir: Path | None = None
) -> Snapshot | None:
    """Return a commit's files from the hub's cache, with no network, or None if one of ``required`` is not there."""
    found = [_hub().try_to_load_from_cache(repo_id, name, revision=commit, cache_dir=cache_dir) for name in required]
    if not all(isinstance(path, str) and Path(path).is_file() for path in found):
        return None
    return Snapshot(commit, Path(str(found[0])).parent, tuple(required))


def digest_problem(path: Path, digest: Digest) -> str | None:
    """Return what is wrong with a file's content, or None if it is what ``digest`` says."""
    if digest.sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest.sha256:
            return f"SHA-256 {found} instead of {digest.sha256}"
    if digest.git_blob is not None:
        # Source: git's object format, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
        sha = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                sha.update(block)
        if sha.hexdigest() != digest.git_blob:
            return f"git object id {sha.hexdigest()} instead of {digest.git_blob}"
    return None


def _fetch_part(url: str, part: Path, max_bytes: int, retry: Retry, progress: bool) -> None:
    """Fill ``part``, in as many attempts as it takes while each brings something."""
    import httpx

    timeout = httpx.Timeout(retry.timeout_s, connect=min(CONNECT_TIMEOUT_S, retry.timeout_s))
    # identity: offsets in a compressed stream are not offsets in the file
    headers = {"Accept-Encoding": "identity", "User-Agent": f"geocentroids-tiler/{__version__}"}
    failures = 0

    def stay_encrypted(request: httpx.Request) -> None:
        if urlsplit(url).scheme == "https" and request.url.scheme != "https":
            raise DownloadError(f"{url} redirects to {request.url}; from https only https is followed")

    # Proxies and credentials of the environment apply: the URLs are those of recipes and operators, never of requests.
    with httpx.Client(
        follow_redirects=True,
        max_redirects=3,
        timeout=timeout,
        headers=headers,
        event_hooks={"request": [stay_encrypted]},
    ) as client:
        while True:
            before = _size_bytes(part)
            try:
                _stream(client, url, part, max_bytes, progress)
            except (
                httpx.ConnectError,
                httpx.ConnectTimeout,
                httpx.UnsupportedProtocol,
                httpx.TooManyRedirects,
            ) as error:
                raise DownloadError(f"{url} cannot be reached: {_reason(error)}") from error
            except httpx.InvalidURL as error:
                raise DownloadError(f"{url} is not a URL: {error}") from error
            except (httpx.HTTPError, _InterruptedTransferError) as error:
                failures = 1 if _size_bytes(part) > before else failures + 1
                if failures >= retry.attempts:
                    raise DownloadError(
                        f"{url} broke off after {_size_bytes(part)} bytes: {_reason(error)}; "
                        "run the same command again to go on from there"
                    ) from error
                time.sleep(retry.wait_s * 2 ** (failures - 1))
            else:
                return


def _stream(client: httpx.Client, url: str, part: Path, max_bytes: int, progress: bool) -> None:
    """Make one request for what ``part`` lacks and append the answer to it."""
    offset, validator = _size_bytes(part), _validator_file(part)
    headers = {}
    if offset and validator.is_file():
        headers = {"Range": f"bytes={offset}-", "If-Range": validator.read_text(encoding="ascii")}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{offset}":
            return  # everything had arrived before
        if response.status_code in _BUSY_STATUS:
            raise _InterruptedTransferError(f"the server answered {response.status_code}")
        resumed = response.status_code == 206
        if response.status_code == 416 or (
            resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        ):
            part.unlink(missing_ok=True)
            validator.unlink(missing_ok=True)
            raise _InterruptedTransferError("the server answered with another range than asked for")
        if response.status_code not in (200, 206):
            raise DownloadError(f"{url} answered with status {response.status_code}")
        length = response.headers.get("Content-Length", "")
        start = offset if resumed else 0
        total = start + int(length) if length.isdigit() else None
        _check_size(url, total or 0, max_bytes)
        _check_space(part.parent, (total or 0) - start)
        etag = response.headers.get("ETag", "")
        if etag.startswith('"') and "Content-Encoding" not in response.headers:
            validator.write_text(etag, encoding="ascii")
        else:  # a weak or missing ETag cannot prove that the rest belongs to the same content
            validator.unlink(missing_ok=True)
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=part.name.removesuffix(PART_SUFFIX),
                disable=None if progress else True,
            ) as bar,
        ):
            for chunk in response.iter_bytes():  # as it arrives: a fixed size would lose the last, shorter one
                file.write(chunk)
                start += len(chunk)
                _check_size(url, start, max_bytes)
                bar.update(len(chunk))


def _hub() -> Any:
    """Return huggingface_hub, imported late because it is slow to, with its telemetry off unless the user set it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub

    return huggingface_hub


def _hub_listing(repo_id: str, revision: str | None, endpoint: str | None) -> tuple[str, list[_HubFile]]:
    """Return the commit that ``revision`` stands for now, and its files with sizes and digests."""
    api: HfApi = _hub().HfApi(endpoint=endpoint, library_name="geocentroids-tiler", library_version=__version__)
    info = api.model_info(repo_id, revision=revision or "main", files_metadata=True, timeout=Retry().timeout_s)
    if info.sha is None or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise DownloadError(f"the hub answered with commit {info.sha!r} for {repo_id}; expected 40 hex digits")
    files = [
        _HubFile(
            path=file.rfilename,
            size_bytes=file.size or 0,
            digest=Digest(sha256=file.lfs.sha256) if file.lfs else Digest(git_blob=file.blob_id),
        )
        for file in info.siblings or []
    ]
    return info.sha, files


def _check_listing(repo_id: str, wanted: Sequence[_HubFile], required: Sequence[str], max_bytes: int) -> None:
    paths = {file.path for file in wanted}
    if missing := [name for name in required if name not in paths]:
        raise DownloadError(f"hub repository {repo_id} has no {missing[0]}; it must have {', '.join(required)}")
    if unsafe := [path for path in paths if not _SAFE_PATH.fullmatch(path)]:
        raise DownloadError(f"hub repository {repo_id} has a file named {unsafe[0]!r}; such names are refused")
    _check_size(f"hub repository {repo_id}", sum(file.size_bytes for file in wanted), max_bytes)


def _verify_hub_file(repo_id: str, path: Path, file: _HubFile) -> None:
    problem = "not arrived" if not path.is_file() else digest_problem(path, file.digest)
    if problem is None:
        return
    path.resolve().unlink(missing_ok=True)  # in the hub's cache the path is a link to the content
    path.unlink(missing_ok=True)
    raise DownloadError(f"{file.path} of hub repository {repo_id} is not the expected file: it has {problem}")


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one sentence."""
    _hub()
    from huggingface_hub import errors

    where = f"hub repository {repo_id}"
    # The bases of HfHubHTTPError are the root of its HTTP client's errors, whichever client it uses, and OSError.
    anything: tuple[type[Exception], ...] = (
        *errors.HfHubHTTPError.__bases__,
        errors.HfHubHTTPError,
        ValueError,
        RuntimeError,
    )
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{where} has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(f"{where} does not exist, or may be read only after logging in (hf auth login)") from error
    except errors.HfHubHTTPError as error:
        raise DownloadError(f"{where} cannot be fetched: the hub answered {error.response.status_code}") from error
    except anything as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise DownloadError(f"{where} cannot be fetched: {_reason(error)}") from error


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Turn a failure to write into one sentence."""
    try:
        yield
    except OSError as error:
        raise DownloadError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from error


def _check_size(what: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise DownloadError(f"{what} has {size_bytes} bytes; at most {max_bytes} are accepted")


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise DownloadError(f"{folder} has {free} bytes free; {needed_bytes} are needed")


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _NoBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"disable": True}))
