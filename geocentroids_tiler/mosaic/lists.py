"""Lists of images: an address in each line, or a table with a column of addresses."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from itertools import islice

from geocentroids_tiler.errors import MosaicError, short
from geocentroids_tiler.mosaic.members import Member, box, member_url, moment

BOUNDS = ("west", "south", "east", "north")
COLUMNS = ("url", *BOUNDS, "datetime", "crs")


def read_list(text: str, resolve: Callable[[str], str], max_members: int) -> tuple[Member, ...]:
    """Read a list of images. Blank lines, and those that begin with #, say nothing.

    Args:
        text: a URL or path in each line; or comma-separated values whose first line names the columns: ``url``, and
            if known ``west``, ``south``, ``east``, ``north`` (degrees), ``datetime`` and ``crs`` (EPSG:32721).
        resolve: makes addresses absolute.
        max_members: the most images; one more is read, so that it shows.

    Raises:
        MosaicError: if a line cannot be read; the text names it.
    """
    lines = ((number, line) for number, line in enumerate(io.StringIO(text), 1) if _says_something(line))
    numbered = list(islice(lines, max_members + 2))
    if not numbered:
        return ()
    first = [name.strip().lower() for name in numbered[0][1].split(",")]
    if "url" not in first:
        return tuple(Member(resolve(member_url(line, f"line {number}"))) for number, line in numbered)
    if unknown := [name for name in first if name not in COLUMNS]:
        raise MosaicError(f"the list has a column {short(unknown[0])}; accepted: {', '.join(COLUMNS)}")
    if 0 < len(set(first) & set(BOUNDS)) < len(BOUNDS):
        raise MosaicError(f"the list has some of the columns {', '.join(BOUNDS)}; all four or none are needed")
    return tuple(_member(first, number, line, resolve) for number, line in numbered[1:])


def _says_something(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _member(columns: list[str], number: int, line: str, resolve: Callable[[str], str]) -> Member:
    what = f"line {number}"
    try:
        values = next(csv.reader(io.StringIO(line), strict=True))
    except (csv.Error, StopIteration) as error:
        raise MosaicError(f"{what} cannot be read: {error}") from error
    if len(values) != len(columns):
        raise MosaicError(f"{what} has {len(values)} values; the first line names {len(columns)} columns")
    row = {name: value.strip() for name, value in zip(columns, values, strict=True)}
    bounds = [row.get(name, "") for name in BOUNDS]
    return Member(
        url=resolve(member_url(row["url"], what)),
        footprint=box(bounds, what) if any(bounds) else None,
        taken_at=moment(row.get("datetime"), what),
        crs=row.get("crs") or None,
    )
