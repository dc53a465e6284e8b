"""Where the folder of real imagery lies, for the tests that use it."""

from __future__ import annotations

from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[1].parent / "shared"
SHARED: Path | None = _FOLDER if _FOLDER.is_dir() else None
"""Real imagery and models, not part of the repository; None where there is none."""
needs_shared = pytest.mark.skipif(SHARED is None, reason="the folder of real imagery is not beside the repository")


def shared(name: str) -> Path:
    """Return a file of the shared folder; only in tests marked ``needs_shared``."""
    if SHARED is None:
        raise FileNotFoundError(name)
    return SHARED / name
