"""Requests made from the OpenAPI document, sensible and not: no crash, no status that the document does not name."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import fake_service, write_codebooks, write_images
from hypothesis import HealthCheck, given, settings

from geocentroids_tiler.app import create_app

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "15"))
"""Requests to each operation."""
URLS = ["whole.tif", "hole.tif", "absent.tif", "http://127.0.0.1:1/x.tif", "/etc/passwd", ""]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("api")
    write_images(folder / "images")
    (folder / "codebooks").mkdir()
    write_codebooks(folder / "codebooks")
    service, _ = fake_service(
        folder / "images", folder / "codebooks", labels_dir=folder / "labels", max_chunks=300, export_timeout_s=20
    )
    service.engine(service.codebook(None)).result()
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(service=service))
    service.close()


@pytest.mark.filterwarnings("default")  # of libraries, about parameters that make no sense together
def test_no_surprise(api: Any) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) > 40
    for operation in operations:
        documented = set(operation.definition.raw["responses"])

        @given(operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def surprise(case: Any) -> None:
            _send(case, documented)  # noqa: B023 - run before the next operation

        surprise()


def _send(case: Any, documented: set[str]) -> None:
    if "url" in (case.query or {}):
        case.query["url"] = random.Random(repr(case.query)).choice(URLS)
    answer = case.call()
    assert str(answer.status_code) in documented, answer.text
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    if answer.status_code >= 400:
        assert isinstance(answer.json()["detail"], str | list)
        assert answer.headers["cache-control"] == ["no-store"]
    if answer.status_code in (429, 503):
        assert answer.headers["retry-after"]
