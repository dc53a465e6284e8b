"""Exemplars: for each label a small picture of typical patches, and whose images these were cut from.

They lie in the folder ``exemplars`` of a codebook: the pictures, called sheets, in ``sheets.safetensors``, where each
is an array of bytes with the label as its name, and ``index.json``. A codebook may come from anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from geocentroids_tiler.errors import CodebookError, short
from geocentroids_tiler.safetensors_layout import array_places

EXEMPLARS_DIR = "exemplars"
SHEETS_FILE = "sheets.safetensors"
INDEX_FILE = "index.json"
MAX_SHEET_BYTES = 64 * 2**10
MAX_SHEETS_BYTES = 512 * 2**20
MAX_INDEX_BYTES = 32 * 2**20


class ExemplarImage(BaseModel):
    """An image that exemplars were cut from, and what its owner wants to be said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = Field(min_length=1, max_length=4096, description="its path when the codebook was fitted, or its URL")
    licence: str = Field(default="", max_length=4096)
    attribution: str = Field(default="", max_length=4096)
    url: str = Field(default="", max_length=4096, pattern=r"^(https?://\S+)?$", description="where more is said of it")


class _Index(BaseModel):
    """Content of ``index.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: tuple[ExemplarImage, ...]
    patches: dict[int, tuple[tuple[int, int, int], ...]]


@dataclass(frozen=True)
class Exemplars:
    """The exemplars of a codebook.

    Attributes:
        file: where the sheets lie.
        sheets: for each label that has a sheet, where it begins in the file, and how many bytes it has.
        images: the images that patches were cut from.
        patches: for each label the patches on its sheet, from left to right: number of the image, and row and column
            on its ground grid.
    """

    file: Path
    sheets: Mapping[int, tuple[int, int]]
    images: tuple[ExemplarImage, ...]
    patches: Mapping[int, tuple[tuple[int, int, int], ...]]

    def read(self, label: int) -> bytes | None:
        """Return the sheet of a label as WebP, at most ``MAX_SHEET_BYTES``, or None if it has none.

        Raises:
            CodebookError: if the file cannot be read, or has no WebP there.
        """
        if label not in self.sheets:
            return None
        offset, size_bytes = self.sheets[label]
        try:
            with self.file.open("rb") as file:
                file.seek(offset)
                content = file.read(size_bytes)
        except OSError as error:
            raise CodebookError(f"{self.file} cannot be read: {error.strerror or error}") from error
        # Source: https://developers.google.com/speed/webp/docs/riff_container
        if len(content) < size_bytes or content[:4] != b"RIFF" or content[8:12] != b"WEBP":
            raise CodebookError(f"{self.file}: sheet {label} is not WebP")
        return content


def load_exemplars(codebook: Path, k: int) -> Exemplars | None:
    """Look at the exemplars of a codebook directory.

    Args:
        codebook: the directory.
        k: number of labels.

    Returns:
        The exemplars, or None if there are no sheets.

    Raises:
        CodebookError: if a sheet is of no label, too large or no WebP, or the index is missing or wrong.
    """
    file, index_file = (codebook / EXEMPLARS_DIR / name for name in (SHEETS_FILE, INDEX_FILE))
    if not file.exists():
        return None
    index = _read_index(index_file)
    exemplars = Exemplars(file, _find_sheets(file, k), index.images, index.patches)
    for label in exemplars.sheets:
        exemplars.read(label)
    return exemplars


def _find_sheets(file: Path, k: int) -> dict[int, tuple[int, int]]:
    """Return where each sheet begins in the file, and how many bytes it has."""
    _check(file, MAX_SHEETS_BYTES)
    try:
        with safe_open(file, framework="numpy"):  # checks the header
            places = array_places(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CodebookError(f"{file} is not a readable safetensors file: {str(error)[:200]!r}") from error
    labels = {str(label): label for label in range(k)}
    sheets = {}
    for name, place in places.items():
        if name not in labels:
            raise CodebookError(f"{file} has a sheet named {short(name)}; allowed are the labels 0 to {k - 1}")
        if place.dtype != "U8" or place.shape != (place.size_bytes,) or not 0 < place.size_bytes <= MAX_SHEET_BYTES:
            raise CodebookError(
                f"{file}: sheet {name} has shape {short(list(place.shape))} and dtype {place.dtype}; "
                f"allowed are 1 to {MAX_SHEET_BYTES} bytes in one dimension, dtype U8"
            )
        sheets[labels[name]] = place.offset, place.size_bytes
    return sheets


def _read_index(file: Path) -> _Index:
    _check(file, MAX_INDEX_BYTES)
    try:
        index = _Index.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CodebookError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise CodebookError(f"{file} is not an index of exemplars: {where}: {first['msg']}") from error
    outside = [
        image for patches in index.patches.values() for image, *_ in patches if not 0 <= image < len(index.images)
    ]
    if outside:
        raise CodebookError(f"{file} names image {outside[0]}; allowed are 0 to {len(index.images) - 1}")
    return index


def _check(file: Path, max_bytes: int) -> None:
    """Raise CodebookError unless ``file`` is a file of at most ``max_bytes``; to open a pipe would wait for ever."""
    if not file.is_file():
        raise CodebookError(f"{file} is missing or not a file")
    if file.stat().st_size > max_bytes:
        raise CodebookError(f"{file} has {file.stat().st_size} bytes; allowed are at most {max_bytes}")
