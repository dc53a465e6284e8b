"""Who labels what, where several devices could: each image, or part of a large one, has one owner at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from geocentroids_tiler.labels.labeller import DatasetKey

BLOCK_CHUNKS = 64
"""Chunks a side of what has one owner. Windows on the edge of two blocks are computed by both owners, 3 % of them."""


def block_key(dataset: DatasetKey, place: tuple[int, int]) -> str:
    """Return the name of the block that a chunk is in.

    Args:
        dataset: the image.
        place: row and column of the chunk, counted from the image's first: an image up to 64 x 64 chunks is one block.
    """
    url, identity, options = dataset
    text = repr((url, identity, options, place[0] // BLOCK_CHUNKS, place[1] // BLOCK_CHUNKS))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def ranked(key: str, names: Sequence[str]) -> list[str]:
    """Return candidates for a key, the owner first, by rendezvous hashing.

    Everybody who knows the same candidates has the same order, and a candidate that goes or comes moves its own share
    only.
    """
    return sorted(names, key=lambda name: hashlib.blake2b(f"{key} {name}".encode(), digest_size=8).digest())
