"""Pools of threads for work that may wait for long."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor


def full_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool all of whose threads run already.

    A ``ThreadPoolExecutor`` starts a thread when it takes none of those it has for idle. In Python 3.11 it may take a
    busy one for idle, and what is submitted then waits for that one, however many more there could be.
    """
    pool = ThreadPoolExecutor(threads, name)
    met = threading.Barrier(threads)
    for started in [pool.submit(met.wait) for _ in range(threads)]:
        started.result()
    return pool
