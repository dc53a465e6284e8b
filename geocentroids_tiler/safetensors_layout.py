"""Where arrays lie in a safetensors file, for reading some of them without the others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """An array in a file.

    Attributes:
        dtype: as the format writes it, for example ``F16``.
        shape: of the array.
        offset: of its first byte from the start of the file.
        size_bytes: of the array.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def array_places(file: Path) -> dict[str, ArrayPlace]:
    """Return where each array lies in a file that the safetensors library accepts.

    Raises:
        OSError: if it cannot be read.
        ValueError, KeyError, TypeError: if it is anything else.

    Source: https://huggingface.co/docs/safetensors (a length of 8 bytes, a header in JSON, then the arrays).
    """
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(start - 8))
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, stop = entry["data_offsets"]
            places[name] = ArrayPlace(entry["dtype"], tuple(entry["shape"]), start + first, stop - first)
    return places
