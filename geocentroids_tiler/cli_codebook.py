"""Texts of the ``geocentroids codebook`` commands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from geocentroids_tiler.codebook import Codebook, PreprocessSection, validation_problems
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.hub import ListedCodebook, codebook_size_bytes

_PREPROCESS_OPTIONS = ("gsd_m", "resampling", "window_patches", "margin_patches", "stride_patches", "mean", "std")


def preprocess_section(options: dict[str, Any]) -> PreprocessSection:
    """Take the options of preprocessing out of ``options``; those that are None get their defaults.

    Raises:
        InputError: if a value is not allowed.
    """
    values = {key: value for key in _PREPROCESS_OPTIONS if (value := options.pop(key)) is not None}
    core = values["window_patches"] - 2 * values["margin_patches"]
    values.setdefault("stride_patches", max(1, core // 2 if core % 2 == 0 else core))  # half of the core blends
    try:
        return PreprocessSection(**values)
    except ValidationError as error:
        raise InputError(validation_problems(error)) from error


def list_text(entries: Sequence[ListedCodebook], *, as_json: bool) -> str:
    """Return a table, one line a codebook, and below it what is wrong with the broken ones; or JSON."""
    if as_json:
        return json.dumps([asdict(entry) for entry in entries], indent=2, ensure_ascii=False, default=str)
    head = ("NAME", "VERSION", "CLASSES", "DIM", "GSD M", "METRIC", "SIZE", "STATE", "ENCODER")
    rows = [
        (
            entry.name,
            entry.version,
            entry.classes,
            entry.dim,
            entry.gsd_m,
            entry.metric,
            None if entry.size_bytes is None else size_text(entry.size_bytes),
            "broken" if entry.error else entry.origin,
            entry.encoder,
        )
        for entry in entries
    ]
    lines = [*_table([head, *rows])]
    lines += [f"{entry.name} is broken: {entry.error}" for entry in entries if entry.error]
    lines += [f"Fetch: geocentroids codebook pull {entry.name}" for entry in entries if entry.origin == "available"]
    return "\n".join(lines)


def show_text(codebook: Codebook, *, as_json: bool) -> str:
    """Return all that is known of a codebook, one field a line, or as JSON."""
    facts = _facts(codebook)
    if as_json:
        return json.dumps(facts, indent=2, ensure_ascii=False)
    flat = [*_flatten("", facts)]
    width = max(len(key) for key, _ in flat)
    return "\n".join(f"{key:<{width}}  {'-' if value in (None, '') else value}" for key, value in flat)


def size_text(size_bytes: int) -> str:
    """Return a size for people, in decimal units."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    power = min(3, (len(str(size_bytes)) - 1) // 3)
    return f"{size_bytes / 1000**power:.1f} {('B', 'kB', 'MB', 'GB')[power]}"


def _facts(codebook: Codebook) -> dict[str, Any]:
    manifest = codebook.manifest.model_dump(mode="json")
    low, high = codebook.similarity_range()
    return {
        "name": manifest.pop("name"),
        "version": manifest.pop("version"),
        "title": manifest.pop("title"),
        "path": str(codebook.path),
        "digest": codebook.digest,
        "size_bytes": codebook_size_bytes(codebook.path) if codebook.path else None,
        "classes": len(codebook),
        "centroid_dtype": codebook.centroids.dtype.name,
        "patch_m": codebook.patch_m,
        "counts": codebook.counts is not None,
        "merge_tree": codebook.tree is not None,
        "embedded_encoder": codebook.encoder_path is not None,
        "names": [
            {"classes": n, "named": len(names)}
            for n, names in sorted(codebook.names.items(), key=lambda item: item[0] or 0)
        ],
        "similarity_range": [low, high],
        **manifest,
    }


def _flatten(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, item in enumerate(value):
            yield from _flatten(f"{prefix}.{i}", item)
    elif isinstance(value, list):
        yield prefix, ", ".join(str(item) for item in value) or "none"
    elif isinstance(value, bool):
        yield prefix, "yes" if value else "no"
    else:
        yield prefix, value


def _table(rows: Sequence[Sequence[object]]) -> Iterable[str]:
    texts = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts)
