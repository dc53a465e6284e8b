"""What is counted and timed while labels are computed and tiles drawn; read by ``metrics.py``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Histogram, Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Meters:
    """Counters and timers of one service. Safe for threads."""

    def __init__(self) -> None:
        """Start at zero, registered nowhere."""

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"geocentroids_{name}", text, buckets=buckets, registry=None)

        self.read_seconds = histogram("read_seconds", "Reading one window.")
        self.encode_seconds = histogram("encode_seconds", "One run of the encoder, as its caller sees it.")
        self.assign_seconds = histogram("assign_seconds", "Labelling one batch of chunks.")
        self.render_seconds = histogram("render_seconds", "Drawing and encoding one tile.")
        self.batch_windows = histogram("batch_windows", "Windows in one run of the encoder.", _WINDOWS)
        self.windows_read = Counter("geocentroids_windows_read", "Windows read from files.", registry=None)
        self.rejected = Counter("geocentroids_rejected", "Requests refused because the queue was full.", registry=None)
        self.timed_out = Counter("geocentroids_timed_out", "Requests that met their deadline.", registry=None)
        self.requests = Counter("geocentroids_requests", "Requests answered.", ["status"], registry=None)
        self.cancelled = Counter("geocentroids_cancelled", "Requests whose client went away.", registry=None)

    def collect(self) -> Iterable[Metric]:
        """Yield all of them."""
        for meter in vars(self).values():
            yield from meter.collect()


@contextmanager
def timed(histogram: Histogram) -> Iterator[None]:
    """Observe how long the block takes, also when it fails."""
    start_s = time.perf_counter()
    try:
        yield
    finally:
        histogram.observe(time.perf_counter() - start_s)
