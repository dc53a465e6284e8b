"""``geocentroids-fit``: from a folder of images to a codebook."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import cast, get_args

import click
from pydantic import ValidationError

from geocentroids_fit import __version__
from geocentroids_fit.pack import Identity
from geocentroids_fit.pipeline import Plan, run
from geocentroids_tiler.cli import ErrorGroup
from geocentroids_tiler.codebook import Metric, PreprocessSection, Resampling, validation_problems
from geocentroids_tiler.errors import InputError


class _FitGroup(ErrorGroup):
    program = "geocentroids-fit"


@click.group(cls=_FitGroup)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__)
def main(debug: bool) -> None:
    """Fit a codebook for geocentroids-tiler from a folder of overhead images."""


@main.command("run")
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--encoder", required=True, help="DINOv2 checkpoint: a local directory or a hub id.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Codebook directory to write.")
@click.option("--name", required=True, help="Name of the codebook.")
@click.option("--version", "codebook_version", default="1", show_default=True, help="Version of the codebook.")
@click.option("--title", default="", help="One line that says what it is.")
@click.option("--licence", default="", help="Licence of centroids and encoder.")
@click.option("--attribution", default="", help="One line for the corner of a map.")
@click.option("--region", default="", help="Where the images lie.")
@click.option("--exclude", multiple=True, help="Pattern of paths to leave out, for example '*/mask/*'.")
@click.option("--k", default=1024, show_default=True, help="Number of classes.")
@click.option("--metric", type=click.Choice(get_args(Metric)), default="l2", show_default=True)
@click.option("--gsd", default=0.25, show_default=True, help="Metres on the ground per pixel.")
@click.option("--resampling", type=click.Choice(get_args(Resampling)), default="bilinear", show_default=True)
@click.option("--window", default=32, show_default=True, help="Patches a side of a window.")
@click.option("--margin", default=3, show_default=True, help="Patches dropped on each side of a window.")
@click.option("--stride", default=13, show_default=True, help="Patches between windows; half of the core blends.")
@click.option("--per-image", default=40_000, show_default=True, help="Patches that one image gives at most.")
@click.option("--seed", default=0, show_default=True)
@click.option("--card", type=click.Path(path_type=Path), help="Text of the model card; default: made from the run.")
def run_command(
    images: Path,
    encoder: str,
    out: Path,
    name: str,
    codebook_version: str,
    title: str,
    licence: str,
    attribution: str,
    region: str,
    exclude: tuple[str, ...],
    k: int,
    metric: str,
    gsd: float,
    resampling: str,
    window: int,
    margin: int,
    stride: int,
    per_image: int,
    seed: int,
    card: Path | None,
) -> None:
    """Fit a codebook to the GeoTIFFs below IMAGES."""
    for option, value, least in (("--k", k, 1), ("--per-image", per_image, 1), ("--seed", seed, 0)):
        if value < least:
            raise InputError(f"{option} is {value}; it must be at least {least}")
    try:
        preprocess = PreprocessSection(
            gsd_m=gsd,
            resampling=cast(Resampling, resampling),
            window_patches=window,
            margin_patches=margin,
            stride_patches=stride,
        )
    except ValidationError as error:
        raise InputError(f"the windows do not fit together: {validation_problems(error)}") from error
    plan = Plan(
        images=images,
        exclude=exclude,
        encoder=encoder,
        out=out,
        identity=Identity(name, codebook_version, title, licence, attribution, region),
        preprocess=preprocess,
        metric=cast(Metric, metric),
        k=k,
        per_image=per_image,
        seed=seed,
        card=_read_card(card),
        command=shlex.join(["geocentroids-fit", *sys.argv[1:]]),
    )
    start = time.monotonic()
    result = run(plan, click.echo, progress=sys.stderr.isatty())
    ours, plain = result.coloring.score, result.coloring.stretch
    click.echo(
        f"{out}: {len(result.codebook)} classes of {result.features} patches in {time.monotonic() - start:.0f} s; "
        f"colours: rank correlation {ours.rank_correlation:.3f} (plain stretch {plain.rank_correlation:.3f}), "
        f"neighbours kept {ours.neighbours:.3f} (plain stretch {plain.neighbours:.3f})"
    )


def _read_card(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


if __name__ == "__main__":
    main()
