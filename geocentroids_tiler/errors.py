"""The error tree, and the one table that maps it to HTTP status codes."""

from __future__ import annotations

import math


class GeocentroidsError(Exception):
    """Base of every error this package raises on purpose. Its text is one sentence for the user."""


class InputError(GeocentroidsError):
    """A parameter, geometry or option cannot be used as given."""


class SourceRefusedError(GeocentroidsError):
    """The policy does not let this source be opened."""


class SourceUnavailableError(GeocentroidsError):
    """The source is missing, forbidden or unreadable; the three are not told apart."""


class SourceChangedError(GeocentroidsError):
    """The source is no longer what it was when work on it began."""


class UnsupportedImageError(GeocentroidsError):
    """The image was read, but it is not one that the codebook can classify."""


class MosaicError(GeocentroidsError):
    """A document was read, but it does not name images in a way that can be used."""


class TooManyImagesError(InputError):
    """A request needs more images of a mosaic than one may open.

    Attributes:
        count: how many.
    """

    def __init__(self, message: str, count: int = 0) -> None:
        super().__init__(message)
        self.count = count


class CodebookError(GeocentroidsError):
    """A codebook is missing a part, or a part of it is wrong."""


class CodebookNotFoundError(CodebookError):
    """No codebook of that name is installed."""


class EncoderError(GeocentroidsError):
    """The encoder of a codebook cannot be loaded or run here."""


class BusyError(GeocentroidsError):
    """More is asked for than can be done now; the same request may succeed later.

    Attributes:
        retry_after_s: when to ask again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[BusyError], tuple[str, float]]:
        """Go from process to process whole."""
        return type(self), (str(self), self.retry_after_s)


class TooManyRequestsError(BusyError):
    """One client has as many requests under way as it may have."""


class BodyTooLargeError(GeocentroidsError):
    """The body of a request is larger than this server reads."""


class TargetTooLongError(GeocentroidsError):
    """Path and query of a request are longer than this server reads."""


class HeadersTooLargeError(GeocentroidsError):
    """The headers of a request are larger than this server reads."""


class AccessDeniedError(GeocentroidsError):
    """The request has no key and no signature that allow it; which of them is wrong is not told."""


class KeptLabelsError(GeocentroidsError):
    """Labels kept on disk are broken."""


class StorageFullError(GeocentroidsError):
    """What is to be kept does not fit where it belongs."""


class JobNotFoundError(GeocentroidsError):
    """There is no such job, or no longer."""


class JobStateError(GeocentroidsError):
    """The job is in a state in which this cannot be done."""


class ClusterError(GeocentroidsError):
    """A Ray cluster cannot be reached, or its nodes do not agree."""


class DownloadError(GeocentroidsError):
    """Something that had to be fetched could not be fetched or is not what was expected."""


HTTP_STATUS: dict[type[GeocentroidsError], int] = {
    GeocentroidsError: 500,
    InputError: 400,
    TooManyImagesError: 400,
    SourceRefusedError: 400,
    SourceUnavailableError: 404,
    SourceChangedError: 409,
    UnsupportedImageError: 422,
    MosaicError: 422,
    CodebookError: 500,
    CodebookNotFoundError: 404,
    EncoderError: 503,
    BusyError: 503,
    TooManyRequestsError: 429,
    BodyTooLargeError: 413,
    TargetTooLongError: 414,
    HeadersTooLargeError: 431,
    AccessDeniedError: 401,
    KeptLabelsError: 500,
    StorageFullError: 507,
    JobNotFoundError: 404,
    JobStateError: 409,
    ClusterError: 503,
    DownloadError: 502,
}
"""Status of an error raised while a request is answered; a class not listed takes its nearest base's."""


def http_status(error: GeocentroidsError) -> int:
    """Return the HTTP status for ``error``: that of the nearest class in its MRO listed in ``HTTP_STATUS``."""
    return next(HTTP_STATUS[cls] for cls in type(error).__mro__ if cls in HTTP_STATUS)


def http_headers(error: GeocentroidsError) -> dict[str, str]:
    """Return the headers that go with ``error``: when to try again, or how to ask, where that helps."""
    if isinstance(error, BusyError):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, AccessDeniedError) else {}


def short(value: object) -> str:
    """Return a value as an error message shows it: as Python writes it, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
