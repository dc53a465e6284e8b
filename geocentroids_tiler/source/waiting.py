"""A thread that waits for the network lets another one compute: whoever bounds the threads gives hooks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_hooks = threading.local()


@contextmanager
def computing_in(pause: Callable[[], object], resume: Callable[[], object]) -> Iterator[None]:
    """Have ``pause`` and ``resume`` called around all that this thread waits for in the ``with`` block."""
    before = getattr(_hooks, "pair", None)
    _hooks.pair = pause, resume
    try:
        yield
    finally:
        _hooks.pair = before


@contextmanager
def waiting() -> Iterator[None]:
    """Mark a ``with`` block in which this thread waits and does not compute."""
    pair = getattr(_hooks, "pair", None)
    if pair is None:
        yield
        return
    pause, resume = pair
    _hooks.pair = None  # a wait inside of this one is part of it
    pause()
    try:
        yield
    finally:
        resume()
        _hooks.pair = pair
