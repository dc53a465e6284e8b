"""The commands that open images: demo, serve, classify, info. Heavy modules are imported when a command runs."""

from __future__ import annotations

import json
import math
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from geocentroids_tiler.errors import GeocentroidsError, InputError
from geocentroids_tiler.settings import load_settings

if TYPE_CHECKING:
    from geocentroids_tiler.labels.engine import LabelEngine
    from geocentroids_tiler.labels.service import Service
    from geocentroids_tiler.source import Dataset, ReadOptions

DEMO_BUDGET_S = 600
CHUNKS_AT_ONCE = 4
"""Chunks of the sample scene computed ahead at once: enough to keep a few cores busy."""
DEMO_FOLDER = Path.home() / ".cache" / "geocentroids" / "demo"

codebook_option = click.option("--codebook", help="Name of an installed codebook, or a codebook directory.")
host_option = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
port_option = click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
bidx_option = click.option("--bidx", help="Three bands for red, green and blue, for example 4,3,2.")
rescale_option = click.option("--rescale", help="LOW,HIGH: values that become black and white.")


@click.command()
@host_option
@port_option
@codebook_option
@click.option("--folder", type=click.Path(path_type=Path), default=DEMO_FOLDER, help="Where the sample scene is kept.")
def demo(host: str, port: int, codebook: str | None, folder: Path) -> None:
    """Show a sample scene, classified, in the web page. Needs no network."""
    import uvicorn

    from geocentroids_tiler.app import create_app
    from geocentroids_tiler.scene import ensure_demo_scene

    check_port(host, port)
    click.echo("Preparing the sample scene ...", err=True)
    scene = ensure_demo_scene(folder)
    # All labels are computed ahead, so every zoom may be asked for.
    settings = load_settings(codebook=codebook, root=folder, demo_url=scene.name, tile_budget_s=DEMO_BUDGET_S)
    app = create_app(settings)
    service: Service = app.state.service
    service.codebook(None)
    threading.Thread(target=_label_ahead, args=(service, scene.name), daemon=True).start()
    click.echo(f"Open http://{_shown(host)}:{port}/ in a browser (Ctrl+C ends the server).")
    uvicorn.run(app, host=host, port=port, log_level="warning")


@click.command()
@host_option
@port_option
@codebook_option
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder whose images may be opened by relative path.",
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes.")
def serve(host: str, port: int, codebook: str | None, root: Path | None, workers: int) -> None:
    """Serve tiles, exports and the web page. Further settings: GEOCENTROIDS_* environment variables."""
    import uvicorn

    from geocentroids_tiler.hub import find_codebook

    check_port(host, port)
    settings = load_settings(codebook=codebook, root=root)
    find_codebook(settings.codebook, settings.codebooks_dir, allow_path=True)  # now, not in each worker
    # Workers are processes of their own: they read the same settings from the environment.
    if settings.root is not None:
        os.environ["GEOCENTROIDS_ROOT"] = str(settings.root.resolve())
    os.environ["GEOCENTROIDS_CODEBOOK"] = settings.codebook
    click.echo(f"Open http://{_shown(host)}:{port}/ in a browser (Ctrl+C ends the server).")
    uvicorn.run("geocentroids_tiler.app:create_app", factory=True, host=host, port=port, workers=workers)


@click.command()
@click.argument("src")
@click.argument("dst", type=click.Path(dir_okay=False, path_type=Path))
@codebook_option
@click.option("--classes", type=click.IntRange(1, 65535), help="Merge the labels to this many classes.")
@bidx_option
@rescale_option
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
def classify(
    src: str,
    dst: Path,
    codebook: str | None,
    classes: int | None,
    bidx: str | None,
    rescale: str | None,
    overwrite: bool,
) -> None:
    """Label all of SRC (a URL or a file) and write the labels to DST.tif, a Cloud Optimized GeoTIFF."""
    from tqdm import tqdm

    from geocentroids_tiler.labels.export import classify as write_labels

    if dst.exists() and not overwrite:
        raise InputError(f"{dst} exists already; name another file or use --overwrite")
    service, dataset, engine = _open(src, codebook, bidx, rescale)
    try:
        for warning in dataset.warnings:
            click.echo(f"Warning: {warning}", err=True)
        merged = service.classes(engine.codebook, classes)
        with tqdm(total=dataset.chunk_count, unit="chunk", desc=dst.name) as bar:
            write_labels(engine, dataset, merged, dst, bar.update)
    finally:
        service.close()


@click.command()
@click.argument("src")
@codebook_option
@bidx_option
@rescale_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(src: str, codebook: str | None, bidx: str | None, rescale: str | None, as_json: bool) -> None:
    """Say how SRC (a URL or a file) lies on the ground grid, and what labelling it would cost."""
    import morecantile

    from geocentroids_tiler.handlers import zooms_of
    from geocentroids_tiler.responses import image_info

    service, dataset, engine = _open(src, codebook, bidx, rescale)
    try:
        tms = morecantile.tms.get("WebMercatorQuad")
        found = image_info(dataset, engine, zooms_of(service, engine, dataset, tms)).model_dump()
    finally:
        service.close()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for line in _lines(found):
            click.echo(line)


def check_port(host: str, port: int) -> None:
    """Raise InputError if the address cannot be listened on, before anything slow starts."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error


def _open(
    src: str, codebook: str | None, bidx: str | None, rescale: str | None
) -> tuple[Service, Dataset, LabelEngine]:
    """Open a URL, or a file wherever it is: on the command line the user is the operator."""
    from geocentroids_tiler.labels.service import Service

    options = read_options(bidx, rescale)
    local = Path(src)
    is_url = src.lower().startswith(("http:", "https:"))
    settings = (
        load_settings(codebook=codebook) if is_url else load_settings(codebook=codebook, root=local.resolve().parent)
    )
    service = Service(settings)
    try:
        chosen = service.codebook(None)
        dataset = service.dataset(src if is_url else local.name, options, chosen).result()
        return service, dataset, service.engine(chosen).result()
    except GeocentroidsError:
        service.close()
        raise


def read_options(bidx: str | None, rescale: str | None) -> ReadOptions:
    """Read what ``--bidx`` and ``--rescale`` say.

    Raises:
        InputError: if they are not three band numbers and two values.
    """
    from geocentroids_tiler.params import parse_bidx, parse_rescale
    from geocentroids_tiler.source import ReadOptions

    try:
        bands = [int(part) for part in bidx.split(",")] if bidx else None
    except ValueError:
        raise InputError(f"--bidx {bidx} is not three band numbers, for example 4,3,2") from None
    return ReadOptions(parse_bidx(bands), parse_rescale(rescale))


def _label_ahead(service: Service, url: str) -> None:
    """Compute the labels of the sample scene before anyone asks for them, from its middle outwards.

    Few chunks are asked for at once, so that a tile that someone is waiting for comes first.
    """
    from geocentroids_tiler.source import ReadOptions

    codebook = service.codebook(None)
    engine = service.engine(codebook).result()
    dataset = service.dataset(url, ReadOptions(), codebook).result()
    stride = engine.layout.stride_patches
    chunks = dataset.footprint.chunk_range(stride)
    middle = (chunks.row_start + chunks.row_stop) / 2, (chunks.col_start + chunks.col_stop) / 2
    outwards = sorted(dataset.footprint.chunks(stride), key=lambda chunk: math.dist(chunk, middle))
    for _, labels in engine.ahead(dataset, outwards, CHUNKS_AT_ONCE):
        labels.result()


def _shown(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        else:
            shown = ", ".join(map(str, item)) if isinstance(item, list | tuple) else item
            lines.append(f"{indent}{key}: {shown}")
    return lines
