"""Every setting is in the docs with its default, and bounds hold."""

from __future__ import annotations

import json
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.settings import Settings, default_codebooks_dir, load_settings

DOCS = Path(__file__).parents[1] / "docs" / "settings.md"
ROWS = {
    match[1]: (match[2], match[3])
    for match in re.finditer(r"^\| `GEOCENTROIDS_(\w+)` \| (.+?) \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.M)
}
FIELDS = Settings.model_fields


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIELDS:
        monkeypatch.delenv(f"GEOCENTROIDS_{name.upper()}", raising=False)


def shown(value: Any) -> str:
    """Return a default as the docs write it."""
    if value is None:
        return "none"
    if value == default_codebooks_dir():
        return "`~/.local/share/geocentroids/codebooks`"
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return f"`{text.removesuffix('.0')}`"


def test_the_docs_list_every_setting_and_no_other() -> None:
    assert list(ROWS) == [name.upper() for name in FIELDS], "in the order of the class"


@pytest.mark.parametrize("name", FIELDS)
def test_the_docs_have_the_default_and_a_meaning(name: str) -> None:
    default, meaning = ROWS[name.upper()]
    assert default == shown(getattr(Settings(), name))
    assert meaning.endswith(".")
    assert FIELDS[name].description, "the class says what it means, too"


@pytest.mark.parametrize("name", FIELDS)
def test_the_docs_have_the_largest_value(name: str) -> None:
    for bound in FIELDS[name].metadata:
        if hasattr(bound, "le"):
            assert re.search(rf"\b{bound.le}\b", ROWS[name.upper()][1])


GOOD = {
    "codebook": ["southamerica-6k"],
    "codebooks_dir": ["/somewhere"],
    "root": ["/images"],
    "demo_url": ["https://example.org/a.tif"],
    "backend": ["auto", "onnx", "torch"],
    "provider": ["cpu"],
    "device": ["cuda:1"],
    "precision": ["auto", "fp32", "bf16"],
    "threads": ["1", "256"],
    "batch_windows": ["1", "4096"],
    "read_threads": ["1", "64"],
    "label_cache_bytes": ["0", "1000000000000"],
    "labels_dir": ["/labels"],
    "label_files_bytes": ["0", "1000000000000"],
    "max_jobs": ["1", "10000"],
    "label_store_dir": ["/labels-store"],
    "label_store_bytes": ["16777216", "1000000000000"],
    "redis_url": ["redis://127.0.0.1:6379/0", "rediss://user:pw@host:6380/1"],
    "redis_ttl_s": ["1", "31536000"],
    "token_cache_bytes": ["0"],
    "tile_cache_bytes": ["0"],
    "mosaic_images": ["1", "100000"],
    "mosaic_bytes": ["1024", "1073741824"],
    "mosaic_unplaced": ["0", "100000"],
    "mosaic_opened": ["1", "10000"],
    "failure_ttl_s": ["0", "60"],
    "request_timeout_s": ["0.1", "3600"],
    "export_timeout_s": ["0.1", "86400"],
    "queue_windows": ["1", "1000000"],
    "source_ttl_s": ["0", "0.5", "86400"],
    "source_timeout_s": ["0.1", "600"],
    "source_connect_timeout_s": ["0.1", "60"],
    "source_total_timeout_s": ["0.1", "3600"],
    "source_read_bytes": ["1048576"],
    "source_cache_bytes": ["1048576"],
    "source_connections": ["1", "64"],
    "source_http": ["True", "False"],
    "source_hosts": ["[]", '["example.com", "*.example.org"]'],
    "source_networks": ["[]", '["10.0.0.0/8", "fd00::/8", "127.0.0.1"]'],
    "source_ports": ["[1, 65535]"],
    "source_buckets": ["[]", '["s3://a-bucket", "gs://bucket/", "az://container"]'],
    "source_proxy": ["http://proxy:3128"],
    "ray_ingress_replicas": ["1", "2-8", "4-4"],
    "ray_encoder_replicas": ["1", "1-9999"],
    "tile_budget_s": ["0.001", "600"],
    "max_chunks": ["1", "10000000"],
    "cors_origins": ['["https://example.org"]', "[]"],
    "cache_control": ["no-cache"],
    "max_body_bytes": ["1024", "1073741824"],
    "max_target_bytes": ["1024", "1048576"],
    "max_header_bytes": ["1024", "1048576"],
    "client_requests": ["1", "100000"],
    "requests_at_once": ["1", "1000000"],
    "stock_requests": ["1", "36"],
    "max_features": ["1", "1000000"],
    "max_vertices": ["4", "100000000"],
    "api_keys": ["[]", '["0123456789abcdef", "another-key-of-20-ch"]'],
    "signing_key": ["0123456789abcdef0123456789abcdef"],
    "frame_ancestors": ["'none'", "'self'", "'self' https://*.example.org http://localhost:8080"],
    "docs": ["True", "False"],
}
BAD = {
    "codebook": [""],
    "demo_url": ["x" * 4097],
    "backend": ["tensorflow", "ONNX"],
    "precision": ["int4"],
    "label_store_bytes": ["16777215", "-1", "1GB"],
    "redis_url": ["", "host:6379", "http://host", "redis://", "redis://h:port"],
    "redis_ttl_s": ["0", "31536001"],
    "mosaic_images": ["0", "100001"],
    "mosaic_bytes": ["1023", "1073741825"],
    "mosaic_unplaced": ["-1", "100001"],
    "mosaic_opened": ["0", "10001"],
    "failure_ttl_s": ["-1", "61"],
    "request_timeout_s": ["0", "3601"],
    "export_timeout_s": ["0", "86401"],
    "queue_windows": ["0", "1000001"],
    "threads": ["0", "257", "two", "1.5"],
    "batch_windows": ["0", "4097"],
    "read_threads": ["0", "65", "-1"],
    "label_cache_bytes": ["-1", "128MB"],
    "label_files_bytes": ["-1", "10GB"],
    "max_jobs": ["0", "10001", "many"],
    "token_cache_bytes": ["-1"],
    "tile_cache_bytes": ["-1"],
    "source_ttl_s": ["-0.1", "86401", "nan"],
    "source_timeout_s": ["0", "601", "nan", "inf"],
    "source_connect_timeout_s": ["0", "61", "nan"],
    "source_total_timeout_s": ["0", "3601", "nan"],
    "source_read_bytes": ["1048575"],
    "source_cache_bytes": ["1048575"],
    "source_connections": ["0", "65"],
    "source_http": ["perhaps"],
    "source_networks": ['["10.0.0.1/8"]', '["example.com"]'],
    "source_ports": ["[]", "[0]", "[65536]"],
    "source_buckets": ['["bucket"]', '["https://example.com"]', '["s3://"]', '["s3://a/b"]'],
    "ray_ingress_replicas": ["", "0", "0-4", "4-2", "2-", "-2", "two", "1-10000"],
    "ray_encoder_replicas": ["0", "3-1", "1.5"],
    "tile_budget_s": ["0", "601", "-1", "nan"],
    "max_chunks": ["0", "10000001"],
    "cache_control": ["public\r\nSet-Cookie: a=b", "öffentlich"],
    "max_body_bytes": ["1023", "1073741825", "1MB"],
    "max_target_bytes": ["1023", "1048577"],
    "max_header_bytes": ["1023", "1048577"],
    "client_requests": ["0", "100001"],
    "requests_at_once": ["0", "1000001"],
    "stock_requests": ["0", "37"],
    "max_features": ["0", "1000001"],
    "max_vertices": ["3", "100000001"],
    "api_keys": ['["0123456789abcde"]', '["0123456789abcdef", "with blanks in it"]', "[17]", '["clé-clé-clé-clé-"]'],
    "signing_key": ["", "0123456789abcdef0123456789abcde"],
    "frame_ancestors": ["", "'none' https://example.org", "https://a.example; script-src *", "a.example\nX: y", "*"],
    "docs": ["perhaps"],
}


def test_every_setting_is_tried() -> None:
    assert set(GOOD) == set(FIELDS)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in GOOD.items() for text in texts])
def test_allowed(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"GEOCENTROIDS_{name.upper()}", text)
    value = getattr(Settings(), name)
    if name == "api_keys":
        expected: Any = [SecretStr(key) for key in json.loads(text)]
    elif name == "source_networks":
        expected = [ip_network(network) for network in json.loads(text)]
    elif isinstance(value, list):
        expected = json.loads(text)
    else:
        expected = text == "True" if isinstance(value, bool) else type(value)(text)
    assert value == expected
    assert getattr(load_settings(), name) == value


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"GEOCENTROIDS_{name.upper()}", text)
    with pytest.raises(ValidationError):
        Settings()
    with pytest.raises(InputError, match=f"GEOCENTROIDS_{name.upper()} = ") as refused:
        load_settings()
    assert "\n" not in str(refused.value)


def test_a_list_that_is_no_json_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOCENTROIDS_CORS_ORIGINS", "https://example.org")
    with pytest.raises(InputError, match="GEOCENTROIDS_CORS_ORIGINS") as refused:
        load_settings()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("api_keys", '["geheim", 17]'),
        ("api_keys", "geheim-geheim-geheim"),
        ("signing_key", "geheim"),
        ("redis_url", "http://geheim"),
    ],
)
def test_a_secret_is_repeated_nowhere(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"GEOCENTROIDS_{name.upper()}", text)
    with pytest.raises(InputError, match=f"GEOCENTROIDS_{name.upper()}") as refused:
        load_settings()
    assert "geheim" not in str(refused.value)
    monkeypatch.delenv(f"GEOCENTROIDS_{name.upper()}")
    assert "geheim" not in repr(Settings(signing_key="geheim" * 6, api_keys=["geheim" * 6]))


def test_options_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOCENTROIDS_CODEBOOK", "from-environment")
    monkeypatch.setenv("GEOCENTROIDS_MAX_CHUNKS", "7")
    settings = load_settings(codebook="from-option", root=None)
    assert (settings.codebook, settings.max_chunks, settings.root) == ("from-option", 7, None)


def test_other_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOCENTROIDS_SOMETHING_ELSE", "x")
    Settings()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().codebook = "other"  # type: ignore[misc]
