"""The commands that open images or serve them: demo, serve, sign, classify, info. Heavy modules are imported late."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import re
import socket
import threading
import time
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from geocentroids_tiler.errors import EncoderError, GeocentroidsError, InputError
from geocentroids_tiler.settings import load_settings

if TYPE_CHECKING:
    from geocentroids_tiler.labels.engine import LabelEngine
    from geocentroids_tiler.labels.keeping import KeptWriter
    from geocentroids_tiler.labels.service import Service
    from geocentroids_tiler.settings import Settings
    from geocentroids_tiler.source import Dataset, ReadOptions

_PATHS = ("codebooks_dir", "root", "labels_dir", "label_store_dir")
"""Settings that name folders, which other processes find only by their whole paths."""
DEMO_BUDGET_S = 600
DEMO_FOLDER = Path.home() / ".cache" / "geocentroids" / "demo"

codebook_option = click.option("--codebook", help="Name of an installed codebook, or a codebook directory.")
host_option = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
port_option = click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
bidx_option = click.option("--bidx", help="Three bands for red, green and blue, for example 4,3,2.")
labels_option = click.option(
    "--labels",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of labels of whole datasets, served without computing.",
)
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
    settings = load_settings(
        codebook=codebook,
        root=folder,
        demo_url=scene.name,
        tile_budget_s=DEMO_BUDGET_S,
        request_timeout_s=DEMO_BUDGET_S,
    )
    app = create_app(settings)
    service: Service = app.state.service
    service.codebook(None)
    threading.Thread(target=_label_ahead, args=(service, scene.name), daemon=True).start()
    click.echo(f"Open http://{_shown(host)}:{port}/ in a browser (Ctrl+C ends the server).")
    uvicorn.run(app, host=host, port=port, log_level="warning", **_protocol(settings))


@click.command()
@host_option
@port_option
@codebook_option
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder whose images may be opened by relative path.",
)
@labels_option
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes.")
@click.option("--ray", "cluster", metavar="ADDRESS", help="Serve on a Ray cluster: auto, local or HOST:PORT.")
def serve(
    host: str,
    port: int,
    codebook: str | None,
    root: Path | None,
    labels: Path | None,
    workers: int,
    cluster: str | None,
) -> None:
    """Serve tiles, exports and the web page. Further settings: GEOCENTROIDS_* environment variables."""
    import uvicorn

    from geocentroids_tiler.hub import find_codebook

    check_port(host, port)
    settings = load_settings(codebook=codebook, root=root, labels_dir=labels)
    find_codebook(settings.codebook, settings.codebooks_dir, allow_path=True)  # now, not in each worker
    if cluster is not None:
        _serve_on_ray(settings, cluster, host, port, workers)
        return
    # Workers are processes of their own: they read the same settings from the environment.
    if settings.root is not None:
        os.environ["GEOCENTROIDS_ROOT"] = str(settings.root.resolve())
    if settings.labels_dir is not None:
        settings.labels_dir.mkdir(parents=True, exist_ok=True)
        os.environ["GEOCENTROIDS_LABELS_DIR"] = str(settings.labels_dir.resolve())
    os.environ["GEOCENTROIDS_CODEBOOK"] = settings.codebook
    click.echo(f"Open http://{_shown(host)}:{port}/ in a browser (Ctrl+C ends the server).")
    uvicorn.run(
        "geocentroids_tiler.app:create_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        log_config=_log_config(),
        access_log=False,  # ours says the same, without queries and with the request's id
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_s),
        **_protocol(settings),
    )


def _serve_on_ray(settings: Settings, address: str, host: str, port: int, workers: int) -> None:
    """Serve on a Ray cluster until the command is ended."""
    from geocentroids_tiler.ray_serving import serve_on_ray

    if workers != 1:
        raise InputError(f"--workers {workers} goes without --ray; GEOCENTROIDS_RAY_INGRESS_REPLICAS is what it has")
    if settings.redis_url is None:
        click.echo(
            "Without GEOCENTROIDS_REDIS_URL the nodes share no labels: what one has is computed again by another.",
            err=True,
        )
    paths = {name: path.resolve() for name in _PATHS if (path := getattr(settings, name)) is not None}
    serve_on_ray(
        settings.model_copy(update=paths),
        address,
        host,
        port,
        lambda: click.echo(f"Open http://{_shown(host)}:{port}/ in a browser (Ctrl+C ends the server)."),
    )


@click.command()
@click.argument("url")
@click.option("--expires", "lifetime", help="For how long it is valid: 90s, 30m, 12h or 7d.  [default: for ever]")
@click.option("--base", help="Address of the server, for example https://tiles.example.com: print whole addresses.")
def sign(url: str, lifetime: str | None, base: str | None) -> None:
    """Print the query that opens image URL on a server with the same GEOCENTROIDS_SIGNING_KEY."""
    from geocentroids_tiler.access import signed_query

    key = load_settings().signing_key
    if key is None:
        raise InputError("there is no signing key; GEOCENTROIDS_SIGNING_KEY holds it, here and on the server")
    expires = None if lifetime is None else int(time.time()) + read_lifetime(lifetime)
    query = signed_query(key, url, expires)
    if base is None:
        click.echo(query)
        return
    routes = f"{base.rstrip('/')}/cog/geocentroids"
    click.echo(f"XYZ       {routes}/tiles/WebMercatorQuad/{{z}}/{{x}}/{{y}}.png?{query}")
    click.echo(f"TileJSON  {routes}/WebMercatorQuad/tilejson.json?{query}")
    click.echo(f"WMTS      {routes}/WMTSCapabilities.xml?{query}")
    click.echo(f"viewer    {base.rstrip('/')}/?{query}")


@click.command()
@click.argument("src", required=False)
@click.argument("dst", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--list",
    "list_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Label all images of a text file, a URL or path in each line; in place of SRC and DST.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the labels of a list.")
@click.option("--ray", "address", help="Let a Ray cluster label the list: HOST:PORT, auto, or local.")
@codebook_option
@click.option("--classes", type=click.IntRange(1, 65535), help="Merge the labels to this many classes.")
@bidx_option
@rescale_option
@labels_option
@click.option(
    "--overwrite", is_flag=True, help="Replace DST if it exists, or labels of a list that were made in another way."
)
def classify(
    src: str | None,
    dst: Path | None,
    list_file: Path | None,
    out: Path | None,
    address: str | None,
    codebook: str | None,
    classes: int | None,
    bidx: str | None,
    rescale: str | None,
    labels: Path | None,
    overwrite: bool,
) -> None:
    """Label all of SRC (a URL or a file) and write the labels to DST.tif, a Cloud Optimized GeoTIFF.

    With a folder of labels (--labels or GEOCENTROIDS_LABELS_DIR) they are kept there too, unless they are merged; a
    server with that folder then computes none of them. DST may be left out.

    With --list FILE --out DIR all images of a list are labelled, and DIR gets their labels and a STAC catalogue. A run
    that was ended goes on where it stopped when it is started again.
    """
    if list_file is not None:
        if src is not None or labels is not None:
            given = "SRC" if src is not None else "--labels"
            raise InputError(f"{given} and --list exclude each other; with --list, labels go to the folder --out")
        if out is None:
            raise InputError("--out is missing: name a folder for the labels of the list")
        _classify_list(list_file, out, address, codebook, classes, read_options(bidx, rescale), overwrite)
        return
    if src is None:
        raise InputError("SRC is missing: name an image, or a list of images with --list")
    if out is not None or address is not None:
        raise InputError(f"{'--ray' if out is None else '--out'} goes with --list; for one image name SRC and DST only")
    _classify_one(src, dst, codebook, classes, bidx, rescale, labels, overwrite)


def _classify_list(
    list_file: Path,
    out: Path,
    address: str | None,
    codebook: str | None,
    classes: int | None,
    options: ReadOptions,
    overwrite: bool,
) -> None:
    """Label the images of a list, and say at the end what failed."""
    from geocentroids_tiler.bulk.command import classify_list
    from geocentroids_tiler.bulk.image_list import read_list

    images = read_list(list_file)
    for again in images.repeated:
        click.echo(
            f"Warning: line {again.line} of {list_file} names {again.name!r} again, after line {again.first}; it is "
            "done once",
            err=True,
        )
    report = classify_list(images.images, out, load_settings(codebook=codebook), options, classes, address, overwrite)
    click.echo(
        f"{out}: {report.labelled} labelled, {report.reused} there already, {len(report.failures)} failed", err=True
    )
    for failure in report.failures:
        click.echo(f"line {failure.image.line}, {failure.image.name}: {failure.reason}", err=True)
    if report.failures:
        raise click.exceptions.Exit(1)


def _classify_one(
    src: str,
    dst: Path | None,
    codebook: str | None,
    classes: int | None,
    bidx: str | None,
    rescale: str | None,
    labels: Path | None,
    overwrite: bool,
) -> None:
    """Label one image."""
    from tqdm import tqdm

    from geocentroids_tiler.labels.export import check_unchanged, strips
    from geocentroids_tiler.labels.export import classify as write_labels

    keep = classes is None and load_settings(labels_dir=labels).labels_dir is not None
    if dst is None and not keep:
        raise InputError("DST is missing: merged labels, and labels without a folder (--labels), go to a file only")
    if dst is not None and dst.exists() and not overwrite:
        raise InputError(f"{dst} exists already; name another file or use --overwrite")
    with ExitStack() as stack:
        service, dataset, engine = _open(src, codebook, bidx, rescale, labels)
        stack.callback(service.close)
        for warning in dataset.warnings:
            click.echo(f"Warning: {warning}", err=True)
        merged = service.classes(engine.codebook, classes)
        writer = _kept_writer(service, dataset, engine, stack) if keep else None
        write = (lambda strip: None) if writer is None else writer.write
        if dst is not None or writer is not None:
            name = dataset.source.url if dst is None else dst.name
            bar = stack.enter_context(tqdm(total=dataset.chunk_count, unit="chunk", desc=name))
            if dst is not None:
                write_labels(engine, dataset, merged, dst, bar.update, write)
            else:
                for strip in strips(engine, dataset, dataset.footprint, bar.update):
                    write(strip)
        if writer is not None:
            check_unchanged(dataset)
            writer.finish()


@click.command()
@click.argument("src")
@codebook_option
@bidx_option
@rescale_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(src: str, codebook: str | None, bidx: str | None, rescale: str | None, as_json: bool) -> None:
    """Say how SRC (a URL or a file) lies on the ground grid, and what labelling it would cost.

    SRC may be an image, or a document that names many: a list, a MosaicJSON, STAC items or a search.
    """
    options = read_options(bidx, rescale)
    service, url = _service_for(src, codebook)
    try:
        found = asyncio.run(_described(service, url, options))
    finally:
        service.close()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for line in _lines(found):
            click.echo(line)


async def _described(service: Service, url: str, options: ReadOptions) -> dict[str, Any]:
    """Describe an image or a mosaic as the route does."""
    import morecantile

    from geocentroids_tiler.descriptions import describe
    from geocentroids_tiler.grounds import open_layer
    from geocentroids_tiler.params import LayerParams

    found = await open_layer(service, url, LayerParams(None, options.bidx, options.rescale))
    return (await describe(service, found, morecantile.tms.get("WebMercatorQuad"))).model_dump(mode="json")


def check_port(host: str, port: int) -> None:
    """Raise InputError if the address cannot be listened on, before anything slow starts."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error


def _open(
    src: str, codebook: str | None, bidx: str | None, rescale: str | None, labels: Path | None = None
) -> tuple[Service, Dataset, LabelEngine]:
    """Open an image, a URL or a file."""
    options = read_options(bidx, rescale)
    service, url = _service_for(src, codebook, labels)
    try:
        chosen = service.codebook(None)
        dataset = service.dataset(url, options, chosen).result()
        return service, dataset, service.engine(chosen).result()
    except GeocentroidsError:
        service.close()
        raise


def _service_for(src: str, codebook: str | None, labels: Path | None = None) -> tuple[Service, str]:
    """Return what opens a URL, or a file wherever it is: on the command line the user is the operator."""
    from geocentroids_tiler.labels.service import Service

    settings = load_settings(codebook=codebook, labels_dir=labels)
    url = src
    if not src.lower().startswith(("http:", "https:")):
        root, url = as_served(Path(src), settings.root)
        settings = load_settings(codebook=codebook, labels_dir=labels, root=root)
    return Service(settings), url


def as_served(file: Path, root: Path | None) -> tuple[Path, str]:
    """Return the root folder and the URL for a file, if it lies in ``root`` those under which a server has it."""
    if root is not None:
        for path in (Path(os.path.normpath(file.absolute())), file.resolve()):
            for folder in (Path(os.path.normpath(root.absolute())), root.resolve()):
                if path.is_relative_to(folder) and file.resolve().is_relative_to(root.resolve()):
                    return root, path.relative_to(folder).as_posix()
    return file.resolve().parent, file.name


def _kept_writer(service: Service, dataset: Dataset, engine: LabelEngine, stack: ExitStack) -> KeptWriter | None:
    """Return what keeps the labels of a dataset until the stack is closed, or None if they are kept already.

    Raises:
        StorageFullError: if they may not fit.
    """
    if service.kept is None or service.jobs is None:
        return None
    place = f"{dataset.source.url!r} in {service.kept.folder}"
    if service.kept.find(dataset, engine.codebook) is not None:
        click.echo(f"The labels of {place} are kept already", err=True)
        return None
    service.kept.check_room(dataset, service.jobs.reserved_bytes())
    click.echo(f"Keeping the labels of {place}", err=True)
    return stack.enter_context(service.kept.writer(dataset, engine.codebook, engine.device_name))


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


def read_lifetime(text: str) -> int:
    """Read a time span, in seconds.

    Raises:
        InputError: if it is not a whole number of seconds, minutes, hours or days, up to a thousand years.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = text[:-1], text[-1:]
    seconds = int(number) * units[unit] if re.fullmatch("[0-9]{1,9}", number) and unit in units else 0
    if not 0 < seconds <= 1000 * 366 * 86400:
        raise InputError(f"--expires {text} is not a time span, for example 90s, 30m, 12h or 7d")
    return seconds


def _protocol(settings: Settings) -> dict[str, Any]:
    """Return how uvicorn reads requests: with h11, as httptools collects headers without a bound.

    What is not much too large has to get through to our own limits, which say what they are.
    """
    size = 2 * (settings.max_target_bytes + settings.max_header_bytes)
    return {"http": "h11", "h11_max_incomplete_event_size": size}


def _log_config() -> dict[str, Any]:
    """Return uvicorn's logging, with our own beside it: one line for each request, and what goes wrong."""
    from uvicorn.config import LOGGING_CONFIG

    config: dict[str, Any] = copy.deepcopy(LOGGING_CONFIG)
    config["formatters"]["geocentroids"] = {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    config["handlers"]["geocentroids"] = {
        "class": "logging.StreamHandler",
        "formatter": "geocentroids",
        "stream": "ext://sys.stderr",
    }
    config["loggers"]["geocentroids_tiler"] = {"handlers": ["geocentroids"], "level": "INFO", "propagate": False}
    return config


def _label_ahead(service: Service, url: str) -> None:
    """Compute the labels of the sample scene before anyone asks for them, from its middle outwards."""
    from geocentroids_tiler.source import ReadOptions

    codebook = service.codebook(None)
    with suppress(EncoderError, CancelledError):  # the server is shutting down
        engine = service.engine(codebook).result()
        dataset = service.dataset(url, ReadOptions(), codebook).result()
        stride = engine.layout.stride_patches
        chunks = dataset.footprint.chunk_range(stride)
        middle = (chunks.row_start + chunks.row_stop) / 2, (chunks.col_start + chunks.col_stop) / 2
        outwards = sorted(dataset.footprint.chunks(stride), key=lambda chunk: math.dist(chunk, middle))
        for _, labels in engine.ahead(dataset, outwards):
            labels.result()


def _shown(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            lines.append(f"{indent}{key}:")
            lines += [indent + "  " + ", ".join(f"{name} {part}" for name, part in each.items()) for each in item]
        else:
            shown = ", ".join(map(str, item)) if isinstance(item, list | tuple) else item
            lines.append(f"{indent}{key}: {shown}")
    return lines
