"""The error tree, and the one table that maps it to HTTP status codes."""

from __future__ import annotations


class GeocentroidsError(Exception):
    """Base of every error this package raises on purpose. Its text is one sentence for the user."""


class InputError(GeocentroidsError):
    """A parameter, geometry or option cannot be used as given."""


class SourceRefusedError(GeocentroidsError):
    """The policy does not let this source be opened."""


class SourceUnavailableError(GeocentroidsError):
    """The source is missing, forbidden or unreadable; the three are not told apart."""


class UnsupportedImageError(GeocentroidsError):
    """The image was read, but it is not one that the codebook can classify."""


class CodebookError(GeocentroidsError):
    """A codebook is missing a part, or a part of it is wrong."""


class CodebookNotFoundError(CodebookError):
    """No codebook of that name is installed."""


class EncoderError(GeocentroidsError):
    """The encoder of a codebook cannot be loaded or run here."""


class DownloadError(GeocentroidsError):
    """Something that had to be fetched could not be fetched or is not what was expected."""


HTTP_STATUS: dict[type[GeocentroidsError], int] = {
    GeocentroidsError: 500,
    InputError: 400,
    SourceRefusedError: 400,
    SourceUnavailableError: 404,
    UnsupportedImageError: 422,
    CodebookError: 500,
    CodebookNotFoundError: 404,
    EncoderError: 503,
    DownloadError: 502,
}
"""Status of an error raised while a request is answered; a class not listed takes its nearest base's."""


def http_status(error: GeocentroidsError) -> int:
    """Return the HTTP status for ``error``: that of the nearest class in its MRO listed in ``HTTP_STATUS``."""
    return next(HTTP_STATUS[cls] for cls in type(error).__mro__ if cls in HTTP_STATUS)


def short(value: object) -> str:
    """Return a value as an error message shows it: as Python writes it, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
