"""All settings, read once from ``GEOCENTROIDS_*`` environment variables by the entry points and passed down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, IPvAnyNetwork, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from geocentroids_tiler.errors import InputError

MIB = 2**20
_REPLICAS = r"^[1-9][0-9]{0,3}(-[1-9][0-9]{0,3})?$"
MIN_API_KEY = 16
MIN_SIGNING_KEY = 32
"""Characters. A signing key can be tried out offline by whoever has one signature."""


def default_codebooks_dir() -> Path:
    """Return the folder where pulled and imported codebooks are kept."""
    return Path.home() / ".local" / "share" / "geocentroids" / "codebooks"


class Settings(BaseSettings):
    """What an operator can choose. Sizes are in bytes, times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="GEOCENTROIDS_", frozen=True, extra="ignore", hide_input_in_errors=True
    )

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

    backend: Literal["auto", "onnx", "openvino", "torch"] = Field(
        default="auto", description="what runs the encoder; auto: the fastest installed one for this machine"
    )
    provider: str = Field(default="auto", description="ONNX Runtime execution provider, for example CUDA or CPU")
    device: str = Field(default="auto", description="torch device, for example cuda:0 or cpu")
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        default="auto",
        description="number format of the encoder; auto: bf16 with torch on CUDA and OpenVINO on a CPU that has it",
    )
    threads: int | None = Field(default=None, ge=1, le=256, description="CPU threads of the encoder; none: all cores")
    batch_windows: int | None = Field(
        default=None, ge=1, le=4096, description="windows in one run of the device; none: 1 on a CPU, 32 on a GPU"
    )

    read_threads: int = Field(default=4, ge=1, le=64, description="windows read from sources at once")
    label_cache_bytes: int = Field(default=128 * MIB, ge=0, description="memory for computed labels")
    label_store_dir: Path | None = Field(
        default=None, description="folder on a local disk that keeps computed labels; none: memory only"
    )
    label_store_bytes: int = Field(default=1024 * MIB, ge=16 * MIB, description="disk for that folder")
    redis_url: SecretStr | None = Field(
        default=None, description="Redis that keeps computed labels for several machines; none: no Redis"
    )
    redis_ttl_s: int = Field(
        default=30 * 86400, ge=1, le=365 * 86400, description="time after which Redis forgets labels"
    )
    labels_dir: Path | None = Field(
        default=None, description="folder of labels of whole datasets, and of the jobs that make them; none: no jobs"
    )
    label_files_bytes: int = Field(
        default=10 * 1024 * MIB, ge=0, description="disk for that folder; a job that may not fit is refused"
    )
    max_jobs: int = Field(default=100, ge=1, le=10_000, description="unfinished jobs; with as many, more are refused")
    token_cache_bytes: int = Field(
        default=256 * MIB, ge=0, description="device memory for tokens that neighbouring chunks share"
    )
    tile_cache_bytes: int = Field(default=64 * MIB, ge=0, description="memory for encoded tiles")
    source_ttl_s: float = Field(
        default=60, ge=0, le=86400, description="time after which a source is asked again whether it changed"
    )
    source_timeout_s: float = Field(
        default=10, gt=0, le=600, description="longest silence of a source's server before and within an answer"
    )
    source_connect_timeout_s: float = Field(
        default=5, gt=0, le=60, description="longest wait for a connection to a source's server, its name resolved"
    )
    source_total_timeout_s: float = Field(
        default=60, gt=0, le=3600, description="longest wait for all bytes that one opening of a source needs"
    )
    source_read_bytes: int = Field(
        default=512 * MIB, ge=MIB, description="bytes that one opening of a source may fetch, for some windows"
    )
    source_cache_bytes: int = Field(default=64 * MIB, ge=MIB, description="memory for bytes of remote sources")
    source_connections: int = Field(
        default=8, ge=1, le=64, description="connections to one host, images of it opened and windows read at once"
    )
    source_http: bool = Field(default=False, description="whether http URLs are opened beside https")
    source_hosts: list[str] = Field(
        default=[],
        description="the only hosts that are read from, example.com or *.example.com, as a JSON list; none: all public",
    )
    source_networks: list[IPvAnyNetwork] = Field(
        default=[],
        description="networks that are read from although they are not public, such as 10.0.0.0/8, as a JSON list",
    )
    source_ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        default=[80, 443, 8080, 8443], min_length=1, description="ports of public hosts, as a JSON list"
    )
    source_buckets: list[Annotated[str, Field(pattern=r"^(s3|gs|az)://[a-z0-9][a-z0-9._-]{1,254}/?$")]] = Field(
        default=[],
        description="buckets read from with this server's own credentials, such as s3://name, as a JSON list",
    )
    source_proxy: SecretStr | None = Field(
        default=None, description="http URL of a proxy for all sources; none: none, whatever the environment says"
    )
    mosaic_images: int = Field(
        default=20_000, ge=1, le=100_000, description="images of a mosaic; one that names more is refused"
    )
    mosaic_bytes: int = Field(
        default=32 * MIB,
        ge=1024,
        le=1024 * MIB,
        description="size of a mosaic's document, unpacked, or of all pages of a search",
    )
    mosaic_unplaced: int = Field(
        default=500, ge=0, le=100_000, description="images opened to learn where they lie, if a mosaic does not say"
    )
    mosaic_opened: int = Field(default=128, ge=1, le=10_000, description="images of a mosaic that one request may open")
    failure_ttl_s: float = Field(
        default=3, ge=0, le=60, description="time for which a source that could not be opened is not asked again"
    )
    request_timeout_s: float = Field(
        default=60, gt=0, le=3600, description="longest wait of a tile or point for its labels"
    )
    export_timeout_s: float = Field(
        default=600, gt=0, le=86400, description="longest wait of an export or statistics for their labels"
    )
    queue_windows: int = Field(
        default=4096, ge=1, le=1_000_000, description="windows that may wait; with as many, requests are refused"
    )
    ray_ingress_replicas: str = Field(
        default="1-4",
        pattern=_REPLICAS,
        description="processes of `serve --ray` that read and answer: N, or MIN-MAX by what is under way",
    )
    ray_encoder_replicas: str | None = Field(
        default=None,
        pattern=_REPLICAS,
        description="devices of `serve --ray`: N, or MIN-MAX; none: each GPU, without GPUs each node",
    )
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

    # Who may ask for how much, and what browsers may do with the answers.
    max_body_bytes: int = Field(
        default=MIB, ge=1024, le=1024 * MIB, description="largest body of a request; larger ones are refused"
    )
    max_target_bytes: int = Field(default=16 * 1024, ge=1024, le=MIB, description="longest path and query of a request")
    max_header_bytes: int = Field(default=32 * 1024, ge=1024, le=MIB, description="headers of a request in all")
    client_requests: int = Field(
        default=64, ge=1, le=100_000, description="requests of one client at once; more are refused"
    )
    requests_at_once: int = Field(
        default=512, ge=1, le=1_000_000, description="requests of all clients at once; more are refused"
    )
    stock_requests: int = Field(
        default=16, ge=1, le=36, description="requests to TiTiler's own routes that run at once; more wait"
    )
    max_features: int = Field(default=1000, ge=1, le=1_000_000, description="features in the body of one request")
    max_vertices: int = Field(
        default=100_000, ge=4, le=100_000_000, description="vertices of all features in the body of one request"
    )
    api_keys: list[SecretStr] = Field(
        default=[], description="keys of which every request needs one, as a JSON list; empty: no key is needed"
    )
    signing_key: SecretStr | None = Field(
        default=None, description="key of signatures that open one image; none: there are no signatures"
    )
    frame_ancestors: str = Field(
        default="'self'",
        pattern=r"^('none'|('self'|https?://[\w.*-]+(:(\d+|\*))?)( ('self'|https?://[\w.*-]+(:(\d+|\*))?))*)$",
        description="who may show the web page in a frame, as a Content-Security-Policy says it",
    )
    docs: bool = Field(default=False, description="serve /docs, whose script comes from a host of others")

    @field_validator("api_keys", "signing_key")
    @classmethod
    def _check_secrets(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse keys that could be guessed, or could not be sent, without repeating them."""
        shortest = MIN_API_KEY if info.field_name == "api_keys" else MIN_SIGNING_KEY
        for secret in value if isinstance(value, list) else [value]:
            text = "" if secret is None else secret.get_secret_value()
            if secret is not None and (len(text) < shortest or not re.fullmatch(r"[\x21-\x7e]+", text)):
                raise ValueError(f"a key has at least {shortest} printable ASCII characters and no blanks")
        return value

    @field_validator("ray_ingress_replicas", "ray_encoder_replicas")
    @classmethod
    def _check_replicas(cls, text: str | None) -> str | None:
        """Refuse MIN-MAX with the greater first."""
        least, _, most = (text or "").partition("-")
        if most and int(least) > int(most):
            raise ValueError("MIN is greater than MAX")
        return text

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: SecretStr | None) -> SecretStr | None:
        """Refuse what is no address of a Redis, without repeating it: it may hold a password."""
        if url is not None:
            try:
                parts = urlsplit(url.get_secret_value())
                usable = parts.scheme in ("redis", "rediss") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                usable = False
            if not usable:
                raise ValueError("not redis://host:port/number or rediss://host:port/number")
        return url


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
        name = str(problem["loc"][0]).upper()  # of a list the setting, not the item: it may be secret as a whole
        given = "(hidden)" if name.lower() in _secret_names() else repr(problem["input"])
        raise InputError(f"GEOCENTROIDS_{name} = {given}: {problem['msg']}") from error


def _secret_names() -> set[str]:
    """Return the settings whose values are shown nowhere."""
    return {name for name, field in Settings.model_fields.items() if SecretStr in get_args(field.annotation)}
