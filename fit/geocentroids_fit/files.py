"""Files that are whole or not there: written beside their place, flushed, then moved into it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.safetensors_layout import array_places

PART_SUFFIX = ".part"
"""Of a file that is being written. One that is left over is written anew."""
_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "U8": np.uint8, "U16": np.uint16, "I64": np.int64}


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name to write to in place of ``path``; after the block, the file is flushed and moved to ``path``.

    Raises:
        InputError: if the disk is full or the folder may not be written to.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise InputError(
            f"{path} could not be written: {error.strerror or error}; make room or choose another folder, then run "
            "the same command again: finished work is kept"
        ) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as safetensors, whole or not at all; the same arrays give the same bytes.

    Raises:
        InputError: if the file cannot be written.
    """
    content = save({key: np.ascontiguousarray(array) for key, array in arrays.items()})
    with new_file(path) as part:
        part.write_bytes(content)


def read_arrays(path: Path, remedy: str) -> dict[str, NDArray[Any]]:
    """Read arrays from a safetensors file.

    Args:
        path: the file.
        remedy: what to do if it cannot be read, for the message.

    Raises:
        InputError: if it is missing or broken.
    """
    try:
        arrays: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({error}); {remedy}") from error
    return arrays


def map_array(path: Path, key: str) -> NDArray[Any]:
    """Map one array of a safetensors file into memory, read-only; nothing is read yet."""
    place = array_places(path)[key]
    dtype = np.dtype(_DTYPES[place.dtype])
    if not place.size_bytes:  # nothing cannot be mapped
        return np.empty(place.shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=place.offset, shape=place.shape)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; what is no text in it, such as some file names, is escaped.

    Raises:
        InputError: if the file cannot be written.
    """
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all; the same content gives the same bytes.

    Raises:
        InputError: if the file cannot be written.
    """
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no such file or it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def digest_of(content: Any) -> str:
    """Return the SHA-256 of something that JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
