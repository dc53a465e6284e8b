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
        label_bytes = GaugeMetricFamily("geocentroids_label_cache_bytes", "Memory taken by computed labels.")
        label_bytes.add_metric([], self._service.store.nbytes)
        yield label_bytes
        encoded = CounterMetricFamily("geocentroids_windows_encoded", "Windows encoded.", labels=["codebook"])
        read = GaugeMetricFamily("geocentroids_windows_to_read", "Windows waiting to be read.", labels=["codebook"])
        queued = GaugeMetricFamily("geocentroids_device_queue", "Items waiting for the device.", labels=["codebook"])
        speed = GaugeMetricFamily(
            "geocentroids_seconds_per_chunk",
            "Seconds per chunk, measured when the model was loaded.",
            labels=["codebook"],
        )
        for engine in self._service.engines():
            labels = [engine.codebook.name]
            encoded.add_metric(labels, engine.windows_encoded)
            read.add_metric(labels, engine.windows_to_read)
            queued.add_metric(labels, engine.device_queue)
            speed.add_metric(labels, engine.seconds_per_chunk)
        yield from (encoded, read, queued, speed)


def exposition(service: Service) -> bytes:
    """Return the metrics of a service in the Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(service))
    return generate_latest(registry)
