"""A shorter search for colours: what is tested does not depend on how many orientations are tried."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from geocentroids_fit import color


@pytest.fixture(scope="session", autouse=True)
def _few_rotations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(color, "ROTATIONS", 12)
        patch.setattr(color, "SEARCH_SAMPLE", 200)
        yield
