"""Features on disk: one shard per image, and a manifest that says what they are and where each comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from geocentroids_fit.files import map_array, read_json, write_arrays, write_json
from geocentroids_tiler.codebook import EncoderSection, PreprocessSection, file_sha256, validation_problems
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import Bounds

FORMAT: Literal["geocentroids-features/1"] = "geocentroids-features/1"
MANIFEST_FILE = "features.json"
SHARDS_DIR = "shards"
AGAIN = "run geocentroids-fit extract again: it computes this shard anew and keeps the others"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FeatureSettings(_Record):
    """What features depend on beside the image.

    Attributes:
        encoder: which encoder computed the tokens.
        preprocess: from pixels to windows.
        device: backend, provider and precision; tokens of another may differ in the last bits.
        per_image: the most features of one image.
        seed: of the sample.
        bidx: bands read as red, green and blue; None: by their colour interpretation.
        rescale: values that became black and white; None: the images are of 8 bits.
    """

    encoder: EncoderSection
    preprocess: PreprocessSection
    device: str
    per_image: int
    seed: int
    bidx: tuple[int, int, int] | None = None
    rescale: tuple[float, float] | None = None


class ShardRecord(_Record):
    """A finished shard.

    Attributes:
        image: path of the image relative to the folder, or its URL.
        identity: of the image's content when it was read.
        bounds: west, south, east, north of the image in degrees.
        features: number of features, 0 if no patch has data.
        file: name of the shard in ``SHARDS_DIR``.
        size_bytes: of the shard.
        sha256: of the shard, in hex.
    """

    image: str
    identity: str
    bounds: tuple[float, float, float, float] | None = None
    features: int
    file: str
    size_bytes: int
    sha256: str


class SkippedImage(_Record):
    """An image that gave no shard, and why."""

    image: str
    reason: str


class FeatureManifest(_Record):
    """Content of ``features.json``."""

    format: Literal["geocentroids-features/1"] = FORMAT
    settings: FeatureSettings
    images: tuple[ShardRecord, ...]
    skipped: tuple[SkippedImage, ...] = ()


@dataclass(frozen=True)
class Features:
    """Features of one image, or of all.

    Attributes:
        tokens: blended tokens, of shape (N, D), float16.
        rgb: mean colour of each patch, of shape (N, 3), uint8.
        row: row of the patch on the image's ground grid, of shape (N,), int64.
        col: its column, likewise.
    """

    tokens: NDArray[np.float16]
    rgb: NDArray[np.uint8]
    row: NDArray[np.int64]
    col: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class FeatureStore:
    """Finished features of many images. Feature i of all is counted through the images in the manifest's order.

    Attributes:
        path: the directory.
        manifest: what ``features.json`` says.
    """

    path: Path
    manifest: FeatureManifest

    def __len__(self) -> int:
        return sum(record.features for record in self.manifest.images)

    @property
    def dim(self) -> int:
        """Length D of a token."""
        return self.manifest.settings.encoder.dim

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the images."""
        return tuple(record.image for record in self.manifest.images)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds that of every shard."""
        return file_sha256(self.path / MANIFEST_FILE)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Number of the first feature of each image, and of all features, of shape (images + 1,)."""
        return np.concatenate([[0], np.cumsum([record.features for record in self.manifest.images])]).astype(np.int64)

    def parts(self) -> list[NDArray[np.float16]]:
        """Return the tokens of each image, of shape (n, D), mapped from disk."""
        return [map_array(self.path / SHARDS_DIR / record.file, "tokens") for record in self.manifest.images]

    def origin(self, image: int) -> Features:
        """Return the features of one image, of which tokens are mapped from disk."""
        path = self.path / SHARDS_DIR / self.manifest.images[image].file
        return Features(**{key: map_array(path, key) for key in ("tokens", "rgb", "row", "col")})


def open_features(path: Path, *, verify: bool = True) -> FeatureStore:
    """Open a directory of features.

    Args:
        path: the directory.
        verify: whether the checksum of every shard is compared.

    Raises:
        InputError: if the manifest or a shard is missing or broken; the text names the file and the remedy.
    """
    content = read_json(path / MANIFEST_FILE)
    if content is None:
        raise InputError(f"{path / MANIFEST_FILE} is missing: run geocentroids-fit extract to its end first")
    try:
        manifest = FeatureManifest.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path / MANIFEST_FILE} is not a manifest: {validation_problems(error)}") from error
    for record in manifest.images:
        if problem := shard_problem(path / SHARDS_DIR, record, verify=verify):
            raise InputError(f"{problem}; {AGAIN}")
    return FeatureStore(path, manifest)


def shard_file(image: str) -> str:
    """Return the name of an image's shard: readable, and different for every image."""
    stem = Path(image).stem[-60:]
    readable = "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "_" for char in stem)
    return f"{readable}-{hashlib.sha256(image.encode()).hexdigest()[:12]}.safetensors"


def write_shard(
    folder: Path, image: str, identity: str, features: Features, bounds: Bounds | None = None
) -> ShardRecord:
    """Write the shard of one image, then its record; without the record a shard does not count.

    Raises:
        InputError: if there is no room.
    """
    name = shard_file(image)
    path = folder / name
    write_arrays(path, dict(vars(features)))
    record = ShardRecord(
        image=image,
        identity=identity,
        bounds=bounds,
        features=len(features),
        file=name,
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
    )
    write_json(path.with_suffix(".json"), record.model_dump())
    return record


def finished_shard(folder: Path, image: str, identity: str) -> ShardRecord | None:
    """Return the record of an image's shard if it is whole and made of the image as it is now."""
    content = read_json((folder / shard_file(image)).with_suffix(".json"))
    try:
        record = ShardRecord.model_validate(content)
    except ValidationError:
        return None
    fits = record.image == image and record.identity == identity
    return record if fits and shard_problem(folder, record, verify=True) is None else None


def shard_problem(folder: Path, record: ShardRecord, *, verify: bool) -> str | None:
    """Say what is wrong with a shard, or return None."""
    path = folder / record.file
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != record.size_bytes:
        return f"{path} has {size} bytes instead of {record.size_bytes}"
    if verify and file_sha256(path) != record.sha256:
        return f"{path} has changed: its SHA-256 is not that of its record"
    return None
