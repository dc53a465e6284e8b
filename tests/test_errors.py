from __future__ import annotations

import inspect

import pytest

from geocentroids_tiler import errors
from geocentroids_tiler.errors import (
    HTTP_STATUS,
    BusyError,
    CodebookNotFoundError,
    GeocentroidsError,
    http_headers,
    http_status,
)

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, GeocentroidsError) and value.__module__ == errors.__name__
]


def _make(error: type[GeocentroidsError]) -> GeocentroidsError:
    return error("x", 1.0) if issubclass(error, BusyError) else error("x")


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_class_has_a_status_of_its_own(error: type[GeocentroidsError]) -> None:
    assert error in HTTP_STATUS
    assert 400 <= HTTP_STATUS[error] < 600
    assert http_status(_make(error)) == HTTP_STATUS[error]


def test_the_table_lists_nothing_else() -> None:
    assert set(HTTP_STATUS) == set(CLASSES)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_names_and_documentation(error: type[GeocentroidsError]) -> None:
    assert error.__name__.endswith("Error")
    assert error.__doc__


def test_a_class_not_listed_takes_its_nearest_base() -> None:
    class PrivateError(CodebookNotFoundError):
        pass

    class BothError(errors.DownloadError, errors.InputError):
        pass

    assert http_status(PrivateError("x")) == 404
    assert http_status(BothError("x")) == HTTP_STATUS[errors.DownloadError], "the first base in the MRO"


def test_the_callers_fault_is_not_the_servers() -> None:
    assert http_status(errors.InputError("x")) == 400
    assert http_status(errors.SourceUnavailableError("x")) == 404
    assert http_status(GeocentroidsError("x")) == 500


def test_when_to_try_again() -> None:
    assert http_headers(BusyError("x", 7.2)) == {"Retry-After": "8"}
    assert http_headers(BusyError("x", 0.0)) == {"Retry-After": "1"}, "whole seconds, and never at once"
    assert http_headers(CodebookNotFoundError("x")) == {}
