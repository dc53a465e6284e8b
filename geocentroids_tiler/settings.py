"""All settings, read once from ``GEOCENTROIDS_*`` environment variables by the entry points and passed down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from geocentroids_tiler.errors import InputError

MIB = 2**20


def default_codebooks_dir() -> Path:
    """Return the folder where pulled and imported codebooks are kept."""
    return Path.home() / ".local" / "share" / "geocentroids" / "codebooks"


class Settings(BaseSettings):
    """What an operator can choose. Sizes are in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="GEOCENTROIDS_", frozen=True, extra="ignore")

    codebook: str = Field(default="nano", min_length=1, description="codebook used where a request names none")
    codebooks_dir: Path = Field(
        default_factory=default_codebooks_dir, description="folder of installed codebooks, one directory each"
    )
    root: Path | None = Field(
        default=None, description="folder whose files may be opened by relative path; none: no local files"
    )

    demo_url: str | None = Field(
        default=None, max_length=4096, description="image that the viewer opens with when it is given none"
    )

    backend: Literal["auto", "onnx", "torch"] = Field(default="auto", description="what runs the encoder")
    provider: str = Field(default="auto", description="ONNX Runtime execution provider, for example CUDA or CPU")
    device: str = Field(default="auto", description="torch device, for example cuda:0 or cpu")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="number format of the torch encoder; auto: bf16 on CUDA, fp32 on a CPU"
    )
    threads: int | None = Field(default=None, ge=1, le=256, description="CPU threads of the encoder; none: all cores")
    batch_windows: int | None = Field(
        default=None, ge=1, le=4096, description="windows in one run of the device; none: 1 on a CPU, 32 on a GPU"
    )

    read_threads: int = Field(default=4, ge=1, le=64, description="windows read from sources at once")
    label_cache_bytes: int = Field(default=128 * MIB, ge=0, description="memory for computed labels")
    token_cache_bytes: int = Field(
        default=256 * MIB, ge=0, description="device memory for tokens that neighbouring chunks share"
    )
    tile_cache_bytes: int = Field(default=64 * MIB, ge=0, description="memory for encoded tiles")
    source_ttl_s: float = Field(
        default=60, ge=0, le=86400, description="time after which a source is asked again whether it changed"
    )
    source_timeout_s: float = Field(default=10, gt=0, le=600, description="longest wait for an answer of a source")
    tile_budget_s: float = Field(
        default=4, gt=0, le=600, description="computing time that a tile may need; it sets minzoom"
    )
    max_chunks: int = Field(
        default=20_000, ge=1, le=10_000_000, description="chunks that one export or statistics request may need"
    )
    cors_origins: list[str] = Field(
        default=["*"], description="web origins whose pages may use this server, as a JSON list"
    )
    cache_control: str = Field(
        default="public, max-age=3600", pattern=r"^[\x20-\x7e]+$", description="Cache-Control header of tiles"
    )


def load_settings(**values: Any) -> Settings:
    """Return the settings of the environment, with those of the command line that are not None over them.

    Raises:
        InputError: if a variable has a value that is not allowed.
    """
    try:
        return Settings(**{key: value for key, value in values.items() if value is not None})
    except SettingsError as error:  # a variable whose type is read as JSON
        names = re.findall(r'field "(\w+)"', str(error))
        raise InputError(f"GEOCENTROIDS_{''.join(names).upper()} is not JSON: {error.__cause__}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        name = "_".join(str(part) for part in problem["loc"]).upper()
        raise InputError(f"GEOCENTROIDS_{name} = {problem['input']!r}: {problem['msg']}") from error
