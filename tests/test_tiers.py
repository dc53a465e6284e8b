"""Stores of labels below the memory: what they give back is what was put, or nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import resource
import shutil
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import SecretStr, ValidationError

from geocentroids_tiler import __version__
from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.labels import tiers as tiers_module
from geocentroids_tiler.labels.store import ChunkKey, ChunkLabels
from geocentroids_tiler.labels.tiers import (
    DIGEST_BYTES,
    FORMAT_VERSION,
    LabelTier,
    TierChain,
    TierFigures,
    decode_labels,
    encode_labels,
    key_digest,
    open_tiers,
)
from geocentroids_tiler.settings import Settings, load_settings
from geocentroids_tiler.source import ReadOptions

lmdb = pytest.importorskip("lmdb", reason="the store extra is not installed")
redis = pytest.importorskip("redis", reason="the store extra is not installed")

from geocentroids_tiler.labels import lmdb_tier, redis_tier  # noqa: E402
from geocentroids_tiler.labels.lmdb_tier import MIN_BYTES, LmdbTier  # noqa: E402
from geocentroids_tiler.labels.redis_tier import KEY_PREFIX, PAUSE_S, Breaker, RedisTier  # noqa: E402

PATIENCE_S = 30.0
"""Longest wait for something that happens at once when nothing is broken."""
URL = "https://example.org/one image.tif?token=hidden-in-digests"
KEY = ChunkKey(URL, "etag", ReadOptions((4, 3, 2), (0.0, 2500.5)), "codebook", "onnx/cpu/fp32", 3, -7)
D = bytes(DIGEST_BYTES)
PASSWORD = "sEcr3t%20pw"


def key(number: int) -> ChunkKey:
    return replace(KEY, row=number)


def labels(number: int, side: int = 13) -> ChunkLabels:
    """Return labels that differ by number and cannot be compressed well."""
    rng = np.random.default_rng(number)
    return ChunkLabels(
        rng.integers(0, 6144, (side, side)).astype(np.uint16), rng.normal(size=(side, side)).astype(np.float32)
    )


def same(left: ChunkLabels | None, right: ChunkLabels) -> bool:
    """Tell whether labels are equal bit for bit, in memory of their own."""
    return (
        left is not None
        and (left.labels.dtype, left.similarity.dtype) == (np.uint16, np.float32)
        and left.labels.shape == right.labels.shape == left.similarity.shape
        and left.labels.tobytes() == right.labels.tobytes()
        and left.similarity.tobytes() == right.similarity.tobytes()
    )


def stored(digest: bytes, kind: int, side: int, body: bytes, version: int = FORMAT_VERSION) -> bytes:
    """Return a value that says this and has the right checksum."""
    return struct.pack("<BBH8s", version, kind, side, tiers_module._checksum(digest, kind, side, body)) + body


class Counted:
    """A store in memory that writes down what it is asked."""

    errors = 0
    away = False
    nbytes = 0

    def __init__(self, name: str, kept: dict[ChunkKey, ChunkLabels] | None = None) -> None:
        self.name = name
        self.kept = kept or {}
        self.asked: list[list[ChunkKey]] = []
        self.closed = False

    def get_many(self, keys: Sequence[ChunkKey]) -> list[ChunkLabels | None]:
        self.asked.append(list(keys))
        return [self.kept.get(k) for k in keys]

    def put_many(self, items: Sequence[tuple[ChunkKey, ChunkLabels]]) -> None:
        self.kept.update(items)

    def close(self) -> None:
        self.closed = True


texts = st.text("a\0/1:é\ud800", max_size=3)
numbers = st.sampled_from([0.0, -0.0, 0.5, 1.0, 255.0, 1e300, float("inf"), -3.25])
options = st.builds(
    ReadOptions,
    st.none() | st.tuples(*[st.integers(1, 12)] * 3),
    st.none() | st.tuples(numbers, numbers),
)
keys = st.builds(ChunkKey, texts, texts, options, texts, texts, st.integers(-12, 12), st.integers(-12, 12))


class TestDigests:
    @given(keys, keys)
    def test_equal_where_keys_are_and_nowhere_else(self, one: ChunkKey, other: ChunkKey) -> None:
        assert (key_digest(one) == key_digest(other)) == (one == other)

    @given(keys, st.data())
    def test_each_field_counts(self, one: ChunkKey, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([field.name for field in fields(ChunkKey)]))
        other = replace(one, **{name: getattr(data.draw(keys), name)})
        assert (key_digest(one) == key_digest(other)) == (one == other)

    @given(st.text(min_size=1), st.text(min_size=1), st.data())
    def test_fields_never_run_together(self, left: str, right: str, data: st.DataObject) -> None:
        """What is moved from the end of one text to the beginning of another is noticed."""
        names = ["url", "identity", "codebook_digest", "device"]
        one, other = data.draw(st.sampled_from(list(combinations(names, 2))))
        joined = left + right
        seen = set()
        for cut in range(len(joined) + 1):
            seen.add(key_digest(replace(KEY, **{one: joined[:cut], other: joined[cut:]})))
        assert len(seen) == len(joined) + 1

    def test_numbers_never_run_together(self) -> None:
        digests = {key_digest(replace(KEY, row=row, col=col)) for row in (1, 11, 111, -1) for col in (1, 11, 111, -1)}
        digests |= {key_digest(replace(KEY, options=ReadOptions(b))) for b in ((1, 11, 1), (11, 1, 1), (1, 1, 11))}
        assert len(digests) == 16 + 3

    def test_long_enough_and_without_the_address(self) -> None:
        digest = key_digest(KEY)
        assert len(digest) == DIGEST_BYTES >= 16
        assert b"example" not in digest

    def test_the_release_and_the_format_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        digest = key_digest.__wrapped__(KEY)
        monkeypatch.setattr(tiers_module, "__version__", __version__ + "x")
        other = key_digest.__wrapped__(KEY)
        monkeypatch.setattr(tiers_module, "FORMAT_VERSION", FORMAT_VERSION + 1)
        assert len({digest, other, key_digest.__wrapped__(KEY)}) == 3

    def test_a_field_of_another_type_is_refused(self) -> None:
        with pytest.raises(TypeError, match="set"):
            key_digest.__wrapped__(replace(KEY, url={1}))  # type: ignore[arg-type]


@st.composite
def chunks(draw: st.DrawFn) -> ChunkLabels:
    """Draw labels with any bits, among them NaNs of all kinds and the ends of the ranges."""
    side = draw(st.integers(1, 15))
    ends = st.sampled_from([0, 1, NODATA_LABEL - 1, NODATA_LABEL])
    nans = st.sampled_from([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0x80000000, 0, 0x7F800000])
    bits = draw(arrays(np.uint32, (side, side), elements=nans | st.integers(0, 2**32 - 1)))
    return ChunkLabels(
        draw(arrays(np.uint16, (side, side), elements=ends | st.integers(0, 65535))), bits.view(np.float32)
    )


class TestStoredForm:
    @given(chunks(), st.binary(min_size=16, max_size=16))
    def test_comes_back_bit_for_bit(self, chunk: ChunkLabels, digest: bytes) -> None:
        value = encode_labels(digest, chunk)
        back = decode_labels(digest, value)
        assert same(back, chunk)
        assert back is not None
        assert back.labels.flags.writeable
        assert back.labels.flags.c_contiguous

    @pytest.mark.parametrize("side", [1, 10, 13, 1024])
    def test_without_data_it_is_small(self, side: int) -> None:
        value = encode_labels(D, ChunkLabels.empty(side))
        assert len(value) == 12
        assert same(decode_labels(D, value), ChunkLabels.empty(side))

    def test_other_memory_layouts(self) -> None:
        big = labels(0, 26)
        part = ChunkLabels(big.labels[::2, ::-2], big.similarity.T[::2, 1::2])
        assert same(decode_labels(D, encode_labels(D, part)), part)

    def test_likeness_of_neighbours_saves_bytes(self) -> None:
        smooth = ChunkLabels(
            np.full((13, 13), 7, np.uint16), np.linspace(0.5, 0.51, 169, dtype=np.float32).reshape(13, 13)
        )
        assert len(encode_labels(D, smooth)) < 0.5 * 169 * 6
        assert len(encode_labels(D, labels(0))) < 169 * 6 + 30, "noise costs next to nothing more"

    @pytest.mark.parametrize("chunk", [labels(1, 5), ChunkLabels.empty(13)], ids=["data", "no data"])
    def test_any_wrong_byte_is_a_miss(self, chunk: ChunkLabels) -> None:
        value = encode_labels(D, chunk)
        for place in range(len(value)):
            for change in range(1, 256):
                wrong = bytearray(value)
                wrong[place] ^= change
                assert decode_labels(D, bytes(wrong)) is None

    def test_any_wrong_length_is_a_miss(self) -> None:
        for value in (encode_labels(D, labels(1)), encode_labels(D, ChunkLabels.empty(13))):
            for length in range(len(value)):
                assert decode_labels(D, value[:length]) is None
            assert decode_labels(D, value + b"\0") is None

    @given(st.binary(max_size=200))
    def test_anything_else_is_a_miss(self, value: bytes) -> None:
        assert decode_labels(D, value) is None

    def test_under_another_key_it_is_a_miss(self) -> None:
        assert decode_labels(key_digest(key(2)), encode_labels(key_digest(key(1)), labels(1))) is None

    def test_nonsense_with_the_right_checksum_is_a_miss(self) -> None:
        packed, noise = zlib.compress(bytes(4 * 25), 1), bytes(2 * 25)
        assert decode_labels(D, stored(D, 1, 5, packed + noise)) is not None
        bomb = zlib.compress(bytes(10**8), 9)
        for value in (
            stored(D, 1, 5, packed + noise, version=FORMAT_VERSION + 1),
            stored(D, 0, 0, b""),
            stored(D, 0, 1025, b""),
            stored(D, 0, 65535, b""),
            stored(D, 0, 5, b"x"),
            stored(D, 2, 5, packed + noise),
            stored(D, 1, 5, b""),
            stored(D, 1, 5, noise),
            stored(D, 1, 5, bytes(40) + noise),
            stored(D, 1, 6, packed + bytes(2 * 36)),
            stored(D, 1, 4, packed + bytes(2 * 16)),
            stored(D, 1, 5, bomb + noise),
            stored(D, 1, 5, packed + b"more" + noise),
            stored(D, 1, 5, packed[:-5] + noise),
        ):
            assert decode_labels(D, value) is None

    def test_what_is_no_chunk_is_refused(self) -> None:
        good = labels(0, 4)
        for wrong in (
            ChunkLabels(good.labels[:2], good.similarity[:2]),
            ChunkLabels(good.labels, good.similarity[:2]),
            ChunkLabels(good.labels[:0, :0], good.similarity[:0, :0]),
            ChunkLabels.empty(1025),
            ChunkLabels(good.labels, good.similarity.astype(np.float64)),  # type: ignore[arg-type]
            ChunkLabels(good.labels.astype(np.int16), good.similarity),  # type: ignore[arg-type]
        ):
            with pytest.raises(ValueError, match="not "):
                encode_labels(D, wrong)


class TestChain:
    def test_found_behind_is_written_in_front(self) -> None:
        front, middle, back = Counted("a"), Counted("b"), Counted("c", {key(1): labels(1)})
        front.kept[key(0)] = labels(0)
        chain = TierChain([front, middle, back])
        found = chain.get_many([key(0), key(1), key(2), key(1)])
        assert [chunk is not None for chunk in found] == [True, True, False, True]
        assert same(found[1], labels(1))
        assert back.asked == [[key(1), key(2), key(1)]]
        assert set(front.kept) == {key(0), key(1)}
        assert set(middle.kept) == {key(1)}
        assert set(back.kept) == {key(1)}
        assert chain.figures() == [
            TierFigures("a", 1, 3, 0, 0, False),
            TierFigures("b", 0, 3, 0, 0, False),
            TierFigures("c", 2, 1, 0, 0, False),
        ]

    def test_nobody_is_asked_in_vain(self) -> None:
        front, back = Counted("a", {key(0): labels(0)}), Counted("b")
        chain = TierChain([front, back])
        assert chain.get_many([]) == []
        chain.get_many([key(0)])
        assert back.asked == []

    def test_all_are_written_and_closed(self) -> None:
        tiers = [Counted("a"), Counted("b")]
        chain = TierChain(tiers)
        chain.put_many([(key(1), labels(1))])
        chain.close()
        assert all(key(1) in tier.kept and tier.closed for tier in tiers)


@pytest.fixture
def open_lmdb(tmp_path: Path) -> Iterator[Callable[..., LmdbTier]]:
    made: list[LmdbTier] = []

    def make(max_bytes: int = MIN_BYTES, folder: Path = tmp_path / "store") -> LmdbTier:
        made.append(LmdbTier(folder, max_bytes))
        return made[-1]

    yield make
    for tier in made:
        tier.close()
    assert not lmdb_tier._opened


def disk_bytes(folder: Path) -> int:
    return sum(max(path.stat().st_size, path.stat().st_blocks * 512) for path in folder.iterdir())


def present(tier: LabelTier, count: int, side: int = 13) -> list[bool]:
    """Tell which of the first ``count`` entries are there; each that is must be right."""
    found = tier.get_many([key(i) for i in range(count)])
    assert all(chunk is None or same(chunk, labels(i, side)) for i, chunk in enumerate(found))
    return [chunk is not None for chunk in found]


class TestLmdb:
    def test_survives_closing(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        items = [(key(i), labels(i)) for i in range(20)] + [(key(20), ChunkLabels.empty(13))]
        assert tier.get_many([k for k, _ in items]) == [None] * 21
        tier.put_many(items)
        tier.close()
        assert tier.get_many([key(0)]) == [None], "closed"
        tier.put_many(items)
        assert (tier.nbytes, tier.errors) == (0, 0)
        again = open_lmdb()
        assert all(
            same(chunk, item) for chunk, (_, item) in zip(again.get_many([k for k, _ in items]), items, strict=True)
        )
        assert again.nbytes > 10_000
        assert again.errors == 0

    def test_more_keys_than_are_handled_at_a_time(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb(4 * MIN_BYTES)
        tier.put_many([(key(i), labels(i)) for i in range(1100)])
        assert all(present(tier, 1100))

    def test_no_address_on_the_disk(self, open_lmdb: Callable[..., LmdbTier], tmp_path: Path) -> None:
        open_lmdb().put_many([(key(1), labels(1))])
        assert b"example.org" not in (tmp_path / "store" / "data.mdb").read_bytes()

    def test_the_bound_holds_and_the_oldest_go_first(self, open_lmdb: Callable[..., LmdbTier], tmp_path: Path) -> None:
        tier = open_lmdb()
        written, total = 0, 0
        while total < 10 * MIN_BYTES:
            batch = [(key(i), labels(i)) for i in range(written, written + 200)]
            tier.put_many(batch)
            written += len(batch)
            total += sum(len(encode_labels(D, chunk)) for _, chunk in batch)
            assert disk_bytes(tmp_path / "store") <= MIN_BYTES
            assert tier.nbytes <= MIN_BYTES
        there = present(tier, written)
        first = there.index(True)
        assert all(there[first:])
        assert not any(there[:first])
        assert (written - first) / written * total > 0.35 * MIN_BYTES, "the bound is put to use"
        assert tier.errors == 0

    def test_the_bound_holds_for_chunks_of_all_sizes(self, open_lmdb: Callable[..., LmdbTier], tmp_path: Path) -> None:
        tier = open_lmdb()
        rng = np.random.default_rng(0)
        for start in range(0, 3000, 10):
            sides = rng.integers(1, 60, 10)
            tier.put_many([(key(start + i), labels(start + i, int(side))) for i, side in enumerate(sides)])
            assert disk_bytes(tmp_path / "store") <= MIN_BYTES
            (last,) = tier.get_many([key(start + 9)])
            assert last is not None or tier.errors > 0, "what is dropped is counted"
        assert tier.errors < 30

    def test_one_too_large_for_the_store(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        tier.put_many([(key(0), labels(0, 1000))])
        assert tier.errors == 1
        tier.put_many([(key(1), labels(1))])
        assert tier.errors == 1
        assert tier.get_many([key(0)]) == [None]
        assert same(tier.get_many([key(1)])[0], labels(1))

    def test_what_is_there_keeps_its_place(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        tier.put_many([(key(i), labels(i)) for i in range(100)])
        size = tier.nbytes
        for _ in range(20):
            tier.put_many([(key(i), labels(i)) for i in range(100)])
        assert tier.nbytes == size
        assert tier._store._env.info()["last_txnid"] < 10, "nothing was written"

    def test_twice_in_one_call(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        tier.put_many([(key(1), labels(1)), (key(1), labels(1))])
        assert same(tier.get_many([key(1)])[0], labels(1))

    @pytest.mark.parametrize("rot", [b"", b"\0" * 8, b"\xff" * 900, "cut"])
    def test_rotten_entries_are_misses_and_written_anew(self, open_lmdb: Callable[..., LmdbTier], rot: Any) -> None:
        tier = open_lmdb()
        tier.put_many([(key(i), labels(i)) for i in range(3)])
        store = tier._store
        with store._env.begin(write=True) as txn:
            number = txn.get(key_digest(key(1)), db=store._index)
            row = txn.get(number, db=store._data)[:-1] if rot == "cut" else rot
            txn.put(number, row, db=store._data)
        assert present(tier, 3) == [True, False, True]
        assert tier.errors == 1
        tier.put_many([(key(1), labels(1))])
        assert present(tier, 3) == [True, True, True]
        assert tier.errors == 1

    def test_the_entry_of_another_key_is_a_miss(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        tier.put_many([(key(i), labels(i)) for i in range(3)])
        store = tier._store
        with store._env.begin(write=True) as txn:
            txn.put(key_digest(key(1)), txn.get(key_digest(key(2)), db=store._index), db=store._index)
        assert present(tier, 3) == [True, False, True]
        with store._env.begin(write=True) as txn:
            txn.put(key_digest(key(1)), b"?", db=store._index)
        assert present(tier, 3) == [True, False, True]

    def test_twice_in_one_process(self, open_lmdb: Callable[..., LmdbTier], tmp_path: Path) -> None:
        one, other = open_lmdb(), open_lmdb()
        (tmp_path / "link").symlink_to(tmp_path / "store")
        third = open_lmdb(folder=tmp_path / "link")
        one.put_many([(key(1), labels(1))])
        assert same(other.get_many([key(1)])[0], labels(1))
        one.close()
        one.close()
        assert one.get_many([key(1)]) == [None]
        assert same(other.get_many([key(1)])[0], labels(1))
        other.close()
        assert same(third.get_many([key(1)])[0], labels(1))

    def test_closing_waits_for_calls_under_way(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        with tier._store.use() as usable:
            assert usable
            closing = threading.Thread(target=tier.close)
            closing.start()
            until(lambda: tier._store._closed)
            assert tier._store.read([D]) == [None], "still open"
        closing.join(PATIENCE_S)
        assert not closing.is_alive()

    def test_in_a_forked_process_nothing_is_touched(
        self, open_lmdb: Callable[..., LmdbTier], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tier = open_lmdb()
        tier.put_many([(key(1), labels(1))])
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            assert tier.get_many([key(1)]) == [None]
            tier.put_many([(key(2), labels(2))])
        assert same(tier.get_many([key(1)])[0], labels(1))
        assert tier.get_many([key(2)]) == [None]

    def test_threads(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        wrong: list[Any] = []
        seen: list[int] = []

        def work(start: int) -> None:
            for i in range(start, start + 300, 20):
                numbers = range(i, i + 20)
                tier.put_many([(key(n), labels(n)) for n in numbers])
                found = dict(zip(numbers, tier.get_many([key(n) for n in numbers]), strict=True))
                there = [n for n, chunk in found.items() if chunk is not None]
                seen.extend(there)  # with so small a bound a write may be dropped
                wrong.extend(n for n in there if not same(found[n], labels(n)))

        threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong
        assert len(seen) > 0.8 * 4 * 300


class TestLmdbThatCannotBeUsed:
    def test_another_version_is_emptied(
        self, open_lmdb: Callable[..., LmdbTier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(lmdb_tier, "_FORMAT", b"0")
            old = open_lmdb()
            old.put_many([(key(1), labels(1))])
            old.close()
        new = open_lmdb()
        assert "emptied" in caplog.text
        assert new.get_many([key(1)]) == [None]
        new.put_many([(key(1), labels(1))])
        new.close()
        assert same(open_lmdb().get_many([key(1)])[0], labels(1))

    def test_a_smaller_bound_empties(self, open_lmdb: Callable[..., LmdbTier], tmp_path: Path) -> None:
        large = open_lmdb(4 * MIN_BYTES)
        large.put_many([(key(i), labels(i)) for i in range(2000)])
        large.close()
        assert disk_bytes(tmp_path / "store") > MIN_BYTES
        small = open_lmdb()
        assert disk_bytes(tmp_path / "store") <= MIN_BYTES
        assert not any(present(small, 2000))

    def test_a_larger_bound_keeps(self, open_lmdb: Callable[..., LmdbTier]) -> None:
        small = open_lmdb()
        small.put_many([(key(i), labels(i)) for i in range(100)])
        small.close()
        large = open_lmdb(4 * MIN_BYTES)
        large.put_many([(key(i), labels(i)) for i in range(100, 2000)])
        assert all(present(large, 2000))

    def refused(self, folder: Path, max_bytes: int = MIN_BYTES) -> str:
        with pytest.raises(InputError, match="GEOCENTROIDS_LABEL_STORE_") as error:
            LmdbTier(folder, max_bytes)
        assert "\n" not in str(error.value)
        assert not lmdb_tier._opened
        return str(error.value)

    def test_an_lmdb_of_something_else(self, tmp_path: Path) -> None:
        with lmdb.open(str(tmp_path)) as env, env.begin(write=True) as txn:
            txn.put(b"theirs", b"1")
        assert "no label store" in self.refused(tmp_path)
        with lmdb.open(str(tmp_path)) as env, env.begin() as txn:
            assert list(txn.cursor()) == [(b"theirs", b"1")], "left as it was"

    @pytest.mark.parametrize("size", [1, 100, 4096, 100_000])
    def test_no_lmdb(self, tmp_path: Path, size: int) -> None:
        content = np.random.default_rng(0).bytes(size)
        (tmp_path / "data.mdb").write_bytes(content)
        assert "LABEL_STORE_DIR" in self.refused(tmp_path)
        assert (tmp_path / "data.mdb").read_bytes() == content

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            assert str(folder) in self.refused(folder)

    def test_files_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "data.mdb").mkdir()
        assert "LABEL_STORE_DIR" in self.refused(tmp_path)

    @pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        for folder in (tmp_path, tmp_path / "below"):
            assert str(folder) in self.refused(folder)
        tmp_path.chmod(0o700)

    def test_a_bound_too_small_to_work_in(self, tmp_path: Path) -> None:
        assert "LABEL_STORE_BYTES = 1000" in self.refused(tmp_path, 1000)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does at once."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# What processes do. Each ends the block of its parent when its pipe is closed.


def write_and_read(folder: Path, start: int, pipe: Connection) -> None:
    """Write entries and read them at once, as far as the parent says go on."""
    tier = LmdbTier(folder, 2 * MIN_BYTES)
    pipe.send("open")
    pipe.recv()
    wrong = 0
    for i in range(start, start + 3000, 30):
        numbers = range(i, i + 30)
        tier.put_many([(key(n), labels(n)) for n in numbers])
        wrong += sum(
            chunk is not None and not same(chunk, labels(n))  # with so small a bound a write may be dropped
            for n, chunk in zip(numbers, tier.get_many([key(n) for n in numbers]), strict=True)
        )
        others = [n % 3000 + 3000 * (start == 0) for n in numbers]
        for n, chunk in zip(others, tier.get_many([key(n) for n in others]), strict=True):
            wrong += chunk is not None and not same(chunk, labels(n))
    pipe.send(wrong)
    tier.close()


def write_for_ever(folder: Path, pipe: Connection) -> None:
    tier = LmdbTier(folder, MIN_BYTES)
    for i in range(10**9):
        tier.put_many([(key(n), labels(n)) for n in range(30 * i, 30 * i + 30)])
        pipe.send(i)


def stop_inside_a_write(folder: Path, pipe: Connection) -> None:
    store = LmdbTier(folder, MIN_BYTES)._store
    with store._env.begin(write=True) as txn:
        store._evict(txn, store._max_pages // 4)
        txn.put(b"\xff" * 8, b"half", db=store._data)
        pipe.send("inside")
        pipe.recv()


def stop_inside_a_read(folder: Path, pipe: Connection) -> None:
    store = LmdbTier(folder, MIN_BYTES)._store
    with store._env.begin() as txn:
        txn.get(D, db=store._data)
        pipe.send("inside")
        pipe.recv()


def fill(folder: Path, max_bytes: int, count: int, pipe: Connection) -> None:
    tier = LmdbTier(folder, max_bytes)
    tier.put_many([(key(i), labels(i)) for i in range(count)])
    pipe.send(tier.errors)
    pipe.recv()
    tier.close()


def write_to_a_full_disk(folder: Path, pipe: Connection) -> None:
    tier = LmdbTier(folder, 8 * MIN_BYTES)
    tier.put_many([(key(i), labels(i)) for i in range(50)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # from here on files do not grow, as on a full disk
    for i in range(50, 1000, 50):
        tier.put_many([(key(n), labels(n)) for n in range(i, i + 50)])
    pipe.send((tier.errors, present(tier, 1000)))


@contextlib.contextmanager
def process(work: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Connection]]:
    """Run ``work`` in a process of its own, killed at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(*args, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join(PATIENCE_S)
        child.close()
        ours.close()


def answer(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE_S)
    return pipe.recv()


class TestLmdbOfSeveralProcesses:
    def test_they_write_and_read_at_once(self, tmp_path: Path, open_lmdb: Callable[..., LmdbTier]) -> None:
        with (
            process(write_and_read, tmp_path / "store", 0) as (_, one),
            process(write_and_read, tmp_path / "store", 3000) as (_, other),
        ):
            for pipe in (one, other):
                assert answer(pipe) == "open"
            for pipe in (one, other):
                pipe.send("go")
            assert (answer(one), answer(other)) == (0, 0)
        there = present(open_lmdb(2 * MIN_BYTES), 6000)
        assert sum(there) > 1000
        assert disk_bytes(tmp_path / "store") <= 2 * MIN_BYTES

    def test_killed_while_it_writes(self, tmp_path: Path, open_lmdb: Callable[..., LmdbTier]) -> None:
        for batches in (1, 7, 60):
            with process(write_for_ever, tmp_path / "store") as (child, pipe):
                while answer(pipe) < batches:
                    pass
                child.kill()
                child.join(PATIENCE_S)
            tier = open_lmdb()
            there = present(tier, 4000)
            assert sum(there) >= 30 * min(batches, 10)
            tier.put_many([(key(10**6), labels(1))])
            assert same(tier.get_many([key(10**6)])[0], labels(1))
            assert tier.errors == 0
            tier.close()

    def test_killed_inside_a_transaction_of_each_kind(self, tmp_path: Path, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        tier.put_many([(key(i), labels(i)) for i in range(200)])
        with process(stop_inside_a_write, tmp_path / "store") as (child, pipe):
            assert answer(pipe) == "inside"
            assert all(present(tier, 200)), "readers are not held up"
            child.kill()
            child.join(PATIENCE_S)
        assert all(present(tier, 200))
        with process(stop_inside_a_read, tmp_path / "store") as (child, pipe):
            assert answer(pipe) == "inside"
            child.kill()
            child.join(PATIENCE_S)
        for i in range(200, 5000, 100):
            tier.put_many([(key(n), labels(n)) for n in range(i, i + 100)])
            assert disk_bytes(tmp_path / "store") <= MIN_BYTES
        assert sum(present(tier, 5000)) > 300
        assert tier.errors <= 3, "the dead reader's pages were found and freed"

    def test_one_with_a_larger_bound(self, tmp_path: Path, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb()
        tier.put_many([(key(0), labels(0))])
        with process(fill, tmp_path / "store", 4 * MIN_BYTES, 2000) as (_, pipe):
            assert answer(pipe) == 0
            assert tier.get_many([key(0)]) == [None], "the file is larger than was known here"
            assert tier.errors == 1
            assert all(present(tier, 2000))
            assert tier.errors == 1

    def test_one_with_a_smaller_bound(self, tmp_path: Path, open_lmdb: Callable[..., LmdbTier]) -> None:
        tier = open_lmdb(4 * MIN_BYTES)
        tier.put_many([(key(i), labels(i)) for i in range(2000)])
        with process(fill, tmp_path / "store", MIN_BYTES, 10) as (_, pipe):
            assert answer(pipe) == 0
            assert all(present(tier, 2000)), "this process keeps what it has"
            assert disk_bytes(tmp_path / "store") <= MIN_BYTES
            assert all(present(open_lmdb(4 * MIN_BYTES), 2000)), "and shares it"

    def test_a_full_disk(self, tmp_path: Path, open_lmdb: Callable[..., LmdbTier]) -> None:
        with process(write_to_a_full_disk, tmp_path / "store") as (_, pipe):
            errors, there = answer(pipe)
        assert errors > 0
        assert all(there[:50])
        assert not all(there)
        tier = open_lmdb(8 * MIN_BYTES)
        assert present(tier, 1000) == there
        tier.put_many([(key(i), labels(i)) for i in range(1000)])
        assert all(present(tier, 1000))


class TestBreaker:
    def test_a_pause_then_one_try_at_a_time(self) -> None:
        now = 100.0
        breaker = Breaker(5.0, lambda: now)
        assert breaker.allows()
        assert not breaker.succeeded(), "there was no outage"
        assert breaker.failed()
        assert not breaker.failed(), "the same outage"
        now = 104.9
        assert not breaker.allows()
        now = 105.0
        assert breaker.allows()
        assert not breaker.allows(), "one tries, the others wait for what comes of it"
        assert not breaker.failed()
        now = 109.9
        assert not breaker.allows()
        now = 110.0
        assert breaker.allows()
        assert breaker.succeeded()
        assert breaker.allows()
        assert breaker.allows()


class RealRedis:
    """A redis-server that can be stopped and started again on its port."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly no --daemonize no --dir /tmp".split()
        self._process = subprocess.Popen(["redis-server", *options, "--save", ""], stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with contextlib.suppress(redis.RedisError), redis.Redis(port=self.port, protocol=2) as client:
                return bool(client.ping())
            return False

        until(answers)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)


class FakeRedis:
    """The same, answered by fakeredis over a real socket."""

    def __init__(self) -> None:
        self.port = 0

    def start(self) -> None:
        from fakeredis import TcpFakeServer

        self._server = TcpFakeServer(("127.0.0.1", self.port))
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=partial(self._server.serve_forever, 0.01))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE_S)


SERVERS = [
    pytest.param(
        RealRedis,
        marks=pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
        id="redis-server",
    ),
    pytest.param(
        FakeRedis,
        marks=pytest.mark.skipif(importlib.util.find_spec("fakeredis") is None, reason="fakeredis is not installed"),
        id="fakeredis",
    ),
]


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    made.start()
    yield made
    made.stop()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def connect() -> Iterator[Callable[..., RedisTier]]:
    made: list[RedisTier] = []

    def make(port: int, clock: Clock | None = None, secret: str = "", ttl_s: int = 1000) -> RedisTier:
        made.append(RedisTier(f"redis://{secret}127.0.0.1:{port}/0", ttl_s, clock=clock or Clock()))
        return made[-1]

    yield make
    for tier in made:
        tier.close()


@contextlib.contextmanager
def answering(text: bytes | None) -> Iterator[int]:
    """Run a server that says ``text`` whatever it is asked, or nothing at all; yield its port."""
    over = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while text is not None and self.request.recv(65536):
                self.request.sendall(text)
            over.wait(PATIENCE_S)

    class Server(socketserver.ThreadingTCPServer):
        block_on_close = False  # a client may keep its connection
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=partial(listening.serve_forever, 0.01))
        thread.start()
        yield listening.server_address[1]
        over.set()
        listening.shutdown()
        thread.join(PATIENCE_S)


class TestRedis:
    def test_machines_share_it(self, server: Any, connect: Callable[..., RedisTier]) -> None:
        one, other = connect(server.port), connect(server.port)
        items = [(key(i), labels(i)) for i in range(1100)] + [(key(1100), ChunkLabels.empty(13))]
        assert one.get_many([key(0), key(1)]) == [None, None]
        one.put_many(items)
        found = other.get_many([k for k, _ in items])
        assert all(same(chunk, item) for chunk, (_, item) in zip(found, items, strict=True))
        assert (one.errors, other.errors, one.nbytes) == (0, 0, 0)
        other.close()
        assert other.get_many([key(0)]) == [None]

    def test_what_it_sees(self, server: Any, connect: Callable[..., RedisTier]) -> None:
        connect(server.port, ttl_s=77).put_many([(key(1), labels(1))])
        with redis.Redis(port=server.port, protocol=2) as client:
            (name,) = client.keys()
            assert name == KEY_PREFIX + key_digest(key(1))
            assert b"example" not in name
            assert 0 < client.ttl(name) <= 77

    def test_values_of_others_are_misses(self, server: Any, connect: Callable[..., RedisTier]) -> None:
        tier = connect(server.port)
        tier.put_many([(key(i), labels(i)) for i in range(5)])
        with redis.Redis(port=server.port, protocol=2) as client:
            name = [KEY_PREFIX + key_digest(key(i)) for i in range(5)]
            client.set(name[0], client.get(name[1]))
            client.set(name[1], client.get(name[1])[:-1])
            client.set(name[2], b"")
            client.delete(name[3])
            client.lpush(name[3], b"a list")
        assert present(tier, 5) == [False, False, False, False, True]
        assert tier.errors == 3

    def test_away_and_back(
        self, server: Any, connect: Callable[..., RedisTier], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "geocentroids_tiler")
        clock = Clock()
        tier = connect(server.port, clock)
        tier.put_many([(key(1), labels(1))])
        assert same(tier.get_many([key(1)])[0], labels(1))
        server.stop()
        for _ in range(3):
            assert tier.get_many([key(i) for i in range(2000)]) == [None] * 2000
            tier.put_many([(key(1), labels(1))])
        assert tier.errors == 1, "asked once, then left alone"
        clock.now += PAUSE_S
        assert tier.get_many([key(1)]) == [None]
        assert tier.get_many([key(1)]) == [None]
        assert tier.errors == 2, "tried again once"
        server.start()
        assert tier.get_many([key(1)]) == [None], "still left alone"
        clock.now += PAUSE_S
        tier.put_many([(key(1), labels(1))])
        assert same(tier.get_many([key(1)])[0], labels(1))
        assert tier.errors == 2
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"], "once each"
        assert "is away" in caplog.text
        assert "is back" in caplog.text

    def test_never_there(self, connect: Callable[..., RedisTier]) -> None:
        with socket.socket() as bound:  # taken, and nobody listens
            bound.bind(("127.0.0.1", 0))
            tier = connect(bound.getsockname()[1])
            assert tier.get_many([key(1)]) == [None]
            assert tier.errors == 1

    @pytest.mark.parametrize(
        "text",
        [
            None,
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"-LOADING Redis is loading the dataset in memory\r\n",
            b"-NOAUTH Authentication required.\r\n",
            b"*2\r\n$1\r\na\r\n$1\r\nb\r\n",
            b":5\r\n",
            b"*x\r\n",
            b"\xff\xfe\0",
        ],
    )
    def test_something_else_answers(
        self, connect: Callable[..., RedisTier], monkeypatch: pytest.MonkeyPatch, text: bytes | None
    ) -> None:
        monkeypatch.setattr(redis_tier, "TIMEOUT_S", 0.05)
        with answering(text) as port:
            tier = connect(port)
            assert tier.get_many([key(1)]) == [None]
            assert tier.errors == 1
            assert tier.get_many([key(1)]) == [None]
            assert tier.errors == 1

    def test_refused_writes_are_counted_and_logged_once(
        self,
        server: Any,
        connect: Callable[..., RedisTier],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        tier = connect(server.port)
        with monkeypatch.context() as patch:
            full = redis.exceptions.OutOfMemoryError("command not allowed")
            patch.setattr(redis.client.Pipeline, "execute", lambda self, raise_on_error: [full] * len(self))
            for _ in range(3):
                tier.put_many([(key(1), labels(1)), (key(2), labels(2))])
        assert tier.errors == 6
        assert caplog.text.count("refuses labels: OutOfMemoryError") == 1
        tier.put_many([(key(1), labels(1))])
        assert same(tier.get_many([key(1)])[0], labels(1)), "it was not left alone"
        assert tier.errors == 6

    @pytest.mark.parametrize("secret", [f":{PASSWORD}@", f"user:{PASSWORD}@"])
    def test_the_password_is_shown_nowhere(
        self, connect: Callable[..., RedisTier], caplog: pytest.LogCaptureFixture, secret: str
    ) -> None:
        caplog.set_level(logging.DEBUG)
        with answering(f"-WRONGPASS sEcr3t pw {PASSWORD}\r\n".encode()) as port:
            tier = connect(port, secret=secret)
            tier.get_many([key(1)])
            tier.put_many([(key(1), labels(1))])
            assert tier.errors == 1
        shown = caplog.text + repr(tier) + str(vars(tier))
        assert f"127.0.0.1:{port}" in caplog.text
        assert "sEcr3t" not in shown

    @pytest.mark.parametrize(
        "url",
        [
            f"redis://:{PASSWORD}@host:port",
            f"redis://:{PASSWORD}@host:99999",
            f"redis://:{PASSWORD}@[::1",
            f"http://:{PASSWORD}@host",
            f"redis://host?password={PASSWORD}&socket_timeout=x",
            f"redis://host?{PASSWORD}=1",
        ],
    )
    def test_an_address_that_cannot_be_understood(self, url: str) -> None:
        with pytest.raises(InputError, match="GEOCENTROIDS_REDIS_URL") as error:
            RedisTier(url, 1)
        assert "sEcr3t" not in "".join(traceback.format_exception(error.value))


class TestOpening:
    def test_nothing_is_set(self) -> None:
        assert open_tiers(Settings()) is None

    def test_the_disk_before_the_network(self, tmp_path: Path, server: Any) -> None:
        chain = open_tiers(
            Settings(label_store_dir=tmp_path, redis_url=SecretStr(f"redis://127.0.0.1:{server.port}"), redis_ttl_s=5)
        )
        assert chain is not None
        assert [tier.name for tier in chain.tiers] == ["lmdb", "redis"]
        front, back = chain.tiers
        back.put_many([(key(1), labels(1))])
        assert same(chain.get_many([key(1)])[0], labels(1))
        assert same(front.get_many([key(1)])[0], labels(1))
        chain.put_many([(key(2), labels(2))])
        assert all(same(tier.get_many([key(2)])[0], labels(2)) for tier in chain.tiers)
        assert [(f.name, f.hits, f.misses, f.errors) for f in chain.figures()] == [
            ("lmdb", 0, 1, 0),
            ("redis", 1, 0, 0),
        ]
        chain.close()

    def test_what_was_opened_is_closed_again(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="REDIS_URL"):
            open_tiers(Settings(label_store_dir=tmp_path, redis_url=SecretStr("redis://host?nonsense=1")))
        assert not lmdb_tier._opened

    @pytest.mark.parametrize(
        ("package", "name", "value"),
        [("lmdb", "label_store_dir", "store"), ("redis", "redis_url", f"redis://:{PASSWORD}@host")],
    )
    def test_a_package_that_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, package: str, name: str, value: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"geocentroids_tiler.labels.{package}_tier")
        with pytest.raises(InputError, match=r"pip install 'geocentroids-tiler\[store\]'") as error:
            open_tiers(Settings(**{name: value}))
        assert f"GEOCENTROIDS_{name.upper()}" in str(error.value)
        assert "sEcr3t" not in "".join(traceback.format_exception(error.value))

    def test_packages_are_imported_only_when_used(self) -> None:
        code = (
            "import sys; from geocentroids_tiler.labels.tiers import open_tiers;"
            "from geocentroids_tiler.settings import Settings; open_tiers(Settings());"
            "print([m for m in ('lmdb', 'redis') if m in sys.modules])"
        )
        found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        assert found.strip() == "[]"


class TestSettings:
    @pytest.mark.parametrize("url", ["", "host:6379", "http://:sEcr3t@host", "redis://", "redis://:sEcr3t@h:port"])
    def test_a_wrong_address_is_refused_and_hidden(self, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        monkeypatch.setenv("GEOCENTROIDS_REDIS_URL", url)
        with pytest.raises(InputError, match=r"GEOCENTROIDS_REDIS_URL = \(hidden\): .*redis://") as refused:
            load_settings()
        assert "\n" not in str(refused.value)
        assert "sEcr3t" not in "".join(traceback.format_exception(refused.value))
        with pytest.raises(ValidationError) as error:
            Settings()
        assert "sEcr3t" not in str(error.value)

    def test_the_address_is_hidden(self) -> None:
        settings = Settings(redis_url=SecretStr("rediss://:sEcr3t@host:6380/2"))
        assert "sEcr3t" not in repr(settings) + str(settings) + settings.model_dump_json()

    def test_values_of_other_settings_are_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GEOCENTROIDS_LABEL_STORE_BYTES", "1000")
        with pytest.raises(InputError, match="GEOCENTROIDS_LABEL_STORE_BYTES = '1000'"):
            load_settings()
