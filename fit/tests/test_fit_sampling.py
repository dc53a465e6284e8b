"""Which patches become features."""

from __future__ import annotations

import numpy as np
import pytest

from geocentroids_fit.sampling import Sample, spread_chunks
from geocentroids_fit.shards import Features
from geocentroids_tiler.grid import PatchRange


def offered(count: int, start: int = 0) -> Features:
    number = np.arange(start, start + count)
    return Features(
        tokens=np.stack([number, -number], axis=1).astype(np.float16),
        rgb=np.repeat(number[:, None] % 256, 3, axis=1).astype(np.uint8),
        row=number // 50,
        col=number % 50,
    )


def test_spread_chunks_cover_the_area_evenly() -> None:
    area = PatchRange(-300, 300, 90, 690)  # 200 x 200 chunks of 3
    chosen = spread_chunks(area, 3, 100, np.random.default_rng(0))
    assert len(chosen) == len(set(chosen)) == 100
    cells = {((chunk.row + 100) // 20, (chunk.col - 30) // 20) for chunk in chosen}
    assert len(cells) == 100
    assert chosen == spread_chunks(area, 3, 100, np.random.default_rng(0))


def test_few_chunks_are_all_taken() -> None:
    area = PatchRange(0, 7, 0, 4)
    assert spread_chunks(area, 3, 6, np.random.default_rng(0)) == list(area.chunks(3))


def test_the_order_of_chunks_does_not_matter() -> None:
    forward, backward = Sample("a", 0, 30, 2), Sample("a", 0, 30, 2)
    for chunk in range(10):
        forward.offer(chunk, offered(40, 40 * chunk))
    for chunk in reversed(range(10)):
        backward.offer(chunk, offered(40, 40 * chunk))
    one, other = forward.features(), backward.features()
    assert len(one) == 30
    assert all((getattr(one, key) == getattr(other, key)).all() for key in ("tokens", "rgb", "row", "col"))
    assert (one.tokens[:, 0] == -one.tokens[:, 1]).all()
    assert (one.row * 50 + one.col == one.tokens[:, 0]).all()


def test_every_patch_has_the_same_chance() -> None:
    taken = np.zeros(200)
    for seed in range(400):
        sample = Sample("a", seed, 50, 2)
        for chunk in range(4):
            sample.offer(chunk, offered(50, 50 * chunk))
        taken[sample.features().tokens[:, 0].astype(int)] += 1
    # 400 draws with a chance of a quarter: mean 100, standard deviation 8.7.
    assert taken.mean() == 100
    assert taken.min() > 60
    assert taken.max() < 140
    assert taken.std() == pytest.approx(8.7, rel=0.3)


def test_fewer_than_the_cap_are_all_kept() -> None:
    sample = Sample("a", 0, 500, 2)
    sample.offer(0, offered(20))
    assert len(sample.features()) == 20
