"""From settings to what opens remote sources."""

from __future__ import annotations

from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source.addresses import Resolver, resolve
from geocentroids_tiler.source.http_store import HttpLimits, HttpStore
from geocentroids_tiler.source.object_store import ObjectStore
from geocentroids_tiler.source.policy import RemotePolicy
from geocentroids_tiler.source.remote import Remote
from geocentroids_tiler.source.stores import ByteStore


def open_remote(settings: Settings, resolver: Resolver = resolve) -> Remote:
    """Return what opens remote sources as an operator allows it; ``Remote.close`` ends it.

    Args:
        settings: what the operator chose.
        resolver: from names of hosts to addresses.

    Raises:
        InputError: if a bucket is named and what reads buckets is not installed.
    """
    policy = RemotePolicy(
        allow_http=settings.source_http,
        hosts=tuple(settings.source_hosts),
        networks=tuple(settings.source_networks),
        ports=frozenset(settings.source_ports),
    )
    limits = HttpLimits(
        connect_s=settings.source_connect_timeout_s,
        silence_s=settings.source_timeout_s,
        host_connections=settings.source_connections,
    )
    proxy = settings.source_proxy.get_secret_value() if settings.source_proxy is not None else None
    buckets: dict[str, ByteStore] = {
        bucket.rstrip("/") + "/": ObjectStore(
            bucket.rstrip("/"), settings.source_timeout_s, allow_http=settings.source_http
        )
        for bucket in settings.source_buckets
    }
    return Remote(
        policy,
        HttpStore(policy, limits, proxy=proxy, resolver=resolver),
        buckets=buckets,
        cache_bytes=settings.source_cache_bytes,
        read_s=settings.source_total_timeout_s,
        read_bytes=settings.source_read_bytes,
        failure_s=settings.failure_ttl_s,
    )
