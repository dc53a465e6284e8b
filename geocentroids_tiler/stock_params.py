"""Bounds on the parameters of TiTiler's own routes: what each may cost is decided before any of them is parsed."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from titiler.core.dependencies import PartFeatureParams

from geocentroids_tiler.errors import InputError, short
from geocentroids_tiler.grid import parse_crs

MAX_IMAGE_PX = 2048
DEFAULT_IMAGE_PX = 1024
"""Longer side of an image whose size is not asked for, as TiTiler's previews have it."""
MAX_COVERAGE_PX = 10 * DEFAULT_IMAGE_PX
"""Statistics of polygons are weighed on a grid finer than the image: 10 times, if ``cover_scale`` says nothing."""
MAX_BANDS = 16
MAX_ZOOM = 40
_MAX_TILE = 2**40
_MAX_EXPONENT = 64

Check = Callable[[str, str], None]
"""Raises InputError if a value, given with its parameter's name, is out of bounds."""


@dataclass
class BoundedPartParams(PartFeatureParams):
    """Size of an image of a box or a polygon; unlike TiTiler's it is bounded where nothing is asked for."""

    def __post_init__(self) -> None:
        """Set the size where none is given."""
        if not (self.max_size or self.width or self.height):
            self.max_size = DEFAULT_IMAGE_PX
        super().__post_init__()  # type: ignore[no-untyped-call]


def check_stock_request(query: Iterable[tuple[str, str]], path: Mapping[str, object], coverage: bool = False) -> None:
    """Check all parameters of a request to one of TiTiler's own routes.

    Args:
        query: names and values as they came, repeated ones too.
        path: parameters in the path.
        coverage: whether the route weighs pixels by how much of them a polygon covers.

    Raises:
        InputError: if one is out of bounds.
    """
    given: dict[str, list[str]] = {}
    for name, value in [*query, *((name, str(value)) for name, value in path.items())]:
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) > (most := _MOST.get(name, 1 if name in _CHECKS else len(values))):
            raise InputError(f"{name} is given {len(values)} times; accepted: at most {most}")
        for value in values:
            _CHECKS.get(name, _anything)(name, value)
    _check_size(given, coverage)


def _check_size(given: Mapping[str, list[str]], coverage: bool) -> None:
    if ("width" in given) != ("height" in given):
        # The other side would follow from the shape of the area, which may be a line.
        raise InputError("width and height are needed together; or give max_size")
    if coverage:
        sides = [int(given[name][0]) for name in ("width", "height", "max_size") if name in given]
        longest, scale = max(sides, default=DEFAULT_IMAGE_PX), int(given.get("cover_scale", ["10"])[0])
        if longest * scale > MAX_COVERAGE_PX:
            raise InputError(
                f"an image of {longest} pixels with cover_scale={scale} is too large; accepted: a product of at most "
                f"{MAX_COVERAGE_PX}"
            )


def _anything(name: str, value: str) -> None:
    pass


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: str) -> None:
        # Python's int reads digits of any script and underscores, and any number of them; what is read here as one
        # number must not be read as another later.
        plain = value.isascii() and value.removeprefix("-").isdigit() and len(value) <= 20
        if not plain or not low <= int(value) <= high:
            raise InputError(f"{name}={short(value)} is not a whole number; accepted: {low} to {high}")

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: str) -> None:
        try:
            number = float(value) if len(value) <= 64 else math.nan
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise InputError(f"{name}={short(value)} is not a number; accepted: {low:g} to {high:g}")

    return check


def _text(most: int) -> Check:
    def check(name: str, value: str) -> None:
        if len(value) > most:
            raise InputError(f"{name} has {len(value)} characters; accepted: at most {most}")

    return check


def _json(most: int, *kinds: type) -> Check:
    def check(name: str, value: str) -> None:
        _text(most)(name, value)
        try:
            usable = isinstance(json.loads(value), kinds)
        except (ValueError, RecursionError):
            usable = False
        if value and not usable:
            raise InputError(f"{name}={short(value)} is not JSON of the kind that is needed")

    return check


def _crs(name: str, value: str) -> None:
    # Anything else may be a file or an address, which PROJ and GDAL would open.
    if value:
        parse_crs(value)


def _bins(name: str, value: str) -> None:
    _text(8192)(name, value)
    if "," not in value:
        _whole(1, 1024)(name, value)
    elif (count := value.count(",") + 1) > 1024:
        raise InputError(f"{name} has {count} edges; accepted: at most 1024")


def _expression(name: str, value: str) -> None:
    """Allow arithmetic on bands only: ``9**9**9`` and ``"a"*10**9`` are computed before any pixel is looked at."""
    _text(256)(name, value)
    blocks = [block.strip() for block in value.split(";") if block.strip()]
    if len(blocks) > MAX_BANDS:
        raise InputError(f"{name} has {len(blocks)} parts; accepted: at most {MAX_BANDS}")
    for block in blocks:
        try:
            tree = ast.parse(block, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise InputError(f"{name}={short(value)} is not arithmetic on bands, for example b1/b2") from None
        for node in ast.walk(tree):
            _check_node(name, value, node)


_ARITHMETIC = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)


def _check_node(name: str, value: str, node: ast.AST) -> None:
    number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
    called = not isinstance(node, ast.Call) or (isinstance(node.func, ast.Name) and not node.keywords)
    if not (number or (isinstance(node, _ARITHMETIC) and called)):
        raise InputError(f"{name}={short(value)} is not arithmetic on bands, for example b1/b2")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift | ast.RShift):
        numbers = [side for side in (node.left, node.right) if not _has_band(side)]
        small = all(isinstance(side, ast.Constant) and abs(side.value) <= _MAX_EXPONENT for side in numbers)  # type: ignore[arg-type]
        if not small or len(numbers) == 2:
            raise InputError(
                f"{name}={short(value)}: powers and shifts are of a band and a number of at most {_MAX_EXPONENT}"
            )


def _has_band(node: ast.AST) -> bool:
    called = {id(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
    return any(isinstance(each, ast.Name) and id(each) not in called for each in ast.walk(node))


_SIDE = _whole(1, MAX_IMAGE_PX)
_COORDINATE = _number(-1e9, 1e9)
_CHECKS: dict[str, Check] = {
    # images
    "tilesize": _whole(16, 1024),
    "width": _SIDE,
    "height": _SIDE,
    "max_size": _SIDE,
    "buffer": _number(0, 256),
    "padding": _whole(0, 256),
    "cover_scale": _whole(1, 100),
    # places; a zoom level that does not exist is looked for one by one
    "z": _whole(0, MAX_ZOOM),
    "minzoom": _whole(0, MAX_ZOOM),
    "maxzoom": _whole(0, MAX_ZOOM),
    "x": _whole(-_MAX_TILE, _MAX_TILE),
    "y": _whole(-_MAX_TILE, _MAX_TILE),
    "lon": _COORDINATE,
    "lat": _COORDINATE,
    "minx": _COORDINATE,
    "miny": _COORDINATE,
    "maxx": _COORDINATE,
    "maxy": _COORDINATE,
    "bbox": _text(256),
    **dict.fromkeys(("crs", "coord_crs", "dst_crs", "bbox_crs", "coord-crs", "dst-crs", "bbox-crs"), _crs),
    # bands
    "bidx": _whole(1, 65535),
    "expression": _expression,
    "nodata": _text(32),
    "rescale": _text(64),
    "color_formula": _text(256),
    "colormap": _json(8192, dict, list),
    "colormap_name": _text(64),
    "algorithm": _text(64),
    "algorithm_params": _json(1024, dict),
    # statistics
    "c": _number(-1e15, 1e15),
    "p": _whole(0, 100),
    "histogram_bins": _bins,
    "histogram_range": _text(64),
    # choices, which TiTiler looks up in lists
    **dict.fromkeys(
        ("unscale", "resampling", "reproject", "return_mask", "categorical", "f", "format", "tile_format"), _text(32)
    ),
}
_MOST = {"bidx": MAX_BANDS, "rescale": MAX_BANDS, "c": 256, "p": 64}
"""How often a parameter may be given, where that is more than once."""
