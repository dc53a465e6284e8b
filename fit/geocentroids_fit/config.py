"""What a fit is to do: one model for the TOML file and the command line's flags."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from geocentroids_tiler.codebook import (
    MAX_CENTROIDS,
    NAME_PATTERN,
    Metric,
    PreprocessSection,
    Resampling,
    Triple,
    validation_problems,
)
from geocentroids_tiler.errors import InputError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImagesConfig(_Section):
    """Which images: a folder of GeoTIFFs, URLs of COGs, or both."""

    folder: Path | None = None
    urls: tuple[str, ...] = ()
    exclude: tuple[str, ...] = Field(default=(), description="patterns of paths below the folder to leave out")
    prepare: bool = Field(default=False, description="bring the images to the windows' gsd first")
    compress: Literal["jpeg", "lossless"] = "jpeg"
    bidx: tuple[int, int, int] | None = None
    rescale: tuple[float, float] | None = None


class SourceConfig(_Section):
    """Where some of the images come from; the first that matches an image is its source."""

    match: str = "*"
    licence: str = ""
    attribution: str = ""
    url: str = ""


class EncoderConfig(_Section):
    """The encoder: a hub id, a directory with a DINOv2 checkpoint, or an .onnx file."""

    model: str = Field(min_length=1)
    revision: str | None = None
    embed: bool | None = Field(default=None, description="carry it in the codebook; default: unless it is on the hub")
    provider: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = Field(default=None, ge=1)


class WindowsConfig(_Section):
    """From pixels on the ground to windows."""

    gsd_m: float = 0.25
    resampling: Resampling = "bilinear"
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)
    window_patches: int = 32
    margin_patches: int = 3
    stride_patches: int = 13

    @property
    def preprocess(self) -> PreprocessSection:
        """The same, as a codebook's manifest has it."""
        return PreprocessSection(**self.model_dump())

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            _ = self.preprocess
        except ValidationError as error:
            raise ValueError(validation_problems(error)) from error
        return self


class SampleConfig(_Section):
    """Which patches become features."""

    per_image: int = Field(default=20_000, ge=1, description="the most features of one image")
    readers: int = Field(default=2, ge=1, le=64, description="threads that read windows ahead of the encoder")


class ClusterConfig(_Section):
    """K-Means."""

    k: int = Field(default=1024, ge=1, le=MAX_CENTROIDS)
    metric: Metric = "cosine"
    init: Literal["auto", "random", "k-means++"] = "auto"
    max_iterations: int = Field(default=50, ge=1)
    tolerance: float = Field(default=1e-4, ge=0)
    device: str = "auto"


class ColorConfig(_Section):
    """Colours."""

    anchor: str | None = Field(default=None, description="codebook whose colours similar centroids keep")


class CodebookConfig(_Section):
    """What the codebook says of itself."""

    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(default="1", min_length=1, max_length=64)
    title: str = ""
    licence: str = ""
    attribution: str = ""
    region: str = ""
    card: Path | None = Field(default=None, description="text of the model card; default: made from the run")
    exemplars: bool = True


class ImageSetConfig(_Section):
    """Images to evaluate on, with land cover masks or without."""

    name: str = ""
    images: Path
    exclude: tuple[str, ...] = ()
    masks: Path | None = None
    ignore: tuple[int, ...] = (255,)
    classes: dict[int, str] = Field(default_factory=dict)


class EvaluateConfig(_Section):
    """The report at the end."""

    sets: tuple[ImageSetConfig, ...] = ()
    max_patches: int = Field(default=16_384, ge=1, description="of one image; a larger one is cut to its middle")


class FitConfig(_Section):
    """A fit from images to codebook."""

    out: Path
    work: Path | None = Field(default=None, description="folder of what is kept between runs; default: OUT.work")
    seed: int = Field(default=0, ge=0)
    images: ImagesConfig
    sources: tuple[SourceConfig, ...] = ()
    encoder: EncoderConfig
    windows: WindowsConfig = WindowsConfig()
    sample: SampleConfig = SampleConfig()
    cluster: ClusterConfig = ClusterConfig()
    color: ColorConfig = ColorConfig()
    codebook: CodebookConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def workspace(self) -> Path:
        """Folder of what is kept between runs."""
        return self.work or self.out.with_name(self.out.name + ".work")


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file; relative paths in it start at its folder.

    Raises:
        InputError: if it cannot be read or is not TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    base = path.parent
    for section, key in (("", "out"), ("", "work"), ("images", "folder"), ("codebook", "card")):
        _anchor(content.get(section) if section else content, key, base)
    for entry in _tables(content.get("evaluate"), "sets"):
        _anchor(entry, "images", base)
        _anchor(entry, "masks", base)
    for section, key in (("encoder", "model"), ("color", "anchor")):  # a path, or a name
        table = content.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str) and (base / table[key]).exists():
            _anchor(table, key, base)
    return content


def make_config(content: Mapping[str, Any]) -> FitConfig:
    """Check a configuration.

    Raises:
        InputError: naming each value that is wrong and what is accepted.
    """
    try:
        return FitConfig.model_validate(content)
    except ValidationError as error:
        raise InputError(f"the configuration is not usable: {validation_problems(error)}") from error


def _anchor(table: Any, key: str, base: Path) -> None:
    if isinstance(table, dict) and isinstance(table.get(key), str):
        table[key] = str(base / table[key])


def _tables(section: Any, key: str) -> list[Any]:
    found = section.get(key) if isinstance(section, dict) else None
    return found if isinstance(found, list) else []
