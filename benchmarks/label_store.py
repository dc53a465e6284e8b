"""How long labels take from each store: memory, LMDB on the local disk, Redis, and how many bytes a chunk takes there.

    python benchmarks/label_store.py                                  # Redis by fakeredis in a process of its own
    python benchmarks/label_store.py --redis redis://127.0.0.1:6379/9 # a real one

Labels are made up: patches of one class, similarities with the noise that real ones have in their last bits.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from geocentroids_tiler.labels.lmdb_tier import LmdbTier
from geocentroids_tiler.labels.redis_tier import RedisTier
from geocentroids_tiler.labels.store import ChunkKey, ChunkLabels, LabelStore
from geocentroids_tiler.labels.tiers import LabelTier, decode_labels, encode_labels, key_digest
from geocentroids_tiler.source import ReadOptions

Items = Sequence[tuple[ChunkKey, ChunkLabels]]


def made_up(count: int, side: int) -> Items:
    """Return chunks of patches of land, about three neighbours of a class."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(count):
        labels = np.repeat(rng.integers(0, 1024, (side, side // 3 + 1)), 3, axis=1)[:, :side].astype(np.uint16)
        similarity = rng.uniform(0.73, 0.99, (side, side)).astype(np.float32)
        key = ChunkKey("https://example.org/image.tif", "etag", ReadOptions(), "0" * 64, "onnx/cpu/fp32", i // 100, i)
        items.append((key, ChunkLabels(labels, similarity)))
    return items


def best(work: Callable[[], object], times: int = 5) -> float:
    """Return the fewest seconds that it took."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took)


def serve(pipe: Connection) -> None:
    """Be a Redis."""
    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", 0))
    pipe.send(server.server_address[1])
    server.serve_forever()


@contextlib.contextmanager
def fake_redis() -> Iterator[str]:
    """Run one in a process of its own; yield its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    yield f"redis://127.0.0.1:{ours.recv()}/0"
    process.kill()
    process.join()


def report(name: str, tier: LabelTier, items: Items, memory_s: float) -> None:
    """Print the figures of a store."""
    keys = [key for key, _ in items]
    start = time.perf_counter()
    tier.put_many(items)
    put_s = time.perf_counter() - start
    get_s = best(lambda: tier.get_many(keys))
    if None in tier.get_many(keys) or tier.errors:
        raise SystemExit(f"{name}: not all chunks came back, {tier.errors} errors")
    print(
        f"{name}: get {1e3 * get_s:.1f} ms, {get_s / memory_s:.0f} x memory; "
        f"put {len(items) / put_s:.0f} chunks/s in one call"
    )


def main() -> None:
    """Print milliseconds, ratios and bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", help="address of a Redis to use")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--dir", type=Path, help="where to put the LMDB; none: where temporary files go")
    options = parser.parse_args()
    for side in (10, 13):
        items = made_up(options.count, side)
        digests = [key_digest(key) for key, _ in items]
        values = [encode_labels(digest, chunk) for digest, (_, chunk) in zip(digests, items, strict=True)]
        encode_s = best(lambda: [encode_labels(d, c) for d, (_, c) in zip(digests, items, strict=True)])  # noqa: B023
        decode_s = best(lambda: [decode_labels(d, v) for d, v in zip(digests, values, strict=True)])  # noqa: B023
        digest_s = best(lambda: [key_digest.__wrapped__(key) for key, _ in items])  # noqa: B023
        stored, raw = np.mean([len(value) for value in values]), 6 * side * side
        each = 1e6 / len(items)
        print(f"s = {side}, {len(items)} chunks: {stored:.0f} bytes each, {stored / raw:.2f} of the arrays")
        print(
            f"  encode {encode_s * each:.0f} us, decode {decode_s * each:.0f} us, digest {digest_s * each:.0f} us each"
        )
        memory = LabelStore(2**30)
        for key, chunk in items:
            memory.put(key, chunk)
        memory_s = best(lambda: [memory.get(key) for key, _ in items])  # noqa: B023
        print(f"  memory: get {1e3 * memory_s:.1f} ms")
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            tier = LmdbTier(Path(folder), 2**26)
            report("  lmdb", tier, items, memory_s)
            print(f"  lmdb: {tier.nbytes / len(items):.0f} bytes of disk each")
            tier.close()
        with contextlib.nullcontext(options.redis) if options.redis else fake_redis() as url:
            redis = RedisTier(url, 60)
            report("  redis" if options.redis else "  fakeredis", redis, items, memory_s)
            redis.close()


if __name__ == "__main__":
    main()
