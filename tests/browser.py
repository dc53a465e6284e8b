"""A real browser for tests, where one is installed and the viewer is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DIST = Path(__file__).parent.parent / "static" / "dist"
CHROMIUM = Path("/usr/bin/chromium")
SECOND_MS = 1000
TIMEOUT_MS = 20 * SECOND_MS
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--use-gl=swiftshader",
    "--enable-unsafe-swiftshader",
]
IN_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}"),
    pytest.mark.skipif(
        not (DIST / "index.html").exists(), reason="viewer not built: npm ci && npm run build in static/"
    ),
]
"""Marks for tests that drive one."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Run a browser for the length of a ``with`` block."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield running
        running.close()


def settle(page: Any, asked: Sized) -> None:
    """Wait until nothing has been loading for a moment.

    Args:
        page: shows the viewer.
        asked: grows with each request.
    """
    quiet = 0
    for _ in range(TIMEOUT_MS // 100):
        before = len(asked)
        page.wait_for_timeout(100)
        quiet = quiet + 1 if page.locator("#loading").is_hidden() and len(asked) == before else 0
        if quiet == 3:
            return
    pytest.fail("The map never stopped loading.")


def eventually(page: Any, condition: Callable[[], bool]) -> None:
    """Wait until something holds, as long as a page may take; what asserts it afterwards says what is wrong."""
    for _ in range(TIMEOUT_MS // 100):
        if condition():
            return
        page.wait_for_timeout(100)
