"""The cache that labels, tiles and datasets are kept in."""

from __future__ import annotations

from geocentroids_tiler.cache import ByteCache


def test_the_least_recently_used_goes_first() -> None:
    cache: ByteCache[str, bytes] = ByteCache(10, len)
    cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == b"1234"
    cache.put("c", b"1234")
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (b"1234", None, b"1234")
    assert cache.nbytes == 8


def test_what_is_larger_than_the_cache_is_not_kept_and_drops_nothing() -> None:
    cache: ByteCache[str, bytes] = ByteCache(10, len)
    cache.put("a", b"1234")
    cache.put("b", b"12345678901")
    assert (cache.get("a"), cache.get("b")) == (b"1234", None)
