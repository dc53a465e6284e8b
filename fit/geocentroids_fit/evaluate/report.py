"""The report: one HTML file that needs nothing else, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from geocentroids_fit.evaluate.pictures import ImageMaps
from geocentroids_fit.evaluate.results import Evaluation

HTML_FILE, JSON_FILE = "report.html", "report.json"
DIGITS = 6
"""Decimals of numbers in JSON."""


def to_json(evaluation: Evaluation) -> str:
    """Return all numbers as JSON: keys in the order of the classes' attributes, numbers rounded."""
    return json.dumps(_rounded(asdict(evaluation)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_html(evaluation: Evaluation, maps: Sequence[ImageMaps], plots: dict[str, str]) -> str:
    """Return the report as HTML.

    Args:
        evaluation: the numbers.
        maps: of some of the images.
        plots: ``data:`` addresses of the plots ``similarity`` and ``usage``.
    """
    environment = Environment(
        loader=PackageLoader("geocentroids_fit.evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, percent=_percent)
    return environment.get_template("report.html.j2").render(e=evaluation, maps=maps, plots=plots)


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
