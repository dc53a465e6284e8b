"""Results of steps that are kept between runs: arrays, and a record of what they were made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from geocentroids_fit import __version__
from geocentroids_fit.files import digest_of, read_arrays, read_json, write_arrays, write_json
from geocentroids_tiler.codebook import file_sha256
from geocentroids_tiler.errors import InputError

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Kept:
    """A finished step.

    Attributes:
        arrays: what it made.
        record: ``inputs`` it was made of, ``sha256`` of the arrays, and facts about them.
        reused: whether it was there already.
    """

    arrays: Arrays
    record: dict[str, Any]
    reused: bool

    @property
    def digest(self) -> str:
        """SHA-256 of the record, which holds that of the arrays."""
        return digest_of(self.record)


def keep(
    folder: Path, name: str, inputs: Mapping[str, Any], make: Callable[[], tuple[Arrays, Mapping[str, Any]]]
) -> Kept:
    """Return a step's result: the one kept if it was made of the same inputs by this version, else a new one.

    Args:
        folder: where results are kept.
        name: of the step.
        inputs: all that the result depends on, as JSON can hold it.
        make: makes arrays and facts about them.

    Raises:
        InputError: if there is no room.
    """
    inputs = {"version": __version__, **inputs}
    arrays_file, record_file = _files(folder, name)
    record = read_json(record_file)
    if record is not None and record.get("inputs") == inputs and _whole(arrays_file, record):
        return Kept(read_arrays(arrays_file, f"remove it and run geocentroids-fit {name} again"), record, True)
    arrays, facts = make()
    record_file.unlink(missing_ok=True)  # without its record a result does not count
    write_arrays(arrays_file, arrays)
    record = {"inputs": inputs, "sha256": file_sha256(arrays_file), **facts}
    write_json(record_file, record)
    return Kept(arrays, record, False)


def load_kept(folder: Path, name: str) -> Kept:
    """Return a step's finished result.

    Raises:
        InputError: if it is missing, broken or not finished.
    """
    arrays_file, record_file = _files(folder, name)
    record = read_json(record_file)
    if record is None:
        raise InputError(f"{record_file} is missing: run geocentroids-fit {name} to its end first")
    again = f"run geocentroids-fit {name} again"
    if not _whole(arrays_file, record):
        raise InputError(f"{arrays_file} is missing or not the file that {record_file.name} describes; {again}")
    return Kept(read_arrays(arrays_file, again), record, True)


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def _whole(arrays_file: Path, record: Mapping[str, Any]) -> bool:
    return arrays_file.is_file() and file_sha256(arrays_file) == record.get("sha256")
