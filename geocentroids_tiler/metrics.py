"""Prometheus metrics of one service."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from geocentroids_tiler.labels.service import Service


class ServiceCollector(Collector):
    """Reads the state of a service when it is asked for, so that nothing is counted twice."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics."""
        yield from self._service.meters.collect()
        yield from self._caches()
        yield from self._engines()

    def _caches(self) -> Iterable[Metric]:
        size = GaugeMetricFamily("geocentroids_cache_bytes", "Memory or disk that a cache takes.", labels=["cache"])
        hits = CounterMetricFamily("geocentroids_cache_hits", "Values found in a cache.", labels=["cache"])
        misses = CounterMetricFamily("geocentroids_cache_misses", "Values not found in a cache.", labels=["cache"])
        errors = CounterMetricFamily("geocentroids_cache_errors", "Failures of a store.", labels=["cache"])
        away = GaugeMetricFamily("geocentroids_store_away", "1: a store could not be reached.", labels=["cache"])
        for name, cache in self._service.caches.items():
            size.add_metric([name], cache.nbytes)
            hits.add_metric([name], cache.hits)
            misses.add_metric([name], cache.misses)
        for tier in self._service.stores():
            size.add_metric([tier.name], tier.nbytes)
            hits.add_metric([tier.name], tier.hits)
            misses.add_metric([tier.name], tier.misses)
            errors.add_metric([tier.name], tier.errors)
            away.add_metric([tier.name], tier.away)
        yield from (size, hits, misses, errors, away)

    def _engines(self) -> Iterable[Metric]:
        by = ["codebook"]
        encoded = CounterMetricFamily("geocentroids_windows_encoded", "Windows encoded.", labels=by)
        given_up = CounterMetricFamily(
            "geocentroids_windows_given_up", "Windows asked for that nobody waited for any more.", labels=by
        )
        waiting = GaugeMetricFamily("geocentroids_windows_waiting", "Windows wanted and not encoded yet.", labels=by)
        read = GaugeMetricFamily("geocentroids_windows_to_read", "Windows waiting to be read.", labels=by)
        queued = GaugeMetricFamily("geocentroids_device_queue", "Items waiting for the device.", labels=by)
        speed = GaugeMetricFamily(
            "geocentroids_seconds_per_chunk", "Seconds per chunk, measured when the model was loaded.", labels=by
        )
        for engine in self._service.engines():
            labels = [engine.codebook.name]
            figures = engine.figures()  # once: it may wait for a network
            encoded.add_metric(labels, figures.windows_encoded)
            given_up.add_metric(labels, figures.windows_given_up)
            waiting.add_metric(labels, engine.windows_waiting)
            read.add_metric(labels, engine.windows_to_read)
            queued.add_metric(labels, figures.queued)
            speed.add_metric(labels, engine.seconds_per_chunk)
        yield from (encoded, given_up, waiting, read, queued, speed)


def exposition(service: Service) -> bytes:
    """Return the metrics of a service in the Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(service))
    return generate_latest(registry)
