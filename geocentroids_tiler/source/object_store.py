"""Bytes of files in object storage that the operator named, with the operator's credentials."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.source.deadline import Deadline
from geocentroids_tiler.source.stores import Fetched, FetchError, SilentError, TooLargeError, identity_of


class ObjectStore:
    """Fetches byte ranges of one bucket: Amazon S3 and what speaks like it, Google Cloud Storage, Azure.

    Credentials, region and endpoint come from the environment, under the names that these services' own tools use.

    Args:
        bucket: ``s3://name``, ``gs://name`` or ``az://container``.
        timeout_s: longest silence of the service.
        allow_http: whether an endpoint of the operator's own may be without TLS.

    Raises:
        InputError: if what reads buckets is not installed, or the environment does not say enough for this one.
    """

    def __init__(self, bucket: str, timeout_s: float, *, allow_http: bool = False) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import AzureStore, GCSStore, S3Store
        except ImportError as error:
            raise InputError(
                f"GEOCENTROIDS_SOURCE_BUCKETS names {bucket}, and obstore is not installed; "
                "pip install 'geocentroids-tiler[objects]'"
            ) from error
        scheme, _, name = bucket.partition("://")
        store_class: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
        self._get = obstore.get
        self._error = BaseError
        self._bucket = bucket
        patience = timedelta(seconds=timeout_s)
        try:
            self._store: Any = store_class(
                name,
                client_options={"connect_timeout": patience, "read_timeout": patience, "allow_http": allow_http},
                retry_config={"max_retries": 2, "retry_timeout": patience},
            )
        except (BaseError, ValueError) as error:
            raise InputError(f"bucket {bucket} cannot be used: {error}") from error

    def fetch(self, url: str, start: int, stop: int, deadline: Deadline, *, ask_again: bool = False) -> Fetched:
        """Fetch one range of bytes; see ``ByteStore.fetch``."""
        path = url.removeprefix(self._bucket).lstrip("/")
        try:
            deadline.left_s()
            answer = self._get(self._store, path, options={"range": (start, stop)})
            data = bytes(answer.bytes())
        except TimeoutError as error:
            raise SilentError(str(error)) from error
        except (self._error, ValueError, OSError) as error:
            raise FetchError(f"{type(error).__name__} {str(error).partition(chr(10))[0]}") from error
        meta = answer.meta
        return Fetched(identity_of(meta["e_tag"] or "", meta["last_modified"].isoformat(), meta["size"]), data)

    def fetch_all(self, url: str, max_bytes: int, deadline: Deadline) -> bytes:
        """Fetch a whole file; see ``ByteStore.fetch_all``."""
        data = self.fetch(url, 0, max_bytes + 1, deadline).data
        if len(data) > max_bytes:
            raise TooLargeError(f"it has more than {max_bytes} bytes")
        return data

    def close(self) -> None:
        """Do nothing: connections end with the store."""
